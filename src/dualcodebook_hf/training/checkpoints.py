"""Checkpoints that appear whole or not at all, and the export that `from_pretrained` reads."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..image_processing_dualcodebook import DualCodebookImageProcessor
from .arguments import RunConfig

NAME = re.compile(r"checkpoint-(\d+)$")
TRAIN_CONFIG = "train_config.json"
CONVERSION = "conversion.json"  # written by `dualcodebook convert`: whose weights a run started from
DERIVED_FIELDS = ("latent_channels", "vq_embed_dim")  # sums of others: a message should name the cause


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if NAME.search(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(NAME.search(path.name).group(1)))


def find_checkpoint(run: RunConfig) -> Path | None:
    """The folder that `resume_from_checkpoint` means; None for a fresh start (`latest` in an empty run is one).

    Raises ValueError when a named folder is no checkpoint, when its model is another one, and when a fresh start would
    mix with the checkpoints that `output_dir` already holds.
    """
    resume, existing = run.training.resume_from_checkpoint, list_checkpoints(run.training.output_dir)
    if resume is None:
        if existing:
            raise ValueError(
                f"`output_dir` {run.training.output_dir!r} already holds {existing[-1].name}: set "
                "`resume_from_checkpoint: latest` to go on, or name another folder"
            )
        return None
    if resume == "latest":
        if not existing:
            return None
        path = existing[-1]
    else:
        path = Path(resume)
    if not (path / TRAIN_CONFIG).is_file():
        raise ValueError(f"`resume_from_checkpoint` must be `latest` or a checkpoint-N folder, got {resume!r}")
    saved, wanted = json.loads((path / TRAIN_CONFIG).read_text()), run.to_dict()
    compared = [(name, saved["model"].get(name), value) for name, value in wanted["model"].items()]
    compared.append(("seed", saved["training"]["seed"], wanted["training"]["seed"]))
    for name, old, new in compared:
        if name not in DERIVED_FIELDS and old != new:
            raise ValueError(f"`{name}` must be {old!r}, as in the checkpoint {path}, got {new!r}")
    for name in ("ema_decay", "adversarial_weight"):
        old, new = saved["training"][name], wanted["training"][name]
        if bool(old) != bool(new):
            raise ValueError(f"`{name}` cannot be switched on or off: {old!r} in the checkpoint {path}, got {new!r}")
    return path


def save_checkpoint(accelerator: Accelerator, run: RunConfig, step: int, model: DualCodebookVQModel | None) -> Path:
    """Writes `output_dir/checkpoint-<step>`; deletes the oldest beyond `checkpoints_total_limit`.

    It holds accelerate's state (weights, both optimizers, EMA, RNG of every process, progress), train_config.json and,
    in `model/`, the `model` that was validated, for `from_pretrained`. Everything is written beside it first and
    renamed once; a checkpoint of the same step is left as it is.
    Call it on every process: the main one needs the `model`.
    """
    output_dir = Path(run.training.output_dir)
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    if final.exists():
        return final
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        export_model(model, partial / "model", run)
        write_train_config(run, partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(partial, final)
        if run.training.checkpoints_total_limit:
            for old in list_checkpoints(output_dir)[: -run.training.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def exportable(model: DualCodebookVQModel, dtype: str) -> DualCodebookVQModel:
    """A copy of the model with the backbone in `dtype` ("bfloat16", ...) and the codebooks in float32."""
    model = copy.deepcopy(model)
    model.cast_backbone(getattr(torch, dtype))
    return model


def export_model(model: DualCodebookVQModel, folder: Path, run: RunConfig) -> None:
    """Saves what every `from_pretrained` reads, and train_config.json, as `folder`, which is replaced as a whole."""
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    DualCodebookImageProcessor().save_pretrained(partial)
    write_train_config(run, partial)
    origin = Path(run.training.init_from or ".") / CONVERSION
    if run.training.init_from and origin.is_file():
        shutil.copyfile(origin, partial / CONVERSION)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def write_train_config(run: RunConfig, folder: Path) -> None:
    """Writes the whole run configuration as train_config.json."""
    (folder / TRAIN_CONFIG).write_text(json.dumps(run.to_dict(), indent=2) + "\n")
