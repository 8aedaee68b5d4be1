"""Training: arguments, data, losses, the adversary, checkpoints and the trainer. Needs the extra `train`."""
