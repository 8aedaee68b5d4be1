"""3 x 3 convolutions on a CPU by Winograd's algorithm, in inference and in training, and how layers are exchanged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# Below these NNPACK's transform of the weights costs more than its fewer multiplications save (measured, AVX2).
WINOGRAD_CHANNELS, WINOGRAD_POSITIONS = 64, 48 * 48


def use_winograd(network: nn.Module) -> None:
    """On a CPU, 3 x 3 convolutions become `WinogradConv2d`, where it is worth it. State-dict keys stay.

    Args:
        network: on its device, frozen or in training; changed in place.
    """
    device = next(network.parameters(), torch.empty(0)).device
    if device.type == "cpu" and winograd_available():
        replace_layers(network, nn.Conv2d, lambda conv: WinogradConv2d(conv) if WinogradConv2d.takes(conv) else conv)


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 that NNPACK computes by F(6 x 6, 3 x 3): 5 times fewer multiplications.

    So is the gradient in its input; the one in its weights goes the usual way. Larger rounding errors (1e-4 of the
    values' deviation instead of 1e-5); small images and other types than float32 go the usual way too.

    Args:
        conv: its parameters are taken over.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        bias = conv.bias is not None
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, bias=bias, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    @staticmethod
    def takes(conv: nn.Conv2d) -> bool:
        """Whether it can stand for `conv`, and is worth it."""
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        return (
            shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
            and min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        large = len(x) > 0 and x.shape[2] * x.shape[3] >= WINOGRAD_POSITIONS
        plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
        if plain and large and x.dtype == torch.float32 and x.device.type == "cpu" and winograd_available():
            return _Winograd.apply(x, self.weight, self.bias)
        return super().forward(x)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        trained = any(ctx.needs_input_grad[1:])
        ctx.save_for_backward(weight, x if trained else None)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return _winograd(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        in_input, *in_parameters = ctx.needs_input_grad
        found = _winograd(gradient, weight.flip(2, 3).transpose(0, 1).contiguous(), None) if in_input else None
        if not any(in_parameters):
            return found, None, None
        shape = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation; not transposed; groups
        mask = [False, *in_parameters]
        return found, *torch.ops.aten.convolution_backward(gradient, x, weight, ctx.bias_sizes, *shape, mask)[1:]


def _winograd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    parts = [torch._nnpack_spatial_convolution(one, weight, bias, padding=1) for one in x.split(1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def winograd_available() -> bool:
    """Whether torch has NNPACK and the processor runs it; the question also initialises it."""
    return torch.backends.nnpack.is_available()


def replace_layers(model: nn.Module, kind: type[nn.Module], build: Callable[[nn.Module], nn.Module]) -> None:
    """Puts `build(layer)` in the place of each layer of exactly that kind."""
    for parent, name, layer in layers_of(model, kind):
        setattr(parent, name, build(layer))


def layers_of(model: nn.Module, *kinds: type[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of all layers of exactly these kinds, not of classes made from them."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in kinds
    ]
