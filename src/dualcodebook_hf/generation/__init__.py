"""A generator on the tokenizer's tokens: a masked transformer, its schedulers, its pipeline and its training."""
