"""Perceptual distances by frozen networks, below metrics and training."""
