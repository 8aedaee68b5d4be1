"""What is published of a tokenizer or of a pipeline that holds one, written into a folder that appears as a whole."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from ..autoencoder_dualcodebook import AUTO_MAP, DualCodebookVQModel
from ..image_processing_dualcodebook import DualCodebookImageProcessor
from .card import model_card, pipeline_card
from .records import Records, public_record, read_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PACKAGE = Path(__file__).parents[1]
CODE = ("configuration_dualcodebook", "modeling_dualcodebook", "image_processing_dualcodebook")
PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_dualcodebook.DualCodebookImageProcessor"}
SAMPLES = "samples.png"
RECORDS = {"train": "train_config.json", "metrics": "metrics.json", "conversion": "conversion.json"}


@dataclass
class TrainedModel:
    """A trained model on disk: its folder, the records and the sample picture that belong to it, a name for it."""

    folder: Path
    records: dict[str, Path]
    samples: Path | None
    name: str

    @classmethod
    def find(cls, run: str | Path, metrics: str | Path | None = None) -> TrainedModel:
        """The model of a run's `output_dir` (its `final/`), of a checkpoint (its `model/`), or in a folder itself.

        train_config.json, metrics.json and conversion.json may lie in either; `metrics` names another file. Raises
        ValueError where there is no model.
        """
        path = Path(run).expanduser().resolve()
        if not path.is_dir():
            raise ValueError(f"`run` must be the folder of a run or of a trained model, got '{run}'")
        folders = [folder for folder in (path, path / "final", path / "model") if (folder / "config.json").is_file()]
        if not folders:
            there = ", ".join(sorted(folder.name for folder in path.glob("checkpoint-*")))
            hint = f"; name one of its checkpoints: {there}" if there else ""
            raise ValueError(f"there is no config.json in '{run}', nor in its final/ or model/{hint}")
        folder = folders[0]
        home = folder.parent if folder.name in ("final", "model") else folder
        if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"there is no {SAFETENSORS_WEIGHTS_NAME} in '{folder}': save the model by "
                "DualCodebookVQModel.save_pretrained"
            )
        records = {}
        for key, name in RECORDS.items():
            found = [place / name for place in (folder, home) if (place / name).is_file()]
            records |= {key: found[0]} if found else {}
        if metrics is not None:
            records["metrics"] = Path(metrics).expanduser()
            if not records["metrics"].is_file():
                raise ValueError(f"`metrics` must be a file written by `dualcodebook evaluate`, got '{metrics}'")
        step = re.fullmatch(r"checkpoint-(\d+)", home.name)
        wanted = f"step-{int(step[1]):07d}.png" if step else "step-*.png"
        images = sorted(((home.parent if step else home) / "samples").glob(wanted))
        return cls(folder, records, images[-1] if images else None, re.sub(r"[^\w.-]|^[.-]", "_", home.name))

    def check_weights(self) -> None:
        """Raises ValueError unless the weights are those that config.json speaks of."""
        try:
            _, report = DualCodebookVQModel.from_pretrained(self.folder, output_loading_info=True)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(f"the model in '{self.folder}' cannot be loaded: {error}") from error
        wrong = {kind: names for kind, names in report.items() if names}
        if wrong:
            raise ValueError(f"the weights in '{self.folder}' do not fit config.json: {wrong}")

    def card(self, repo_id: str | None = None, license: str | None = None, samples: bool = False) -> str:
        """README.md; without a `repo_id` its examples say "you/..."."""
        records = Records.read(self.folder, **self.records)
        figure = SAMPLES if samples and self.samples else None
        return model_card(records, repo_id or f"you/{self.name}", license=license, figure=figure)


def prepare_folder(
    run: str | Path,
    folder: str | Path,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    metrics: str | Path | None = None,
    samples: bool = True,
) -> list[str]:
    """Writes into a new or empty `folder` what `push_model` publishes, and returns the files' names.

    config.json, the weights, preprocessor_config.json, the code for `trust_remote_code`, README.md, and what there is
    of train_config.json, metrics.json, conversion.json and the last samples. No local path gets into any of them.

    Args:
        run: see `TrainedModel.find`. repo_id: what the card's examples load.
        license: the Hub's identifier of the weights' licence; None: apache-2.0, or "other" for converted weights.
        metrics: a file written by `dualcodebook evaluate` that does not lie in `run`.
        samples: publish the run's last grid of validation pictures.

    Raises ValueError before anything is written when something is missing, broken or of another model.
    """
    source, folder = TrainedModel.find(run, metrics), Path(folder).expanduser().absolute()
    with _complete_folder(folder) as partial:
        card = source.card(repo_id, license, samples)
        source.check_weights()
        partial.mkdir(parents=True)
        for name in (SAFETENSORS_WEIGHTS_NAME, "config.json", "preprocessor_config.json"):
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, partial / name)
        for key, path in source.records.items():
            _write_json(partial / RECORDS[key], public_record(read_json(path)) if key == "train" else read_json(path))
        if samples and source.samples:
            shutil.copyfile(source.samples, partial / SAMPLES)
        export_code(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())


def export_code(folder: str | Path) -> None:
    """Adds to a saved model what `trust_remote_code=True` needs where this package is not installed.

    The modules that configuration, model and image processor import, preprocessor_config.json where there is none, and
    the entries in both JSON files by which transformers finds the classes.
    """
    folder = Path(folder)
    for path in code_files():
        shutil.copyfile(path, folder / path.name)
    if not (folder / "preprocessor_config.json").is_file():
        DualCodebookImageProcessor().save_pretrained(folder)
    for name, classes in {"config.json": AUTO_MAP, "preprocessor_config.json": PROCESSOR_MAP}.items():
        content = {**read_json(folder / name), "auto_map": classes}
        content.pop("_name_or_path", None)  # where it was loaded from: a folder of this machine
        _write_json(folder / name, dict(sorted(content.items())))


def code_files() -> list[Path]:
    """The modules of `CODE` and all that they import of this package, all of them at its top."""
    names: list[str] = []
    waiting = list(CODE)
    while waiting:
        names.append(waiting.pop())
        for node in ast.walk(ast.parse((PACKAGE / f"{names[-1]}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module not in names + waiting:
                waiting.append(node.module)
    return [PACKAGE / f"{name}.py" for name in sorted(names)]


def export_pipeline(pipeline: DiffusionPipeline, folder: str | Path, repo_id: str | None = None) -> list[str]:
    """Saves a diffusers pipeline that holds a tokenizer of ours so that it loads by its Hub id; returns its components.

    `DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)` then loads it, where this package is installed.
    From the Hub diffusers takes a class of another package only from a file in the component's folder: that file is one
    line here, an import of the installed class. Copies of the code would need no package, but diffusers puts those of
    all repositories into one folder under their bare names, where they overwrite each other.

    Raises ValueError when no component is of this package, or when the folder holds something.
    """
    folder = Path(folder).expanduser().absolute()
    names = [name for name, part in pipeline.components.items() if type(part).__module__.startswith(PACKAGE.name + ".")]
    if not names:
        raise ValueError(f"`pipeline` must hold a component of {PACKAGE.name}, got {', '.join(pipeline.components)}")
    with _complete_folder(folder) as partial:
        pipeline.save_pretrained(partial)
        index = read_json(partial / "model_index.json")
        for name in names:
            kind = type(pipeline.components[name]).__name__
            index[name] = [PACKAGE.name, kind]
            (partial / name / f"{PACKAGE.name}.py").write_text(f"from {PACKAGE.name} import {kind}\n")
        _write_json(partial / "model_index.json", index)
        for path in partial.rglob("*.json"):
            content = read_json(path)
            if content.pop("_name_or_path", None) is not None:
                _write_json(path, content)
        card = pipeline_card(type(pipeline).__name__, repo_id or f"you/{folder.name}", names)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return names


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """Another name to write to: the folder appears as a whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got '{folder}'")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        yield partial
        if folder.is_dir():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
