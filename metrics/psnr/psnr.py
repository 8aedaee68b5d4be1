"""Peak signal-to-noise ratio of reconstructed images, for `evaluate.load`."""

import evaluate

from dualcodebook_hf.metrics.evaluate_inputs import image_pair, image_pair_features
from dualcodebook_hf.metrics.images import psnr

_DESCRIPTION = """
PSNR in dB by the protocol of dualcodebook_hf: values clamped to [0, 1] and not rounded, one number per image, then the
mean over images; the MSE of an image is at least 1e-10, so equal images have 100 dB.
"""

_INPUTS = """
Args:
    predictions: reconstructions. PIL images, files or uint8 arrays (H, W, C); or floats (C, H, W) in [0, 1].
    references: the originals, of the same sizes.

Returns:
    psnr: dB, mean over images.
"""


class Psnr(evaluate.Metric):
    """See the module's description."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=image_pair_features(),
        )

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("`predictions` must hold images, got none")
        pairs = (image_pair(*pair) for pair in zip(predictions, references, strict=True))
        values = [psnr(prediction[None], reference[None]).item() for prediction, reference in pairs]
        return {"psnr": sum(values) / len(values)}
