"""The terms of the training loss (paper: the loss), their weighted sum and the adaptive weight of the adversary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..metrics.images import ms_ssim

ADAPTIVE_EPSILON = 1e-4
ADAPTIVE_MAXIMUM = 1e4
LOG_L2_FLOOR = 4e-3  # of the scale [-1, 1]: 30 dB


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """0.5 * (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))): logits of any shape -> scalar, float32."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """g = -mean D(x_hat): logits of any shape -> scalar, float32."""
    return -fake_logits.float().mean()


def adaptive_weight(rec: torch.Tensor, g: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """lambda = ||d rec / d last|| / (||d g / d last|| + 1e-4), clamped to [0, 1e4]: a scalar without gradient, float32.

    Args:
        rec: scalar, the weighted sum of the reconstruction terms; its graph is kept.
        g: scalar, the generator's term; its graph is kept.
        last_layer: the decoder's last weight, in both graphs.
    """
    (rec_gradient,) = torch.autograd.grad(rec, last_layer, retain_graph=True)
    (g_gradient,) = torch.autograd.grad(g, last_layer, retain_graph=True)
    ratio = rec_gradient.float().norm() / (g_gradient.float().norm() + ADAPTIVE_EPSILON)
    return ratio.clamp(0, ADAPTIVE_MAXIMUM).detach()


def take_gradient(
    loss: torch.Tensor, leaf: torch.Tensor, x_hat: torch.Tensor, scaler: torch.amp.GradScaler | None = None
) -> torch.Tensor:
    """The value of `loss`, with its gradient at the reconstruction taken now, once and for all.

    What lies between is walked and freed here; any later backward pass through the result, such as those of
    `adaptive_weight`, starts at `x_hat` with what is known. Exact.

    Args:
        loss: scalar, computed from `leaf`.
        leaf: `x_hat.detach().requires_grad_()`.
        x_hat: reconstructions with their graph.
        scaler: of float16, whose range is too small for the gradient as it is; None: another type.
    """
    if scaler is None:
        (gradient,) = torch.autograd.grad(loss, leaf)
    else:
        (gradient,) = torch.autograd.grad(scaler.scale(loss), leaf)
        gradient = gradient / scaler.scale(torch.ones_like(loss))
    return _KnownGradient.apply(x_hat, loss.detach(), gradient)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, factor: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return factor * gradient, None, None


def weighted_sum(terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """The sum of weight x term. Raises ValueError when a term has no weight or a weight no term, or there are none."""
    if set(terms) != set(weights) or not terms:
        raise ValueError(f"`terms` and `weights` must have the same names, got {sorted(terms)} and {sorted(weights)}")
    return sum(weights[name] * term for name, term in terms.items())


class MSSSIMLoss(nn.Module):
    """1 - mean MS-SSIM of the pixels in [0, 1]; on crops below 176 pixels with fewer scales, see `ms_ssim`."""

    def forward(self, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> scalar, float32."""
        # Unclamped: early reconstructions leave [-1, 1], and a clamped pixel has no gradient to bring it back.
        with torch.autocast(x.device.type, enabled=False):
            return 1 - ms_ssim((x_hat.float() + 1) / 2, (x.float() + 1) / 2, clamp=False).mean()


def grid_pattern(difference: torch.Tensor, x: torch.Tensor, side: int) -> torch.Tensor:
    """Mean square of what all f x f blocks of a batch have wrong in common: scalar, float32.

    At each place within a block, the errors of the batch are fitted by a linear function of the block's mean colours
    (least squares); that function is a pattern which repeats with every position of the latents, and can be seen where
    images are plain. Here is the mean square of its values.

    Args:
        difference: errors (B, C, H, W), float32.
        x: originals of the same shape, for the blocks' colours; no gradient reaches them.
        side: f, in pixels. What is left over at the right and the bottom does not count.
    """
    channels = x.shape[1]

    def blocks(images: torch.Tensor) -> torch.Tensor:  # (blocks, C, f^2)
        parts = images.unfold(2, side, side).unfold(3, side, side)
        return parts.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, side**2)

    colours = blocks(x.detach().float()).mean(2)
    basis = torch.linalg.qr(torch.cat([torch.ones_like(colours[:, :1]), colours], 1))[0]
    errors = blocks(difference).flatten(1)
    return (basis.T @ errors).square().sum() / errors.numel()


def seams(difference: torch.Tensor, side: int) -> torch.Tensor:
    """Mean square of the steps that errors make from one f x f block to the next: scalar, float32; 0 for one block.

    A decoder leaves such steps where positions disagree. They are a small part of the squared error, and the eye sees
    the grid.

    Args:
        difference: errors (B, C, H, W), float32.
        side: f, in pixels.
    """
    steps = [
        (difference[..., side::side, :] - difference[..., side - 1 : -1 : side, :]).flatten(),
        (difference[..., side::side] - difference[..., side - 1 : -1 : side]).flatten(),
    ]
    return torch.cat(steps).square().sum() / max(sum(step.numel() for step in steps), 1)


class ReconstructionLoss(nn.Module):
    """The terms that compare a reconstruction with its original, by name: a term of weight 0 is not computed.

    Args:
        l1_weight: of "l1" = mean |x - x_hat|.
        l2_weight: of "l2" = mean (x - x_hat)^2.
        log_l2_weight: of "log_l2" = mean over images of ln(mean (x - x_hat)^2 + 0.004): each image's PSNR up to a
            factor, levelling off above 30 dB.
        grid_weight: of "grid" = `grid_pattern` of x - x_hat: the pattern that a decoder may lay over plain regions.
        seam_weight: of "seams" = `seams` of x - x_hat: the edges of blocks.
        grid: f of both, in pixels.
        perceptual: module (x_hat, x) -> a distance for each image (B,) or their mean, float32: `LPIPS`, `MSSSIMLoss`
            or another. None: no such term.
        perceptual_weight: of "perceptual", the mean of that distance.
        feature_matching: module (x_hat, x) -> scalar, float32: `FeatureMatching`. None: no such term.
        feature_matching_weight: of "feature_matching".

    Attributes:
        weights: {name: weight} of the terms that `forward` gives.

    Raises ValueError when no term is left, and for a negative weight.
    """

    def __init__(
        self,
        *,
        l1_weight: float = 1.0,
        l2_weight: float = 0.0,
        log_l2_weight: float = 0.0,
        grid_weight: float = 0.0,
        seam_weight: float = 0.0,
        grid: int = 16,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.25,
        feature_matching: nn.Module | None = None,
        feature_matching_weight: float = 1.0,
    ) -> None:
        super().__init__()
        weights = {"l1": l1_weight, "l2": l2_weight, "log_l2": log_l2_weight, "grid": grid_weight}
        weights["seams"] = seam_weight
        if perceptual is not None:
            weights["perceptual"] = perceptual_weight
        if feature_matching is not None:
            weights["feature_matching"] = feature_matching_weight
        if not any(weights.values()) or min(weights.values()) < 0:
            raise ValueError(f"the weights of the reconstruction terms must be >= 0 and not all 0, got {weights}")
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.perceptual, self.feature_matching, self.grid = perceptual, feature_matching, grid

    def forward(self, x_hat: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two batches (B, 3, H, W) in [-1, 1] -> scalars by name, float32. Gradients reach both."""
        terms = {}
        difference = x.float() - x_hat.float()
        if "l1" in self.weights:
            terms["l1"] = difference.abs().mean()
        if "l2" in self.weights:
            terms["l2"] = difference.square().mean()
        if "log_l2" in self.weights:
            terms["log_l2"] = (difference.square().mean(dim=(1, 2, 3)) + LOG_L2_FLOOR).log().mean()
        if "grid" in self.weights:
            terms["grid"] = grid_pattern(difference, x, self.grid)
        if "seams" in self.weights:
            terms["seams"] = seams(difference, self.grid)
        if "perceptual" in self.weights:
            terms["perceptual"] = self.perceptual(x_hat, x).mean()
        if "feature_matching" in self.weights:
            terms["feature_matching"] = self.feature_matching(x_hat, x)
        return terms

    def rec(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The `rec` of the adaptive weight: the weighted sum of the reconstruction terms among `terms`."""
        return weighted_sum({name: terms[name] for name in self.weights}, self.weights)
