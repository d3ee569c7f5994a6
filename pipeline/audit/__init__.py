"""An outsider's check of a campaign from its files. It needs only the standard library and `cryptography`."""
