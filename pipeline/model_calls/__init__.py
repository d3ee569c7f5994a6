"""Calls of language models: the endpoint, what a call may cost, what of it is kept, and how it is played again without a model."""
