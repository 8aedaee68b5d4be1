"""The order in which a generator's hidden tokens are revealed, and how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from .choices import CHOICE_TEMPERATURE, MASKING_SCHEDULES, ORDERS, UNITS
from .masking import hidden_share, hidden_tokens, mask_tokens

ROUNDING = 1e-9  # a share of (1 - .9) of ten tokens is one token
Generator = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class MaskedTokenSchedulerOutput(BaseOutput):
    """What a step of `MaskedTokenScheduler` gives.

    Attributes:
        prev_sample: int64 (B, codebooks, h, w), the tokens with more of them revealed: the model's next input.
        pred_original_sample: likewise, with all hidden tokens as they were drawn in this step.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class MaskedTokenScheduler(SchedulerMixin, ConfigMixin):
    """Draws the hidden tokens of several codebooks and keeps those of the step's choice (MaskGIT, arXiv 2202.04200).

    After step i of n a share s((i + 1) / n) of what was hidden at the start is still hidden, rounded down. A token that
    is known never changes, and after the last step all are known.

    Args:
        codebook_sizes: K_i, codes of each codebook; the token K_i is a hidden one.
        order: what is revealed first. "confidence": tokens whose probability is highest, with Gumbel noise on its
            logarithm (MaskGIT; MaskBit, arXiv 2409.16211). "halton": positions in the order of a Halton sequence, which
            spreads them over the image, from a random place on (Halton-MaskGIT, arXiv 2503.17076).
        units: what is revealed together. "tokens": each token by itself, all codebooks in one row (MaskBit).
            "positions": all tokens of a position, by their joint probability. "books": the first codebook everywhere,
            then the next one; each gets an equal part of the steps.
        masking_schedule: s(r): "arccos" is arccos(r) / (pi/2), "cosine" cos(r pi/2), "linear" 1 - r.

    Raises ValueError for an argument that is wrong.
    """

    order = 1  # of the solver, as diffusers' pipelines ask; the order of revealing is `config.order`

    @register_to_config
    def __init__(
        self,
        *,  # `from_config` takes what was given by position for a default, and drops it
        codebook_sizes: tuple[int, ...] = (512, 512),
        order: str = "confidence",
        units: str = "tokens",
        masking_schedule: str = "arccos",
    ) -> None:
        if not codebook_sizes or min(codebook_sizes) < 1:
            raise ValueError(f"`codebook_sizes` must be numbers of codes of at least 1, got {codebook_sizes!r}")
        for name, value, known in (
            ("order", order, ORDERS),
            ("units", units, UNITS),
            ("masking_schedule", masking_schedule, MASKING_SCHEDULES),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}")
        self.timesteps: torch.Tensor | None = None
        self.temperatures: list[float] = []
        self._rolls: torch.Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | Sequence[float] = CHOICE_TEMPERATURE,
        device: str | torch.device | None = None,
    ) -> None:
        """Begins a new batch of samples.

        Args:
            num_inference_steps: n; `timesteps` are n - 1 ... 0.
            temperature: (first, last) of the noise on the confidences, linear in between; a number: from it to 0.
                With 0 the most confident tokens come first. Without effect in the order "halton".
            device: of `timesteps`.

        Raises ValueError for an argument that is wrong.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}")
        first, last = (temperature, 0.0) if isinstance(temperature, (int, float)) else temperature
        if not (first >= 0 and last >= 0):
            raise ValueError(f"`temperature` must be at least 0, got {temperature!r}")
        self.timesteps = torch.arange(num_inference_steps, device=device).flip(0)
        self.temperatures = np.linspace(first, last, num_inference_steps).tolist()
        self._rolls = None

    def step(
        self,
        model_output: Sequence[torch.Tensor],
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        starting_mask: torch.Tensor | None = None,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> MaskedTokenSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Draws every hidden token and reveals some of them.

        Args:
            model_output: logits of each codebook, (B, K_i, h, w); the softmax is taken in float32.
            timestep: one of `timesteps`.
            sample: int64 (B, codebooks, h, w), the model's input.
            starting_mask: boolean, of the same shape: what was hidden before the first step; None: everything.
            generator: of the draws, or one for each sample; its device may be another than the tensors'.
            return_dict: False: the same as a tuple.

        Raises ValueError for shapes that do not fit, or before `set_timesteps`.
        """
        step, steps = self._begin(model_output, timestep, sample)
        hidden = self.hidden(sample)
        drawn, confidences = draw_tokens(model_output, generator)
        predicted = torch.where(hidden, drawn, sample)

        shape = self._unit_shape(sample)
        unit_hidden = hidden.reshape(shape).any(2)
        starting = (
            unit_hidden.new_ones(()) if starting_mask is None else starting_mask.to(hidden.device).reshape(shape).any(2)
        )
        kept = (starting.expand_as(unit_hidden).sum(2).cpu().double() * self._shares(step, steps) + ROUNDING).floor()
        if self.config.order == "halton":
            scores = self._halton_scores(sample, generator).reshape(shape)[:, :, 0]
        else:
            scores = confidences.masked_fill(~hidden, 0).reshape(shape).sum(2)
            scores = scores + self.temperatures[step] * gumbel_like(scores, generator)
        still_hidden = lowest(scores, unit_hidden, kept.long().to(hidden.device))
        still_hidden = still_hidden[:, :, None].expand(shape).reshape(hidden.shape) & hidden
        tokens = torch.where(still_hidden, mask_tokens(self.config.codebook_sizes, sample.device), predicted)
        return MaskedTokenSchedulerOutput(tokens, predicted) if return_dict else (tokens, predicted)

    def hidden(self, sample: torch.Tensor) -> torch.Tensor:
        """Which of the tokens (B, codebooks, h, w) are hidden, boolean."""
        return hidden_tokens(sample, self.config.codebook_sizes)

    def _begin(
        self, model_output: Sequence[torch.Tensor], timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> tuple[int, int]:
        """Number of the step, from 0, and of all of them. Raises ValueError for what does not fit."""
        if self.timesteps is None:
            raise ValueError("`set_timesteps` must be called before `step`")
        steps = len(self.timesteps)
        if not 0 <= int(timestep) < steps:
            raise ValueError(f"`timestep` must lie in [0, {steps}), got {int(timestep)}")
        sizes = self.config.codebook_sizes
        if sample.ndim != 4 or sample.shape[1] != len(sizes):
            raise ValueError(f"`sample` must have shape (B, {len(sizes)}, h, w), got {tuple(sample.shape)}")
        expected = [(len(sample), size, *sample.shape[2:]) for size in sizes]
        found = [tuple(logits.shape) for logits in model_output]
        if found != expected:
            raise ValueError(f"`model_output` must have the shapes {expected}, got {found}")
        return steps - 1 - int(timestep), steps

    def _unit_shape(self, sample: torch.Tensor) -> tuple[int, int, int, int]:
        """(B, groups, tokens of a unit, units of a group): each group has a schedule of its own."""
        batch, books, positions = *sample.shape[:2], sample.shape[2] * sample.shape[3]
        return {
            "tokens": (batch, 1, 1, books * positions),
            "positions": (batch, 1, books, positions),
            "books": (batch, books, 1, positions),
        }[self.config.units]

    def _shares(self, step: int, steps: int) -> torch.Tensor:
        """The share of each group that is hidden after a step; several groups have one part of the steps each."""
        groups = len(self.config.codebook_sizes) if self.config.units == "books" else 1
        shares = []
        for group in range(groups):
            first, end = steps * group // groups, steps * (group + 1) // groups
            done = (step + 1 - first) / (end - first) if end > first else float(step + 1 >= end)
            shares.append(min(max(done, 0.0), 1.0))
        return hidden_share(torch.tensor(shares, dtype=torch.float64), self.config.masking_schedule)

    def _halton_scores(self, sample: torch.Tensor, generator: Generator) -> torch.Tensor:
        """(B, codebooks, h * w), higher for what comes earlier; codebooks take turns, each from a place of its own."""
        batch, books, height, width = sample.shape
        order = torch.from_numpy(halton_order(height, width))
        if self._rolls is None:
            draws = random_like(torch.empty(batch, books), generator, torch.Tensor.uniform_)
            self._rolls = (draws * len(order)).long().clamp(max=len(order) - 1)
        if self._rolls.shape != (batch, books):
            raise ValueError(f"`sample` must keep its {len(self._rolls)} samples until `set_timesteps`, got {batch}")
        ranks = (order.argsort() + self._rolls[:, :, None]) % len(order)
        return -(ranks + torch.arange(books)[:, None] / books).to(sample.device)


def draw_tokens(logits: Sequence[torch.Tensor], generator: Generator = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens drawn from the softmax of logits, and the logarithms of their probabilities.

    Args:
        logits: of each codebook, (B, K_i, h, w); any floating type.
        generator: one, one for each sample, or None.

    Returns int64 and float32 (B, codebooks, h, w).
    """
    tokens, confidences = [], []
    for part in logits:
        log_probabilities = part.float().log_softmax(1).movedim(1, -1)  # (B, h, w, K)
        ids = _multinomial(log_probabilities.exp(), generator)
        tokens.append(ids)
        confidences.append(log_probabilities.gather(-1, ids[..., None])[..., 0])
    return torch.stack(tokens, 1), torch.stack(confidences, 1)


def _multinomial(probabilities: torch.Tensor, generator: Generator) -> torch.Tensor:
    """(B, h, w, K) -> int64 (B, h, w), drawn on the device of the generator."""
    if isinstance(generator, Sequence):
        parts = zip(probabilities.split(1), generator, strict=True)
        return torch.cat([_multinomial(part, each) for part, each in parts])
    place = probabilities if generator is None else probabilities.to(generator.device)
    drawn = torch.multinomial(place.flatten(0, -2), 1, generator=generator)
    return drawn.view(place.shape[:-1]).to(probabilities.device)


def gumbel_like(values: torch.Tensor, generator: Generator = None) -> torch.Tensor:
    """Gumbel noise of the shape, type and device of `values` (B, ...)."""
    return -random_like(values, generator, torch.Tensor.exponential_).log()


def random_like(values: torch.Tensor, generator: Generator, fill: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Random numbers of the shape, type and device of `values` (B, ...), drawn on the device of the generator.

    Args:
        values: not read.
        generator: one, one for each sample, or None.
        fill: of torch.Tensor, such as `uniform_`.
    """
    if isinstance(generator, Sequence):
        parts = zip(values.split(1), generator, strict=True)
        return torch.cat([random_like(part, each, fill) for part, each in parts])
    place = torch.empty_like(values, device=values.device if generator is None else generator.device)
    return fill(place, generator=generator).to(values.device)


def lowest(scores: torch.Tensor, among: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Marks, of the entries `among`, those with the lowest scores, exactly so many of them as there are.

    Args:
        scores: (..., N).
        among: boolean (..., N).
        counts: int64 (...).
    """
    ranks = scores.masked_fill(~among, math.inf).argsort(-1).argsort(-1)
    return among & (ranks < counts[..., None])


@lru_cache(maxsize=8)
def halton_order(height: int, width: int) -> np.ndarray:
    """Positions of a grid, row * width + column, in the order in which a Halton sequence meets them first.

    The points are (radical inverse of n in base 2, in base 3), n = 1, 2, ...; they choose row and column.
    """
    # A box of the sides 2^-a <= 1/2h and 3^-b <= 1/2w lies inside of every position's, and 2^a 3^b points in a row
    # meet every such box once.
    count = 2 ** math.ceil(math.log2(2 * height)) * 3 ** math.ceil(math.log(2 * width, 3))
    numbers = np.arange(1, count + 1)
    rows, columns = (_scaled_radical_inverse(numbers, *pair) for pair in ((2, height), (3, width)))
    positions, first = np.unique(rows * width + columns, return_index=True)
    return positions[first.argsort()]


def _scaled_radical_inverse(numbers: np.ndarray, base: int, size: int) -> np.ndarray:
    """floor(size * the radical inverse of each number): its digits behind the point, the last one first."""
    inverse, scale, rest = np.zeros_like(numbers), 1, numbers
    while rest.any():
        inverse, scale, rest = inverse * base + rest % base, scale * base, rest // base
    return inverse * size // scale  # in whole numbers: 1/3 of 3 rows is 1
