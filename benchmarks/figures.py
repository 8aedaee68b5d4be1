"""The paper's figures 3, 4 and 5 and the rate-quality figure, one command each:

    python benchmarks/figures.py codebook --dataset DATA --output docs/figures/codebook.jpg
    python benchmarks/figures.py compare  --dataset DATA --model patch-linear --model M --output OUT.jpg
    python benchmarks/figures.py extremes --dataset DATA --output docs/figures/extremes.jpg
    python benchmarks/figures.py rate     --dataset DATA --output docs/figures/rate.jpg --json docs/figures/rate.json

A model is a folder, a Hub id, `embedded` or `patch-linear` (the linear codec, fitted to DATA's train split at the first
model's sizes). Pictures are those of `dualcodebook evaluate`: shorter side to 256, centre crop. PNG or JPEG by suffix.
"""

from __future__ import annotations

import argparse
import io
import json
import random
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

from dualcodebook_hf.cli.inputs import check_folder, load_model, positive
from dualcodebook_hf.evaluation.codecs import available_codecs, coded_at, coded_within
from dualcodebook_hf.evaluation.data import EvaluationData, EvaluationImages
from dualcodebook_hf.evaluation.linear_codec import PatchLinearCodec
from dualcodebook_hf.files import atomic_file
from dualcodebook_hf.image_processing_dualcodebook import to_image, to_pixels
from dualcodebook_hf.loading import tokenizer_label
from dualcodebook_hf.metrics.images import psnr, ssim
from dualcodebook_hf.metrics.tokens import TokenStatistics
from dualcodebook_hf.tokens.file import token_bytes

LARGEST_JPEG = 200_000
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
    parser.add_argument("--limit", type=positive, help="the first so many pictures only")
    parser.add_argument("--size", type=positive, default=256, help="side of the crops (default: %(default)s)")
    parser.add_argument("--rows", type=positive, default=4, help="pictures shown (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the pictures of `compare` (default: %(default)s)")
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, required=True, metavar="FIGURE.png|jpg")
    parser.add_argument("--json", type=Path, help="write the numbers of `rate` there")
    parser.add_argument("--codec-cache", type=Path, help="keep the codecs' numbers there: they depend on no model")
    arguments = parser.parse_args(argv)
    try:
        if arguments.output.suffix not in (".png", ".jpg"):
            raise ValueError(f"`--output` must be a file named *.png or *.jpg, got '{arguments.output}'")
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
    """Figure 3: the codes of each book, and how often a split uses them."""
    (name, model), *_ = load_models(arguments)
    statistics = TokenStatistics({key: codebook.size for key, codebook in model.quantize.codebooks.items()})
    for crops in data(arguments).batches(8):
        statistics.update(model.tokenize(crops.to(model.device)))
    codebooks = {key: (code_patches(model, key), counts) for key, counts in statistics.histograms.items()}
    side, positions = model.downsample_factor, f"{statistics.positions:,} positions"
    return codebook_figure(
        codebooks, f"Codebooks of {name}, patches of {side} x {side}; {source(arguments)}, {positions}"
    )


def compare(arguments: argparse.Namespace) -> Image.Image:
    """Figure 4: several models on pictures drawn at random, the region where they differ the most boxed."""
    models = load_models(arguments)
    images = list(data(arguments))
    chosen = random.Random(arguments.seed).sample(range(len(images)), min(arguments.rows, len(images)))
    rows = []
    for index in chosen:
        original = images[index]
        decoded = [reconstruct(model, original[None])[0] for _, model in models]
        box = difference_window(original, decoded)
        tiles = [Tile(to_image(original), f"picture {index}", box=box)]
        tiles += [Tile(to_image(one), *quality_lines(one, original), box) for one in decoded]
        rows.append(tiles)
    names = ["original", *(f"{name}, {bits(model):g} bits a position" for name, model in models)]
    title = f"{source(arguments)}: {len(rows)} pictures drawn at random; boxed: where the models differ the most"
    return models_figure(rows, names, title)


def extremes(arguments: argparse.Namespace) -> Image.Image:
    """Figure 5: the pictures of a split that a model reconstructs best and worst, by PSNR."""
    (name, model), *_ = load_models(arguments)
    pairs = []
    for crops in data(arguments).batches(8):
        pairs += zip(crops, reconstruct(model, crops), strict=True)
    values = torch.cat([psnr(unit(one[None]), unit(original[None])) for original, one in pairs])
    order = values.argsort(descending=True).tolist()
    count = min(arguments.rows + 2, len(order) // 2)
    if not count:
        raise ValueError(f"`--split` must hold two pictures or more, got {len(order)}")
    halves = []
    for chosen in (order[:count], order[-count:][::-1]):
        originals = [Tile(to_image(pairs[index][0]), note=f"picture {index}") for index in chosen]
        decoded = [Tile(to_image(pairs[index][1]), *quality_lines(*pairs[index][::-1])) for index in chosen]
        halves.append([originals, decoded])
    title = f"{name}, {rate(model, arguments.size):.4f} bits per pixel; {source(arguments)}, N = {len(order)}"
    return extremes_figure(*halves, f"{title}, mean {values.mean():.2f} dB")


def rate_quality(arguments: argparse.Namespace) -> Image.Image:
    """Tokenizers against JPEG, WebP and AVIF: curves over a split, and pictures at the first model's bytes."""
    models = load_models(arguments)
    images = [to_image(crop) for crop in data(arguments)]
    (first, model), grid = models[0], -(-arguments.size // models[0][1].downsample_factor)
    budget = token_bytes((grid, grid), bits(model))
    curves, equal = codec_numbers(arguments, images, budget)
    points = {name: [tokenizer_point(one, images, arguments.size)] for name, one in models} | curves
    ours = [measured(decoded(model, image), to_pixels(image)) for image in images]
    summary = {name: equal_summary(found, ours) for name, found in equal.items()}
    record = {"data": source(arguments), "pictures": len(images), "size": arguments.size, "points": points}
    record["equal_bytes"] = {"model": first, "bytes": budget, "codecs": summary}
    if arguments.json:
        with atomic_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
    strip = rate_strip(arguments, first, model, images, ours, equal, budget)
    title = f"Rate and quality, {source(arguments)}, N = {len(images)}, {arguments.size} x {arguments.size} pixels"
    return rate_figure(points, title, rate_notes(record), strip)


def codec_numbers(
    arguments: argparse.Namespace, images: Sequence[Image.Image], budget: int
) -> tuple[dict[str, list], dict[str, list]]:
    """(curves, each picture at the tokens' bytes) of every codec; taken from --codec-cache where it holds just these.

    No model has a part in them, and AVIF is slow.
    """
    key = {"data": source(arguments), "pictures": len(images), "size": arguments.size, "bytes": budget}
    key |= {"pillow": Image.__version__, "codecs": {name: repr(codec) for name, codec in available_codecs().items()}}
    cache = arguments.codec_cache
    if cache and cache.exists() and (kept := json.loads(cache.read_text())).get("key") == key:
        return kept["curves"], kept["equal"]
    curves, equal = {}, {}
    for name, codec in available_codecs().items():
        print(f"{name} ...", flush=True)
        curves[name] = [codec_point(codec, images, quality) for quality in CURVES[name]]
        equal[name] = [equal_bytes(codec, image, budget) for image in images]
    if cache:
        with atomic_file(cache) as temporary:
            temporary.write_text(json.dumps({"key": key, "curves": curves, "equal": equal}) + "\n")
    return curves, equal


def tokenizer_point(model: Any, images: Sequence[Image.Image], size: int) -> dict[str, float]:
    """Mean quality of a tokenizer at its fixed rate."""
    found = [measured(decoded(model, image), to_pixels(image)) for image in images]
    return {"bits_per_pixel": rate(model, size), **means(found)}


def codec_point(codec: Any, images: Sequence[Image.Image], quality: int) -> dict[str, float]:
    """Mean rate and mean quality of a codec at one of its qualities."""
    coded = [(coded_at(codec, image, quality), image) for image in images]
    total = sum(one.count * 8 / (image.width * image.height) for one, image in coded)
    found = [measured(to_pixels(one.image), to_pixels(image)) for one, image in coded]
    return {"quality": quality, "bits_per_pixel": total / len(coded), **means(found)}


def equal_bytes(codec: Any, image: Image.Image, budget: int) -> dict[str, Any]:
    """A picture at the tokens' bytes, or the codec's smallest."""
    coded = coded_within(codec, image, budget)
    quality = measured(to_pixels(coded.image), to_pixels(image))
    return {"bytes": coded.count, "smallest": coded.smallest, **quality}


def equal_summary(found: Sequence[dict[str, Any]], ours: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over pictures, how many a codec can hold to the bytes, and on how many the tokenizer is better."""
    count = len(found)
    shares = {
        f"tokenizer_better_{key}": sum(mine[key] > its[key] for mine, its in zip(ours, found, strict=True)) / count
        for key in ("psnr", "ssim")
    }
    within = sum(not one["smallest"] for one in found) / count
    return {"bytes": sum(one["bytes"] for one in found) / count, "within_bytes": within, **means(found), **shares}


def rate_notes(record: dict[str, Any]) -> list[str]:
    """The equal-bytes comparison in words."""
    equal = record["equal_bytes"]
    mine = record["points"][equal["model"]][0]
    lines = [
        f"At {equal['bytes']} bytes a picture, {equal['model']}: {mine['psnr']:.2f} dB, SSIM {mine['ssim']:.3f}. Each "
        "codec at its best quality within those bytes, or else its smallest file:"
    ]
    for name, found in equal["codecs"].items():
        lines.append(
            f"  {name}: {found['bytes']:.0f} bytes on average ({found['within_bytes']:.0%} of the pictures fit), "
            f"{found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}; the tokenizer is better on "
            f"{found['tokenizer_better_psnr']:.0%} of the pictures by PSNR and {found['tokenizer_better_ssim']:.0%} by "
            "SSIM"
        )
    lines.append(
        "Pictures from the tokenizer's largest gain over the best codec within the bytes (top) to its largest loss "
        "(bottom); in colour: more bytes than the tokens"
    )
    return lines


def rate_strip(
    arguments: argparse.Namespace,
    name: str,
    model: Any,
    images: Sequence[Image.Image],
    ours: Sequence[dict[str, float]],
    equal: dict[str, list[dict[str, Any]]],
    budget: int,
) -> Image.Image:
    """Pictures from the tokenizer's largest gain over the best codec that fits the bytes down to its largest loss."""
    fitting = [
        [found[index]["psnr"] for found in equal.values() if not found[index]["smallest"]] for index in range(len(ours))
    ]
    gains = {index: ours[index]["psnr"] - max(values) for index, values in enumerate(fitting) if values}
    order = sorted(gains or range(len(ours)), key=lambda index: gains.get(index, 0), reverse=True)
    count = min(arguments.rows, len(order))
    chosen = [order[round(step * (len(order) - 1) / max(count - 1, 1))] for step in range(count)]
    codecs, rows = available_codecs(), []
    for index in chosen:
        image = images[index]
        tiles = [Tile(image, f"picture {index}")]
        tiles.append(Tile(to_image(decoded(model, image)), f"{budget} bytes", quality_note(ours[index])))
        for key in reversed(codecs):
            coded, found = coded_within(codecs[key], image, budget), equal[key][index]
            caption = f"{coded.count} bytes" + (", smallest" if coded.smallest else "")
            tiles.append(Tile(coded.image, caption, quality_note(found), marked=coded.smallest))
        rows.append(tiles)
    return tiles_figure(rows, ["original", name, *reversed(codecs)], side=208)


def load_models(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    """(name, model) of each --model; the linear codec gets the books of the first other one."""
    names = arguments.model or ["embedded"]
    loaded = {
        name: load_model(
            argparse.Namespace(model=None if name == "embedded" else name, device=arguments.device, dtype="float32")
        )
        for name in names
        if name != "patch-linear"
    }
    if arguments.figure in ("codebook", "extremes") and (len(names) > 1 or not loaded):
        raise ValueError(f"`--model` of {arguments.figure} must be one neural model, got {names}")
    if "patch-linear" in names:
        sizes = next(
            ([codebook.size for codebook in model.quantize.codebooks.values()] for model in loaded.values()), (512, 512)
        )
        loaded["patch-linear"] = PatchLinearCodec(sizes).fit(
            data(arguments, split="train", limit=None).shuffled(0).first(400)
        )
    shown = {"embedded": "embedded checkpoint", "patch-linear": "patch-linear codec"}
    return [(shown.get(name) or tokenizer_label(name), loaded[name]) for name in names]


def data(arguments: argparse.Namespace, **changes: Any) -> EvaluationImages:
    """The split's images."""
    names = ("dataset", "config", "split", "image_column", "size", "limit")
    return EvaluationData(**{name: getattr(arguments, name) for name in names} | changes).open()


@torch.no_grad()
def reconstruct(model: Any, crops: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same, on the CPU, not clamped."""
    return model.autoencode(crops.to(model.device)).sample.float().cpu()


def decoded(model: Any, image: Image.Image) -> torch.Tensor:
    """One picture through a tokenizer, (3, H, W)."""
    return reconstruct(model, to_pixels(image)[None])[0]


def measured(one: torch.Tensor, original: torch.Tensor) -> dict[str, float]:
    """PSNR and SSIM of (3, H, W) in [-1, 1], as `dualcodebook evaluate` measures them."""
    pair = unit(one[None]), unit(original[None])
    return {"psnr": psnr(*pair).item(), "ssim": ssim(*pair).item()}


def means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean PSNR and SSIM."""
    return {key: sum(one[key] for one in found) / len(found) for key in ("psnr", "ssim")}


def quality_lines(one: torch.Tensor, original: torch.Tensor) -> tuple[str, str]:
    """PSNR and SSIM in words, a line each."""
    found = measured(one, original)
    return f"{found['psnr']:.2f} dB", f"SSIM {found['ssim']:.3f}"


def quality_note(found: dict[str, float]) -> str:
    """PSNR and SSIM in one line."""
    return f"{found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}"


def unit(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1]."""
    return (pixels + 1) / 2


def bits(model: Any) -> float:
    """Bits a position."""
    return model.bits_per_position


def rate(model: Any, size: int) -> float:
    """Bits per pixel of a square crop."""
    return (-(-size // model.downsample_factor)) ** 2 * bits(model) / size**2


def source(arguments: argparse.Namespace) -> str:
    """Data set and split, without this machine's folders."""
    path = Path(arguments.dataset).expanduser()
    return f"{path.resolve().name if path.exists() else arguments.dataset} {arguments.split}"


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
