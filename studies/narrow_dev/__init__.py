"""What a dev set that is a declared slice of its families does: to the tests where nothing is wrong, and to real campaigns on the tiny model."""
