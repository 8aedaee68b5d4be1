"""The paper's figures 3, 4 and 5 and the rate-quality figure, one command each:

    python benchmarks/figures.py codebook --dataset DATA --output docs/figures/codebook.jpg
    python benchmarks/figures.py compare  --dataset DATA --model patch-linear --model M --output OUT.jpg
    python benchmarks/figures.py extremes --dataset DATA --output docs/figures/extremes.jpg
    python benchmarks/figures.py rate     --dataset DATA --output docs/figures/rate.jpg --json docs/figures/rate.json

A model is a folder, a Hub id, `embedded` (`sharp`), `faithful` or `patch-linear` (the linear codec, fitted to DATA's
train split at the first model's sizes). Images are those of `dualcodebook evaluate`: shorter side to 256, centre crop.
PNG or JPEG by suffix.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from paper_figures import (
    Tile,
    code_patches,
    codebook_figure,
    difference_window,
    extremes_figure,
    models_figure,
    rate_figure,
    tiles_figure,
)
from PIL import Image

from dualcodebook_hf.cli.inputs import check_folder, positive
from dualcodebook_hf.evaluation.codecs import Codec, available_codecs, coded_at, coded_within
from dualcodebook_hf.evaluation.data import EvaluationData, EvaluationImages
from dualcodebook_hf.evaluation.linear_codec import PatchLinearCodec
from dualcodebook_hf.files import atomic_file, public_name, read_json, write_json
from dualcodebook_hf.image_processing_dualcodebook import to_image, to_pixels
from dualcodebook_hf.loading import EMBEDDED, check_device, load_tokenizer, tokenizer_label
from dualcodebook_hf.metrics import load_metric_network
from dualcodebook_hf.metrics.efficientnet import EfficientNetFeatures
from dualcodebook_hf.metrics.images import image_quality
from dualcodebook_hf.metrics.kernel import kernel_distance
from dualcodebook_hf.metrics.tokens import TokenStatistics
from dualcodebook_hf.reconstruction import Reconstruction, reconstruct_image
from dualcodebook_hf.tokenizer import Tokenizer

LARGEST_JPEG = 200_000
FITTED_IMAGES = 400  # of the train split, for the linear codec
PERCEPTUAL, FEATURE_BATCH = "kd_effnetlite2", 8
# Qualities of the curves on each codec's own scale, from the lowest on.
CURVES = {
    "JPEG": (1, 5, 10, 20, 30, 50, 70),
    "WebP": (0, 5, 15, 30, 50, 70, 80),
    "AVIF": (0, 15, 30, 45, 60),
    "AVIF at half size": (0, 10, 20, 35, 50),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draws one figure; 2 and one line for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=sorted(FIGURES))
    parser.add_argument("--model", action="append", metavar="M", help="may be repeated (default: embedded)")
    parser.add_argument("--dataset", required=True, metavar="DATA")
    parser.add_argument("--config")
    parser.add_argument("--split", default="test")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--limit", type=positive, help="the first N images only")
    parser.add_argument("--size", type=positive, default=256, help="side of the crops (default: %(default)s)")
    parser.add_argument("--rows", type=positive, default=4, help="images shown (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the images of `compare` (default: %(default)s)")
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, required=True, metavar="FIGURE.png|jpg")
    parser.add_argument("--json", type=Path, help="write the numbers of `rate` there")
    parser.add_argument("--codec-cache", type=Path, help="keep the codecs' numbers there: they depend on no model")
    arguments = parser.parse_args(argv)
    try:
        if arguments.output.suffix not in (".png", ".jpg"):
            raise ValueError(f"`--output` must be a file named *.png or *.jpg, got '{arguments.output}'")
        if arguments.figure != "rate" and (arguments.json or arguments.codec_cache):
            raise ValueError(f"`--json` and `--codec-cache` are of the figure rate, got {arguments.figure}")
        for path in filter(None, (arguments.output, arguments.json, arguments.codec_cache)):
            check_folder(path.parent, "--output")
        figure = FIGURES[arguments.figure](arguments)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    save(figure, arguments.output)
    print(f"{figure.width} x {figure.height} pixels written to {arguments.output}")
    return 0


def codebook(arguments: argparse.Namespace) -> Image.Image:
    """Figure 3: the codes of each codebook, and how often a split uses them."""
    (name, model), *_ = load_models(arguments)
    statistics = TokenStatistics(model.codebook_sizes)
    for crops in data(arguments).batches(8):
        statistics.update(model.tokenize(crops.to(model.device)))
    codebooks = {key: (code_patches(model, key), counts) for key, counts in statistics.histograms.items()}
    side, positions = model.downsample_factor, f"{statistics.positions:,} positions"
    return codebook_figure(
        codebooks, f"Codebooks of {name}, patches of {side} x {side}; {source(arguments)}, {positions}"
    )


def compare(arguments: argparse.Namespace) -> Image.Image:
    """Figure 4: several models on images drawn at random, the region where they differ the most boxed."""
    models = load_models(arguments)
    images = images_of(arguments)
    chosen = random.Random(arguments.seed).sample(range(len(images)), min(arguments.rows, len(images)))
    rows = []
    for index in chosen:
        original = images[index]
        found = [reconstruct_image(model, original) for _, model in models]
        box = difference_window(to_pixels(original), [to_pixels(one.image) for one in found])
        rows.append([Tile(original, f"image {index}", box=box), *(Tile(*shown(one), box) for one in found)])
    names = ["original", *(f"{name}, {model.bits_per_position:g} bits per position" for name, model in models)]
    title = f"{source(arguments)}: {len(rows)} images drawn at random; boxed: where the models differ the most"
    return models_figure(rows, names, title)


def extremes(arguments: argparse.Namespace) -> Image.Image:
    """Figure 5: the images of a split that a model reconstructs best and worst, by PSNR."""
    (name, model), *_ = load_models(arguments)
    found = [reconstruct_image(model, image) for image in images_of(arguments)]
    order = sorted(range(len(found)), key=lambda index: found[index].psnr, reverse=True)
    count = min(arguments.rows + 2, len(order) // 2)
    if not count:
        raise ValueError(f"`--split` must hold two images or more, got {len(order)}")
    halves = []
    for chosen in (order[:count], order[-count:][::-1]):
        originals = [Tile(found[index].original, note=f"image {index}") for index in chosen]
        halves.append([originals, [Tile(*shown(found[index])) for index in chosen]])
    mean = statistics.fmean(one.psnr for one in found)
    title = f"{name}, {found[0].bits_per_pixel:.4f} bits per pixel; {source(arguments)}, N = {len(found)}"
    return extremes_figure(*halves, f"{title}, mean {mean:.2f} dB")


def rate_quality(arguments: argparse.Namespace) -> Image.Image:
    """Tokenizers against JPEG, WebP and AVIF: curves over a split, and images at the first model's bytes."""
    device = check_device(arguments.device)
    network = load_metric_network(PERCEPTUAL, arguments.size, device)
    models, images = load_models(arguments), images_of(arguments)
    perceptual = PerceptualDistance(network, images, device)
    found = {name: [reconstruct_image(model, image) for image in images] for name, model in models}
    first, ours = next(iter(found.items()))
    curves, equal, distances = codec_numbers(arguments, images, ours[0].num_bytes, perceptual)
    points = {name: [tokenizer_point(members, perceptual)] for name, members in found.items()} | curves
    summary = {name: {**equal_summary(members, ours), PERCEPTUAL: distances[name]} for name, members in equal.items()}
    record = {"data": source(arguments), "pictures": len(images), "size": arguments.size, "points": points}
    record["equal_bytes"] = {"model": first, "bytes": ours[0].num_bytes, "codecs": summary}
    if arguments.json:
        write_json(arguments.json, record)
    strip = rate_strip(arguments.rows, first, ours, equal)
    title = f"Rate and quality, {source(arguments)}, N = {len(images)}, {arguments.size} x {arguments.size} pixels"
    return rate_figure(points, title, rate_notes(record), strip)


def codec_numbers(
    arguments: argparse.Namespace, images: Sequence[Image.Image], budget: int, perceptual: PerceptualDistance
) -> tuple[dict[str, list], dict[str, list], dict[str, float]]:
    """(curves, each image at the tokens' bytes, kernel distance of these images) of every codec.

    Taken from --codec-cache where it holds just these: no model has a part in them, and AVIF is slow.
    """
    key = {"data": source(arguments), "pictures": len(images), "size": arguments.size, "bytes": budget}
    key |= {"config": arguments.config, "image_column": arguments.image_column, "qualities": repr(CURVES)}
    key |= {"pillow": Image.__version__, "codecs": {name: repr(codec) for name, codec in available_codecs().items()}}
    key |= {PERCEPTUAL: perceptual.network.description}
    cache = arguments.codec_cache
    if cache and (kept := read_json(cache) or {}).get("key") == key:
        return kept["curves"], kept["equal"], kept["distances"]
    curves, equal, distances = {}, {}, {}
    for name, codec in available_codecs().items():
        print(f"{name} ...", flush=True)
        curves[name] = [codec_point(codec, images, quality, perceptual) for quality in CURVES[name]]
        equal[name], distances[name] = equal_bytes(codec, images, budget, perceptual)
    if cache:
        write_json(cache, {"key": key, "curves": curves, "equal": equal, "distances": distances})
    return curves, equal, distances


class PerceptualDistance:
    """`kd_effnetlite2` of images to the originals of a split, whose features are computed once.

    Args:
        network: of `load_metric_network`.
        originals: two or more of one size; ValueError for fewer.
        device: of the network.
    """

    def __init__(self, network: EfficientNetFeatures, originals: Sequence[Image.Image], device: str = "cpu") -> None:
        if len(originals) < 2:
            raise ValueError(f"`--split` must hold two images or more, got {len(originals)}")
        self.network, self.device = network, device
        self._originals = self._features(originals)

    def __call__(self, images: Sequence[Image.Image]) -> float:
        """x 1000, of one image for each original, in their order."""
        return 1000 * kernel_distance(self._features(images), self._originals)[0]

    def _features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        batches = (images[start : start + FEATURE_BATCH] for start in range(0, len(images), FEATURE_BATCH))
        pixels = ((torch.stack([to_pixels(image) for image in batch]) + 1) / 2 for batch in batches)
        return torch.cat([self.network(batch.to(self.device)).cpu() for batch in pixels])


def tokenizer_point(found: Sequence[Reconstruction], perceptual: PerceptualDistance) -> dict[str, float]:
    """Quality of a tokenizer at its fixed rate."""
    quality = means([{"psnr": one.psnr, "ssim": one.ssim} for one in found])
    distance = perceptual([one.image for one in found])
    return {"bits_per_pixel": found[0].bits_per_pixel, **quality, PERCEPTUAL: distance}


def codec_point(
    codec: Codec, images: Sequence[Image.Image], quality: int, perceptual: PerceptualDistance
) -> dict[str, float]:
    """Mean rate and quality of a codec at one of its qualities."""
    coded = [(coded_at(codec, image, quality), image) for image in images]
    total = sum(one.count * 8 / (image.width * image.height) for one, image in coded)
    found = [measured(one.image, image) for one, image in coded]
    distance = perceptual([one.image for one, _ in coded])
    return {"quality": quality, "bits_per_pixel": total / len(coded), **means(found), PERCEPTUAL: distance}


def equal_bytes(
    codec: Codec, images: Sequence[Image.Image], budget: int, perceptual: PerceptualDistance
) -> tuple[list[dict[str, Any]], float]:
    """Each image at the tokens' bytes, or the codec's smallest; and the kernel distance of them all."""
    coded = [coded_within(codec, image, budget) for image in images]
    found = [
        {"bytes": one.count, "smallest": one.smallest, **measured(one.image, image)}
        for one, image in zip(coded, images, strict=True)
    ]
    return found, perceptual([one.image for one in coded])


def equal_summary(found: Sequence[dict[str, Any]], ours: Sequence[Reconstruction]) -> dict[str, float]:
    """Means over images, how many a codec can hold to the bytes, and on how many the tokenizer is better."""
    count = len(found)
    shares = {
        f"tokenizer_better_{key}": sum(getattr(mine, key) > its[key] for mine, its in zip(ours, found, strict=True))
        / count
        for key in ("psnr", "ssim")
    }
    within = sum(not one["smallest"] for one in found) / count
    return {"bytes": sum(one["bytes"] for one in found) / count, "within_bytes": within, **means(found), **shares}


def rate_notes(record: dict[str, Any]) -> list[str]:
    """The equal-bytes comparison in words."""
    equal = record["equal_bytes"]
    mine = record["points"][equal["model"]][0]
    lines = [
        f"At {equal['bytes']} bytes per image, {equal['model']}: {in_words(mine)}. "
        "Each codec at its best quality within those bytes, or else its smallest file:"
    ]
    for name, found in equal["codecs"].items():
        lines.append(
            f"  {name}: {found['bytes']:.0f} bytes on average ({found['within_bytes']:.0%} of the images fit), "
            f"{in_words(found)}; the tokenizer is better on "
            f"{found['tokenizer_better_psnr']:.0%} of the images by PSNR and {found['tokenizer_better_ssim']:.0%} by "
            "SSIM"
        )
    lines.append(
        "KD lite2: kernel distance x 1000 between EfficientNet-Lite2's features of all reconstructions and of all "
        "originals, lower is better"
    )
    lines.append(
        "Images from the tokenizer's largest gain over the best codec within the bytes (top) to its largest loss "
        "(bottom); in colour: more bytes than the tokens"
    )
    return lines


def in_words(found: dict[str, float]) -> str:
    """PSNR, SSIM and kernel distance."""
    return f"{found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}, KD lite2 {found[PERCEPTUAL]:.1f}"


def rate_strip(
    rows: int, name: str, ours: Sequence[Reconstruction], equal: dict[str, list[dict[str, Any]]]
) -> Image.Image:
    """Images from the tokenizer's largest gain over the best codec that fits the bytes down to its largest loss.

    Args:
        rows: images shown, at most.
        name: of the tokenizer.
        ours: every image through it.
        equal: codec -> what `equal_bytes` says of every image.
    """
    fitting = [
        [found[index]["psnr"] for found in equal.values() if not found[index]["smallest"]] for index in range(len(ours))
    ]
    gains = {index: ours[index].psnr - max(values) for index, values in enumerate(fitting) if values}
    order = sorted(gains or range(len(ours)), key=lambda index: gains.get(index, 0), reverse=True)
    count = min(rows, len(order))
    chosen = [order[round(step * (len(order) - 1) / max(count - 1, 1))] for step in range(count)]
    codecs, tiles = available_codecs(), []
    for index in chosen:
        mine = ours[index]
        row = [Tile(mine.original, f"image {index}")]
        row.append(Tile(mine.image, f"{mine.num_bytes} bytes", f"{mine.psnr:.2f} dB, SSIM {mine.ssim:.3f}"))
        for key in reversed(codecs):
            coded, found = coded_within(codecs[key], mine.original, mine.num_bytes), equal[key][index]
            caption = f"{coded.count} bytes" + (", smallest" if coded.smallest else "")
            note = f"{found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}"
            row.append(Tile(coded.image, caption, note, marked=coded.smallest))
        tiles.append(row)
    return tiles_figure(tiles, ["original", name, *reversed(codecs)], side=208)


def load_models(arguments: argparse.Namespace) -> list[tuple[str, Tokenizer]]:
    """(name, tokenizer) of each --model; the linear codec gets the sizes of the first other one."""
    names = arguments.model or ["embedded"]
    neural = [name for name in names if name != "patch-linear"]
    if arguments.figure in ("codebook", "extremes") and not len(names) == len(neural) == 1:
        raise ValueError(f"`--model` of {arguments.figure} must be one neural model, got {names}")
    loaded: dict[str, Tokenizer] = {}
    for name in neural:
        loaded[name] = load_tokenizer(None if name == "embedded" else name, device=arguments.device, argument="--model")
    if "patch-linear" in names:
        sizes = list(loaded[neural[0]].codebook_sizes.values()) if neural else (512, 512)
        images = data(arguments, split="train", limit=None).shuffled(0).first(FITTED_IMAGES)
        loaded["patch-linear"] = PatchLinearCodec(sizes).fit(images)
    shown = {"embedded": EMBEDDED, "patch-linear": "patch-linear codec"}
    labels = [shown.get(name) or tokenizer_label(name) for name in names]
    if len(set(labels)) < len(labels):
        raise ValueError(f"`--model` must name different models, got {', '.join(labels)}")
    return [(label, loaded[name]) for label, name in zip(labels, names, strict=True)]


def data(arguments: argparse.Namespace, **changes: Any) -> EvaluationImages:
    """The split's images."""
    names = ("dataset", "config", "split", "image_column", "size", "limit")
    return EvaluationData(**{name: getattr(arguments, name) for name in names} | changes).open()


def images_of(arguments: argparse.Namespace) -> list[Image.Image]:
    """The split's crops."""
    return [to_image(crop) for crop in data(arguments)]


def measured(one: Image.Image, original: Image.Image) -> dict[str, float]:
    """PSNR and SSIM, as `dualcodebook evaluate` measures them."""
    values = image_quality(to_pixels(one)[None], to_pixels(original)[None])
    return dict(zip(("psnr", "ssim"), values, strict=True))


def means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean PSNR and SSIM."""
    return {key: statistics.fmean(one[key] for one in found) for key in ("psnr", "ssim")}


def shown(one: Reconstruction) -> tuple[Image.Image, str, str]:
    """The reconstruction, and its PSNR and SSIM in words."""
    return one.image, f"{one.psnr:.2f} dB", f"SSIM {one.ssim:.3f}"


def source(arguments: argparse.Namespace) -> str:
    """Data set and split, without this machine's folders."""
    return f"{public_name(arguments.dataset)} {arguments.split}"


def save(figure: Image.Image, path: Path) -> None:
    """PNG, or a JPEG of at most 200 kB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        if path.suffix == ".png":
            figure.save(temporary, "PNG")
            return
        for quality in range(92, 30, -4):
            file = io.BytesIO()
            figure.save(file, "JPEG", quality=quality, optimize=True, progressive=True)
            if file.tell() <= LARGEST_JPEG:
                break
        temporary.write_bytes(file.getvalue())


FIGURES = {"codebook": codebook, "compare": compare, "extremes": extremes, "rate": rate_quality}

if __name__ == "__main__":
    sys.exit(main())
