"""Discriminators of adversarial training."""
