"""The loop on a task that is not a tokenizer: a line fitted to synthetic points."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from assertions import assert_equal_checkpoints, checkpoint_names
from conftest import forget_accelerate
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dualcodebook_hf.training.arguments import parse_run_config
from dualcodebook_hf.training.run import NonFiniteError, StopRequest, Trainer, learning_rate_factor
from dualcodebook_hf.training.run_arguments import RunArguments
from dualcodebook_hf.training.task import Trained

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SLOPES = torch.tensor([[1.0, -2.0, 3.0]])


@dataclass(kw_only=True)
class LineArguments(RunArguments):
    """The loop's arguments and one of the task's own."""

    learning_rate: float = 0.05
    spoiled: list[int] = field(default_factory=list)  # samples whose target is NaN


class Line(nn.Linear):
    """Keeps the mean of what it saw in training, like BatchNorm."""

    def __init__(self, width):
        super().__init__(width, 1, bias=False)
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return super().forward(x)


class LineTask:
    """Linear regression with noise from the global generator, which a resume must restore, too."""

    validates = True
    goal = ("error", False)
    errors = None  # in place of what is measured

    def __init__(self, arguments, width=3, dies_at=None):
        self.arguments, self.width, self.dies_at = arguments, width, dies_at
        self.settings = {"model": {"width": width}, "training": asdict(arguments)}

    def check_resumable(self, checkpoint):
        checkpoint.require_equal("model", self.settings["model"])

    def prepare(self, accelerator, fresh):
        self.accelerator, self.fresh = accelerator, fresh
        self.network = Line(self.width)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.arguments.learning_rate)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)

    def batches(self, start):
        size = self.arguments.train_batch_size
        while True:
            index = list(range(start, start + size))
            x = np.stack([np.random.default_rng([self.arguments.seed, i]).standard_normal(self.width) for i in index])
            y = torch.tensor([[torch.nan] if i in self.arguments.spoiled else [0.0] for i in index])
            yield {"x": torch.tensor(x, dtype=torch.float32), "nan": y, "index": torch.tensor(index)}
            start += size

    def remarks(self):
        return ["all of it was drawn"]

    def set_learning_rates(self, factor):
        rate = self.arguments.learning_rate * factor
        self.optimizer.param_groups[0]["lr"] = rate
        return {"line": rate}

    def forward_backward(self, batch, step):
        if step == self.dies_at:
            raise KeyError("the machine lost its power")
        assert self.network.training
        x = batch["x"] + 0.01 * torch.randn(batch["x"].shape)
        loss = (self.model(x) - batch["x"] @ SLOPES.T - batch["nan"]).square().mean()
        self.accelerator.backward(loss)
        return {"square": loss.detach()}

    def parts(self):
        return [Trained(self.model, self.optimizer)]

    def trained(self, step):
        return self.parts()

    def statistics(self):
        return [self.network.mean]

    def validate(self):
        assert not self.network.training
        if self.errors:
            return {"error": self.errors.pop(0)}, None
        return {"error": float((self.network.weight.detach() - SLOPES).square().sum())}, Image.new("RGB", (4, 4))

    def export(self, folder):
        folder.mkdir()
        save_file(self.network.state_dict(), folder / "line.safetensors")

    def publish(self, folder, repo_id, private):
        raise AssertionError("nothing asked for it")


def arguments_of(output_dir, **changes):
    defaults = {
        "train_batch_size": 2,
        "max_train_steps": 6,
        "validation_steps": 0,
        "checkpointing_steps": 0,
        "report_to": "none",
        "num_threads": 1,
    }
    return LineArguments(output_dir=str(output_dir), **{**defaults, **changes})


def trainer_of(output_dir, stop=None, width=3, dies_at=None, **changes):
    arguments = arguments_of(output_dir, **changes)
    return Trainer(LineTask(arguments, width, dies_at), arguments, stop)


def weight(trainer):
    return trainer.network.weight.detach().clone()


def test_it_learns_and_validates_and_exports_with_its_settings(tmp_path, capsys):
    shared = {"max_train_steps": 200, "train_batch_size": 8, "validation_steps": 100, "ema_decay": 0.9}
    trainer = trainer_of(tmp_path, report_to="tensorboard", **shared)
    before = (weight(trainer) - SLOPES).norm()
    trainer.train()
    with trainer.averaged_weights() as network:
        averaged = network.weight.clone()
    assert (averaged - SLOPES).norm() < before / 20
    assert torch.equal(load_file(tmp_path / "final" / "line.safetensors")["weight"], averaged)
    for folder in ("final", "checkpoint-200"):
        assert json.loads((tmp_path / folder / "train_config.json").read_text()) == trainer.settings
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0000100.png", "step-0000200.png"]
    assert list((tmp_path / "logs").rglob("events*"))
    assert capsys.readouterr().err.endswith("all of it was drawn\n")


def test_six_steps_equal_three_then_a_sudden_end_then_three(tmp_path):
    """Bit for bit: weights, their average, the optimizer, random numbers and the place in the data."""
    shared = {"ema_decay": 0.9, "checkpointing_steps": 3, "gradient_accumulation_steps": 2, "lr_schedule": "cosine"}
    trainer_of(tmp_path / "whole", **shared).train()
    forget_accelerate()
    with pytest.raises(KeyError, match="lost its power"):
        trainer_of(tmp_path / "cut", dies_at=4, **shared).train()
    assert checkpoint_names(tmp_path / "cut") == ["checkpoint-3"]
    forget_accelerate()
    torch.manual_seed(99)
    resumed = trainer_of(tmp_path / "cut", resume_from_checkpoint="latest", **shared)
    assert not resumed.task.fresh
    resumed.train()
    assert_equal_checkpoints(tmp_path / "whole" / "checkpoint-6", tmp_path / "cut" / "checkpoint-6")
    finals = [load_file(tmp_path / name / "final" / "line.safetensors")["weight"] for name in ("whole", "cut")]
    assert torch.equal(*finals)


def test_a_run_without_a_better_validation_ends_and_keeps_the_best_model(tmp_path):
    """Validated after every second update: the second is the best one; two more were patience."""
    shared = {"max_train_steps": 40, "validation_steps": 2, "patience": 2, "checkpoints_total_limit": 0}
    trainer = trainer_of(tmp_path, checkpointing_steps=2, **shared)
    trainer.task.errors = [3.0, 1.0, 2.0, 1.0, 0.5]
    said = trainer.train()
    assert (
        said
        == f"finished after 8 updates (`patience`), no validation has been better since update 4: {tmp_path / 'best'}"
    )
    best, saved = (
        load_file(tmp_path / place / "line.safetensors")["weight"] for place in ("best", "checkpoint-4/model")
    )
    assert torch.equal(best, saved) and not torch.equal(best, weight(trainer))
    forget_accelerate()
    resumed = trainer_of(tmp_path, resume_from_checkpoint="latest", **shared)
    assert resumed.train() == said and resumed.progress.step == 8


def test_patience_goes_on_where_it_was(tmp_path):
    """Cut after the first of two stale validations, a run ends where the whole one does."""
    shared = {"max_train_steps": 40, "validation_steps": 2, "checkpointing_steps": 2, "patience": 2}
    cut = trainer_of(tmp_path, dies_at=6, **shared)
    cut.task.errors = [1.0, 0.5, 2.0]
    with pytest.raises(KeyError, match="lost its power"):
        cut.train()
    forget_accelerate()
    resumed = trainer_of(tmp_path, resume_from_checkpoint="latest", **shared)
    assert (resumed.progress.best, resumed.progress.best_step, resumed.progress.stale) == (0.5, 4, 1)
    resumed.task.errors = [0.5, 0.4]
    assert "after 8 updates" in resumed.train()


def test_patience_needs_validations(tmp_path):
    with pytest.raises(ValueError, match="`patience` 3 needs `validation_steps` above 0, got 0"):
        trainer_of(tmp_path, patience=3)


def test_patience_needs_something_to_validate_on(tmp_path):
    flags = ["--dataset", "x", "--validation-split", "null", "--patience", "3", "--output-dir", str(tmp_path)]
    with pytest.raises(ValueError, match="`patience` 3 needs `validation_split` to validate on; or give 0"):
        parse_run_config(["--config", "tiny", *flags])


def test_what_is_exported_is_the_moving_average_of_the_weights(tmp_path):
    trainer_of(tmp_path, ema_decay=0.2, checkpointing_steps=1, checkpoints_total_limit=0).train()
    average = None
    for step, name in enumerate(checkpoint_names(tmp_path)):
        new = load_file(tmp_path / name / "model.safetensors")["weight"]
        decay = min(0.2, (1 + step) / (10 + step))  # diffusers' warm-up of the decay
        average = new if average is None else decay * average + (1 - decay) * new
        torch.testing.assert_close(load_file(tmp_path / name / "model" / "line.safetensors")["weight"], average)
    assert not torch.allclose(average, new)


def test_an_update_with_a_nan_is_skipped_and_the_run_continues(tmp_path, capsys):
    """Samples 4 and 5 are those of the third update; the run then takes six others."""
    trainer = trainer_of(tmp_path, spoiled=[5], ema_decay=0.5)
    trainer.train()
    assert (trainer.progress.step, trainer.progress.samples, trainer.progress.skipped) == (6, 14, 0)
    assert weight(trainer).isfinite().all()
    assert "update 3 skipped: square = nan; batch: samples [4, 5]" in capsys.readouterr().err


def test_a_skipped_update_changes_nothing(tmp_path):
    """Its batch is as if it had not been there: weights, their average, Adam's moments, what forward passes track."""
    stopped = trainer_of(tmp_path / "stopped", spoiled=[4, 6], ema_decay=0.5, non_finite_limit=2)
    with pytest.raises(
        NonFiniteError, match=r"update 3 skipped: .*samples \[6, 7\].*2 in a row \(`non_finite_limit`\)"
    ):
        stopped.train()
    forget_accelerate()
    clean = trainer_of(tmp_path / "clean", ema_decay=0.5)
    batches = clean.task.batches(0)
    for _ in range(2):
        clean._update([next(batches)])
    assert stopped.progress.step == 2
    assert torch.equal(weight(stopped), weight(clean))
    assert torch.equal(stopped.network.mean, clean.network.mean)
    assert torch.equal(stopped.ema.shadow_params[0], clean.ema.shadow_params[0])
    moments = [trainer.task.optimizer.state_dict()["state"][0]["exp_avg"] for trainer in (stopped, clean)]
    assert torch.equal(*moments)


def test_accumulated_gradients_equal_the_larger_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn", torch.zeros)  # the noise would be another one
    trainers = [
        trainer_of(tmp_path / "many", gradient_accumulation_steps=3),
        trainer_of(tmp_path / "one", train_batch_size=6),
    ]
    for trainer in trainers:
        trainer.train()
    torch.testing.assert_close(weight(trainers[0]), weight(trainers[1]), rtol=1e-5, atol=1e-6)
    assert trainers[0].progress.samples == trainers[1].progress.samples == 36


def test_a_request_to_stop_saves_and_exports(tmp_path):
    class AfterTwo(StopRequest):
        looks = 0

        @property
        def requested(self):
            self.looks += 1
            return self.looks > 2

    trainer_of(tmp_path, AfterTwo()).train()
    assert checkpoint_names(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / "final" / "line.safetensors").is_file()


def test_the_time_limit_stops_and_saves(tmp_path):
    trainer = trainer_of(tmp_path, max_train_steps=10**9, max_train_minutes=0.005)
    trainer.train()
    assert trainer.progress.step > 0
    assert checkpoint_names(tmp_path) == [f"checkpoint-{trainer.progress.step}"]


def test_only_the_last_checkpoints_are_kept_and_leftovers_of_a_kill_go(tmp_path):
    for name in (".checkpoint-5.1.partial", ".checkpoint-7.1.partial", ".checkpoint-1.removed.9.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    trainer_of(tmp_path, checkpointing_steps=1, checkpoints_total_limit=2).train()
    assert checkpoint_names(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    assert not list(tmp_path.glob(".*"))


def test_an_export_that_fails_leaves_no_checkpoint(tmp_path):
    class FullDisk(LineTask):
        def export(self, folder):
            super().export(folder)
            raise OSError("the disk is full")

    arguments = arguments_of(tmp_path)
    with pytest.raises(OSError, match="the disk is full"):
        Trainer(FullDisk(arguments), arguments).train()
    assert list(tmp_path.iterdir()) == []


def test_a_run_continues_only_what_fits_it(tmp_path):
    trainer_of(tmp_path, max_train_steps=1).train()
    forget_accelerate()
    with pytest.raises(ValueError, match=r"`output_dir` .* already holds checkpoint-1"):
        trainer_of(tmp_path)
    latest = {"resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"`width` must be 3, as in the checkpoint .*, got 4"):
        trainer_of(tmp_path, width=4, **latest)
    with pytest.raises(ValueError, match=r"`seed` must be 0, as in the checkpoint .*, got 1"):
        trainer_of(tmp_path, seed=1, **latest)
    with pytest.raises(
        ValueError, match=r"`ema_decay` cannot be switched on or off: 0.0 in the checkpoint .*, got 0.9"
    ):
        trainer_of(tmp_path, ema_decay=0.9, **latest)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be"):
        trainer_of(tmp_path, resume_from_checkpoint=str(tmp_path / "nothing"))
    assert trainer_of(tmp_path, **latest).progress.step == 1


def test_wrong_arguments_are_named_before_anything_is_built(tmp_path):
    arguments = arguments_of(tmp_path / "run", logging_steps=0)
    task = LineTask(arguments)
    with pytest.raises(ValueError, match="`logging_steps` must be at least 1, got 0"):
        Trainer(task, arguments)
    assert not hasattr(task, "network")
    assert not Path(arguments.output_dir).exists()


@pytest.mark.parametrize("asked", [None, "bf16"])
def test_precision_that_is_left_to_the_launcher_is_what_runs_and_is_recorded(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = trainer_of(tmp_path, mixed_precision=asked, max_train_steps=1)
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()
    recorded = json.loads((tmp_path / "final" / "train_config.json").read_text())["training"]
    assert (recorded["mixed_precision"], recorded["num_processes"]) == ("bf16", 1)


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "no"}, "`mixed_precision` is 'no', .* 'bf16'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "`mixed_precision` must be one of no, bf16, fp16, .* 'fp8'"),
        (
            {"ACCELERATE_USE_CPU": "true"},
            {"mixed_precision": "fp16"},
            r"`mixed_precision` 'fp16' is not possible on this device \(cpu\)",
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "`gradient_accumulation_steps` is 1, .* with 4"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "`compile` is the argument that compiles, .* INDUCTOR"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "`distributed_type` must be MULTI_GPU or NO, .* FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "`distributed_type` must be MULTI_GPU or NO, .* DEEPSPEED"),
        # Up to 1.8 at least, accelerate refuses it itself.
        ({"WORLD_SIZE": "2"}, {}, r"is 2, but accelerate trains with 1 process.*ACCELERATE_USE_CPU|`MASTER_ADDR` env"),
        ({}, {"num_processes": 2}, "`num_processes` is 2, but 1 were started"),
    ],
)
def test_what_accelerate_would_run_instead_is_refused(tmp_path, environment, arguments, message):
    with mock.patch.dict(os.environ, environment), pytest.raises(ValueError, match=message):  # accelerate sets more
        trainer_of(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_what_is_said_on_the_command_line_of_a_silent_launcher_runs(tmp_path, monkeypatch):
    """It passes "no" on where nobody asked for anything."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert trainer_of(tmp_path, mixed_precision="bf16").accelerator.mixed_precision == "bf16"


def test_a_statistic_that_is_not_finite_is_a_reason_to_skip(tmp_path, capsys):
    """Its loss and its gradients are finite: only what the forward pass tracked is not."""

    class Overflowing(LineTask):
        def forward_backward(self, batch, step):
            terms = super().forward_backward(batch, step)
            if 4 in batch["index"]:
                self.network.mean.fill_(torch.inf)
            return terms

    arguments = arguments_of(tmp_path)
    trainer = Trainer(Overflowing(arguments), arguments)
    trainer.train()
    assert "update 3 skipped: a running statistic = inf; batch: samples [4, 5]" in capsys.readouterr().err
    assert trainer.network.mean.isfinite().all()


def test_the_schedule_by_hand():
    arguments = RunArguments(lr_schedule="cosine", lr_warmup_steps=10, max_train_steps=110, lr_final=0.1)
    factors = {step: learning_rate_factor(arguments, step) for step in (0, 4, 9, 10, 60, 110)}
    assert factors == pytest.approx({0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1})
    arguments.lr_schedule = "linear"
    assert learning_rate_factor(arguments, 60) == pytest.approx(0.55)
    arguments.lr_schedule = "constant"
    assert learning_rate_factor(arguments, 100) == 1.0
