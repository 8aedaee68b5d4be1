"""Measures a tokenizer on images: one loop, for a split of a data set and for validation in training."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..files import is_free_folder
from ..image_processing_dualcodebook import to_image
from ..metrics import ImageMetric, image_metrics
from ..metrics.tokens import QuantizationError, TokenStatistics, bits_per_pixel
from ..tokenizer import Autoencoded, Tokenizer, check_tokenizer
from ..version import __version__
from ..weights import weights_hash
from .data import CROP, EvaluationImages

DEFINITIONS = {
    "crop": CROP,
    "values": "colours in [0, 1]; reconstructions clamped to it, not rounded to 8 bits, never through JPEG",
    "mean": "one number per image, then the mean over images",
}
TOKEN_DEFINITIONS = {
    "quantization_error": "E|z - z_q|^2 / Var z, sums over channels of moments over all images and positions",
    "bits_per_position": "sum of log2 of the codebooks' sizes",
    "bits_per_pixel": "positions x bits_per_position over the pixels of the crop",
    "codebooks": "usage (share of codes used), perplexity and entropy / log2 size over all tokens of the split",
    "pair_entropy": "bits, of the codebooks' tokens together; a split of P positions cannot show more than log2 P",
}


class Evaluator:
    """What a tokenizer makes of images, measured batch by batch.

    Args:
        tokenizer: in eval mode, on the device that it shall run on.
        metrics: of reconstructions; tokens and latents are measured always. None: those that need no network.

    Raises ValueError when `tokenizer` is none.
    """

    def __init__(self, tokenizer: Tokenizer, metrics: Sequence[ImageMetric] | None = None) -> None:
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.metrics = image_metrics() if metrics is None else list(metrics)
        self.tokens = TokenStatistics(tokenizer.codebook_sizes)
        self.error = QuantizationError(tokenizer.latent_slices)
        self.count = 0
        self._size: tuple[int, int] = (0, 0)

    @torch.no_grad()
    def update(self, images: torch.Tensor) -> Autoencoded:
        """Adds images (B, 3, H, W) float32 in [-1, 1], all of one size, and returns what the tokenizer made of them."""
        images = images.to(self.tokenizer.device)
        output = self.tokenizer.autoencode(images.to(self.tokenizer.dtype))
        original, reconstruction = (images + 1) / 2, (output.sample.float() + 1) / 2
        for metric in self.metrics:
            metric.update(reconstruction, original)
        self.tokens.update(output.tokens)
        self.error.update(output.latents, output.quantized)
        self.count += len(images)
        self._size = tuple(images.shape[-2:])
        return output

    def compute(self) -> dict[str, Any]:
        """Every metric by its name, JSON-ready. Raises ValueError before the first update."""
        if not self.count:
            raise ValueError("there is nothing to compute: no image was measured")
        bits, errors = self.tokenizer.bits_per_position, self.error.compute()
        values = {name: value for metric in self.metrics for name, value in metric.compute().items()}
        return values | {
            "quantization_error": errors["all"],
            "bits_per_position": bits,
            "bits_per_pixel": bits_per_pixel(self.tokens.positions // self.count, bits, *self._size),
            "pair_entropy": self.tokens.pair_entropy,
            "codebooks": {
                name: {**health, "quantization_error": errors.get(name)}
                for name, health in self.tokens.codebooks().items()
            },
        }


def evaluate(
    tokenizer: Tokenizer,
    images: EvaluationImages,
    metrics: Sequence[ImageMetric] | None = None,
    *,
    batch_size: int = 8,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
    save_images: str | Path | None = None,
) -> dict[str, Any]:
    """Measures a tokenizer on a split; what `dualcodebook evaluate` writes as JSON.

    Args:
        tokenizer: either face of the model, or the linear codec; put into eval mode meanwhile.
        images: what `EvaluationData.open` gives.
        metrics: fresh ones, see `image_metrics`; None: those that need no network.
        batch_size: images at a time.
        name: of the tokenizer, for the record.
        about: what else the record says of the tokenizer, such as what it was fitted to.
        progress: show a bar.
        save_images: new or empty folder for the measured images, as PNG: original/ and reconstruction/00000.png and so
            on, for other tools. The metrics see the values before they are rounded to these 8 bits.

    Returns {"protocol": what was measured, how and where; "model": what the tokenizer is; "metrics": see
    `Evaluator.compute`}. Images that were left out (see `EvaluationData.on_bad_image`) are listed in the protocol as
    "skipped"; "pictures" counts the others. Raises ValueError for wrong arguments, before any work, for a split without
    images, and BadImageError for an image that cannot be read.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}")
    if save_images is not None and not is_free_folder(save_images):
        raise ValueError(f"`save_images` must be a new or empty folder, got '{save_images}'")
    evaluator = Evaluator(tokenizer, metrics)
    save = _image_saver(save_images)
    with _eval_mode(tokenizer):
        for batch in _with_bar(images, batch_size) if progress else images.batches(batch_size):
            output = evaluator.update(batch)
            save(original=batch, reconstruction=output.sample)
    if not evaluator.count and images.skipped:
        raise images.skipped[-1]
    if not evaluator.count:
        raise ValueError(f"`split` must hold images, got none in {images.data.split!r} of {images.data.dataset!r}")
    definitions = DEFINITIONS | {metric.name: metric.definition for metric in evaluator.metrics} | TOKEN_DEFINITIONS
    protocol = images.data.record(evaluator.count) | {"batch_size": batch_size, "definitions": definitions}
    if images.data.on_bad_image == "skip":
        protocol["skipped"] = images.skipped_record()
    protocol |= {"versions": library_versions(), "hardware": hardware(tokenizer.device)}
    return {
        "protocol": protocol,
        "model": _describe(tokenizer, name) | dict(about or {}),
        "metrics": evaluator.compute(),
    }


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _with_bar(images: EvaluationImages, batch_size: int) -> Iterator[torch.Tensor]:
    from tqdm import tqdm

    with tqdm(total=images.count, desc="images", unit="") as bar:
        for batch in images.batches(batch_size):
            yield batch
            bar.update(len(batch))


def _image_saver(folder: str | Path | None) -> Callable[..., None]:
    """Saves batches (B, 3, H, W) in [-1, 1], named by keywords, as PNG: folder/keyword/00000.png, counting on."""
    counts: dict[str, int] = {}

    def save(**batches: torch.Tensor) -> None:
        for name, batch in batches.items() if folder is not None else ():
            (Path(folder) / name).mkdir(parents=True, exist_ok=True)
            for pixels in batch.float().cpu():
                number = counts.setdefault(name, 0)
                to_image(pixels).save(Path(folder) / name / f"{number:05}.png")
                counts[name] += 1

    return save


def _describe(tokenizer: Tokenizer, name: str | None) -> dict[str, Any]:
    return {
        "name": name,
        "class": type(tokenizer).__name__,
        "parameters": tokenizer.num_parameters(),
        "dtype": str(tokenizer.dtype).removeprefix("torch."),
        "downsample_factor": tokenizer.downsample_factor,
        "codebook_sizes": tokenizer.codebook_sizes,
        "bits_per_position": tokenizer.bits_per_position,
        **_weights(tokenizer),
    }


def _weights(tokenizer: Tokenizer) -> dict[str, str]:
    """The hash of a network that is wholly in float32: rounded values are no longer those of its file."""
    network = getattr(tokenizer, "_orig_mod", tokenizer)  # without torch.compile's wrapper
    if not isinstance(network, torch.nn.Module):
        return {}
    types = {values.dtype for values in network.state_dict().values() if values.is_floating_point()}
    return {"weights_sha256": weights_hash(network)} if types == {torch.float32} else {}


def library_versions() -> dict[str, str]:
    """Of this package, Python and what computes, for the record of a measurement."""
    libraries = ("torch", "diffusers", "transformers", "datasets", "pillow")
    return {"dualcodebook_hf": __version__, "python": platform.python_version()} | {
        library: version(library) for library in libraries
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Where something was measured, for its record."""
    found = {"device": device.type, "machine": platform.machine(), "cpu_cores": os.cpu_count()}
    found["torch_threads"] = torch.get_num_threads()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
