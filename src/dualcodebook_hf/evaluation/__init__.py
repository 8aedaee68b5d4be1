"""Measuring a tokenizer: metrics, the linear codec that it must beat, the protocol, and images to look at."""
