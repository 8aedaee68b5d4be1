"""Fréchet distance between reconstructed images and their originals, for `evaluate.load`."""

from itertools import groupby, islice

import evaluate
import torch

from dualcodebook_hf.metrics.evaluate_inputs import image_pair, image_pair_features
from dualcodebook_hf.metrics.frechet import FrechetDistance, inception_extractor

_DESCRIPTION = """
rFID: the squared Frechet distance between the Inception features of reconstructions and of their originals, with
covariances divided by N - 1, in float64. It needs torchmetrics and torch-fidelity, or a feature extractor of your own:
evaluate.load("metrics/rfid", feature_extractor=f), where f maps images (B, 3, H, W) in [0, 1] to features (B, D).
Say N beside the number: the distance is biased upwards by few images.
"""

_INPUTS = """
Args:
    predictions: reconstructions. PIL images, files or uint8 arrays (H, W, C); or floats (3, H, W) in [0, 1].
    references: the originals, of the same sizes.
    batch_size: images that the extractor gets at a time, 32 by default; only images of one size share a batch.

Returns:
    rfid: the distance, 0 for equal sets. A warning comes with it when there are no more images than features.
"""


class Rfid(evaluate.Metric):
    """See the module's description."""

    def __init__(self, *args, feature_extractor=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.feature_extractor = feature_extractor

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=image_pair_features(),
        )

    def _download_and_prepare(self, dl_manager):
        if self.feature_extractor is None:
            self.feature_extractor = inception_extractor()

    def _compute(self, predictions, references, batch_size=32):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}")
        distance = FrechetDistance(self.feature_extractor)
        pairs = (image_pair(*pair) for pair in zip(predictions, references, strict=True))
        for _, group in groupby(pairs, key=lambda pair: pair[0].shape):
            while batch := list(islice(group, batch_size)):
                distance.update(*map(torch.stack, zip(*batch, strict=True)))
        return distance.compute()
