"""What each configuration costs: parameters, FLOPs of one image, memory of its codes, bits; and what training costs.

    python benchmarks/cost.py --json cost.json

A row is a preset, a file of configs/ or a path. FLOPs are counted by torch on shapes alone (nothing large is computed)
for one image; a multiplication and an addition are two. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.cli.inputs import positive
from dualcodebook_hf.configuration_dualcodebook import DualCodebookConfig
from dualcodebook_hf.evaluation.table import markdown_table
from dualcodebook_hf.files import write_json
from dualcodebook_hf.perceptual.vgg import VGG16Features
from dualcodebook_hf.presets import load_preset, preset_names
from dualcodebook_hf.quantizers import Quantizer, ScalarQuantizer, build_quantizer
from dualcodebook_hf.training.discriminators.patch import PatchDiscriminator

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Images of the training splits, see evaluation/protocols.py; epochs as in the paper.
TRAINING_IMAGES = {"ADE20K": 20_210, "CelebA-HQ": 28_000, "MS-COCO": 117_266}
EPOCHS = 500
# Dense bfloat16 peak of the vendor's data sheet, FLOP a second; the share that is reached is assumed.
GPUS = {"A100": 312e12, "H100 SXM": 989e12}
UTILISATION = 0.25
LARGEST_TABLE = 4 * 2**18 * 256  # bytes of the single table that baselines of 18 bits need


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; 2 and one line for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="(default: all presets and all of configs/)")
    parser.add_argument("--size", type=positive, default=256, help="side of the image (default: %(default)s)")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="of the peak (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args(argv)
    try:
        if not 0 < arguments.utilisation <= 1:
            raise ValueError(f"`--utilisation` must lie in (0, 1], got {arguments.utilisation}")
        names = arguments.rows or distinct([*preset_names(), *sorted(path.stem for path in CONFIGS.glob("*.yaml"))])
        rows = [{"row": name, **cost(model_arguments(name), arguments.size)} for name in names]
        step = training_flops(model_arguments("paper"), arguments.size)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    hours = gpu_hours(step, arguments.utilisation)
    print(cost_table(rows), "", training_table(step, hours, arguments.utilisation), sep="\n")
    if arguments.json:
        record = {"size": arguments.size, "rows": rows, "training_flops_per_picture": step, "gpu_hours": hours}
        record |= {"utilisation": arguments.utilisation, "peak_flops": GPUS, "epochs": EPOCHS}
        write_json(arguments.json, record)
    return 0


def model_arguments(row: str) -> dict[str, Any]:
    """The section `model` of a preset, of a file of configs/ or of any other."""
    file = CONFIGS / f"{row}.yaml"
    return load_preset(str(file) if file.is_file() else row)["model"]


def distinct(rows: Sequence[str]) -> list[str]:
    """Without those whose model an earlier row has too: they differ in how it is trained."""
    seen: dict[str, str] = {}
    for row in rows:
        seen.setdefault(json.dumps(model_arguments(row), sort_keys=True), row)
    return list(seen.values())


def cost(arguments: dict[str, Any], size: int = 256) -> dict[str, Any]:
    """Numbers of one configuration for one size x size image.

    "encode_flops" includes the search for the nearest codes, "search_flops" is that alone. "codes_flops" is spent once
    when a model is loaded (transformer, matrix), not for each image. "codebook_bytes": the codes in float32 as they
    are looked up; 0 where a formula makes them.
    """
    model = shapes_only(arguments)
    pixels = torch.empty(1, model.config.in_channels, size, size, device="meta")
    grid = -(-size // model.downsample_factor)
    quantizer = build_quantizer(DualCodebookConfig(**arguments)).eval()
    latents = torch.randn(2, sum(quantizer.dims), grid, grid, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encode = flops(lambda: model.encode(pixels))
        decode = flops(lambda: model._decode(latents[:1].to("meta")))
        codes = flops(lambda: [codebook.codes() for codebook in quantizer.codebooks.values()])  # kept from here on
        quantizer(latents)  # the library's codebooks start by k-means
        search = flops(lambda: quantizer(latents[:1]))
    codebook_bytes = sum(4 * codebook.size * codebook.dim for codebook in quantizer.codebooks.values())
    parts = {"encoder": ("encoder", "quant_conv", "linear_encoder")}
    parts["decoder"] = ("decoder", "post_quant_conv", "linear_decoder")
    counted = {name: sum(parameters(getattr(model, layer)) for layer in layers) for name, layers in parts.items()}
    return {
        "bits_per_position": quantizer.bits_per_position,
        "bits_per_pixel": grid**2 * quantizer.bits_per_position / size**2,
        "codes": list(quantizer.sizes),
        **{f"{name}_parameters": count for name, count in counted.items()},
        "quantizer_parameters": parameters(quantizer),
        "encode_flops": encode + search,
        "decode_flops": decode,
        "search_flops": search,
        "codes_flops": codes,
        "codebook_bytes": 0 if isinstance(quantizer, ScalarQuantizer) else codebook_bytes,
        "logits": sum(quantizer.sizes),
    }


def shapes_only(arguments: dict[str, Any]) -> DualCodebookVQModel:
    """The model without numbers, in eval mode."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initialising nothing
        return DualCodebookVQModel(**arguments).eval()


def parameters(module: nn.Module | Quantizer | None) -> int:
    """Numbers that a checkpoint holds, the libraries' codes in buffers included."""
    return sum(tensor.numel() for tensor in module.state_dict().values()) if module is not None else 0


def flops(run: Callable[[], Any]) -> int:
    """What torch's counter sees."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def training_flops(arguments: dict[str, Any], size: int = 256) -> int:
    """FLOPs of one image in an update of both networks with LPIPS and the adaptive weight, all of it started.

    Without the codebooks' transformer, which runs once a batch.
    """
    model = shapes_only(arguments).train()
    with torch.device("meta"):
        vgg, discriminator = VGG16Features().requires_grad_(False), PatchDiscriminator()
        pixels = torch.empty(1, 3, size, size)
    last = model.decoder.conv_out.weight

    def update() -> None:
        sample = model._decode(model.encode(pixels).latents)
        with torch.no_grad():
            originals = vgg(pixels)
        distances = [(one - other).square().mean() for one, other in zip(vgg(sample), originals, strict=True)]
        rec = (sample - pixels).abs().mean() + sum(distances)
        discriminator.requires_grad_(False)
        g = -discriminator(sample).mean()
        torch.autograd.grad(rec, last, retain_graph=True)
        torch.autograd.grad(g, last, retain_graph=True)
        (rec + g).backward()
        discriminator.requires_grad_(True)
        (discriminator(sample.detach()) - discriminator(pixels)).mean().backward()

    return flops(update)


def gpu_hours(step: int, utilisation: float) -> dict[str, dict[str, float]]:
    """{data set: {GPU: hours}} of `EPOCHS` epochs."""
    return {
        name: {gpu: count * EPOCHS * step / (peak * utilisation) / 3600 for gpu, peak in GPUS.items()}
        for name, count in TRAINING_IMAGES.items()
    }


COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "bits": ("bits/position", lambda row: f"{row['bits_per_position']:g}"),
    "rate": ("bits/pixel", lambda row: f"{row['bits_per_pixel']:.4f}"),
    "codes": ("codes", lambda row: " + ".join(map(str, row["codes"]))),
    "encoder": ("encoder", lambda row: f"{row['encoder_parameters'] / 1e6:.2f} M"),
    "decoder": ("decoder", lambda row: f"{row['decoder_parameters'] / 1e6:.2f} M"),
    "quantizer": ("quantizer", lambda row: f"{row['quantizer_parameters'] / 1e6:.2f} M"),
    "encode": ("encode, GFLOP", lambda row: f"{row['encode_flops'] / 1e9:.1f}"),
    "search": ("of it search", lambda row: f"{row['search_flops'] / 1e9:.2f}"),
    "decode": ("decode, GFLOP", lambda row: f"{row['decode_flops'] / 1e9:.1f}"),
    "memory": (
        "codes in memory",
        lambda row: f"{row['codebook_bytes'] / 1e6:.2f} MB" if row["codebook_bytes"] else "none",
    ),
    "share": ("of a 2^18 x 256 table", lambda row: f"{row['codebook_bytes'] / LARGEST_TABLE:.2%}"),
    "logits": ("logits of a generator", lambda row: f"{row['logits']:,}"),
}


def cost_table(rows: Sequence[dict[str, Any]], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """Markdown, one line for each row.

    Args:
        rows: a name as "row", and what `cost` returned.
        columns: of `COLUMNS`.
    """
    cells = [[f"`{row['row']}`", *(COLUMNS[key][1](row) for key in columns)] for row in rows]
    return markdown_table(["row", *(COLUMNS[key][0] for key in columns)], cells)


def training_table(step: int, hours: dict[str, dict[str, float]], utilisation: float) -> str:
    """Markdown of computed, not measured, GPU-hours.

    Args:
        step: FLOPs of one image in an update.
        hours: of `gpu_hours`.
        utilisation: share of the peak that was assumed.
    """
    rows = [
        [name, f"{TRAINING_IMAGES[name]:,}", *(f"{n:,.0f}" for n in found.values())] for name, found in hours.items()
    ]
    peaks = ", ".join(f"{peak / 1e12:.0f} TFLOP/s {gpu}" for gpu, peak in GPUS.items())
    return (
        f"Computed, not measured: {step / 1e12:.2f} TFLOP per image and update (preset `paper`, both networks, "
        f"LPIPS), {EPOCHS} epochs, {utilisation:.0%} of the dense bfloat16 peak assumed ({peaks}).\n\n"
        + markdown_table(["data set", "pictures", *(f"{gpu}, GPU-hours" for gpu in GPUS)], rows)
    )


if __name__ == "__main__":
    sys.exit(main())
