"""An outsider's check of a campaign from its files, with the standard library and `cryptography` alone."""
