"""Compose the Hydra configuration into typed settings, compute the memory that they need, and check that the parts fit together."""
