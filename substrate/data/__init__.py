"""From puzzles to batches: the competition's rows, the scorer, the tokenizer, training rows."""
