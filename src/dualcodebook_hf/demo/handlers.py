"""What happens when somebody uses the demo: from what the browser sent to what the components show."""

from __future__ import annotations

import functools
import html
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image
from safetensors import SafetensorError

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..figures import error_map, token_map
from . import fragments, inspection

EMBEDDED = "embedded checkpoint"
HINT = "Drop in a picture, or take an example."
PROGRESS = gr.Progress()


def load_models(names: Sequence[str] | None) -> dict[str, DualCodebookVQModel]:
    """Models, in eval mode, by the label that the dropdown shows; without names the embedded checkpoint.

    Raises ValueError, naming the model, for one that cannot be loaded or does not take RGB pictures.
    """
    from ..loading import default_checkpoint

    device, models = "cuda" if torch.cuda.is_available() else "cpu", {}
    for name in names or [default_checkpoint()]:
        path = Path(name).expanduser()
        # The page is public; this machine's folders are not.
        label = "/".join(path.resolve().parts[-2:]) if path.is_dir() else name
        label = EMBEDDED if name == default_checkpoint() else label
        try:
            model = DualCodebookVQModel.from_pretrained(path if path.is_dir() else name)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"cannot load the model '{name}': {error}") from error
        if (model.config.in_channels, model.config.out_channels) != (3, 3):
            raise ValueError(f"the model '{name}' must have 3 channels, got {model.config.in_channels}")
        models[label if label not in models else f"{label} ({len(models) + 1})"] = model.eval().to(device)
    return models


@dataclass(frozen=True)
class Shown:
    """What a visitor is looking at."""

    model: str
    coded: inspection.CodedImage


def _explained(handler: Callable) -> Callable:
    """Shows the text of a ValueError, which may name the visitor's file, as a message that is no HTML."""

    @functools.wraps(handler)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return handler(*arguments, **options)
        except ValueError as error:
            text = html.escape(str(error), quote=False)
            raise gr.Error(text, print_exception=False) from error

    return run


class Handlers:
    """The functions behind the components, over some models by label.

    Uploads arrive as dicts with a `path`, or None. What a function returns is in the order of the outputs that
    `demo` gives to its event.
    """

    def __init__(self, models: dict[str, DualCodebookVQModel]) -> None:
        self.models = models

    @_explained
    def show_image(self, picture: dict | None, label: str, progress: gr.Progress = PROGRESS) -> list[Any]:
        """Everything on the first tab, what is known of the upload, and the token file."""
        if picture is None:
            return self.nothing()
        model = self._model(label)
        progress(0.1, desc="Reading the picture")
        upload = _upload(picture)
        progress(0.25, desc="Picture to tokens and back")
        coded = inspection.code(model, upload)
        progress(0.7, desc="JPEG and WebP of the same size")
        baselines = inspection.baselines(model, coded)
        rows = inspection.table(model, coded, baselines)
        return [
            Shown(label, coded),
            fragments.tiles(_key_numbers(rows[0])),
            (inspection.enlarged(upload.image), inspection.enlarged(coded.reconstruction)),
            fragments.rate_table(inspection.TABLE_HEADERS, rows),
            inspection.enlarged(error_map(upload.image, coded.reconstruction)),
            *(
                gr.Image(inspection.enlarged(baseline.image), label=row[0])
                for baseline, row in zip(baselines.values(), rows[1:], strict=False)
            ),
            fragments.about_file(upload.name, upload.file_size, upload.file_bytes, upload.notes),
            *self._token_file(model, coded),
        ]

    def _token_file(self, model: DualCodebookVQModel, coded: inspection.CodedImage) -> list[Any]:
        """The button that downloads it, and a line about it."""
        try:
            path = inspection.save_image_tokens(model, coded.upload, coded.tokens, _new_folder())
        except ValueError as error:  # a book of more codes than a token file can number
            return [gr.DownloadButton("Download tokens", value=None, interactive=False), fragments.remark(str(error))]
        codebooks, rows, columns = coded.tokens.shape
        packed, stored = inspection.packed_bytes(model, coded), path.stat().st_size
        button = gr.DownloadButton(f"Download {path.name}", value=str(path), interactive=True)
        return [button, fragments.token_note((columns, rows), codebooks, packed, stored)]

    def nothing(self) -> list[Any]:
        """The first tab as it is before any picture."""
        hint = fragments.hint(HINT)
        button = gr.DownloadButton("Download tokens", value=None, interactive=False)
        return [None, hint, None, "", None, gr.Image(None, label="JPEG"), gr.Image(None, label="WebP"), "", button, ""]

    @_explained
    def look_inside(self, shown: Shown | None) -> list[Any]:
        """The second tab: [hint, page, 2 maps, half groups, 2 halves, usage, cell, 2 places]."""
        if shown is None:
            return [gr.HTML(visible=True), gr.Column(visible=False), *[gr.skip()] * 9]
        model, coded = self._model(shown.model), shown.coded
        codebooks = list(model.quantize.codebooks)
        shape = coded.upload.image.size
        maps = [inspection.enlarged(token_map(ids, shape)) for ids in coded.tokens]
        halves = [inspection.half(model, coded, codebook) for codebook in codebooks] if len(codebooks) > 1 else []
        middle = tuple(side // 2 for side in coded.tokens.shape[1:])
        return [
            gr.HTML(visible=False),
            gr.Column(visible=True),
            *_pair(maps, [f"{codebook.capitalize()} tokens" for codebook in codebooks]),
            gr.Column(visible=len(codebooks) > 1),
            *_pair(
                [inspection.enlarged(image) for image in halves],
                [f"{codebook.capitalize()} half only" for codebook in codebooks],
            ),
            fragments.histograms(inspection.usage(model, coded.tokens)),
            *self._cell(shown, middle),
        ]

    @_explained
    def look_up(self, shown: Shown | None, event: gr.SelectData) -> list[Any]:
        """The token at the point that was clicked: [cell, 2 places]."""
        if shown is None:
            return [gr.skip()] * 3
        return self._cell(shown, inspection.cell_at(self._model(shown.model), shown.coded, event.index))

    def _cell(self, shown: Shown, cell: tuple[int, int]) -> list[Any]:
        model, coded = self._model(shown.model), shown.coded
        codebooks, ids = list(model.quantize.codebooks), coded.tokens[:, cell[0], cell[1]]
        codes = [
            f"{codebook} code {id_}" if len(codebooks) > 1 else f"code {id_}"
            for codebook, id_ in zip(codebooks, ids.tolist(), strict=True)
        ]
        same = coded.tokens == ids[:, None, None]
        counts = [f"{code} occurs {_times(int(count))}" for code, count in zip(codes, same.sum((1, 2)), strict=True)]
        counts += [f"and the two together {_times(int(same.all(0).sum()))}"] if len(codebooks) > 1 else []
        patches = list(inspection.cell_patches(model, coded, cell).values())
        captions = ["the original here", "the reconstruction here", *(f"{code} alone" for code in codes)]
        captions += ["both codes, nothing around"] if len(codebooks) > 1 else []
        rows, columns = coded.tokens.shape[1:]
        text = fragments.cell(
            f"Row {cell[0] + 1} of {rows}, column {cell[1] + 1} of {columns}",
            f"In this picture {', '.join(counts)}.",
            list(zip(captions, patches, strict=False)),
        )
        places = [inspection.same_code(model, coded, index, cell) for index in range(len(codebooks))]
        return [text, *_pair(places, [f"Where else: {code}" for code in codes])]

    @_explained
    def swap(self, shown: Shown | None, other: dict | None) -> list[Any]:
        """Both results of a swap."""
        if shown is None or other is None:
            return [None, None]
        model = self._model(shown.model)
        codebooks = list(model.quantize.codebooks)
        if len(codebooks) != 2:
            return [None, None]
        results = inspection.swap(model, shown.coded, _upload(other))
        labels = [
            f"{codebooks[0]}: yours, {codebooks[1]}: the other's",
            f"{codebooks[0]}: the other's, {codebooks[1]}: yours",
        ]
        return _pair([inspection.enlarged(image) for image in results], [label.capitalize() for label in labels])

    @_explained
    def open_tokens(self, file: dict | None, label: str) -> list[Any]:
        """The pictures of a token file, and a line about them."""
        if file is None:
            return [None, ""]
        model = self._model(label)
        pictures = inspection.read_image_tokens(model, file["path"])
        shown = [(inspection.decode_image(model, picture), picture.name) for picture in pictures]
        note = fragments.opened_note([(picture.name, picture.size[::-1]) for picture in pictures])
        return [gr.Gallery(shown, selected_index=0), note]

    @_explained
    def reconstruct_endpoint(self, image: dict | None, model: str) -> tuple[Image.Image, list[list[object]]]:
        """A picture through tokens and back, and a table of bytes, bits per pixel, PSNR and SSIM."""
        tokenizer, upload = self._model(model), _upload(image)
        coded = inspection.code(tokenizer, upload)
        return coded.reconstruction, inspection.table(tokenizer, coded, inspection.baselines(tokenizer, coded))

    @_explained
    def tokenize_endpoint(self, image: dict | None, model: str) -> str:
        """A picture to its token file (.safetensors)."""
        tokenizer, upload = self._model(model), _upload(image)
        return str(
            inspection.save_image_tokens(tokenizer, upload, inspection.tokenize(tokenizer, upload), _new_folder())
        )

    @_explained
    def detokenize_endpoint(self, file: dict | None, model: str, picture: float) -> Image.Image:
        """A token file to a picture; of several, the one of this number, counted from 1."""
        tokenizer = self._model(model)
        if file is None:
            raise ValueError("`file` must be a token file, got nothing")
        pictures = inspection.read_image_tokens(tokenizer, file["path"])
        if picture not in range(1, len(pictures) + 1):
            raise ValueError(f"`picture` must be a whole number from 1 to {len(pictures)}, got {picture}")
        return inspection.decode_image(tokenizer, pictures[int(picture) - 1])

    def _model(self, label: str) -> DualCodebookVQModel:
        if label not in self.models:
            raise ValueError(f"`model` must be one of {', '.join(self.models)}, got {label!r}")
        return self.models[label]


def _upload(picture: dict | None) -> inspection.Upload:
    if picture is None or not picture.get("path"):
        raise ValueError("`image` must be a picture file, got nothing")
    return inspection.read_upload(picture["path"])


def _new_folder() -> Path:
    """In gradio's cache, where files are served from without a copy and deleted when they are old."""
    cache = Path(get_upload_folder())
    cache.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=cache))


def _key_numbers(row: Sequence[Any]) -> dict[str, str]:
    _, count, rate, decibels, similarity = row
    return {
        "bytes of tokens": f"{count:,}",
        "bits per pixel": f"{rate:.4g}",
        "PSNR": f"{decibels:.2f} dB",
        "SSIM (1 is equal)": f"{similarity:.3f}",
    }


def _pair(images: Sequence[Image.Image], labels: Sequence[str]) -> list[gr.Image]:
    """Two components; a model with a single codebook leaves the second one empty."""
    shown = [gr.Image(image, label=label, visible=True) for image, label in zip(images, labels, strict=False)]
    return (shown + [gr.Image(None, visible=False)] * 2)[:2]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
