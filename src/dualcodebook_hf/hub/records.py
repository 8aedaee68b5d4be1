"""The JSON files that lie beside a model's weights: what it is, how it was trained, what was measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, try_to_load_from_cache

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..configuration_dualcodebook import DualCodebookConfig, DualCodebookFields
from ..files import read_json
from ..loading import EMBEDDED, EMBEDDED_LABELS, embedded_label
from ..run_folder import CONFIG, RECORDS, TRAIN_CONFIG, SavedModel

# Settings that may be local paths, and what a Hub id or a plain name looks like.
PATHS = {"dataset", "output_dir", "init_from", "resume_from_checkpoint", "vgg_weights"}
PATHS |= {"efficientnet_weights", "lite1_weights"}
PATHS |= {"tokens", "validation_tokens", "tokenizer"}  # of generators
NAMES = {"init_from", "tokenizer"}  # of them those that may be `sharp` or `faithful` too
_EMBEDDED_LICENSE = "apache-2.0"
HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")


@dataclass
class Records:
    """What lies beside a model's weights, as read from JSON.

    Attributes:
        config: config.json.
        train: the sections of train_config.json, without local paths; None where there is none.
        results: those of metrics.json, baselines' too.
        conversion: conversion.json, what `dualcodebook convert` wrote; None where there is none.
        origin_license: the Hub's identifier of the licence of the weights that training started from, as their own card
            says; None where it started from none, or their licence is not known here.
        name: what an unpublished model is called.
    """

    config: dict[str, Any]
    train: dict[str, dict] | None = None
    results: list[dict] = field(default_factory=list)
    conversion: dict[str, Any] | None = None
    origin_license: str | None = None
    name: str = EMBEDDED

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
            origin = found["train"]["training"].get("init_from") if found["train"] else None
            license = _license_of(origin) if origin else None
            label = embedded_label(str(folder)) or EMBEDDED
            records = cls(config, train, results, found["conversion"], license, label)
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
            made: Any = DualCodebookVQModel.from_config(self.config)
        return made

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

    def check_weights(self, sha256: str) -> None:
        """Raises ValueError where the measurements are of other weights than those with this `weights_hash`."""
        for described in (result["model"] for result in self.own()):
            measured = described.get("weights_sha256")  # not of a model measured in a lower precision
            if measured is not None and measured != sha256:
                raise ValueError(
                    f"`metrics` are of other weights, SHA-256 {measured}; this model's are {sha256}: measure it again"
                )


def _license_of(source: str) -> str | None:
    """The licence of the weights in a folder, or of a Hub id in the cache; None where it is not known.

    It stands in their card. A folder without a card is a run of one's own: apache-2.0, as its card would say, if it
    started from random weights; otherwise that of what it started from. Records call the embedded one so.
    """
    if source in EMBEDDED_LABELS or source.startswith(EMBEDDED) or embedded_label(source):
        return _EMBEDDED_LICENSE
    path = Path(source).expanduser()
    if not path.is_dir():
        card = try_to_load_from_cache(source, "README.md") if HUB_NAME.fullmatch(source) else None
        return ModelCard.load(card).data.license if isinstance(card, str) else None
    if (path / "README.md").is_file():
        return ModelCard.load(path / "README.md").data.license
    try:
        records = SavedModel.find(path).records()
    except ValueError:
        return None
    train = None if "conversion" in records else read_json(records.get("train", path / TRAIN_CONFIG))
    origin = train and train["training"].get("init_from")
    if origin and Path(origin).expanduser().resolve() != path.resolve():
        return _license_of(origin)
    return None if train is None else "apache-2.0"


@contextmanager
def complete_records() -> Iterator[None]:
    """What is missing in a JSON file of another version or hand, as ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        files = "the model's train_config.json, metrics.json or conversion.json"
        raise ValueError(f"{files} is incomplete: {type(error).__name__} {error}") from error


def public_record(train: Mapping[str, dict]) -> dict[str, dict]:
    """train_config.json for publication: of every local path the last part only.

    A relative path of two parts looks like a Hub id; it is a path where something lies there now.
    """

    def public(name: str, value: Any) -> Any:
        if name in PATHS and isinstance(value, list):
            return [public(name, item) for item in value]
        if name not in PATHS or not isinstance(value, str):
            return value
        if label := embedded_label(value) or (EMBEDDED_LABELS.get(value) if name in NAMES else None):
            return label
        if HUB_NAME.fullmatch(value) and not Path(value).exists():
            return value
        last = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        return f"./{last}" if last in EMBEDDED_LABELS and name in NAMES else last  # a folder, as commands write it

    return {section: {name: public(name, value) for name, value in values.items()} for section, values in train.items()}
