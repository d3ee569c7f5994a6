"""Exact statistics: the same bytes in give the same numbers out on any machine. No numpy, no floats that decide, no random numbers."""
