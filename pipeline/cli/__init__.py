"""The commands of `python -m pipeline`. Each parses its arguments, calls the packages below, and prints the result and the next command."""
