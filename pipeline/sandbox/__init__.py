"""The substrate image (built, verified, mounted, forked) and the sandbox in which a process of it runs confined."""
