"""Decoding with a trained adapter, and how far two engines agree."""
