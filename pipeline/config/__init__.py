"""The composed Hydra configuration as typed settings, what a model of it costs in memory, and whether the parts fit together."""
