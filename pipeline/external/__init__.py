"""Outsiders that a campaign asks and does not trust: leaderboards that score adapters, and models or optimizers that propose settings."""
