"""The commands of `python -m pipeline`: parse arguments, call one package below, print the result and the next command."""
