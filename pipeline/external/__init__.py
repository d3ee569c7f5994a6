"""Whom a campaign asks and does not believe: leaderboards that score adapters, and models or optimisers that propose settings."""
