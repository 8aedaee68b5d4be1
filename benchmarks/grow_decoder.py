"""Writes a tokenizer whose decoder is wider and deeper and computes the same images (Net2Net, arXiv 1511.05641).

    python benchmarks/grow_decoder.py MODEL --widths 16 32 64 128 256 --layers 0 2 2 2 1 --overlap --output DIR

For `backbone: dcae`. Training goes on from it: `init_from: DIR`, `train: decoder`. The tokens stay the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, Decoder, ResBlock
from torch import nn

from dualcodebook_hf import DualCodebookImageProcessor, DualCodebookVQModel
from dualcodebook_hf.configuration_dualcodebook import DualCodebookFields
from dualcodebook_hf.loading import load_tokenizer


@torch.no_grad()
def grow(
    model: DualCodebookVQModel, widths: Sequence[int], layers: Sequence[int], overlapping: bool, seed: int = 0
) -> DualCodebookVQModel:
    """The same function with `decoder_block_out_channels: widths` and `decoder_layers_per_level: layers`.

    Args:
        model: of `backbone: dcae`, with a decoder nowhere wider or deeper than asked for.
        widths: of each level, as in the configuration.
        layers: of each level; the first stays what it is.
        overlapping: turn `overlapping_shortcut` on.
        seed: of the new weights, which at first are multiplied by zeros.
    """
    torch.manual_seed(seed)
    known = {spec.name for spec in fields(DualCodebookFields)} & set(model.config)
    settings = {name: model.config[name] for name in known}
    grown = DualCodebookVQModel(
        **settings
        | {
            "decoder_block_out_channels": list(widths),
            "decoder_layers_per_level": list(layers),
            "overlapping_shortcut": overlapping,
        }
    ).eval()
    state = model.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith(("decoder.", "linear_decoder."))}
    grown.load_state_dict(kept, strict=False)
    if grown.linear_decoder is not None:
        margin = (grown.linear_decoder.kernel_size[0] - model.linear_decoder.kernel_size[0]) // 2
        grown.linear_decoder.weight.copy_(F.pad(model.linear_decoder.weight, (margin,) * 4))
        grown.linear_decoder.bias.copy_(model.linear_decoder.bias)
    _grow_decoder(model.decoder, grown.decoder)
    return grown


def _grow_decoder(old: Decoder, new: Decoder) -> None:
    _widen(old.conv_in, new.conv_in)
    for level, wider in zip(old.up_blocks, new.up_blocks, strict=True):
        for index, block in enumerate(wider):
            if index >= len(level):
                nn.init.zeros_(block.norm.weight)  # a new block adds nothing
            elif isinstance(block, DCUpBlock2d):
                _widen_upsampling(level[index], block)
            else:
                _widen_residual(level[index], block)
    _widen_norm(old.norm_out, new.norm_out)
    last, wider = (getattr(decoder.conv_out, "conv", decoder.conv_out) for decoder in (old, new))
    _widen(last, wider)
    # Between them is a ReLU, which stops the gradient at 0: additional channels are above it, and not used yet.
    width = last.in_channels
    new.norm_out.bias[width:] = 0.1
    wider.weight[:, width:] = 0


def _widen(old: nn.Conv2d, new: nn.Conv2d) -> None:
    """Additional inputs, which are zero at first, keep their random weights; additional outputs are zero."""
    outputs, inputs = old.weight.shape[:2]
    new.weight[outputs:] = 0
    new.weight[:outputs, :inputs] = old.weight
    if new.bias is not None:
        new.bias.zero_()
        new.bias[:outputs] = old.bias


def _widen_norm(old: nn.Module, new: nn.Module) -> None:
    """Zeros among the channels make their root mean square smaller; the weight makes up for it."""
    count, wide = len(old.weight), len(new.weight)
    new.weight.fill_(old.weight.mean() * (count / wide) ** 0.5)
    new.weight[:count] = old.weight * (count / wide) ** 0.5
    new.bias.zero_()
    new.bias[:count] = old.bias


def _widen_residual(old: ResBlock, new: ResBlock) -> None:
    width = len(old.conv1.weight)
    random = new.conv1.weight[width:].clone()
    _widen(old.conv1, new.conv1)
    new.conv1.weight[width:] = random
    _widen(old.conv2, new.conv2)
    new.conv2.weight[:, width:] = 0
    _widen_norm(old.norm, new.norm)


def _widen_upsampling(old: DCUpBlock2d, new: DCUpBlock2d) -> None:
    """The shortcut repeats other channels when the widths change: the kernel's centre takes the difference."""
    _widen(old.conv, new.conv)
    centre = new.conv.weight[:, :, 1, 1]
    for output in range(len(new.conv.weight)):
        centre[output, output // new.repeats] -= 1
        if output < len(old.conv.weight):
            centre[output, output // old.repeats] += 1


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--widths", type=int, nargs="+", required=True, help="of each level of the decoder")
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="of each level of the decoder")
    parser.add_argument("--overlap", action="store_true", help="overlapping patches of the linear shortcut")
    parser.add_argument("--output", required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    model = load_tokenizer(arguments.model, device="cpu").float()
    grown = grow(model, arguments.widths, arguments.layers, arguments.overlap)
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        difference = (grown(images).sample - model(images).sample).abs().max().item()
    grown.save_pretrained(arguments.output)
    DualCodebookImageProcessor().save_pretrained(arguments.output)
    print(f"{grown.num_parameters():,} parameters (were {model.num_parameters():,}), pixels differ by {difference:.1e}")


if __name__ == "__main__":
    main()
