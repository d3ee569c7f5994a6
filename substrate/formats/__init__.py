"""Files for and from others: the competition's archive, models for transformers, published tokenizers."""
