"""How visible the grid of a tokenizer's f x f blocks is: the steps between pixels at their edges against the others.

    python benchmarks/seams.py --model sharp --model faithful --dataset DATA/bsds500 DATA/clothing-256 --limit 64

The mean |step| between neighbouring pixels of two blocks, divided by that between neighbours within a block, over all
images, rows and columns. 1 is no grid; originals, printed first, tell what the images themselves have.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from dualcodebook_hf.cli.inputs import positive
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.loading import load_tokenizer


class Seams:
    """The ratio over batches.

    Args:
        side: f, in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.sums, self.counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def update(self, images: torch.Tensor) -> None:
        """Adds images (B, C, H, W), H and W of at least two blocks."""
        for dim in (-1, -2):
            steps = images.double().diff(dim=dim).abs().transpose(dim, -1)
            edge = torch.arange(steps.shape[-1]) % self.side == self.side - 1
            for kind, chosen in enumerate((steps[..., edge], steps[..., ~edge])):
                self.sums[kind] += chosen.sum()
                self.counts[kind] += chosen.numel()

    def compute(self) -> float:
        """Mean step at the edges / mean step within blocks."""
        edges, inside = self.sums / self.counts
        return (edges / inside).item()


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="may be repeated; of one f")
    parser.add_argument("--dataset", nargs="+", required=True, help="as in `dualcodebook evaluate`")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--size", type=positive, default=256, help="side of the centre crop (default: %(default)s)")
    parser.add_argument("--limit", type=positive, help="the first N images of each data set (default: all)")
    arguments = parser.parse_args(argv)
    options = {"split": arguments.split, "size": arguments.size, "limit": arguments.limit}
    try:
        splits = {dataset: EvaluationData(dataset=dataset, **options).open() for dataset in arguments.dataset}
        models = {name: load_tokenizer(name, device="cpu") for name in arguments.model}
    except ValueError as error:
        parser.error(str(error))
    sides = {model.downsample_factor for model in models.values()}
    if len(sides) != 1:
        parser.error(f"argument --model: must be tokenizers of one downsample factor, got {sorted(sides)}")
    (side,) = sides
    if arguments.size < 2 * side:
        parser.error(f"argument --size: must be at least two blocks of {side} pixels, got {arguments.size}")
    for dataset, images in splits.items():
        found = {name: Seams(side) for name in ("originals", *models)}
        for batch in images.batches(8):
            found["originals"].update(batch)
            for name, model in models.items():
                found[name].update(model(batch).sample.clamp(-1, 1))
        print(f"{dataset}:", ", ".join(f"{name} {seams.compute():.3f}" for name, seams in found.items()))


if __name__ == "__main__":
    main()
