"""Measures a tokenizer on a split of pictures by one stated protocol, and prints models beside each other."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import DualCodebookCore
from ..files import is_free_folder, public_name
from ..image_datasets import image_source, load_images
from ..image_processing_dualcodebook import (
    center_crop,
    read_image,
    resampling_filter,
    resize_shorter_side,
    to_image,
    to_pixels,
)
from ..metrics.frechet import FeatureExtractor, FrechetDistance, inception_extractor
from ..metrics.images import l1, ms_ssim, psnr, ssim
from ..metrics.tokens import QuantizationError, TokenStatistics, bits_per_pixel
from ..metrics.wasserstein import SlicedWasserstein
from ..perceptual.vgg import LPIPS, SMALLEST_SIDE
from ..perceptual.weights import MissingWeightsError
from ..version import __version__
from .linear_codec import PatchLinearCodec
from .protocols import Protocol, get_protocol

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Reconstructions and originals (B, 3, H, W) in [0, 1] -> (B,).
ImageMetric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
IMAGE_METRICS: dict[str, ImageMetric] = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim, "l1": l1}
DEFINITIONS = {
    "crop": "shorter side resized to `size`, up or down, by PIL's filter `resample`; then the centre, size x size",
    "values": "colours in [0, 1]; reconstructions clamped to it, not rounded to 8 bits, never through JPEG",
    "mean": "one number a picture, then the mean over pictures",
    "psnr": "dB, -10 log10(MSE over channels and pixels), MSE at least 1e-10",
    "ssim": "Gaussian window 11, sigma 1.5, population covariance, data_range 1, windows inside the picture only",
    "ms_ssim": "5 scales, weights .0448 .2856 .3001 .2363 .1333 (fewer scales below 176 pixels), SSIM as above",
    "l1": "mean absolute error",
    "swd": "sliced Wasserstein distance of 7 x 7 patches, mean over the levels of a Laplacian pyramid, x 1000; 64 "
    "positions a picture and level, the same in both sets, the first 4096 pictures; channels normalised by the "
    "originals' mean and deviation (Karras et al. 2018: by each set's own); 4 x 128 directions, seed 0",
    "quantization_error": "E|z - z_q|^2 / Var z, sums over channels of moments over all pictures and positions",
    "bits_per_position": "sum of log2 of the codebooks' sizes",
    "bits_per_pixel": "positions x bits_per_position over the pixels of the crop",
    "codebooks": "usage (share of codes used), perplexity and entropy / log2 size over all tokens of the split",
    "pair_entropy": "bits, of the books' tokens together; a split of P positions cannot show more than log2 P",
}
OPTIONAL_DEFINITIONS = {
    "lpips": "VGG16, version 0.1 (Zhang et al. 2018), on values clamped to [0, 1] and then scaled to [-1, 1]",
    "rfid": "squared Frechet distance of features of reconstructions and originals, unbiased covariances, "
    "of all pictures; features: ",
}
OPTIONAL_COLUMNS = {"swd": ("SWD", 1), "lpips": ("LPIPS", 4), "rfid": ("rFID", 2)}
INCEPTION = "2048 of torch-fidelity's TensorFlow Inception, pictures rounded to 8 bits, resized to 299 x 299 as by it"


def evaluate_model(
    model: DualCodebookCore | PatchLinearCodec,
    dataset: str | Path,
    config: str | None = None,
    split: str = "test",
    *,
    image_column: str = "image",
    streaming: bool = False,
    size: int = 256,
    resample: str = "lanczos",
    limit: int | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    name: str | None = None,
    progress: bool = False,
    lpips: bool | LPIPS = False,
    rfid: bool | FeatureExtractor = False,
    save_pictures: str | Path | None = None,
) -> dict[str, Any]:
    """Measures a tokenizer on the pictures of one split; what `dualcodebook evaluate` writes as JSON.

    Each picture's shorter side is resized to `size`, up or down, by the filter `resample`; then its centre is cropped.

    Args:
        model: either face of the model, or the linear codec; it is moved to `device` (None: it stays where it is).
        dataset, config, split, image_column, streaming: see `load_pictures`.
        limit: measure the first so many pictures only. name: of the model, for the record. progress: show a bar.
        lpips: measure LPIPS too; True: with weights from the Hub. rfid: measure rFID too; True: with Inception's
            features, whose weights torch-fidelity downloads; or any other (B, 3, H, W) in [0, 1] -> (B, D).
        save_pictures: empty folder for the measured pictures, as PNG: original/ and reconstruction/00000.png and so on,
            for other tools. The metrics see the values before they are rounded to these 8 bits.

    Returns {"protocol": what was measured, how and where; "model": what the model is; "metrics": {"psnr", "ssim",
    "ms_ssim", "l1", "swd", "swd_levels", "lpips" and "rfid" where asked for, "quantization_error", "bits_per_position",
    "bits_per_pixel", "pair_entropy", "codebooks": {book: {"size", "usage", "perplexity", "normalized_entropy",
    "quantization_error" (None for the codec's stages)}}}}.
    Raises ValueError for wrong arguments and for networks that are not to be had, before any work, for a split without
    pictures, and for an unreadable picture.
    """
    _check_model(model)
    _check_positive(size=size, batch_size=batch_size, limit=1 if limit is None else limit)
    _check_options(size, resample, bool(lpips), save_pictures)
    rows = load_images(dataset, config, split, image_column, streaming)
    pixels = image_crops(rows, image_column, size, resample, limit)
    if progress:
        pixels = _with_bar(pixels, limit if streaming else min(limit or len(rows), len(rows)))
    if device is not None:
        model.to(device)
    networks = load_metric_networks(lpips, rfid, _placement(model)[0])
    with _eval_mode(model):
        count, metrics = _measure(model, _batches(pixels, batch_size), *networks, _image_saver(save_pictures))
    if not count:
        raise ValueError(f"`split` must hold pictures, got none in {split!r} of {str(dataset)!r}")
    source = {"dataset": public_name(dataset), "config": config, "split": split, "image_column": image_column}
    steps = {"pictures": count, "limit": limit, "size": size, "resample": resample, "batch_size": batch_size}
    where = {"versions": _versions(), "hardware": _hardware(_placement(model)[0])}
    protocol = {**source, **steps, "definitions": _definitions(metrics, rfid), **where}
    return {"protocol": protocol, "model": _describe(model, name), "metrics": metrics}


def evaluate_protocol(
    model: DualCodebookCore | PatchLinearCodec, protocol: str | Protocol, **options: Any
) -> dict[str, Any]:
    """`evaluate_model` by a named protocol, streamed unless `streaming=False`; the JSON's protocol carries its name.

    Raises ValueError for an unknown name, and where an option contradicts the protocol.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    fixed = protocol.options(options)
    result = evaluate_model(model, **{"streaming": True, **options, **fixed})
    result["protocol"] = protocol.record(result["protocol"]["pictures"]) | result["protocol"]
    return result


def load_metric_networks(
    lpips: bool | LPIPS, rfid: bool | FeatureExtractor, device: str | torch.device
) -> tuple[LPIPS | None, FeatureExtractor | None]:
    """The networks that `evaluate_model`'s two options ask for, None where they do not.

    Raises ValueError that says what is missing, when a package or the weights are not to be had.
    """
    if lpips is True:
        try:
            lpips = LPIPS.from_pretrained()
        except MissingWeightsError as error:
            raise ValueError(f"`lpips` cannot be measured: {error}") from error
    if rfid is True:
        try:
            rfid = inception_extractor(device)
        # A missing package, or whatever the download of the weights raises.
        except Exception as error:
            raise ValueError(f"`rfid` cannot be measured: {type(error).__name__}: {error}") from error
    return lpips.to(device) if lpips else None, rfid or None


def fit_patch_linear(
    dataset: str | Path,
    config: str | None = None,
    split: str = "train",
    *,
    image_column: str = "image",
    streaming: bool = False,
    size: int = 256,
    resample: str = "lanczos",
    images: int = 400,
    sizes: Sequence[int] = (512, 512),
    components: int = 48,
    seed: int = 0,
) -> PatchLinearCodec:
    """Fits the linear codec to `pictures` pictures drawn from a split, resized and cropped as in `evaluate_model`.

    Takes well under a minute on two cores. Raises ValueError for wrong arguments, before any work.
    """
    _check_positive(size=size, images=images)
    resampling_filter(resample)
    codec = PatchLinearCodec(sizes, components)
    rows = load_images(dataset, config, split, image_column, streaming).shuffle(seed=seed)
    return codec.fit(image_crops(rows, image_column, size, resample, images), seed=seed)


def evaluate_patch_linear(
    train_dataset: str | Path,
    dataset: str | Path,
    config: str | None = None,
    split: str = "test",
    *,
    train_config: str | None = None,
    train_split: str = "train",
    train_images: int = 400,
    sizes: Sequence[int] = (512, 512),
    components: int = 48,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """The rival's row: fits the linear codec to `train_dataset` and measures it as `evaluate_model` would.

    `sizes` should be the model's, so that both spend the same bits; `options` are those of `evaluate_model`, and
    what they say of columns, streaming and crops holds for both data sets.
    """
    shared = {key: options[key] for key in ("image_column", "streaming", "size", "resample") if key in options}
    fitting = {"pictures": train_images, "sizes": sizes, "components": components, "seed": seed}
    codec = fit_patch_linear(train_dataset, train_config, train_split, **fitting, **shared)
    result = evaluate_model(codec, dataset, config, split, **{"name": "patch-linear codec", **options})
    fitted = {"dataset": public_name(train_dataset), "config": train_config, "split": train_split}
    result["model"]["fitted_to"] = {**fitted, **fitting, "sizes": list(sizes)}
    return result


def format_table(results: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """(name, result of `evaluate_model`) pairs -> a Markdown table, a line each, aligned for the terminal as well."""
    results = list(results)
    # Columns of what was measured anywhere; where it was not, the cell says so.
    optional = [key for key in OPTIONAL_COLUMNS if any(result["metrics"].get(key) is not None for _, result in results)]
    header = ["model", "data", "N", "bits/position", "bits/pixel", "PSNR", "SSIM", "MS-SSIM", "L1"]
    header += [OPTIONAL_COLUMNS[key][0] for key in optional]
    header += ["quant. error", "codes used", "perplexity", "norm. entropy", "pair entropy"]
    rows = [header, *(_table_row(name, result, optional) for name, result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _table_row(name: str, result: dict[str, Any], optional: Sequence[str]) -> list[str]:
    protocol, metrics = result["protocol"], result["metrics"]
    codebooks = metrics["codebooks"].values()
    return [
        name,
        f"{protocol['dataset']} {protocol['split']}",
        str(protocol["pictures"]),
        f"{metrics['bits_per_position']:g}",
        f"{metrics['bits_per_pixel']:.4f}",
        f"{metrics['psnr']:.2f}",
        f"{metrics['ssim']:.4f}",
        f"{metrics['ms_ssim']:.4f}",
        f"{metrics['l1']:.4f}",
        *(_optional_cell(metrics.get(key), OPTIONAL_COLUMNS[key][1]) for key in optional),
        f"{metrics['quantization_error']:.4f}",
        " / ".join(f"{codebook['usage']:.1%}" for codebook in codebooks),
        " / ".join(f"{codebook['perplexity']:.0f}" for codebook in codebooks),
        " / ".join(f"{codebook['normalized_entropy']:.3f}" for codebook in codebooks),
        f"{metrics['pair_entropy']:.2f}",
    ]


def _optional_cell(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def _measure(
    model: DualCodebookCore | PatchLinearCodec,
    batches: Iterable[torch.Tensor],
    lpips: LPIPS | None,
    features: FeatureExtractor | None,
    save: Callable[..., None] | None,
) -> tuple[int, dict[str, Any]]:
    """Batches (B, 3, H, W) in [-1, 1] -> number of pictures, metrics."""
    sizes, dims, bits = _codebooks(model)
    statistics, error, swd = TokenStatistics(sizes), QuantizationError(dims), SlicedWasserstein()
    frechet = FrechetDistance(features) if features else None
    image_metrics = IMAGE_METRICS | ({"lpips": _in_unit_range(lpips)} if lpips else {})
    values: dict[str, list[torch.Tensor]] = {key: [] for key in image_metrics}
    device, dtype = _placement(model)
    forward = model.autoencode
    for batch in batches:
        batch = batch.to(device)
        out = forward(batch.to(dtype))
        original, reconstruction = (batch + 1) / 2, (out.sample.float() + 1) / 2
        for key, metric in image_metrics.items():
            values[key].append(metric(reconstruction, original).cpu())
        for sets in filter(None, (swd, frechet)):
            sets.update(reconstruction, original)
        statistics.update(out.tokens)
        error.update(out.latents, out.quantized)
        if save:
            save(original=batch, reconstruction=out.sample)
    count = sum(map(len, values["psnr"]))
    if not count:
        return 0, {}
    errors = error.compute()
    metrics: dict[str, Any] = {key: torch.cat(value).double().mean().item() for key, value in values.items()}
    metrics |= swd.compute() | ({"rfid": frechet.compute()} if frechet else {})
    metrics["quantization_error"] = errors["all"]
    metrics["bits_per_position"] = bits
    metrics["bits_per_pixel"] = bits_per_pixel(statistics.positions // count, bits, *batch.shape[-2:])
    metrics["pair_entropy"] = statistics.pair_entropy
    metrics["codebooks"] = {
        key: {**codebook, "quantization_error": errors.get(key)} for key, codebook in statistics.codebooks().items()
    }
    return count, metrics


def _codebooks(model: DualCodebookCore | PatchLinearCodec) -> tuple[dict[str, int], dict[str, int], float]:
    """Sizes of the books, widths of the slices whose error is measured, bits a position."""
    if isinstance(model, PatchLinearCodec):  # its books do not divide the channels: only the whole has an error
        return model.codebook_sizes, {"components": model.components}, model.bits_per_position
    sizes = {key: codebook.size for key, codebook in model.quantize.codebooks.items()}
    return sizes, model.quantize.slices, model.quantize.bits_per_position


def _image_saver(folder: str | Path | None) -> Callable[..., None] | None:
    """Saves batches (B, 3, H, W) in [-1, 1], named by keywords, as PNG: folder/keyword/00000.png, counting on."""
    if folder is None:
        return None
    counts: Counter[str] = Counter()

    def save(**batches: torch.Tensor) -> None:
        for name, batch in batches.items():
            (Path(folder) / name).mkdir(parents=True, exist_ok=True)
            for pixels in batch.float().cpu():
                to_image(pixels).save(Path(folder) / name / f"{counts[name]:05}.png")
                counts[name] += 1

    return save


def _in_unit_range(lpips: LPIPS) -> ImageMetric:
    """LPIPS of pictures in [0, 1], clamped: the network takes [-1, 1]."""
    return lambda reconstruction, original: lpips(reconstruction.clamp(0, 1) * 2 - 1, original * 2 - 1)


def _placement(model: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    if isinstance(model, PatchLinearCodec):
        return model.mean.device, model.mean.dtype
    return model.device, model.dtype


def _describe(model: DualCodebookCore | PatchLinearCodec, name: str | None) -> dict[str, Any]:
    sizes, _, bits = _codebooks(model)
    weights = model.buffers() if isinstance(model, PatchLinearCodec) else model.parameters()
    return {
        "name": name,
        "class": type(model).__name__,
        "parameters": sum(weight.numel() for weight in weights),
        "dtype": str(_placement(model)[1]).removeprefix("torch."),
        "downsample_factor": model.downsample_factor,
        "codebook_sizes": sizes,
        "bits_per_position": bits,
    }


def _check_model(model: object) -> None:
    if not isinstance(model, (DualCodebookCore, PatchLinearCodec)):
        raise ValueError(f"`model` must be a dual codebook model or a PatchLinearCodec, got {type(model).__name__}")


def _definitions(metrics: dict[str, Any], rfid: bool | FeatureExtractor) -> dict[str, str]:
    """Of what was measured."""
    definitions = DEFINITIONS | {key: text for key, text in OPTIONAL_DEFINITIONS.items() if key in metrics}
    if rfid:
        definitions["rfid"] += INCEPTION if rfid is True else getattr(rfid, "__name__", type(rfid).__name__)
    return definitions


def _check_options(size: int, resample: str, lpips: bool, save_pictures: str | Path | None) -> None:
    resampling_filter(resample)
    if lpips and size < SMALLEST_SIDE:
        raise ValueError(f"`size` must be at least {SMALLEST_SIDE} for `lpips`, got {size}")
    if save_pictures is not None and not is_free_folder(Path(save_pictures)):
        raise ValueError(f"`save_pictures` must be an empty folder or none yet, got '{save_pictures}'")


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")


def image_crops(
    rows: Dataset | IterableDataset, image_column: str, size: int, resample: str, limit: int | None
) -> Iterator[torch.Tensor]:
    """The first `limit` rows of `load_pictures` -> (3, size, size) in [-1, 1], one after the other."""
    for index, row in enumerate(islice(rows, limit)):
        try:
            image = read_image(image_source(row[image_column]))
        except ValueError as error:
            raise ValueError(f"picture {index} of the data set: {error}") from error
        yield to_pixels(center_crop(resize_shorter_side(image, size, resample), size))


def _with_bar(pixels: Iterator[torch.Tensor], total: int | None) -> Iterator[torch.Tensor]:
    from tqdm import tqdm

    return iter(tqdm(pixels, total=total, desc="pictures", unit=""))


def _batches(pixels: Iterable[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
    pixels = iter(pixels)
    while batch := list(islice(pixels, batch_size)):
        yield torch.stack(batch)


def _versions() -> dict[str, str]:
    libraries = ("torch", "diffusers", "transformers", "datasets", "pillow")
    return {"dualcodebook_hf": __version__, "python": platform.python_version()} | {
        library: version(library) for library in libraries
    }


def _hardware(device: torch.device) -> dict[str, Any]:
    hardware = {"device": device.type, "machine": platform.machine(), "cpu_cores": os.cpu_count()}
    hardware["torch_threads"] = torch.get_num_threads()
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return hardware
