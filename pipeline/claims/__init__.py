"""What may be said of a recipe from its runs: whether it is better than the reference, shown to be worse, or neither."""
