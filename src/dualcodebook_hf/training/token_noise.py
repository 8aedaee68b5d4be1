"""Wrong tokens in training (RobustTok, arXiv 2503.08354): the decoder learns to bear what a generator gets wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..quantizers import Quantizer, QuantizerOutput


class TokenNoise:
    """In some images of a training batch, the decoder gets other codes than the tokens' own: near ones, drawn evenly.

    Tokens and codebook losses stay what they are, and the straight-through gradient too. What is drawn comes from
    torch's global generator of the tokens' device. Codes that leave a transformer are computed once more for it.

    Args:
        network: with `quantize`; there is no noise while it is in eval mode.
        share: of the tokens of an image with noise that are replaced, in [0, 1].
        images: chance of an image to be one with noise, in [0, 1].
        neighbours: a token is replaced by one of so many nearest codes of its codebook; itself does not count.
    """

    def __init__(self, network: nn.Module, share: float, images: float, neighbours: int) -> None:
        self.network, self.share, self.images, self.neighbours = network, share, images, neighbours
        network.quantize.register_forward_hook(self._replace)

    @torch.no_grad()
    def _replace(self, quantizer: Quantizer, arguments: Any, output: Any) -> Any:
        if not (self.network.training and isinstance(output, QuantizerOutput)):
            return None
        tokens, parts = output.tokens, []
        noisy = torch.rand(len(tokens), 1, 1, 1, device=tokens.device) < self.images
        replaced = noisy & (torch.rand(tokens.shape, device=tokens.device) < self.share)
        for number, codebook in enumerate(quantizer.codebooks.values()):
            codes, own = codebook.codes(), tokens[:, number]
            others = torch.where(replaced[:, number], self._near(codes, own), own)
            parts.append((codes[others] - codes[own]).movedim(-1, 1))
        with torch.enable_grad():
            output.quantized = output.quantized + torch.cat(parts, 1).to(output.quantized.dtype)
        return output

    def _near(self, codes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """One of the nearest other codes of each token."""
        count = min(self.neighbours, len(codes) - 1)
        # Of the tokens alone: a codebook of 262,144 codes has no matrix of all distances.
        distances = torch.cdist(codes[tokens.flatten()], codes).scatter_(1, tokens.reshape(-1, 1), torch.inf)
        near = distances.topk(count, largest=False).indices
        chosen = torch.randint(count, (len(near), 1), device=near.device)
        return near.gather(1, chosen).reshape(tokens.shape)
