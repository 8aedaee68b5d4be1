"""How fast images become tokens and tokens images, beside diffusers' VQModel of the same widths, in one run:

    python benchmarks/speed.py --dataset DATA                       # the paper's network
    python benchmarks/speed.py --dataset DATA --threads 1 --clock cpu --json speed.json   # where others work
    python benchmarks/speed.py --dataset DATA --batch-sizes 1 8 32 --dtypes float32 bfloat16              # on a GPU

All rows take turns with the same images. `as loaded` is the model without `optimize_for_inference`; `in a command` is
with memory that the process keeps (`keep_freed_memory`), as `dualcodebook`'s commands run it. Weights are random; the
share of equal tokens is that of 512 codes for each half of the channels, drawn from the latents of the images. VQModel,
where the network is VQGAN's, has one codebook of 1024. The linear codec and WebP show what no network costs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cost import cost, model_arguments
from diffusers import VQModel
from timing import add_timing, convolution_peak, in_turns, machine, report, set_up, speedup, speedup_text

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.cli.inputs import positive
from dualcodebook_hf.codebooks import nearest_codes
from dualcodebook_hf.evaluation.codecs import available_codecs
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.linear_codec import PatchLinearCodec
from dualcodebook_hf.evaluation.table import markdown_table
from dualcodebook_hf.files import public_name
from dualcodebook_hf.image_processing_dualcodebook import to_image
from dualcodebook_hf.inference import fastest_dtype, optimize_for_inference

BASE, LOADED, IN_A_COMMAND = "diffusers VQModel", "as loaded", ", in a command"
CODES = 512
WEBP_QUALITY = 0  # still several times the bytes of the tokens


class Contender(NamedTuple):
    """A row: images (B, 3, H, W) to tokens, those to images; its network, where it has one; how it is run."""

    encode: Callable[[torch.Tensor], Any]
    decode: Callable[[Any], Any]
    model: torch.nn.Module | None = None
    dtype: torch.dtype = torch.float32
    keeps_memory: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 2 and one line for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="paper", help="preset or YAML file (default: paper)")
    parser.add_argument("--dataset", required=True, help="images: Hub id, folder or parquet file; its split `test`")
    parser.add_argument("--size", type=positive, default=256, help="side of the images (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=4, help="for the equal tokens (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1], help="(default: 1)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), help="(default: float32, and the machine's fastest)"
    )
    parser.add_argument(
        "--onnx", action="store_true", help="a row of onnxruntime on the CPU, which needs the extra onnx"
    )
    add_timing(parser, rounds=5)
    arguments = parser.parse_args(argv)
    return report(parser, lambda: measure(arguments, set_up(arguments)), table, arguments.json)


@torch.inference_mode()
def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """The record that is printed and written."""
    kind, config = torch.device(device).type, model_arguments(arguments.config)
    count = max(arguments.images, *arguments.batch_sizes)
    data = EvaluationData(dataset=arguments.dataset, size=arguments.size, limit=count)
    images = torch.stack(list(data.open()))
    images = images.repeat(-(-count // len(images)), 1, 1, 1)[:count]
    fastest = fastest_dtype(kind)
    dtypes = [getattr(torch, name) for name in arguments.dtypes or []] or list({torch.float32, fastest})
    contenders = build(config, device, dtypes)
    if arguments.onnx:
        contenders["onnxruntime"] = onnxruntime_row(contenders[LOADED].model)
    contenders |= without_network(images, device)
    flops = cost(config, arguments.size)
    timing = {"rounds": arguments.rounds, "device": device, "clock": arguments.clock}
    rows = [
        row
        for batch in arguments.batch_sizes
        for row in timed_rows(contenders, images[:batch], flops, timing, everything=batch == min(arguments.batch_sizes))
    ]
    latents = {name: one.model.encode(images.to(device)).latents for name, one in contenders.items() if ours(one)}
    for row in rows:
        if row["row"] in latents:
            row["tokens_equal"] = equal_tokens(latents[LOADED], latents[row["row"]])
    peaks = {
        str(dtype).removeprefix("torch."): convolution_peak(device, dtype, clock=arguments.clock)
        for dtype in {torch.float32, *dtypes}
    }
    protocol = {"config": arguments.config, "dataset": public_name(arguments.dataset), "size": arguments.size}
    protocol |= {"images": count, "rounds": arguments.rounds, "clock": arguments.clock, "machine": machine(device)}
    return {"protocol": protocol, "fastest_dtype": str(fastest), "convolution_peak": peaks, "rows": rows}


def build(
    config: dict[str, Any], device: str, dtypes: Sequence[torch.dtype] = (torch.float32,), only: str | None = None
) -> dict[str, Contender]:
    """The networks by name, with the same weights; VQModel where it can have them.

    Args:
        config: of the model.
        device: where they are put.
        dtypes: of `optimize_for_inference`.
        only: the one that is built; None: all.
    """
    torch.manual_seed(0)
    model = DualCodebookVQModel(**config).eval()
    builders: dict[str, Callable[[], Contender]] = {}
    if model.config.backbone == "vqgan" and model.config.attention:
        builders[BASE] = lambda: vq_model(model, device)
    builders[LOADED] = lambda: contender(copy.deepcopy(model).to(device))
    for dtype in dtypes:
        name = f"optimize_for_inference, {str(dtype).removeprefix('torch.')}"
        builders[name] = lambda dtype=dtype: contender(
            optimize_for_inference(copy.deepcopy(model).to(device), dtype), dtype
        )
        if device == "cpu":
            builders[f"{name}{IN_A_COMMAND}"] = lambda one=builders[name]: one()._replace(keeps_memory=True)
    return {name: builder() for name, builder in builders.items() if only in (None, name)}


def onnxruntime_row(model: DualCodebookVQModel) -> Contender:
    """Exported graphs in float32, with as many threads as torch."""
    import onnxruntime

    from dualcodebook_hf.onnx_export import export_onnx
    from dualcodebook_hf.onnx_runtime import OnnxTokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        export_onnx(copy.deepcopy(model).cpu(), Path(folder), [""])
        tokenizer = OnnxTokenizer(folder, session_options=options)
    return Contender(lambda pixels: tokenizer.tokenize(pixels.cpu().numpy()), tokenizer.detokenize)


def without_network(images: torch.Tensor, device: str) -> dict[str, Contender]:
    """What stands beside: the linear codec, and WebP where Pillow has it."""
    codec = PatchLinearCodec().fit(torch.rand(8, 3, 256, 256)).to(device)  # of what, does not matter
    found = {"patch-linear codec": Contender(codec.tokenize, codec.detokenize)}
    webp, size = available_codecs().get("WebP"), tuple(images.shape[:1:-1])
    if webp is not None:
        found["WebP"] = Contender(
            lambda pixels: [webp.encode(to_image(one), WEBP_QUALITY) for one in pixels.cpu()],
            lambda files: [webp.decode(file, size) for file in files],
        )
    return found


def contender(model: DualCodebookVQModel, dtype: torch.dtype = torch.float32) -> Contender:
    """One of ours."""
    return Contender(model.tokenize, model.detokenize, model, dtype)


def ours(contender: Contender) -> bool:
    """Whether it is a network with two codebooks."""
    return isinstance(contender.model, DualCodebookVQModel)


def vq_model(model: DualCodebookVQModel, device: str) -> Contender:
    """diffusers' VQModel with the same encoder and decoder, and VQGAN's codebook of 1024."""
    config = model.config
    plain = len(config.block_out_channels) - 1
    theirs = VQModel(
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        vq_embed_dim=config.vq_embed_dim,
        num_vq_embeddings=1024,
        norm_num_groups=config.norm_num_groups,
    )
    for name in ("encoder", "quant_conv", "post_quant_conv", "decoder"):
        getattr(theirs, name).load_state_dict(getattr(model, name).state_dict())
    theirs = theirs.eval().to(device)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        latents = theirs.encode(pixels).latents
        return theirs.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])

    def decode(ids: torch.Tensor) -> torch.Tensor:
        codes = theirs.quantize.get_codebook_entry(ids.flatten(), (*ids.shape, config.vq_embed_dim))
        return theirs.decode(codes, force_not_quantize=True).sample

    return Contender(encode, decode, theirs)


def timed_rows(
    contenders: dict[str, Contender],
    images: torch.Tensor,
    flops: dict[str, Any],
    timing: dict[str, Any],
    everything: bool,
) -> list[dict[str, Any]]:
    """Times of a batch; the rows without a network only where `everything` is measured."""
    pixels, rows = images.to(timing["device"]), []
    chosen = {name: one for name, one in contenders.items() if everything or one.model is not None}
    tokens, base = {name: one.encode(pixels) for name, one in chosen.items()}, next(iter(chosen))
    timing = timing | {"keeping": [name for name, one in chosen.items() if one.keeps_memory] or None}
    encoded = in_turns({name: lambda one=one: one.encode(pixels) for name, one in chosen.items()}, **timing)
    decoded = in_turns({n: lambda one=one, n=n: one.decode(tokens[n]) for n, one in chosen.items()}, **timing)
    both = {name: [a + b for a, b in zip(encoded[name], decoded[name], strict=True)] for name in chosen}
    for name, one in chosen.items():
        seconds = {key: statistics.median(times[name]) / len(images) for key, times in (("e", encoded), ("d", decoded))}
        row = {"row": name, "batch": len(images), "dtype": str(one.dtype).removeprefix("torch.")}
        row |= {"encode_seconds": seconds["e"], "decode_seconds": seconds["d"]}
        row |= {"speedup_encode": speedup(encoded[base], encoded[name])}
        row |= {"speedup_decode": speedup(decoded[base], decoded[name]), "speedup": speedup(both[base], both[name])}
        if one.model is not None:
            row["flops"] = (flops["encode_flops"] + flops["decode_flops"]) / sum(seconds.values())
        rows.append(row)
    return rows


def equal_tokens(latents: torch.Tensor, others: torch.Tensor) -> float:
    """Share of equal tokens of two latents (B, C, h, w), each half of the channels with codes drawn from the first."""
    equal, generator = [], torch.Generator().manual_seed(0)
    for one, other in zip(latents.float().chunk(2, 1), others.float().chunk(2, 1), strict=True):
        vectors, moved = (half.movedim(1, -1).flatten(0, 2).cpu() for half in (one, other))
        codes = vectors[torch.randperm(len(vectors), generator=generator)[:CODES]]
        # Between two codes, or every vector that became a code would find itself again.
        codes = (codes + codes.roll(1, 0)) / 2
        equal.append((nearest_codes(vectors, codes) == nearest_codes(moved, codes)).float().mean())
    return torch.stack(equal).mean().item()


def table(record: dict[str, Any]) -> str:
    """Markdown; speedups as the median of the rounds with the lowest and the highest."""
    header = ["", "batch", "encode, s", "decode, s", "images/s", f"speed, x {record['rows'][0]['row']}"]
    header += ["encode", "decode"]
    header += ["of the convolution peak", "equal tokens"]
    cells = []
    for row in record["rows"]:
        seconds = row["encode_seconds"], row["decode_seconds"]
        peak = record["convolution_peak"][row["dtype"]]
        cells.append(
            [
                row["row"],
                str(row["batch"]),
                *(f"{value:.3g}" for value in (*seconds, 1 / sum(seconds))),
                *(speedup_text(row[key]) for key in ("speedup", "speedup_encode", "speedup_decode")),
                f"{row['flops'] / peak:.0%}" if "flops" in row else "",
                f"{row['tokens_equal']:.2%}" if "tokens_equal" in row else "",
            ]
        )
    peaks = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {name}" for name, value in record["convolution_peak"].items())
    protocol = record["protocol"]
    taken = f"{protocol['size']} x {protocol['size']}, {protocol['rounds']} rounds"
    return f"{markdown_table(header, cells)}\n\nImages of {taken}. The machine's own 3 x 3 convolution: {peaks}."


if __name__ == "__main__":
    sys.exit(main())
