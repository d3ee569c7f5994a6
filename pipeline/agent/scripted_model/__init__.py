"""A scripted model: a server on this machine that plays written scenarios in place of a language model."""
