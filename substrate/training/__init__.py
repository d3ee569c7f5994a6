"""One run of a recipe: steps, learning rates, checkpoints, the choice of the state that becomes the adapter."""
