"""A tokenizer as ONNX graphs and as `torch.export` programs, each checked against torch before it is handed over.

`onnx/encoder_model.onnx` takes `pixel_values` float32 (batch, channels, height, width) in [-1, 1] of any size from one
pixel, pads them as the model does, and gives `tokens` int64 (batch, codebooks, h, w). `onnx/decoder_model.onnx` takes
`tokens` and gives `pixel_values` float32 (batch, channels, h*f, w*f), to be cropped; the token N of a codebook of N
codes stands for the mean of its codes, by which one codebook is decoded alone. `onnx/tokenizer.json` says the rest.

The graphs are made of standard operators, slices instead of splits, which WebGPU wants. `*_fp16.onnx` compute in
float16 but for the search for the nearest codes, which stays in float32; `*_int8.onnx` quantize the convolutions
dynamically.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from .codebooks import SEARCH_CODES, Codebook
from .configuration_dualcodebook import config_hash
from .core import DualCodebookCore
from .files import write_json
from .metrics.images import psnr
from .onnx_runtime import FOLDER, OnnxTokenizer, TokenizerFile
from .packages import require_package
from .version import __version__
from .weights import encoder_hash

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 20
PROGRAMS = "torch_export"
EXTRA = "onnx"
# What is checked: batches and sizes, among them one pixel and sides that are no multiples of f.
CHECKED_SHAPES = ((1, 1, 1), (2, 50, 70), (1, 176, 128), (3, 33, 90))
TOLERANCE = 1e-3  # of pixels in [-1, 1], in float32
# A latent midway between two codes may take the other one, since sums are rounded in another order.
LEAST_EQUAL = {"": 0.999, "_fp16": 0.9, "_int8": 0.0}
# torch.export takes a side of one latent for a constant: its programs, unlike the graphs, want more pixels than f.
SMALLEST_EXAMPLE = 3


class EncoderGraph(nn.Module):
    """`tokenize` without checks, for export: (B, C, H, W) float32 -> int64 (B, codebooks, ceil(H/f), ceil(W/f)).

    Args:
        model: its codebooks must be of `codebooks.py`; its codes are kept as constants.
    """

    _encode_whole = DualCodebookCore._encode_whole

    def __init__(self, model: DualCodebookCore) -> None:
        super().__init__()
        self.encoder, self.quant_conv, self.linear_encoder = model.encoder, model.quant_conv, model.linear_encoder
        self.factor, self.working_type = model.downsample_factor, model.dtype
        self.dims, self.tiles = model.quantize.dims, []
        for name, codebook in model.quantize.codebooks.items():
            codes = codebook.codes().detach()
            centre = codes.mean(0)
            self.register_buffer(f"{name}_centre", centre)
            names = []
            for number, tile in enumerate((codes - centre).split(SEARCH_CODES)):
                names.append(f"{name}_codes_{number}")
                self.register_buffer(names[-1], tile.T.contiguous())
                self.register_buffer(f"{names[-1]}_offsets", tile.square().sum(1) / 2)
            self.tiles.append((f"{name}_centre", names))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See the class."""
        z = self._encode_whole(_pad(pixel_values, self.factor).to(self.working_type)).float()
        tokens, start = [], 0
        for dim, (centre, names) in zip(self.dims, self.tiles, strict=True):
            vectors = z[:, start : start + dim].movedim(1, -1) - getattr(self, centre)
            tokens.append(self._nearest(vectors, names))
            start += dim
        return torch.stack(tokens, dim=1)

    def _nearest(self, vectors: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """As `nearest_codes`: vectors (..., D) -> int64 (...)."""
        found = None
        for number, name in enumerate(names):
            distances = getattr(self, f"{name}_offsets") - vectors @ getattr(self, name)
            ids = distances.argmin(-1) + number * SEARCH_CODES
            if len(names) == 1:
                return ids
            least = distances.amin(-1)
            if found is None:
                found = least, ids
            else:
                found = torch.minimum(found[0], least), torch.where(least < found[0], ids, found[1])
        return found[1]


class DecoderGraph(nn.Module):
    """`detokenize` without checks, for export: int64 (B, codebooks, h, w) -> float32 (B, C, h*f, w*f).

    Args:
        model: see `EncoderGraph`.
    """

    _decode_whole = DualCodebookCore._decode_whole

    def __init__(self, model: DualCodebookCore) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder
        self.linear_decoder, self.working_type = model.linear_decoder, model.dtype
        self.names = list(model.quantize.codebooks)
        for name, codebook in model.quantize.codebooks.items():
            codes = codebook.codes().detach()
            self.register_buffer(f"{name}_codes", torch.cat([codes, codes.mean(0, keepdim=True)]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """See the class."""
        codes = [getattr(self, f"{name}_codes") for name in self.names]
        parts = [F.embedding(tokens[:, index], table) for index, table in enumerate(codes)]
        return self._decode_whole(torch.cat(parts, dim=-1).movedim(-1, 1).to(self.working_type)).float()


class SequenceAttention(AttnProcessor2_0):
    """diffusers' attention of an image, whose result lies in memory as images do.

    Its own lies channels last, of which torch.export makes a condition on the width that it cannot prove.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        sequence = hidden_states.flatten(2).transpose(1, 2)
        sequence = super().__call__(attn, sequence, encoder_hidden_states, attention_mask, temb)
        return sequence.transpose(1, 2).contiguous().view(hidden_states.shape)


def _pad(x: torch.Tensor, factor: int) -> torch.Tensor:
    """`pad_to_multiple` for a size that is known when the graph runs."""
    for dim in (-2, -1):
        size = x.shape[dim]
        last = torch.arange(size, device=x.device)[-1]
        index = torch.arange((size + factor - 1) // factor * factor, device=x.device) % (2 * last).clamp_min(1)
        x = x.index_select(dim, torch.where(index <= last, index, 2 * last - index))
    return x


@dataclass(frozen=True)
class Check:
    """A pair of graphs beside the model in torch, on images of `CHECKED_SHAPES`.

    Attributes:
        runtime: "onnxruntime" or "torch.export".
        variant: "" (float32), "_fp16" or "_int8".
        num_bytes: of the encoder's and the decoder's file together.
        equal: tokens that equal the model's.
        tokens: all of them.
        difference: the largest of any decoded pixel value, in [-1, 1], of the model's tokens.
        loss: dB of PSNR that image -> tokens -> image loses against the model.
    """

    runtime: str
    variant: str
    num_bytes: int
    equal: int
    tokens: int
    difference: float
    loss: float

    def passes(self) -> bool:
        """Whether the graphs may be handed over."""
        close = self.variant or self.difference <= TOLERANCE
        return bool(close) and self.equal >= LEAST_EQUAL[self.variant] * self.tokens

    def __str__(self) -> str:
        name = f"{self.runtime} {self.variant.lstrip('_') or 'fp32'}"
        return (
            f"{name:20} {self.num_bytes / 1e6:6.1f} MB   tokens equal: {self.equal} of {self.tokens}   "
            f"pixels within {self.difference:.1e}   PSNR {-self.loss:+.3f} dB"
        )


def check_exportable(model: DualCodebookCore) -> None:
    """Raises ValueError for packages that are missing and for a quantizer that is not a search for nearest codes."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require_package(module, extra=EXTRA, user="export")
    if not all(isinstance(codebook, Codebook) for codebook in model.quantize.codebooks.values()):
        raise ValueError(f"`model` must have the quantizer dual or single to be exported, got {model.config.quantizer}")


def export_onnx(model: DualCodebookCore, folder: Path, variants: Sequence[str] = ("", "_fp16")) -> list[Check]:
    """Writes the graphs into `folder`/onnx and runs them in onnxruntime.

    Args:
        model: in eval mode, float32, on the CPU.
        folder: exists; onnx/ does not.
        variants: of "", "_fp16" and "_int8".

    Returns a check of each variant. Raises ValueError (see `check_exportable`) and RuntimeError where a check fails.
    """
    check_exportable(model)
    place = folder / FOLDER
    place.mkdir()
    write_json(place / TokenizerFile.NAME, asdict(_describe(model)))
    for variant in variants:
        if variant == "_int8":
            _write_int8(place)
            continue
        source = model
        if variant == "_fp16":
            source = copy.deepcopy(model)
            source.cast_backbone(torch.float16)
        for name, program in _programs(source).items():
            _write_graph(program, place / f"{name}_model{variant}.onnx")
    return [_check_onnx(model, folder, variant) for variant in variants]


def export_programs(model: DualCodebookCore, folder: Path) -> Check:
    """Writes `torch.export` programs into `folder`/torch_export and runs them; see `export_onnx`.

    Their inputs and outputs are those of the graphs; images must be larger than f on both sides.
    """
    place = folder / PROGRAMS
    place.mkdir()
    for name, program in _programs(model).items():
        torch.export.save(program, place / f"{name}.pt2")
    run = {path.stem: torch.export.load(path).module() for path in place.iterdir()}
    shapes = [shape for shape in CHECKED_SHAPES if min(shape[1:]) > model.downsample_factor]
    num_bytes = sum(path.stat().st_size for path in place.iterdir())
    return _checked(model, run["encoder"], run["decoder"], shapes, "torch.export", "", num_bytes)


def _describe(model: DualCodebookCore) -> TokenizerFile:
    return TokenizerFile(
        downsample_factor=model.downsample_factor,
        channels=model.config.in_channels,
        codebooks=[[name, size] for name, size in model.codebook_sizes.items()],
        config_hash=config_hash(model.config),
        weights_sha256=encoder_hash(model),
        version=__version__,
    )


@torch.no_grad()
def _programs(model: DualCodebookCore) -> dict[str, ExportedProgram]:
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, Attention):
            part.set_processor(SequenceAttention())
    factor, codebooks = model.downsample_factor, len(model.codebook_sizes)
    side = SMALLEST_EXAMPLE * factor - 1
    dynamic = torch.export.Dim
    # diffusers' Upsample2D takes another way from 64 images on; the graphs, which hold no such bound, need not.
    batch = dynamic("batch", max=63) if model.config.backbone == "vqgan" else dynamic("batch")
    pixels = torch.zeros(2, model.config.in_channels, side, side + factor)
    tokens = torch.zeros(2, codebooks, SMALLEST_EXAMPLE, SMALLEST_EXAMPLE + 1, dtype=torch.int64)
    with _quiet():
        return {
            "encoder": torch.export.export(
                EncoderGraph(model).eval(),
                (pixels,),
                dynamic_shapes={
                    "pixel_values": {
                        0: batch,
                        2: dynamic("height", min=factor + 1),
                        3: dynamic("width", min=factor + 1),
                    }
                },
            ),
            "decoder": torch.export.export(
                DecoderGraph(model).eval(),
                (tokens,),
                dynamic_shapes={"tokens": {0: batch, 2: dynamic("h"), 3: dynamic("w")}},
            ),
        }


def _write_graph(program: ExportedProgram, path: Path) -> None:
    import onnx

    names = ["pixel_values", "tokens"]
    names = names if path.name.startswith("encoder") else names[::-1]
    with _quiet():
        graph = torch.onnx.export(
            program, (), input_names=names[:1], output_names=names[1:], opset_version=OPSET, dynamo=True, verbose=False
        ).model_proto
    for node in graph.graph.node:  # where in our code each comes from: paths of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.graph.metadata_props[:], graph.graph.value_info[:]
    graph.producer_name, graph.producer_version = "dualcodebook_hf", __version__
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString())


def _write_int8(place: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in ("encoder", "decoder"):
        with _quiet():  # the CPU has integer convolutions for uint8 weights alone
            quantize_dynamic(
                place / f"{name}_model.onnx",
                place / f"{name}_model_int8.onnx",
                op_types_to_quantize=["Conv"],
                weight_type=QuantType.QUInt8,
            )


def _check_onnx(model: DualCodebookCore, folder: Path, variant: str) -> Check:
    tokenizer = OnnxTokenizer.from_pretrained(folder, variant=variant.lstrip("_") or None)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(tokenizer.tokenize(pixels.numpy()))

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(tokenizer.detokenize(tokens.numpy()))

    num_bytes = sum((folder / FOLDER / f"{name}_model{variant}.onnx").stat().st_size for name in ("encoder", "decoder"))
    return _checked(model, encode, decode, CHECKED_SHAPES, "onnxruntime", variant, num_bytes)


@torch.no_grad()
def _checked(
    model: DualCodebookCore,
    encode: Any,
    decode: Any,
    shapes: Sequence[tuple[int, int, int]],
    runtime: str,
    variant: str,
    num_bytes: int,
) -> Check:
    """Raises RuntimeError where the graphs differ from the model by more than rounding."""
    equal = total = 0
    difference, losses = 0.0, []
    for pixels in _images(model.config.in_channels, shapes):
        tokens, own = model.tokenize(pixels), encode(pixels)
        decoded = model.detokenize(tokens)
        equal, total = equal + int(own.eq(tokens).sum()), total + tokens.numel()
        difference = max(difference, float((decode(tokens) - decoded).abs().max()))
        height, width = pixels.shape[-2:]
        both = [(x[..., :height, :width] + 1) / 2 for x in (decoded, decode(own))]
        losses += [psnr(x, (pixels + 1) / 2).mean().item() for x in both]
    loss = (sum(losses[0::2]) - sum(losses[1::2])) / len(losses[0::2])
    check = Check(runtime, variant, num_bytes, equal, total, difference, loss)
    if not check.passes():
        raise RuntimeError(f"the exported graphs differ from the model: {check}")
    return check


def _images(channels: int, shapes: Sequence[tuple[int, int, int]]) -> Iterator[torch.Tensor]:
    """Smooth random pictures with some noise, the same ones each time."""
    rng = np.random.default_rng(0)
    for batch, height, width in shapes:
        coarse = torch.from_numpy(rng.uniform(-1, 1, (batch, channels, 8, 8))).float()
        smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
        noise = torch.from_numpy(rng.normal(0, 0.05, (batch, channels, height, width))).float()
        yield (smooth + noise).clamp(-1, 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the warnings of the exporters, which are not about this model."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
