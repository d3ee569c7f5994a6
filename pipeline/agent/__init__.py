"""Agents' arms: the relay between a loop in its sandbox and the model, and a scripted model that plays written scenarios."""
