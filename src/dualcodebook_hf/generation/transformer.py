"""The masked transformer: a grid of tokens, some of them hidden, to a distribution over the codes of each codebook."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..weights import StrictWeights, readable
from .choices import check_network

LARGEST_VOCABULARY = 2**16  # codes of a codebook that token files hold


@dataclass
class DualCodebookTransformerOutput(BaseOutput):
    """What `DualCodebookTransformer` gives.

    Attributes:
        logits: for each codebook i, (B, K_i, h, w).
    """

    logits: tuple[torch.Tensor, ...]


class DualCodebookTransformer(StrictWeights, ModelMixin, ConfigMixin):
    """Predicts the hidden tokens of an image from those that are known (MaskGIT, arXiv 2202.04200).

    As in MaskBit (arXiv 2409.16211), the embeddings of a position's tokens are summed, each token may be hidden by
    itself, and each codebook has a head of its own. The class is one more token in front of the positions.

    Args:
        codebook_sizes: K_i, codes of each codebook. The token K_i hides a token of codebook i.
        num_classes: classes; the label `num_classes` means none of them. None: a generator without classes.
        sample_size: (h, w), positions of the grid that is trained on; for other grids the positions are stretched.
        hidden_size: width.
        num_layers: blocks.
        num_attention_heads: of each block; they divide the width.
        mlp_ratio: width of a block's hidden layer, as a multiple of `hidden_size`.
        dropout: share of activations that training drops, behind the embeddings and in every block.
        tokenizer_config_hash: `config_hash` of the tokenizer whose tokens these are; None: unknown.
        tokenizer_weights_sha256: `encoder_hash` of it; None: unknown.

    Raises ValueError for an argument that is wrong.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        codebook_sizes: tuple[int, ...] = (512, 512),
        *,
        num_classes: int | None = None,
        sample_size: tuple[int, int] = (16, 16),
        hidden_size: int = 384,
        num_layers: int = 6,
        num_attention_heads: int = 6,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        tokenizer_config_hash: str | None = None,
        tokenizer_weights_sha256: str | None = None,
    ) -> None:
        super().__init__()
        check_grid(codebook_sizes, num_classes, sample_size)
        check_network(hidden_size, num_layers, num_attention_heads, mlp_ratio, dropout)
        self.gradient_checkpointing = False
        self.token_embeddings = nn.ModuleList(nn.Embedding(size + 1, hidden_size) for size in codebook_sizes)
        self.class_embedding = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.positions = nn.Parameter(torch.empty(1, hidden_size, *sample_size))
        self.embedding_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_attention_heads, round(mlp_ratio * hidden_size), dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.heads = nn.ModuleList(nn.Linear(hidden_size, size) for size in codebook_sizes)
        self._initialize(num_layers)

    def _initialize(self, num_layers: int) -> None:
        """Normal with a deviation of .02; what is added to the residual stream is smaller, as in GPT-2."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.02)
        for block in self.blocks:
            for layer in (block.attention.out, block.mlp[-1]):
                nn.init.normal_(layer.weight, std=0.02 / (2 * num_layers) ** 0.5)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """diffusers' method (folder or Hub id, eval mode), strict.

        Raises ValueError, naming the file and the tensors, for weights that do not fit config.json, whole, or are not
        finite; OSError where there are none.
        """
        with readable(pretrained_model_name_or_path, kwargs):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def mask_token_ids(self) -> tuple[int, ...]:
        """For each codebook, the token that stands for a hidden one."""
        return tuple(self.config.codebook_sizes)

    def forward(
        self, tokens: torch.Tensor, class_labels: torch.Tensor | None = None, return_dict: bool = True
    ) -> DualCodebookTransformerOutput | tuple:
        """Logits of every token, the known ones included.

        Args:
            tokens: int64 (B, codebooks, h, w), each a code of its codebook or its mask token.
            class_labels: int64 (B,) in [0, num_classes]; None: no class.
            return_dict: False: the same as a tuple.

        Raises ValueError for shapes that do not fit.
        """
        labels = self._labels(tokens, class_labels)
        height, width = tokens.shape[2:]
        x = torch.stack([embed(part) for embed, part in zip(self.token_embeddings, tokens.unbind(1), strict=True)])
        x = x.sum(0) + self.stretched_positions(height, width).permute(0, 2, 3, 1)
        x = x.flatten(1, 2)
        if labels is not None:
            x = torch.cat([self.class_embedding(labels)[:, None], x], 1)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        x = self.norm(x[:, x.shape[1] - height * width :])
        logits = tuple(head(x).transpose(1, 2).unflatten(2, (height, width)) for head in self.heads)
        return DualCodebookTransformerOutput(logits) if return_dict else (logits,)

    def _labels(self, tokens: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor | None:
        """The class of every sample; None for a generator without classes."""
        count = len(self.config.codebook_sizes)
        if tokens.ndim != 4 or tokens.shape[1] != count:
            raise ValueError(f"`tokens` must have shape (B, {count}, h, w), got {tuple(tokens.shape)}")
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("`class_labels` must be None: this generator was trained without classes")
            return None
        if class_labels is None:
            return tokens.new_full((len(tokens),), self.config.num_classes)
        if class_labels.shape != (len(tokens),):
            raise ValueError(f"`class_labels` must have shape ({len(tokens)},), got {tuple(class_labels.shape)}")
        return class_labels

    def stretched_positions(self, height: int, width: int) -> torch.Tensor:
        """The learned positions for a grid of another size, (1, hidden_size, height, width), bicubic."""
        if self.positions.shape[2:] == (height, width):
            return self.positions
        stretched = F.interpolate(self.positions.float(), (height, width), mode="bicubic", align_corners=False)
        return stretched.to(self.positions.dtype)


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        width: of the stream.
        heads: of the attention.
        hidden: width of the hidden layer.
        dropout: share of what each half adds that training drops.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Attention(nn.Module):
    """Self-attention with normalised queries and keys (arXiv 2302.05442), which keeps the logits of bf16 in range.

    Args:
        width: of the stream.
        heads: they divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm, self.key_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> the same shape."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


def check_grid(codebook_sizes: Sequence[int], num_classes: int | None, sample_size: Sequence[int]) -> None:
    """Raises ValueError, by name, for codebooks, classes or a grid that cannot be."""
    if not codebook_sizes or not all(1 <= size <= LARGEST_VOCABULARY for size in codebook_sizes):
        raise ValueError(
            f"`codebook_sizes` must be numbers of codes in [1, {LARGEST_VOCABULARY}], got {codebook_sizes!r}"
        )
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, or None, got {num_classes}")
    if len(sample_size) != 2 or min(sample_size) < 1:
        raise ValueError(f"`sample_size` must be (height, width) of at least 1, got {sample_size!r}")
