"""Discriminators of adversarial training."""

# What settings may name; they are read without torch.
AUGMENTATIONS = ("none", "color", "translation", "cutout")
NORMS = ("batch", "group")
