"""What is published of a tokenizer or of a pipeline that holds one, written into a folder that appears as a whole."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from transformers.utils import SAFE_WEIGHTS_NAME

from ..autoencoder_dualcodebook import AUTO_MAP, DualCodebookVQModel, is_saved_by_transformers
from ..figures import grid
from ..files import atomic_folder, read_json, write_json
from ..image_processing_dualcodebook import (
    DualCodebookImageProcessor,
    center_crop,
    read_image,
    resize_shorter_side,
    to_pixels,
)
from ..loading import load_tokenizer
from ..run_folder import CONFIG, RECORDS, TRAIN_CONFIG, SavedModel, checkpoint_step
from ..weights import weights_hash
from .card import generator_card, model_card, pipeline_card
from .records import Records, public_record

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PACKAGE = Path(__file__).parents[1]
CODE = ("configuration_dualcodebook", "modeling_dualcodebook", "image_processing_dualcodebook")
MODELING = "modeling_dualcodebook"
# The end of the published modeling file: the names of its modules, never executed.
DIFFUSERS_IMPORTS = """

if False:  # diffusers' AutoModel brings from a folder only those modules that this file itself names
"""
PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_dualcodebook.DualCodebookImageProcessor"}
PROCESSOR_CONFIG = "preprocessor_config.json"
CARD = "README.md"
SAMPLES = "samples.png"
SAMPLES_CAPTION = "Validation images above their reconstructions"
RECONSTRUCTIONS = "reconstructions.png"
# Photographs of scikit-image's wheel that may be published: by NASA (public domain) and under CC0.
EXAMPLES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
EXAMPLES_CAPTION = "Photographs of scikit-image (public domain, CC0) above their reconstructions"
SHEET_SIZE = 256  # pixels of an image's side
MOST_IMAGES = 8


@dataclass(frozen=True)
class TrainedModel:
    """A saved model that can be published.

    Attributes:
        saved: where it lies, and the run that it belongs to.
        weights: its one file of weights, as diffusers' face or as transformers names it.
        records: the files of `RECORDS` that tell of it.
    """

    saved: SavedModel
    weights: Path
    records: dict[str, Path]

    @classmethod
    def find(cls, run: str | Path, metrics: str | Path | None = None) -> TrainedModel:
        """The model of a run, of a checkpoint or in a folder itself.

        Args:
            run: see `SavedModel.find`.
            metrics: a file written by `dualcodebook evaluate`, instead of the one that lies in `run`.

        Raises ValueError where there is no model, no weights or no such file, and for a link that leads out of `run`.
        """
        saved = SavedModel.find(run)
        own = is_saved_by_transformers(read_json(_inside(saved, saved.folder / CONFIG)) or {})
        weights = saved.folder / (SAFE_WEIGHTS_NAME if own else SAFETENSORS_WEIGHTS_NAME)
        if not weights.is_file():
            raise ValueError(
                f"there is no {weights.name} in '{saved.folder}': one whole file is published, without a variant; load "
                "the model and save it by DualCodebookVQModel.save_pretrained"
            )
        records = {key: _inside(saved, path) for key, path in saved.records().items()}
        if metrics is not None:
            records["metrics"] = Path(metrics).expanduser()
            if not records["metrics"].is_file():
                raise ValueError(f"`metrics` must be a file written by `dualcodebook evaluate`, got '{metrics}'")
        return cls(saved, _inside(saved, weights), records)

    def sample(self) -> Path | None:
        """The run's validation images. Raises ValueError for a link that leads out of the run."""
        path = self.saved.sample()
        return path and _inside(self.saved, path)

    def has_colours(self) -> bool:
        """Whether it takes and gives RGB images."""
        config = read_json(self.saved.folder / CONFIG) or {}
        return config.get("in_channels", 3) == config.get("out_channels", 3) == 3

    def load(self) -> DualCodebookVQModel:
        """The model, on the CPU.

        Raises ValueError unless the weights are those that config.json speaks of, and metrics.json where it names them.
        """
        model = load_tokenizer(str(self.saved.folder), device="cpu", argument="run")
        records = Records.read(self.saved.folder, **self.records)
        if records.results:
            records.check_weights(weights_hash(model))
        return model

    def card(
        self,
        repo_id: str | None = None,
        license: str | None = None,
        figures: Mapping[str, str] | None = None,
        onnx: bool = False,
    ) -> str:
        """README.md; see `model_card`. Without a `repo_id` its examples say "you/..."."""
        records = Records.read(self.saved.folder, **self.records)
        return model_card(records, repo_id or f"you/{self.saved.name}", license=license, figures=figures, onnx=onnx)

    def copy_to(self, folder: Path) -> None:
        """Weights and configuration, as diffusers' face writes them, and the records."""
        shutil.copyfile(self.weights, folder / SAFETENSORS_WEIGHTS_NAME)
        if self.weights.name == SAFETENSORS_WEIGHTS_NAME:
            shutil.copyfile(self.saved.folder / CONFIG, folder / CONFIG)
        else:
            Records.read(self.saved.folder).model().save_config(folder)
        for key, path in self.records.items():
            content = read_json(path) or {}
            write_json(folder / RECORDS[key], public_record(content) if key == "train" else content)


def prepare_folder(
    run: str | Path,
    folder: str | Path,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    metrics: str | Path | None = None,
    samples: bool = True,
    images: Sequence[str | Path] | None = None,
    onnx: bool = False,
) -> list[str]:
    """Writes into a new or empty `folder` what `push_model` publishes, and returns the files' names.

    config.json, the weights, preprocessor_config.json, the code for `trust_remote_code`, README.md with a sheet of
    reconstructions, and those of train_config.json, metrics.json, conversion.json and the last samples that there are.
    No local path gets into any of them.

    Args:
        run: the folder of a run, a checkpoint or a saved model.
        folder: where the files go.
        repo_id: what the card's examples load.
        license: the Hub's identifier of the weights' licence; None: see `model_card`.
        metrics: a file written by `dualcodebook evaluate` that does not lie in `run`.
        samples: publish the run's last grid of validation images.
        images: up to 8 image files for the card's sheet, which may be published; None: four photographs of
            scikit-image, where it is installed; an empty list: no sheet.
        onnx: add graphs for onnxruntime, in float32 and float16, in onnx/.

    Raises ValueError before anything is written when something is missing, broken or of another model.
    """
    model, folder = TrainedModel.find(run, metrics), Path(folder).expanduser()
    sample = model.sample() if samples else None
    originals, caption = _sheet_images(images) if model.has_colours() else ([], "")
    processor = _inside(model.saved, model.saved.folder / PROCESSOR_CONFIG)
    figures = ({RECONSTRUCTIONS: caption} if originals else {}) | ({SAMPLES: SAMPLES_CAPTION} if sample else {})
    card = model.card(repo_id, license, figures, onnx)
    tokenizer = model.load()
    if onnx:
        from ..onnx_export import check_exportable, export_onnx

        check_exportable(tokenizer)
    with atomic_folder(folder) as partial:
        partial.mkdir()
        model.copy_to(partial)
        if processor.is_file():
            shutil.copyfile(processor, partial / PROCESSOR_CONFIG)
        if sample:
            shutil.copyfile(sample, partial / SAMPLES)
        if originals:
            reconstruction_sheet(tokenizer, originals).save(partial / RECONSTRUCTIONS)
        export_code(partial)
        if onnx:
            export_onnx(tokenizer, partial)
        (partial / CARD).write_text(card, encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())


def reconstruction_sheet(tokenizer: DualCodebookVQModel, originals: Sequence[Image.Image]) -> Image.Image:
    """RGB images of one size, side by side, above their reconstructions."""
    pixels = torch.stack([to_pixels(image) for image in originals])
    restored = tokenizer.detokenize(tokenizer.tokenize(pixels), size=(pixels.shape[-2], pixels.shape[-1]))
    return grid(pixels, restored, columns=len(originals))


def _sheet_images(images: Sequence[str | Path] | None) -> tuple[list[Image.Image], str]:
    """The squares of the card's sheet, and what they are. Raises ValueError for files that are not images."""
    caption = "Images above their reconstructions"
    if images is None:
        caption, package = EXAMPLES_CAPTION, importlib.util.find_spec("skimage")
        folder = Path(package.origin).parent / "data" if package and package.origin else None
        images = [folder / name for name in EXAMPLES if (folder / name).is_file()] if folder else []
    if len(images) > MOST_IMAGES:
        raise ValueError(f"`images` must be at most {MOST_IMAGES}, got {len(images)}")
    return [center_crop(resize_shorter_side(read_image(image), SHEET_SIZE), SHEET_SIZE) for image in images], caption


def _inside(saved: SavedModel, path: Path) -> Path:
    """`path` itself. Raises ValueError where it is a link to something outside the run: it would be published."""
    run = saved.home if checkpoint_step(saved.home) is None else saved.home.parent
    if path.exists() and not path.resolve().is_relative_to(run):
        raise ValueError(f"'{path}' leads out of '{run}', to '{path.resolve()}': put the file itself there")
    return path


def export_code(folder: str | Path) -> None:
    """Adds to a saved model what `trust_remote_code=True` needs where this package is not installed.

    The modules that configuration, model and image processor import, preprocessor_config.json where there is none, and
    the entries in both JSON files by which transformers finds the classes.
    """
    folder = Path(folder)
    files = code_files()
    for path in files:
        shutil.copyfile(path, folder / path.name)
    named = [path.stem for path in files if path.stem != MODELING]
    with (folder / f"{MODELING}.py").open("a", encoding="utf-8") as file:
        file.write(DIFFUSERS_IMPORTS + "".join(f"    from .{name} import _\n" for name in named))
    if not (folder / PROCESSOR_CONFIG).is_file():
        DualCodebookImageProcessor().save_pretrained(folder)
    for name, classes in {CONFIG: AUTO_MAP, PROCESSOR_CONFIG: PROCESSOR_MAP}.items():
        content = {**(read_json(folder / name) or {}), "auto_map": classes}
        content.pop("_name_or_path", None)  # where it was loaded from: a folder of this machine
        write_json(folder / name, dict(sorted(content.items())))


def code_files() -> list[Path]:
    """The modules of `CODE` and all that they import of this package, all of them at its top."""
    names: list[str] = []
    waiting = list(CODE)
    while waiting:
        names.append(waiting.pop())
        for node in ast.walk(ast.parse((PACKAGE / f"{names[-1]}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module and node.module not in names + waiting:
                waiting.append(node.module)
    return [PACKAGE / f"{name}.py" for name in sorted(names)]


def export_pipeline(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    repo_id: str | None = None,
    train: Mapping[str, dict] | None = None,
) -> list[str]:
    """Saves a diffusers pipeline that holds a tokenizer of ours so that it loads by its Hub id; returns its components.

    `DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)` then loads it, where this package is installed.
    From the Hub diffusers takes a class of another package only from a file in the component's folder, and a pipeline's
    own from one in the root: that file is one line here, an import of the installed class. Copies of the code would
    need no package, but diffusers puts those of all repositories into one folder under their bare names, where they
    overwrite each other.

    Args:
        pipeline: any that holds a tokenizer.
        folder: must be new or empty.
        repo_id: where it will be published, for the card; None: "you/..." and the folder's name.
        train: content of a generator's train_config.json, which is published beside it.

    Raises ValueError when no component is of this package, or when the folder holds something.
    """
    folder = Path(folder).expanduser()
    held: Any = pipeline  # diffusers' type checkers' view of it is an empty class
    names = [name for name, part in held.components.items() if _is_ours(part)]
    if not names:
        raise ValueError(f"`pipeline` must hold a component of {PACKAGE.name}, got {', '.join(held.components)}")
    with atomic_folder(folder) as partial:
        held.save_pretrained(partial)
        index = read_json(partial / "model_index.json") or {}
        for name in names:
            kind = type(held.components[name]).__name__
            index[name] = [PACKAGE.name, kind]
            (partial / name / f"{PACKAGE.name}.py").write_text(f"from {PACKAGE.name} import {kind}\n")
        ours, repo_id = _is_ours(pipeline), repo_id or f"you/{folder.resolve().name}"
        if ours:
            kind = type(pipeline).__name__
            index["_class_name"] = [PACKAGE.name, kind]
            (partial / f"{PACKAGE.name}.py").write_text(f"from {PACKAGE.name} import {kind}\n")
        write_json(partial / "model_index.json", index)
        for path in partial.rglob("*.json"):
            content = read_json(path) or {}
            if content.pop("_name_or_path", None) is not None:
                write_json(path, content)
        if ours:
            card = generator_card(pipeline, repo_id, train=train)
        else:
            card = pipeline_card(type(pipeline).__name__, repo_id, names)
        (partial / CARD).write_text(card, encoding="utf-8")
        if train is not None:
            write_json(partial / TRAIN_CONFIG, train)
    return names


def _is_ours(part: object) -> bool:
    """Whether this package defines its class."""
    return type(part).__module__.startswith(f"{PACKAGE.name}.")
