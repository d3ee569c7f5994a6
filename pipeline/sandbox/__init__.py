"""Build, verify, mount and fork the substrate image, and run processes of it confined."""
