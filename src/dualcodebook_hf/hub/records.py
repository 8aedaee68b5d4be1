"""The JSON files that lie beside a model's weights: what it is, how it was trained, what was measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..configuration_dualcodebook import DualCodebookConfig, DualCodebookFields
from ..files import read_json
from ..run_folder import CONFIG, RECORDS

# Settings that may be local paths, and what a Hub id or a plain name looks like.
PATHS = ("dataset", "output_dir", "init_from", "resume_from_checkpoint", "vgg_weights", "efficientnet_weights")
HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")


@dataclass
class Records:
    """What lies beside a model's weights, as read from JSON.

    Attributes:
        config: config.json.
        train: the sections of train_config.json, without local paths; None where there is none.
        results: those of metrics.json, baselines' too.
        conversion: conversion.json, what `dualcodebook convert` wrote; None where there is none.
    """

    config: dict[str, Any]
    train: dict[str, dict] | None = None
    results: list[dict] = field(default_factory=list)
    conversion: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: str | Path, **paths: Path | None) -> Records:
        """Reads config.json, and those of `RECORDS` that are there.

        Args:
            folder: of the saved model.
            paths: files that lie elsewhere, by their keys in `RECORDS`.

        Raises ValueError for a file that is no such JSON, and for measurements of another model.
        """
        folder = Path(folder)
        found = {key: read_json(paths.get(key) or folder / name) for key, name in RECORDS.items()}
        config, metrics = read_json(folder / CONFIG), found["metrics"]
        if config is None or config.get("model_type") != DualCodebookConfig.model_type:
            raise ValueError(f"there is no {CONFIG} of a dual codebook tokenizer in '{folder}'")
        if metrics is not None and not isinstance(metrics.get("results"), list):
            raise ValueError("`metrics` must be a file written by `dualcodebook evaluate`, with a list of `results`")
        results = metrics["results"] if metrics else []
        if not all(
            isinstance(result, dict) and result.keys() >= {"model", "protocol", "metrics"} for result in results
        ):
            raise ValueError("`metrics`: every result must have a model, a protocol and metrics, as `evaluate` writes")
        with complete_records():
            train = found["train"] and public_record(found["train"])
            records = cls(config, train, results, found["conversion"])
            records.check()
        return records

    @property
    def fields(self) -> DualCodebookFields:
        """The model's hyper-parameters."""
        names = [spec.name for spec in dataclasses.fields(DualCodebookFields) if spec.name in self.config]
        return DualCodebookConfig(**{name: self.config[name] for name in names})

    def model(self) -> DualCodebookVQModel:
        """The model without storage, to count and to name what it has."""
        with torch.device("meta"):
            return DualCodebookVQModel.from_config(self.config)

    def own(self) -> list[dict]:
        """The results of this model; the others are baselines'."""
        return [result for result in self.results if "fitted_to" not in result["model"]]

    def check(self) -> None:
        """Raises ValueError where the measurements are another model's, or several models'."""
        if not self.results:
            return
        names = {str(result["model"]["name"]) for result in self.own()}
        if len(names) != 1:
            raise ValueError(f"`metrics` must hold the results of one model, got {', '.join(sorted(names)) or 'none'}")
        model = self.model()
        sizes, parameters = model.codebook_sizes, model.num_parameters()
        for described in (result["model"] for result in self.own()):
            if (described["parameters"], described["codebook_sizes"]) != (parameters, sizes):
                raise ValueError(
                    f"`metrics` are of another model: it has {described['parameters']} parameters and codebooks "
                    f"{described['codebook_sizes']}, this one {parameters} and {sizes}"
                )


@contextmanager
def complete_records() -> Iterator[None]:
    """What is missing in a JSON file of another version or hand, as ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        files = "the model's train_config.json, metrics.json or conversion.json"
        raise ValueError(f"{files} is incomplete: {type(error).__name__} {error}") from error


def public_record(train: dict[str, dict]) -> dict[str, dict]:
    """train_config.json for publication: of every local path the last part only."""

    def public(name: str, value: Any) -> Any:
        if name in PATHS and isinstance(value, list):
            return [public(name, item) for item in value]
        if name not in PATHS or not isinstance(value, str) or HUB_NAME.fullmatch(value):
            return value
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]

    return {section: {name: public(name, value) for name, value in values.items()} for section, values in train.items()}
