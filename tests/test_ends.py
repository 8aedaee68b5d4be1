"""How runs end: what is saved, what is said in one line, and the exit code; and who may start or outlive whom."""

import gc
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from assertions import assert_equal_checkpoints, checkpoint_names
from conftest import forget_accelerate
from test_run import LineTask, arguments_of, trainer_of
from test_training import dataset, run_config, run_worker  # noqa: F401

from dualcodebook_hf.training.ends import BadDataError, LostDataError, NonFiniteError, SavingError, StopRequest
from dualcodebook_hf.training.processes import end_with_parent, sole_run
from dualcodebook_hf.training.run import Trainer
from dualcodebook_hf.training.tokenizer_task import TokenizerTask
from dualcodebook_hf.training.train import main

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class SpoiledData(LineTask):
    """Its third batch cannot be read, or its images for validation cannot."""

    error = None
    unreadable = None

    def batches(self, start):
        for number, batch in enumerate(super().batches(start)):
            if number == 2 and self.error:
                raise self.error
            yield batch

    def validate(self):
        if self.unreadable:
            raise self.unreadable
        return super().validate()


def spoiled(output_dir, error=None, unreadable=None, **changes):
    arguments = arguments_of(output_dir, **changes)
    task = SpoiledData(arguments)
    task.error, task.unreadable = error, unreadable
    return Trainer(task, arguments)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("image 5 cannot be read"), BadDataError, "^image 5 cannot be read$"),
        (ValueError("Caught X.\n  File a\nlib.BadImageError: image 5: no"), BadDataError, "^image 5: no$"),
        (KeyError("image"), BadDataError, "^the data cannot be read: KeyError 'image'$"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), LostDataError, r"worker \(pid 7\) is killed"),
        (ConnectionError("no route"), LostDataError, "no route"),
    ],
)
def test_a_batch_that_cannot_be_read_comes_after_saving(tmp_path, error, kind, message):
    trainer = spoiled(tmp_path, error)
    with pytest.raises(kind, match=message):
        trainer.train()
    assert trainer.progress.step == 2
    assert checkpoint_names(tmp_path) == ["checkpoint-2"]


def test_a_batch_that_cannot_be_read_leaves_no_half_update(tmp_path):
    """The second batch of the second update: nothing of its first one is in what is saved."""
    trainer = spoiled(tmp_path / "a", ValueError("no"), gradient_accumulation_steps=2)
    with pytest.raises(BadDataError):
        trainer.train()
    whole = trainer_of(tmp_path / "b", gradient_accumulation_steps=2, max_train_steps=1)
    whole.train()
    assert trainer.network.mean.equal(whole.network.mean)
    assert (trainer.progress.step, trainer.progress.samples) == (1, 4)


def test_where_nothing_was_learned_nothing_blocks_the_repeated_command(tmp_path):
    trainer = spoiled(tmp_path, ValueError("no"), gradient_accumulation_steps=3)
    with pytest.raises(BadDataError):
        trainer.train()
    assert checkpoint_names(tmp_path) == []
    spoiled(tmp_path)


@pytest.mark.parametrize("error", [BadDataError("image 3 cannot be read"), LostDataError("no route")])
def test_an_image_that_cannot_be_read_costs_the_validation_alone(tmp_path, capsys, error):
    trainer = spoiled(tmp_path, unreadable=error, validation_steps=2)
    trainer.train()
    assert trainer.progress.step == 6
    assert capsys.readouterr().err.count(f"no validation: {error}") == 3


def test_the_checkpoint_of_a_step_is_older_than_its_validation(tmp_path):
    class Broken(LineTask):
        def validate(self):
            raise KeyError("a bug")

    arguments = arguments_of(tmp_path, validation_steps=2, checkpointing_steps=2)
    with pytest.raises(KeyError, match="a bug"):
        Trainer(Broken(arguments), arguments).train()
    assert checkpoint_names(tmp_path) == ["checkpoint-2"]


def test_non_finite_updates_end_after_saving_and_no_older_checkpoint_goes(tmp_path):
    spoil = {"spoiled": [8, 10], "non_finite_limit": 2}
    trainer = trainer_of(tmp_path, checkpointing_steps=2, checkpoints_total_limit=1, **spoil)
    with pytest.raises(NonFiniteError, match=r"2 in a row \(`non_finite_limit`\), training stops"):
        trainer.train()
    assert checkpoint_names(tmp_path) == ["checkpoint-4"]
    assert trainer.progress.samples == 12  # what a resumed run does not read again


@contextmanager
def full_disk(left=2000):
    """No file may become longer: what a full disk does, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_a_run_with_what_is_on_it(tmp_path):
    trainer = trainer_of(tmp_path, max_train_steps=2)
    trainer.train()
    trainer.arguments.max_train_steps = 4
    with full_disk(), pytest.raises(SavingError, match=r"checkpoint-4 could not be written: .*too large") as caught:
        trainer.train()
    assert caught.value.__traceback__ and not any(type(held).__name__ == "_BytesIOBuffer" for held in gc.get_objects())
    assert checkpoint_names(tmp_path) == ["checkpoint-2"]
    assert not list(tmp_path.glob(".*"))


def flags_of(run):
    """The run's settings as a command line."""
    for section in run.to_dict().values():
        for name, value in section.items():
            words = ["null"] if value is None else map(str, value if isinstance(value, list) else [value])
            yield from (f"--{name}", *words)


def end_of(run, capsys):
    """Exit code of the training process, and its last line."""
    code = main(list(flags_of(run)))
    return code, capsys.readouterr().err.strip().splitlines()[-1]


def test_every_end_is_a_line_and_an_exit_code(dataset, tmp_path, capsys):  # noqa: F811
    code, line = end_of(run_config(dataset, tmp_path / "a", max_train_steps=2), capsys)
    assert (code, line) == (0, f"dualcodebook train: finished after 2 updates: {tmp_path / 'a' / 'final'}")
    code, line = end_of(run_config(dataset, tmp_path / "a"), capsys)
    assert code == 2 and line.startswith("dualcodebook train: error: `output_dir`")
    code, line = end_of(run_config(dataset, tmp_path / "b", learning_rate=1e30, non_finite_limit=2), capsys)
    assert code == 3 and line.endswith("2 in a row (`non_finite_limit`), training stops")
    assert checkpoint_names(tmp_path / "b") == ["checkpoint-1"]
    with full_disk():
        code, line = end_of(run_config(dataset, tmp_path / "c", max_train_steps=1), capsys)
    assert code == 1 and "checkpoint-1 could not be written" in line
    code, line = end_of(run_config(dataset, tmp_path / "d", max_train_minutes=1e-6), capsys)
    assert code == 0 and line.startswith("dualcodebook train: stopped by max_train_minutes after 0 updates")


def test_a_bug_is_no_bad_input(dataset, tmp_path, monkeypatch):  # noqa: F811
    """A ValueError from somewhere in the network is not taken for bad data: it shows where it is."""

    def broken(self, batch, step):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(TokenizerTask, "forward_backward", broken)
    with pytest.raises(ValueError, match="shapes do not fit"):
        main(list(flags_of(run_config(dataset, tmp_path))))


@pytest.fixture
def hangup():
    """SIGHUP as in a terminal: whoever runs the tests may have it ignored."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


def test_a_second_interrupt_ends_at_once_and_a_hangup_like_any_other_signal(hangup):
    with StopRequest().watching() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert (stop.requested, stop.reason) == (True, "SIGHUP")
    with StopRequest().watching() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest().watching() as stop:  # under nohup
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested


def test_a_data_worker_that_is_killed_ends_the_run_after_saving(dataset, tmp_path, capsys):  # noqa: F811
    others = set(psutil.Process().children())  # what earlier tests have left

    def kill():
        while len(workers := set(psutil.Process().children()) - others) < 2:
            time.sleep(0.05)
        time.sleep(1)
        for worker in workers:
            worker.kill()

    threading.Thread(target=kill, daemon=True).start()
    run = run_config(dataset, tmp_path, data={"num_workers": 2}, max_train_steps=10**6, max_train_minutes=2)
    code, line = end_of(run, capsys)
    # Which of the two is noticed first, the dead process or its closed pipe, is chance.
    assert code == 1 and line.startswith("dualcodebook train: error: the data cannot be read: ")
    assert len(checkpoint_names(tmp_path)) == 1


@contextmanager
def forked(work):
    """A process that does `work` and waits; it is killed at the end."""
    pid = os.fork()
    if not pid:
        try:
            work()
            time.sleep(30)
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_folder_is_of_one_run_and_free_again_when_that_is_killed(tmp_path):
    folder, ready = tmp_path / "run", tmp_path / "ready"

    def hold():
        lock = sole_run(folder)
        lock.__enter__()
        os.fork() or time.sleep(30)  # a data worker, which outlives it for a while
        ready.touch()
        time.sleep(30)

    with forked(hold) as pid:
        wait_for(ready.exists)
        with pytest.raises(ValueError, match=f"in use by another run: process {pid} on {socket.gethostname()}"):
            trainer_of(folder)
        workers = psutil.Process(pid).children()
        assert workers
    with sole_run(folder):
        assert all(worker.is_running() for worker in workers)
    for worker in workers:
        worker.kill()
    assert not folder.exists() or not list(folder.iterdir())


def test_the_lock_is_given_back_whatever_happens(tmp_path):
    with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
        trainer_of(tmp_path / "deep" / "a", resume_from_checkpoint=str(tmp_path / "none"))
    assert not (tmp_path / "deep").exists()
    with pytest.raises(KeyError):
        trainer_of(tmp_path / "a", dies_at=1).train()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_an_output_dir_that_is_a_file_is_refused_at_the_start(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`output_dir` must be a folder .*file is a file"):
        arguments_of(tmp_path / place).check()


def test_a_process_ends_when_its_parent_is_killed(tmp_path):
    """By SIGTERM, so that a trainer saves."""
    ready, ended = tmp_path / "ready", tmp_path / "ended"

    def child():
        signal.signal(signal.SIGTERM, lambda *_: (ended.touch(), os._exit(0)))
        end_with_parent(seconds=0.02)
        ready.touch()
        while True:
            time.sleep(0.01)

    with forked(lambda: os.fork() or child()):
        wait_for(ready.exists)
        assert not ended.exists()
    wait_for(ended.exists)


COMMAND = [sys.executable, "-m", "dualcodebook_hf.cli", "train"]


def start(run, *launch_flags, command=COMMAND, **environment):
    dashes = ["--"] if launch_flags else []
    words = [*command, *launch_flags, *dashes, *flags_of(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killing_the_command_ends_the_trainer_and_saves(dataset, tmp_path):  # noqa: F811
    run = run_config(dataset, tmp_path, max_train_steps=10**6, checkpointing_steps=2)
    process = start(run, ACCELERATE_USE_CPU="true")
    wait_for(lambda: checkpoint_names(tmp_path), 120)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2  # the launcher and the trainer
    process.kill()
    wait_for(lambda: not any(member.is_running() for member in family), 60)
    assert (tmp_path / "final" / "config.json").is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_trainer_that_is_killed_is_named(dataset, tmp_path):  # noqa: F811
    process = start(run_config(dataset, tmp_path, max_train_steps=10**6, checkpointing_steps=2), ACCELERATE_USE_CPU="1")
    wait_for(lambda: checkpoint_names(tmp_path), 120)
    psutil.Process(process.pid).children(recursive=True)[-1].kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert said.strip().splitlines()[-1].endswith("error: the training process was killed by SIGKILL")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_that_would_each_train_alone_are_refused(dataset, tmp_path, launcher):  # noqa: F811
    script = str(Path(__file__).parents[1] / "scripts" / "train.py")
    commands = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script],
        "accelerate": [*COMMAND[:2], "accelerate.commands.launch", "--cpu", "--num_processes", "2", script],
    }
    process = start(run_config(dataset, tmp_path / "run"), command=commands[launcher], CUDA_VISIBLE_DEVICES="")
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "dualcodebook train: error: " in said and "ACCELERATE_USE_CPU=true torchrun" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_end_together_in_one_line_after_saving(dataset, tmp_path):  # noqa: F811
    """One of them meets an image that cannot be read; without torch's report of it."""
    broken = tmp_path / "broken"
    shutil.copytree(dataset, broken)
    (broken / "train" / "5.png").write_bytes(b"no image")
    run = run_config(str(broken), tmp_path / "run", max_train_steps=100, train_batch_size=1)
    process = start(run, "--multi_gpu", "--num_processes", "2", ACCELERATE_USE_CPU="true")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert said.count("dualcodebook train: error: cannot read row 5 of ") == said.count("rror") == 1, said
    assert "Traceback" not in said and "elastic" not in said, said
    assert len(checkpoint_names(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two_and_always_the_same(dataset, tmp_path):  # noqa: F811
    shared = {"adversarial_weight": 0.8, "adversarial_start": 0, "ema_decay": 0.9}
    Trainer(
        TokenizerTask(run := run_config(dataset, tmp_path / "a", max_train_steps=2, **shared)), run.training
    ).train()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in "ab":
        run = run_config(dataset, tmp_path / name, max_train_steps=4, resume_from_checkpoint="latest", **shared)
        result = run_worker(run, "dump", tmp_path, processes=2)
        assert result.returncode == 0, result.stderr
    assert_equal_checkpoints(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")
    assert (tmp_path / "a" / "checkpoint-4" / "random_states_1.json").is_file()


@pytest.mark.parametrize("option", ["channels_last", pytest.param("compile", marks=pytest.mark.slow)])
def test_networks_in_another_layout_are_saved_and_resumed(dataset, tmp_path, option):  # noqa: F811
    shared = {option: True, "ema_decay": 0.9, "adversarial_weight": 0.8, "adversarial_start": 0}
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for until in steps:
            run = run_config(dataset, tmp_path / name, max_train_steps=until, resume_from_checkpoint="latest", **shared)
            Trainer(TokenizerTask(run), run.training).train()
            forget_accelerate()
    assert_equal_checkpoints(tmp_path / "whole" / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")
