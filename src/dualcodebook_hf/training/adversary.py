"""The adversary of training: the discriminator, its optimizer, its start, and the generator's term."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from .discriminators.augment import Augmentation
from .losses import adaptive_weight, generator_loss, hinge_discriminator_loss, take_gradient

if TYPE_CHECKING:
    from accelerate import Accelerator


class Adversary:
    """A discriminator and what belongs to it. Before `start_step` it costs nothing: no forward pass, no gradient.

    It leaves backward passes and steps to its user; an update of both networks is::

        with accelerator.accumulate(model, adversary.discriminator):
            out = model(x)
            terms = reconstruction(out.sample, x)
            g = adversary.generator_term(out.sample, reconstruction.rec(terms), last_layer, step)
            accelerator.backward(... + g)                      # and the generator's optimizer
            loss = adversary.discriminator_loss(x, out.sample, step)
            if loss is not None:
                accelerator.backward(loss)                     # and adversary.optimizer

    Several processes: run DDP with `broadcast_buffers=False` (broadcasting writes to BatchNorm's buffers between the
    two forward passes of D, and its backward pass refuses that); `sync_buffers` keeps them equal instead. The
    statistics that normalise a batch are those of each process.

    Args:
        discriminator: network, images (B, 3, H, W) in [-1, 1] -> logits of any shape, high for real images. Only its
            parameters that require a gradient are trained.
        learning_rate: of Adam.
        betas: of Adam (paper: 0.5 and 0.9).
        start_step: generator updates before the adversary starts (paper: 10,000).
        weight: of the generator's term, beside the adaptive weight (paper: 0.8).
        ramp: updates over which `weight` rises linearly from 0, from the start on; 0: it is there at once (paper).
        adaptive: multiply the generator's term by the adaptive weight (paper); False: `weight` alone counts.
        augmentation: of what the discriminator sees, real images and reconstructions; None: nothing (paper).

    Attributes:
        discriminator: the network; after `prepare` wrapped for distribution.
        optimizer: its Adam; after `prepare` accelerate's.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.5, 0.9),
        start_step: int = 10_000,
        weight: float = 0.8,
        ramp: int = 0,
        adaptive: bool = True,
        augmentation: Augmentation | None = None,
    ) -> None:
        for name, value in (("weight", weight), ("start_step", start_step), ("ramp", ramp)):
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}")
        self.ramp, self.adaptive, self.augmentation = ramp, adaptive, augmentation or Augmentation()
        self.start_step, self.weight, self.learning_rate = start_step, weight, learning_rate
        self._network = self.discriminator = discriminator
        parameters = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=betas, fused=True)
        self.scaler: torch.amp.GradScaler | None = None

    def prepare(self, accelerator: Accelerator) -> None:
        """Hands the network and the optimizer to accelerate: device, distribution, mixed precision, checkpoints."""
        self.discriminator, self.optimizer = accelerator.prepare(self.discriminator, self.optimizer)
        self.scaler = accelerator.scaler

    def started(self, step: int) -> bool:
        """Whether the adversary takes part in the update that follows `step` updates of the generator."""
        return step >= self.start_step

    def ramp_factor(self, step: int) -> float:
        """Share of the weight in the update that follows `step` updates of the generator, once it has started."""
        return min((step - self.start_step + 1) / self.ramp, 1.0) if self.ramp else 1.0

    def generator_term(
        self, x_hat: torch.Tensor, rec: torch.Tensor, last_layer: torch.Tensor, step: int
    ) -> torch.Tensor:
        """lambda * weight * g with g = -mean D(x_hat), all weights included: a scalar, float32; 0 before the start.

        Without the adaptive weight lambda is 1.

        Args:
            x_hat: reconstructions (B, 3, H, W) in [-1, 1] with their graph; gradients reach them and nothing of D.
            rec: scalar, the weighted sum of the reconstruction terms (`ReconstructionLoss.rec`), for lambda; its graph
                is walked here too, which costs little after `losses.take_gradient`.
            last_layer: the decoder's last weight (`conv_out.weight`), in the graphs of both.
            step: generator updates taken so far.
        """
        if not self.started(step):
            return torch.zeros((), device=x_hat.device)
        leaf = x_hat.detach().requires_grad_()
        # The bare network: DDP would wait for gradients that frozen parameters never get.
        with _frozen(self._network):
            g = generator_loss(self._network(self.augmentation(leaf)))
            g = take_gradient(g, leaf, x_hat, self.scaler)
        weight = self.weight * self.ramp_factor(step)
        return adaptive_weight(rec, g, last_layer) * weight * g if self.adaptive else weight * g

    def discriminator_loss(self, x: torch.Tensor, x_hat: torch.Tensor, step: int) -> torch.Tensor | None:
        """The hinge loss of D: a scalar, float32; None before the start. Nothing flows back into `x_hat`.

        Args:
            x: originals (B, 3, H, W) in [-1, 1].
            x_hat: reconstructions, of the same shape.
            step: generator updates taken so far; the same number as given to `generator_term`.
        """
        if not self.started(step):
            return None
        real, fake = (self.discriminator(self.augmentation(images)) for images in (x, x_hat.detach()))
        loss = hinge_discriminator_loss(real, fake)
        self.sync_buffers()
        return loss

    def sync_buffers(self) -> None:
        """Averages BatchNorm's running statistics over the processes, which all must call it together.

        `discriminator_loss` does so itself.
        """
        # `.data`: backward passes still to come check that the buffers were not written to, and do not read them.
        # A frozen part stays in eval mode, and its buffers as they are.
        moving = [module for module in self._network.modules() if module.training]
        buffers = [buffer for module in moving for buffer in module.buffers(recurse=False)]
        buffers = [buffer.data for buffer in buffers if buffer.is_floating_point()]
        if not (buffers and dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        packed = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
        for buffer, mean in zip(buffers, packed.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
