"""From puzzles to batches: training rows, micro-batches, the tokenizer, the competition's file, overlaps of prompts."""
