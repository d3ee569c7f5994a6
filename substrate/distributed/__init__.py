"""The ranks of a run: how they start, find one another and sum over one another."""
