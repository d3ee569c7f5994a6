"""One training run: the loop, learning rates, checkpoints, and the choice of the state that becomes the adapter."""
