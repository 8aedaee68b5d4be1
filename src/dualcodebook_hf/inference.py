"""Fast inference: one call that prepares a tokenizer for the machine on which it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from .codebooks import TransformerCodebook
from .core import DualCodebookCore
from .winograd import WinogradConv2d, layers_of, replace_layers, use_winograd, winograd_available

Face = TypeVar("Face", bound=DualCodebookCore)

DTYPES = (torch.float32, torch.bfloat16)
# How much faster bfloat16 must be to be taken: machines that emulate it are several times slower, others twice as fast.
BFLOAT16_GAIN = 1.3
PROBE_CHANNELS, PROBE_SIDE, PROBE_ROUNDS = 128, 48, 2


def optimize_for_inference(model: Face, dtype: torch.dtype | None = None, compile: bool | None = None) -> Face:
    """Makes a tokenizer fast on its device, in place, and returns it: for inference only, and the last thing to do.

    Codes that a transformer computes are kept; activations overwrite what is not needed any more. On a CPU in float32
    3 x 3 convolutions of the VQGAN backbone run by Winograd's algorithm (NNPACK, where torch was built with it), image
    by image; elsewhere, and in bfloat16, the memory format is channels-last.

    bfloat16 is the type of the convolutions; the sums between the encoder's blocks and its ends stay in float32,
    because a token hangs on them, and images go in and come out in float32 as before. State-dict keys stay. Moving the
    model or loading other weights afterwards is not supported.

    Args:
        model: either face with weights in float32, on its device. One in another type keeps it.
        dtype: of the convolutions, float32 or bfloat16; None: `fastest_dtype` of the device.
        compile: encoder and decoder by torch.compile, which takes a while at the first image of each size;
            None: on CUDA.

    Raises ValueError for another `dtype`.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` must be torch.float32, torch.bfloat16 or None, got {dtype}")
    model.eval().requires_grad_(False)
    device = model.device
    if model.dtype == torch.float32:
        dtype = dtype or fastest_dtype(device.type)
        winograd = dtype == torch.float32 and device.type == "cpu" and winograd_available() and _is_vqgan(model)
    else:
        dtype, winograd = model.dtype, False
    replace_layers(model, ResnetBlock2D, InferenceResnetBlock)
    if winograd:
        use_winograd(model)
        model.use_slicing = True  # NNPACK takes one image
    elif device.type != "cpu" or dtype != torch.float32:  # in float32 a CPU is 6% slower with it (DC-AE's blocks)
        model.to(memory_format=torch.channels_last)
    if dtype == torch.bfloat16 and model.dtype == torch.float32:
        _use_bfloat16(model)
    for codebook in model.quantize.codebooks.values():
        if isinstance(codebook, TransformerCodebook):
            codebook.freeze()
    if compile or (compile is None and device.type == "cuda"):
        model.encoder.compile()
        model.decoder.compile()
    return model


@cache
def fastest_dtype(device: str) -> torch.dtype:
    """The type in which a 3 x 3 convolution of the paper's width is fastest on a kind of device, "cpu", "cuda", ...

    Measured once in a process, in half a second, each in the form in which it would be used; bfloat16 must win clearly.
    """
    shape = (1, PROBE_CHANNELS, PROBE_SIDE, PROBE_SIDE)
    conv = nn.Conv2d(PROBE_CHANNELS, PROBE_CHANNELS, 3, padding=1).requires_grad_(False).to(device)
    channels_last = {"memory_format": torch.channels_last}
    low = nn.Conv2d(PROBE_CHANNELS, PROBE_CHANNELS, 3, padding=1).requires_grad_(False)
    low = low.to(device, torch.bfloat16, **channels_last)
    x = torch.zeros(shape, device=device)
    x_low = x.to(torch.bfloat16, **channels_last)
    if device == "cpu":
        conv = WinogradConv2d(conv) if winograd_available() else conv
    else:
        conv, x = conv.to(**channels_last), x.contiguous(**channels_last)
    full, half = map(min, time_in_turns([partial(conv, x), partial(low, x_low)], PROBE_ROUNDS, device))
    return torch.bfloat16 if full > BFLOAT16_GAIN * half else torch.float32


def time_in_turns(
    calls: list[Callable[[], object]],
    rounds: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
    before: list[Callable[[], object]] | None = None,
) -> list[list[float]]:
    """Seconds of each call, round by round: A B A B ..., so that what disturbs the machine meets all of them.

    Args:
        calls: without arguments.
        rounds: after a first one that does not count.
        device: kind of device that is waited for after each call.
        clock: seconds; `time.process_time` leaves out what other processes take.
        before: for each call what is done before it and not timed.
    """
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, first, found in zip(calls, before or [lambda: None] * len(calls), times, strict=True):
            first()
            start = clock()
            call()
            if device != "cpu":
                torch.get_device_module(device).synchronize()
            if number:
                found.append(clock() - start)
    return times


class InferenceResnetBlock(nn.Module):
    """diffusers' ResnetBlock2D of a VAE without temporary copies: activation and sum overwrite their input.

    Inside the block everything is in the type of its convolutions, the sum in the type of the input.

    Args:
        block: its layers are taken over, under their names.
    """

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, x: torch.Tensor, temb: None = None) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H, W); `temb` is diffusers' argument that a VAE leaves out."""
        h = self.norm1(x).to(self.conv1.weight.dtype)
        h = self.conv1(F.silu(h, inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h.add_(shortcut) if h.dtype == x.dtype else shortcut + h


class BFloat16Conv2d(nn.Module):
    """A convolution in bfloat16 whose input and output keep their type.

    Args:
        conv: its parameters are taken over, in bfloat16.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.to(torch.bfloat16).weight, conv.bias
        self.options = {"stride": conv.stride, "padding": conv.padding}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return F.conv2d(x.to(torch.bfloat16), self.weight, self.bias, **self.options).to(x.dtype)


def _use_bfloat16(model: DualCodebookCore) -> None:
    encoder, decoder = model.encoder, model.decoder
    ends = (encoder.conv_in, encoder.conv_out)
    for parent, name, conv in layers_of(encoder, nn.Conv2d, WinogradConv2d):
        if conv not in ends and parent not in ends:
            setattr(parent, name, BFloat16Conv2d(conv))
    for block in encoder.modules():
        if isinstance(block, InferenceResnetBlock):
            block.norm2.to(torch.bfloat16)
    decoder.to(torch.bfloat16)
    decoder.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(torch.bfloat16),))
    decoder.register_forward_hook(lambda module, inputs, output: output.float())


def _is_vqgan(model: DualCodebookCore) -> bool:
    """DC-AE's blocks normalise over the channels, and are narrow where images are large."""
    return model.config.backbone == "vqgan"
