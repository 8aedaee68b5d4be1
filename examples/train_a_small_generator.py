"""Train a small autoregressive transformer on tokens, draw samples from it, and decode them into images.

    python examples/train_a_small_generator.py samples.png --images photos/*.jpg --size 128 --steps 20000

Two heads: one predicts a position's global token from all earlier positions, the other its local token from these and
the global one. Without --images it sees two photographs of scikit-image's wheel: enough to watch it learn.
"""

import argparse
import math
from pathlib import Path

import torch
from skimage import data_dir
from torch import nn
from torch.nn import functional as F

from dualcodebook_hf.files import write_json
from dualcodebook_hf.image_processing_dualcodebook import read_image, to_image, to_pixels
from dualcodebook_hf.loading import load_tokenizer


class Generator(nn.Module):
    """p(tokens): the grid in reading order, and at each position first the global token, then the local one."""

    def __init__(self, sizes: list[int], positions: int, width: int = 128) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(size, width) for size in sizes])
        self.heads = nn.ModuleList([nn.Linear(width, size) for size in sizes])
        self.place = nn.Parameter(0.02 * torch.randn(positions, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 2, n) -> (B, n + 1, width); state k has seen the first k positions."""
        x = F.pad(self.tables[0](tokens[:, 0]) + self.tables[1](tokens[:, 1]), (0, 0, 1, 0))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.body(x + self.place[: x.shape[1]], mask, is_causal=True)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of (B, 2, positions), in bits per position."""
        state = self.states(tokens[..., :-1])
        logits = self.heads[0](state), self.heads[1](state + self.tables[0](tokens[:, 0]))
        return sum(F.cross_entropy(logits[k].mT, tokens[:, k]) for k in (0, 1)) / math.log(2)

    @torch.no_grad()
    def sample(self, count: int) -> torch.Tensor:
        tokens = torch.zeros(count, 2, 0, dtype=torch.int64)
        while tokens.shape[-1] < len(self.place):
            state = self.states(tokens)[:, -1]
            first = self.heads[0](state).softmax(-1).multinomial(1)
            second = self.heads[1](state + self.tables[0](first[:, 0])).softmax(-1).multinomial(1)
            tokens = torch.cat([tokens, torch.stack([first, second], dim=1)], dim=-1)
        return tokens


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("output", type=Path, help="PNG of eight samples; beside it, as JSON, the loss of each step")
parser.add_argument("--images", nargs="+", default=[f"{data_dir}/{name}" for name in ("astronaut.png", "coffee.png")])
parser.add_argument("--size", type=int, default=64, help="side of the crops in pixels")
parser.add_argument("--steps", type=int, default=1000)
arguments = parser.parse_args()
torch.manual_seed(0)
cut, tokenizer = (arguments.size, arguments.size // 2), load_tokenizer()
crops = [to_pixels(read_image(path)).unfold(1, *cut).unfold(2, *cut).flatten(1, 2) for path in arguments.images]
tokens = torch.cat([tokenizer.tokenize(part) for part in torch.cat(crops, dim=1).movedim(0, 1).split(16)])

generator = Generator(list(tokenizer.codebook_sizes.values()), tokens[0, 0].numel())
optimizer, losses = torch.optim.AdamW(generator.parameters(), lr=1e-3), []
for step in range(arguments.steps):
    loss = generator.loss(tokens[torch.randint(len(tokens), (32,))].flatten(2))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    print(f"step {step}: {loss.item():.2f} bits per position, of {tokenizer.bits_per_position:g}", end="\r")

samples = tokenizer.detokenize(generator.sample(8).unflatten(2, tokens.shape[-2:]))
to_image(torch.cat(list(samples), dim=-1)).save(arguments.output)
write_json(arguments.output.with_suffix(".json"), losses)
