"""Which tokens training hides, the loss on them, and the masks under which validation measures bits per position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


def hidden_share(progress: torch.Tensor, schedule: str) -> torch.Tensor:
    """Share of tokens that are hidden where a share `progress` of the sampling is over: 1 at 0, 0 at 1.

    Args:
        progress: in [0, 1], any shape.
        schedule: "arccos" (MaskBit, arXiv 2409.16211), "cosine" (MaskGIT, arXiv 2202.04200) or "linear".
    """
    if schedule == "arccos":
        return torch.acos(progress) * (2 / math.pi)
    return torch.cos(progress * (math.pi / 2)) if schedule == "cosine" else 1 - progress


def draw_hidden(tokens: torch.Tensor, masking: str, schedule: str) -> torch.Tensor:
    """Draws from torch's global generator of the tokens' device which of them are hidden: bool, of their shape.

    Of every sample the share is drawn first, then that many of its tokens, at least one.

    - "tokens": of every codebook the same number, each at places of its own (MaskBit).
    - "positions": at the same places in all codebooks.
    - "books": of one codebook, drawn evenly; those before it are not hidden, those behind it wholly.

    Args:
        tokens: (B, codebooks, h, w).
        masking: one of the above.
        schedule: see `hidden_share`.
    """
    batch, codebooks, height, width = tokens.shape
    share = hidden_share(torch.rand(batch, device=tokens.device), schedule)
    count = (share * (height * width)).ceil().clamp(min=1).long()
    ranks = torch.rand(batch, codebooks, height * width, device=tokens.device).argsort(2).argsort(2)
    hidden = ranks < count[:, None, None]
    if masking == "positions":
        hidden = hidden[:, :1].expand(-1, codebooks, -1)
    elif masking == "books":
        chosen = torch.randint(codebooks, (batch, 1, 1), device=tokens.device)
        book = torch.arange(codebooks, device=tokens.device)[None, :, None]
        hidden = (hidden & (book == chosen)) | (book > chosen)
    return hidden.reshape(tokens.shape)


def mask_tokens(codebook_sizes: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    """The token that hides others, K_i of each codebook, int64 (codebooks, 1, 1) for grids (..., codebooks, h, w)."""
    return torch.tensor(list(codebook_sizes), device=device)[:, None, None]


def hidden_tokens(tokens: torch.Tensor, codebook_sizes: Sequence[int]) -> torch.Tensor:
    """Which of the tokens (..., codebooks, h, w) are hidden, bool."""
    return tokens == mask_tokens(codebook_sizes, tokens.device)


def cross_entropies(logits: Sequence[torch.Tensor], tokens: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of every token in nats, float32 (B, codebooks, h, w).

    Args:
        logits: of each codebook, (B, K_i, h, w).
        tokens: int64 (B, codebooks, h, w).
        label_smoothing: share of the target that is spread over all codes.
    """
    columns = [
        F.cross_entropy(part.float(), target, reduction="none", label_smoothing=label_smoothing)
        for part, target in zip(logits, tokens.unbind(1), strict=True)
    ]
    return torch.stack(columns, 1)


class ScoredMask(NamedTuple):
    """One forward pass of a measurement.

    Attributes:
        hidden: bool (codebooks, h, w).
        weight: float32 (codebooks, h, w), what a token's cross-entropy counts; 0 for those that are not hidden.
    """

    hidden: np.ndarray
    weight: np.ndarray


def scored_masks(shape: tuple[int, int, int], masking: str, place: float, rng: np.random.Generator) -> list[ScoredMask]:
    """Masks whose weighted cross-entropies sum to a sample of the negative log likelihood per position.

    Who reveals tokens one by one in a random order gives an image a likelihood, and its negative logarithm is on
    average at most that sum: with n of N hidden, n drawn evenly, N times the mean over the hidden ones (Hoogeboom et
    al., arXiv 2110.02037, formula 3). Here a step reveals what the masking hides together: a token, a position, or a
    token of the first codebook that is not known yet.

    Args:
        shape: (codebooks, h, w).
        masking: see `draw_hidden`.
        place: in [0, 1), the part of 1...N that n is; spread evenly over images, it costs less variance than chance.
        rng: draws which ones are hidden.
    """
    codebooks, height, width = shape
    positions = height * width
    if masking == "tokens":
        hidden = _drawn(codebooks * positions, place, rng)
        return [_scored(hidden.reshape(shape), hidden.reshape(shape), codebooks)]
    if masking == "positions":
        hidden = np.broadcast_to(_drawn(positions, place, rng).reshape(height, width), shape)
        return [_scored(hidden, hidden, codebooks)]
    masks = []
    for number in range(codebooks):
        scored = np.zeros(shape, bool)
        scored[number] = _drawn(positions, place, rng).reshape(height, width)
        hidden = scored.copy()
        hidden[number + 1 :] = True
        masks.append(_scored(hidden, scored, 1))
    return masks


def _drawn(count: int, place: float, rng: np.random.Generator) -> np.ndarray:
    """bool (count,): 1 to `count` of them, by `place`."""
    return rng.permutation(count) < 1 + int(place * count)


def _scored(hidden: np.ndarray, scored: np.ndarray, tokens_per_position: int) -> ScoredMask:
    """The mean over the scored tokens, times what a position has of them."""
    weight = scored * np.float32(tokens_per_position / scored.sum())
    return ScoredMask(np.ascontiguousarray(hidden), weight.astype(np.float32))
