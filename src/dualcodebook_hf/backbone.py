"""Encoder and decoder of the tokenizer, all of them diffusers' own blocks, chosen by `config.backbone`.

`vqgan`: the network of VQGAN and of the paper (diffusers' VQModel holds the same one).
`dcae`: DC-AE's residual blocks with pixel-(un)shuffle resampling, cheap enough to train on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_dc, vae
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_dualcodebook import DualCodebookConfig


class CheckpointedLevel(GradientCheckpointingLayer, nn.Sequential):
    """A resolution level of DC-AE that does gradient checkpointing; diffusers' own levels do none."""


def build_encoder(config: DualCodebookConfig) -> nn.Module:
    """(B, in_channels, H, W) with H, W multiples of f -> (B, latent_channels, H/f, W/f)."""
    widths = config.block_out_channels
    if config.backbone == "dcae":
        options = _dcae_options(config, widths, config.encoder_layers)
        encoder = autoencoder_dc.Encoder(config.in_channels, out_shortcut=False, **options)
        levels: Any = encoder.down_blocks
        encoder.down_blocks = nn.ModuleList(CheckpointedLevel(*level) for level in levels)
        return encoder
    attention = "AttnDownEncoderBlock2D" if config.attention else "DownEncoderBlock2D"
    return vae.Encoder(
        in_channels=config.in_channels,
        out_channels=config.latent_width,
        down_block_types=("DownEncoderBlock2D",) * (len(widths) - 1) + (attention,),
        double_z=False,
        **_vqgan_options(config, widths),
    )


def build_decoder(config: DualCodebookConfig) -> nn.Module:
    """(B, latent_channels, h, w) -> (B, out_channels, h*f, w*f)."""
    widths = config.decoder_widths
    if config.backbone == "dcae":
        # The first argument, diffusers' `in_channels`, is the image's also in a decoder.
        options = _dcae_options(config, widths, config.decoder_layers)
        decoder = autoencoder_dc.Decoder(config.out_channels, in_shortcut=False, **options)
        levels: Any = decoder.up_blocks
        decoder.up_blocks = nn.ModuleList(CheckpointedLevel(*level) for level in levels)
        return decoder
    attention = "AttnUpDecoderBlock2D" if config.attention else "UpDecoderBlock2D"
    return vae.Decoder(
        in_channels=config.latent_width,
        out_channels=config.out_channels,
        up_block_types=(attention,) + ("UpDecoderBlock2D",) * (len(widths) - 1),
        **_vqgan_options(config, widths),
    )


def build_linear_decoder(config: DualCodebookConfig) -> nn.ConvTranspose2d:
    """(B, vq_embed_dim, h, w) -> (B, out_channels, h*f, w*f): patches of f x f or, overlapping, of 2f x 2f."""
    factor = config.downsample_factor
    kernel, padding = (2 * factor, factor // 2) if config.overlapping_shortcut else (factor, 0)
    return nn.ConvTranspose2d(config.latent_width, config.out_channels, kernel, stride=factor, padding=padding)


def _dcae_options(config: DualCodebookConfig, widths: list[int], layers: list[int]) -> dict[str, Any]:
    return {
        "latent_channels": config.latent_width,
        "block_out_channels": tuple(widths),
        "layers_per_block": tuple(layers),
        "qkv_multiscales": ((),) * len(widths),
    }


def _vqgan_options(config: DualCodebookConfig, widths: list[int]) -> dict[str, Any]:
    return {
        "block_out_channels": tuple(widths),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": config.attention if config.mid_attention is None else config.mid_attention,
    }


def last_convolution(decoder: nn.Module) -> nn.Conv2d:
    """The decoder's output convolution: its weight is "the last layer" of the adaptive weight (paper: the loss)."""
    last: Any = decoder.conv_out
    return last.conv if isinstance(last, autoencoder_dc.DCUpBlock2d) else last


def pad_to_multiple(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Pads (..., H, W) at the bottom and the right up to the next multiples of `factor`.

    The image is continued by reflection, repeated as often as needed; a side of one pixel repeats its edge value.
    """
    for dim in (-2, -1):
        size = x.shape[dim]
        target = -(-size // factor) * factor
        if target != size:
            period = max(2 * (size - 1), 1)
            index = torch.arange(target, device=x.device) % period
            x = x.index_select(dim, torch.where(index < size, index, period - index))
    return x
