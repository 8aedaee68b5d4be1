"""Encoder and decoder of the tokenizer, all of them diffusers' own blocks, chosen by `config.backbone`.

`vqgan`: the network of VQGAN and of the paper (diffusers' VQModel holds the same one).
`dcae`: DC-AE's residual blocks with pixel-(un)shuffle resampling, cheap enough to train on a CPU.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders import autoencoder_dc, vae
from torch import nn

from .configuration_dualcodebook import DualCodebookConfig


class DCEncoder(autoencoder_dc.Encoder):
    """DC-AE's encoder, with gradient checkpointing a level at a time (diffusers' own has none)."""

    gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, latent_channels, H/f, W/f)."""
        if not (torch.is_grad_enabled() and self.gradient_checkpointing):
            return super().forward(hidden_states)
        hidden_states = self.conv_in(hidden_states)
        for block in self.down_blocks:
            hidden_states = self._gradient_checkpointing_func(block, hidden_states)
        return self.conv_out(hidden_states)


class DCDecoder(autoencoder_dc.Decoder):
    """DC-AE's decoder, with gradient checkpointing a level at a time (diffusers' own has none)."""

    gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, latent_channels, h, w) -> (B, out_channels, h*f, w*f)."""
        if not (torch.is_grad_enabled() and self.gradient_checkpointing):
            return super().forward(hidden_states)
        hidden_states = self.conv_in(hidden_states)
        for block in reversed(self.up_blocks):
            hidden_states = self._gradient_checkpointing_func(block, hidden_states)
        hidden_states = self.norm_out(hidden_states.movedim(1, -1)).movedim(-1, 1)
        return self.conv_out(self.conv_act(hidden_states))


def build_encoder(config: DualCodebookConfig) -> nn.Module:
    """(B, in_channels, H, W) with H, W multiples of f -> (B, latent_channels, H/f, W/f)."""
    if config.backbone == "dcae":
        return DCEncoder(
            in_channels=config.in_channels,
            latent_channels=config.latent_channels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=_layers(config),
            qkv_multiscales=((),) * len(config.block_out_channels),
            out_shortcut=False,
        )
    plain = len(config.block_out_channels) - 1
    return vae.Encoder(
        in_channels=config.in_channels,
        out_channels=config.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * plain
        + ("AttnDownEncoderBlock2D" if config.attention else "DownEncoderBlock2D",),
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        double_z=False,
        mid_block_add_attention=_middle_attention(config),
    )


def build_decoder(config: DualCodebookConfig) -> nn.Module:
    """(B, latent_channels, h, w) -> (B, out_channels, h*f, w*f)."""
    if config.backbone == "dcae":
        return DCDecoder(
            in_channels=config.out_channels,
            latent_channels=config.latent_channels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=_layers(config),
            qkv_multiscales=((),) * len(config.block_out_channels),
            in_shortcut=False,
        )
    plain = len(config.block_out_channels) - 1
    return vae.Decoder(
        in_channels=config.latent_channels,
        out_channels=config.out_channels,
        up_block_types=("AttnUpDecoderBlock2D" if config.attention else "UpDecoderBlock2D",)
        + ("UpDecoderBlock2D",) * plain,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=_middle_attention(config),
    )


def last_convolution(decoder: nn.Module) -> nn.Conv2d:
    """The decoder's output convolution: its weight is "the last layer" of the adaptive weight (paper: the loss)."""
    last = decoder.conv_out
    return last.conv if isinstance(last, autoencoder_dc.DCUpBlock2d) else last


def _middle_attention(config: DualCodebookConfig) -> bool:
    return config.attention if config.mid_attention is None else config.mid_attention


def _layers(config: DualCodebookConfig) -> tuple[int, ...]:
    return tuple(config.layers_per_level or [config.layers_per_block] * len(config.block_out_channels))


def pad_to_multiple(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Pads (..., H, W) at the bottom and the right up to the next multiples of `factor`.

    The picture is continued by reflection, repeated as often as needed; a side of one pixel repeats its edge value.
    """
    for dim in (-2, -1):
        size = x.shape[dim]
        target = -(-size // factor) * factor
        if target != size:
            period = max(2 * (size - 1), 1)
            index = torch.arange(target, device=x.device) % period
            x = x.index_select(dim, torch.where(index < size, index, period - index))
    return x
