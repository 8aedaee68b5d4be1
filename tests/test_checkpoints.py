"""Checkpoints that were damaged, replaced or left half done, on the line of test_run.py."""

import json
import os
import pickle
import shutil

import pytest
import torch
from assertions import assert_equal_checkpoints, checkpoint_names
from conftest import forget_accelerate
from test_run import trainer_of, weight

from dualcodebook_hf.run_folder import RunFolder
from dualcodebook_hf.training.checkpoints import find_damage, save_checkpoint

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SHARED = {"ema_decay": 0.9, "checkpointing_steps": 2, "checkpoints_total_limit": 0}
LATEST = {**SHARED, "resume_from_checkpoint": "latest"}
FILES = [
    "model.safetensors",
    "optimizer.bin",
    "ema.safetensors",
    "progress.json",
    "random_states_0.json",
    "train_config.json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six updates with the checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer_of(folder, **SHARED).train()
    forget_accelerate()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def sign(checkpoint):
    """Whoever replaces a file can write its manifest, too."""
    (checkpoint / "manifest.json").unlink()
    found = [path for path in checkpoint.rglob("*") if path.is_file()]
    with_manifest = checkpoint.with_name("signed")
    save_checkpoint(
        RunFolder(with_manifest), 1, lambda folder: shutil.copytree(checkpoint, folder, dirs_exist_ok=True), keep=0
    )
    shutil.copy(with_manifest / "checkpoint-1" / "manifest.json", checkpoint)
    shutil.rmtree(with_manifest)
    assert found and find_damage(checkpoint) is None


class Command:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_replaced_file_is_named_and_nothing_in_it_runs(run, tmp_path, name, how):
    executed, checkpoint = tmp_path / "executed", run / "checkpoint-6"
    if how == "pickle":
        (checkpoint / name).write_bytes(pickle.dumps(Command(executed), protocol=2))
    else:
        torch.save({"state": Command(executed)}, checkpoint / name)
    sign(checkpoint)
    with pytest.raises(ValueError, match=name):
        trainer_of(run, **LATEST)
    assert not executed.exists()


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "random_states_0.pkl", "scheduler.bin", "sampler.bin"])
def test_what_accelerate_would_load_is_not_looked_at(run, tmp_path, name):
    executed, checkpoint = tmp_path / "executed", run / "checkpoint-6"
    torch.save(Command(executed), checkpoint / name)
    sign(checkpoint)
    assert trainer_of(run, **LATEST).progress.step == 6
    assert not executed.exists()


@pytest.mark.parametrize(("name", "damage"), zip(FILES, ["cut", "changed", "missing"] * 2, strict=True))
def test_latest_takes_the_last_good_one_and_names_the_damaged_file(run, finished, capsys, name, damage):
    path = run / "checkpoint-6" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    trainer = trainer_of(run, **LATEST)
    assert trainer.progress.step == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "checkpoint-6 is set aside" in said and name in said and "checkpoint-4" in said
    trainer.train()
    assert checkpoint_names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert_equal_checkpoints(run / "checkpoint-6", finished / "checkpoint-6")


def test_a_named_checkpoint_that_is_damaged_is_refused_with_the_file(run):
    (run / "checkpoint-4" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-4: optimizer\.bin has 0 bytes instead of \d+"):
        trainer_of(run, **{**LATEST, "resume_from_checkpoint": str(run / "checkpoint-4")})
    assert checkpoint_names(run)[-1] == "checkpoint-6"


def test_without_a_good_one_there_is_no_silent_start_from_nothing(run):
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    (run / "checkpoint-6" / "manifest.json").unlink()  # as in checkpoints of earlier versions
    with pytest.raises(ValueError, match=r"no complete checkpoint \(checkpoint-6: manifest\.json is missing.*model/"):
        trainer_of(run, **LATEST)
    assert checkpoint_names(run) == ["checkpoint-6"]


@pytest.mark.parametrize("content", ["[]", '{"files": {"a": 1}}', '{"files": 3}', "{}", "[" * 100_000, "\0"])
def test_a_manifest_that_is_none_is_damage(run, content):
    (run / "checkpoint-6" / "manifest.json").write_text(content)
    assert find_damage(run / "checkpoint-6") == "manifest.json is damaged"


def test_an_empty_folder_is_no_checkpoint(run, tmp_path, capsys):
    (run / "checkpoint-9").mkdir()
    assert trainer_of(run, **LATEST).progress.step == 6
    forget_accelerate()
    (tmp_path / "new" / "checkpoint-2").mkdir(parents=True)
    trainer_of(tmp_path / "new", **SHARED).train()
    assert checkpoint_names(tmp_path / "new") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert "set aside" not in capsys.readouterr().err


def test_missing_random_numbers_are_refused(run):
    """Without them the weights would be others than those of the undisturbed run."""
    (run / "checkpoint-6" / "random_states_0.json").unlink()
    sign(run / "checkpoint-6")
    with pytest.raises(ValueError, match=r"random_states_0\.json' is missing"):
        trainer_of(run, **LATEST)


def test_with_another_number_of_processes_each_takes_the_first_ones_random_numbers(run, finished):
    """And with the same number its own: a checkpoint of two is missing one here, and nobody asks for it."""
    progress = run / "checkpoint-4" / "progress.json"
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "processes": 2}))
    sign(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-6")
    trainer_of(run, **LATEST).train()
    assert_equal_checkpoints(run / "checkpoint-6", finished / "checkpoint-6")


@pytest.mark.parametrize("changes", [{"step": -1}, {"step": "6"}, {"other": 1}, {"samples": 1e9}])
def test_progress_that_is_none_is_refused(run, changes):
    path = run / "checkpoint-6" / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    sign(run / "checkpoint-6")
    with pytest.raises(ValueError, match=r"progress\.json"):
        trainer_of(run, **LATEST)


def test_an_optimizer_of_another_network_is_refused(run):
    path = run / "checkpoint-6" / "optimizer.bin"
    state = torch.load(path)
    state["state"][0]["exp_avg"] = torch.zeros(7)
    torch.save(state, path)
    sign(run / "checkpoint-6")
    with pytest.raises(ValueError, match=r"optimizer\.bin.*another shape"):
        trainer_of(run, **LATEST)


def test_the_arguments_of_the_resumed_run_count_and_not_the_old_ones(run):
    trainer = trainer_of(run, **{**LATEST, "ema_decay": 0.5})
    assert trainer.ema.decay == 0.5
    assert trainer.settings["training"]["ema_decay"] == 0.5


def test_a_later_checkpoint_of_another_attempt_is_replaced_and_not_counted(run):
    """The run goes on from a named one: its own checkpoints are those that are kept."""
    arguments = {**SHARED, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "max_train_steps": 3}
    trainer_of(run, resume_from_checkpoint=str(run / "checkpoint-2"), **arguments).train()
    assert checkpoint_names(run) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]
    forget_accelerate()
    before = (run / "checkpoint-4" / "manifest.json").stat().st_mtime_ns
    trainer = trainer_of(
        run,
        resume_from_checkpoint=str(run / "checkpoint-3"),
        **{**arguments, "max_train_steps": 4, "learning_rate": 0.1},
    )
    trainer.train()
    assert (run / "checkpoint-4" / "manifest.json").stat().st_mtime_ns != before
    assert torch.equal(trainer_of(run, **{**LATEST, "max_train_steps": 4}).network.mean, trainer.network.mean) is False
    assert weight(trainer).isfinite().all()
