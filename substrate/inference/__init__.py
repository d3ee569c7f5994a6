"""Decoding with the native engine, and the comparison of two engines."""
