"""Files of others: the competition's archive, models for transformers, published tokenizers."""
