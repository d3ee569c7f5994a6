"""The ranks of a run: how they start, join process groups and sum over one another."""
