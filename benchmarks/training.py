"""How long an update of training takes, beside the plain step, at the paper's losses, in one run:

    python benchmarks/training.py --dataset DATA                        # the network of the preset tiny
    python benchmarks/training.py --dataset DATA --threads 1 --clock cpu --json training.json   # where others work
    python benchmarks/training.py --dataset DATA --config paper --batch-size 16 --flags mixed_precision=bf16

The plain step walks the perceptual network and the discriminator twice for the adaptive weight and once more for the
update, has torch's default optimizers, and reads every term of the loss. Both take turns with the same batches from the
same weights; the adversary takes part from the first update on. The trainer keeps freed memory, as its command does.
VGG16 has random weights, which cost the same.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timing import add_timing, convolution_peak, in_turns, machine, report, set_up, speedup, speedup_text
from torch import nn

from dualcodebook_hf.backbone import last_convolution
from dualcodebook_hf.cli.inputs import positive
from dualcodebook_hf.evaluation.table import markdown_table
from dualcodebook_hf.files import public_name
from dualcodebook_hf.perceptual.vgg import VGG16Features
from dualcodebook_hf.training.adversary import _frozen
from dualcodebook_hf.training.arguments import parse_run_config
from dualcodebook_hf.training.losses import adaptive_weight, generator_loss, weighted_sum
from dualcodebook_hf.training.run import Trainer
from dualcodebook_hf.training.tokenizer_task import TokenizerTask, build_reconstruction_loss
from dualcodebook_hf.winograd import WinogradConv2d, layers_of

PLAIN, OURS = "plain step", "trainer"
# The paper's losses, all of them from the first update on.
LOSSES = {"perceptual": "lpips", "perceptual_weight": 1.25, "adversarial_weight": 0.8, "adversarial_start": 0}
LOSSES |= {
    "l2_weight": 0.0,
    "log_l2_weight": 0.0,
    "adversarial_ramp": 0,
    "adaptive_weight": True,
    "discriminator": "patch",
    "l1_weight": 1.0,
}
QUIET = {"validation_steps": 0, "checkpointing_steps": 0, "report_to": "none", "data_initialization": 0}


class PlainTask(TokenizerTask):
    """The same training, written down as the paper has it."""

    def prepare(self, accelerator: Any, fresh: bool) -> None:
        """With torch's default optimizers and convolutions."""
        super().prepare(accelerator, fresh)
        for _, _, layer in layers_of(self.network, WinogradConv2d):
            layer.__class__ = nn.Conv2d
        with torch.random.fork_rng():
            loss = build_reconstruction_loss(self.arguments, self.features, self.run.model.downsample_factor)
        self.reconstruction_loss = loss.to(accelerator.device)
        for optimizer in (self.optimizer.optimizer, self.adversary.optimizer.optimizer):
            optimizer.defaults["fused"] = None
            for group in optimizer.param_groups:
                group["fused"] = None

    def forward_backward(self, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """One graph from the images to the sum of the losses."""
        x, adversary = batch["pixel_values"].to(self.accelerator.device), self.adversary
        out = self.model(x)
        terms = self.reconstruction_loss(out.sample, x)
        rec = self.reconstruction_loss.rec(terms)
        with _frozen(adversary._network):
            g = generator_loss(adversary._network(adversary.augmentation(out.sample)))
        weight = adversary.weight * adversary.ramp_factor(step)
        terms["adversarial"] = adaptive_weight(rec, g, last_convolution(self.network.decoder).weight) * weight * g
        codebooks = weighted_sum(out.losses, dict.fromkeys(out.losses, self.arguments.codebook_weight))
        terms |= out.losses
        self.accelerator.backward(rec + codebooks + terms["adversarial"])
        terms["discriminator"] = adversary.discriminator_loss(x, out.sample.detach(), step)
        self.accelerator.backward(terms["discriminator"])
        terms = {name: term.detach().float() for name, term in terms.items()}
        for term in terms.values():
            term.item()
        return terms


TASKS = {PLAIN: PlainTask, OURS: TokenizerTask}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 2 and one line for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="preset or YAML file (default: tiny)")
    parser.add_argument("--dataset", required=True, help="images: Hub id, folder or parquet file; its split `train`")
    parser.add_argument("--batch-size", type=positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--resolution", type=positive, default=128, help="(default: %(default)s)")
    parser.add_argument("--flags", nargs="+", default=[], metavar="NAME=VALUE", help="of the trainer, for both")
    add_timing(parser, rounds=5)
    arguments = parser.parse_args(argv)
    return report(parser, lambda: measure(arguments, set_up(arguments)), table, arguments.json)


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """The record that is printed and written."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: build(arguments, task, Path(folder) / task.__name__) for name, task in TASKS.items()}
        runs = {name: Run(one) for name, one in trainers.items()}
        calls = {name: run.update for name, run in runs.items()}
        times = in_turns(calls, arguments.rounds, device, arguments.clock, keeping=[OURS])
        losses = [run.losses[: arguments.rounds + 1] for run in runs.values()]
        wait = runs[OURS].data_wait(arguments.rounds)
    protocol = {"config": arguments.config, "dataset": public_name(arguments.dataset), "flags": arguments.flags}
    protocol |= {"batch": arguments.batch_size, "resolution": arguments.resolution, "rounds": arguments.rounds}
    protocol |= {"clock": arguments.clock, "machine": machine(device)}
    rows = [
        {"row": name, "seconds": statistics.median(found), "speedup": speedup(times[PLAIN], found)}
        for name, found in times.items()
    ]
    peak = convolution_peak(device, torch.float32, clock=arguments.clock)
    record = {"protocol": protocol, "rows": rows, "data_wait": wait, "convolution_peak": {"float32": peak}}
    return record | {"largest_differences": largest_differences(*losses)}


class Run:
    """A trainer that is stepped from outside.

    Args:
        trainer: not trained yet.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.losses = trainer, []
        self.batches = trainer.task.batches(0)
        trainer.network.train()
        trainer._waited = 0.0

    def update(self) -> None:
        """One update; its losses are noted. Both tasks draw the same dropout."""
        torch.manual_seed(len(self.losses))
        taken, terms, _ = self.trainer._update(self.trainer._next_group(self.batches, math.inf))
        if not taken:
            raise RuntimeError("an update was skipped: its losses were not finite")
        self.losses.append(terms)

    def data_wait(self, updates: int) -> float:
        """Share of the time of some updates in a row that is spent on waiting for images."""
        self.trainer._waited, start = 0.0, time.monotonic()
        for _ in range(updates):
            self.update()
        return self.trainer._waited / (time.monotonic() - start)


def build(arguments: argparse.Namespace, task: type[TokenizerTask], folder: Path) -> Trainer:
    """A trainer with the paper's losses, from the same seed."""
    folder.mkdir()
    torch.manual_seed(0)
    save_file(VGG16Features().state_dict(), folder / "vgg.safetensors")
    flags = {**LOSSES, **QUIET, "vgg_weights": folder / "vgg.safetensors", "dataset": arguments.dataset}
    flags |= {"output_dir": folder / "run", "train_batch_size": arguments.batch_size}
    flags |= {"resolution": arguments.resolution, **dict(flag.split("=", 1) for flag in arguments.flags)}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    run = parse_run_config(["--config", arguments.config, *words])
    return Trainer(task(run), run.training)


def largest_differences(plain: list[dict[str, torch.Tensor]], ours: list[dict[str, torch.Tensor]]) -> list[float]:
    """Of every update: the largest difference of a term of the loss, relative to the plain one."""
    return [
        max(((one[name] - other[name]).abs() / one[name].abs().clamp_min(1e-3)).item() for name in one)
        for one, other in zip(plain, ours, strict=True)
    ]


def table(record: dict[str, Any]) -> str:
    """Markdown; the speed as the median of the rounds with the lowest and the highest."""
    cells = [[row["row"], f"{row['seconds']:.3g}", speedup_text(row["speedup"])] for row in record["rows"]]
    return (
        f"{markdown_table(['', 's/update', f'speed, x {PLAIN}'], cells)}\n\n"
        f"Waiting for data: {record['data_wait']:.1%} of the time. At the first update, from equal weights, loss "
        f"terms differ by {record['largest_differences'][0]:.0e} of their value at the most. "
        f"The machine's own 3 x 3 convolution: {record['convolution_peak']['float32'] / 1e9:.0f} GFLOP/s."
    )


if __name__ == "__main__":
    sys.exit(main())
