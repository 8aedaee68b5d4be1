"""The state of a run in files of numbers: JSON, safetensors, and torch's files read by its `weights_only` reader.

Nothing that such a file holds can run when it is read.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from ..files import read_json, write_json
from .task import Trained

PROGRESS, EMA, SCALER = "progress.json", "ema.safetensors", "scaler.json"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: updates taken.
        samples: samples consumed by all processes, which is the position in the data.
        skipped: updates skipped in a row because of a NaN or an infinity.
        best: value of the task's goal at the best validation so far; None: there was none.
        best_step: updates taken then.
        stale: validations since then.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0


class RunState:
    """Everything that a run goes on from, but for its settings.

    Args:
        accelerator: which prepared the parts.
        parts: networks and their optimizers.
        network: the one that is averaged.
        ema: its moving average; None where there is none.
    """

    def __init__(
        self, accelerator: Accelerator, parts: Sequence[Trained], network: nn.Module, ema: EMAModel | None
    ) -> None:
        self.accelerator, self.parts, self.network, self.ema = accelerator, parts, network, ema

    def random_states(self) -> list[dict[str, Any]]:
        """Of every process; all must call this together."""
        return gather_object([_random_state(self.accelerator.device)])

    @contextmanager
    def unchanged_random_numbers(self) -> Iterator[None]:
        """Whatever the block draws, the next numbers are those that would have come without it."""
        before = _random_state(self.accelerator.device)
        try:
            yield
        finally:
            _set_random_state(before, self.accelerator.device)

    def write(self, folder: Path, progress: Progress, random_states: Sequence[dict[str, Any]]) -> None:
        """Writes all of it into a folder that exists.

        Args:
            folder: where.
            progress: of the run.
            random_states: of every process.
        """
        record = {**asdict(progress), "processes": len(random_states)}
        for number, part in enumerate(self.parts):
            save_model(self.accelerator.unwrap_model(part.module), str(folder / _numbered("model.safetensors", number)))
            if part.optimizer is None:
                continue
            buffer = io.BytesIO()  # written by Python, whose error says that the disk is full
            torch.save(part.optimizer.state_dict(), buffer)
            # The view is given back on a full disk too: Python 3.12.1 crashes when it collects one in a traceback.
            with (folder / _numbered("optimizer.bin", number)).open("wb") as file, buffer.getbuffer() as content:
                file.write(content)
        if self.ema is not None:
            names = [name for name, _ in self.network.named_parameters()]
            averages = [average.contiguous() for average in self.ema.shadow_params]
            save_file(dict(zip(names, averages, strict=True)), folder / EMA)
            record["ema_updates"] = self.ema.optimization_step
        if self.accelerator.scaler is not None:
            write_json(folder / SCALER, self.accelerator.scaler.state_dict())
        for rank, state in enumerate(random_states):
            write_json(folder / _of_rank(rank), state)
        write_json(folder / PROGRESS, record)

    def read(self, folder: Path) -> Progress:
        """Sets all of it, on every process, and returns the progress.

        The optimizers' settings (rates, betas) stay those of the arguments. Where another number of processes goes on,
        each takes the random numbers of the first; where another kind of device does, its own stay at the seed's.

        Raises ValueError, which names the file, for one that is missing, damaged or does not fit.
        """
        for number, part in enumerate(self.parts):
            with _reading(folder / _numbered("model.safetensors", number)) as path:
                load_model(self.accelerator.unwrap_model(part.module), path)
            if part.optimizer is None:
                continue
            with _reading(folder / _numbered("optimizer.bin", number)) as path:
                _set_optimizer(part, torch.load(path, map_location="cpu", weights_only=True))
        with _reading(folder / PROGRESS) as path:
            record = read_json(path)
            best = _number(record.pop("best", None))
            record = {name: _count(value) for name, value in record.items()}
            processes = record.pop("processes")
            if self.ema is not None:
                self.ema.optimization_step = record.pop("ema_updates")
            progress = Progress(**record, best=best)
        if self.ema is not None:
            with _reading(folder / EMA) as path:
                _set_average(self.ema, self.network, load_file(path))
        if self.accelerator.scaler is not None:
            with _reading(folder / SCALER) as path:
                self.accelerator.scaler.load_state_dict(read_json(path))
        rank = self.accelerator.process_index if processes == self.accelerator.num_processes else 0
        with _reading(folder / _of_rank(rank)) as path:
            _set_random_state(read_json(path), self.accelerator.device)
        return progress


def _numbered(name: str, number: int) -> str:
    """`model.safetensors`, `model_1.safetensors`, ..."""
    stem, suffix = name.split(".")
    return f"{stem}_{number}.{suffix}" if number else name


def _of_rank(rank: int) -> str:
    return f"random_states_{rank}.json"


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Whatever goes wrong in the block is the file's fault: foreign bytes raise errors of every kind."""
    if not path.is_file():
        raise ValueError(f"'{path}' is missing: the checkpoint is not complete, or of another run")
    try:
        yield path
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"'{path}' is damaged, or not of this run: {type(error).__name__} {reason}") from error


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"must hold whole numbers, got {value!r}")
    return value


def _number(value: Any) -> float | None:
    if value is not None and type(value) is not float:
        raise TypeError(f"`best` must be a number or null, got {value!r}")
    return value


def _set_optimizer(part: Trained, saved: dict[str, Any]) -> None:
    groups = part.optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("its parameters are others")
    parameters = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    for index, state in saved["state"].items():
        shapes = {tuple(value.shape) for value in state.values() if value.ndim}
        if not shapes <= {tuple(parameters[index].shape)}:
            raise ValueError(f"the state of parameter {index} has another shape")
    part.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _set_average(ema: EMAModel, network: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    names = [name for name, _ in network.named_parameters()]
    if set(saved) != set(names):
        raise ValueError("its parameters are others")
    for name, average in zip(names, ema.shadow_params, strict=True):
        if saved[name].shape != average.shape:
            raise ValueError(f"{name} has another shape")
        average.copy_(saved[name])


def _random_state(device: torch.device) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }
    if device.type != "cpu":
        state[device.type] = _hex(torch.get_device_module(device).get_rng_state())
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_of_hex(state["torch"]))
    if device.type in state:
        torch.get_device_module(device).set_rng_state(_of_hex(state[device.type]))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _of_hex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
