"""Perceptual distances by frozen networks, below metrics and training."""

# What settings and tables read without torch.
FORMS = ("stages", "stages-logits", "dists", "stages-gram")  # of EfficientNetDistance
SMALLEST_VIEW = 16  # of EfficientNetDistance and FeatureMatching: a pixel is left by the largest shift
LPIPS_SMALLEST_SIDE = 16  # four poolings lie before VGG16's last slice
