"""What happens when somebody uses the demo: from what the browser sent to what the components show."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..figures import error_map, token_map
from ..files import public_name
from ..inference import optimize_for_inference
from ..loading import EMBEDDED, load_tokenizer, tokenizer_label
from ..reconstruction import Reconstruction, decode_tokens, reconstruct_image, tokenize_image
from . import fragments, inspection
from .reading import Rejected, Upload, UploadReader

HINT = "Drop in a picture, or take an example."
PROGRESS = gr.Progress()


def load_models(names: Sequence[str] | None) -> dict[str, DualCodebookVQModel]:
    """Models, in eval mode, by the label that the dropdown shows; without names the embedded checkpoint.

    Raises ValueError, naming the model, for one that cannot be loaded or does not take RGB images.
    """
    models: dict[str, DualCodebookVQModel] = {}
    for name in names or [None]:
        model = optimize_for_inference(load_tokenizer(name, argument="models"))
        label = tokenizer_label(name)
        label = label if label == EMBEDDED else public_name(name)  # of a folder no more than its name
        if (model.config.in_channels, model.config.out_channels) != (3, 3):
            raise ValueError(f"the model '{name}' must have 3 channels, got {model.config.in_channels}")
        models[label if label not in models else f"{label} ({len(models) + 1})"] = model
    return models


@dataclass(frozen=True)
class Shown:
    """What a visitor is looking at.

    Attributes:
        label: of the model.
        upload: the image file.
        result: its image as the model reconstructs it.
    """

    label: str
    upload: Upload
    result: Reconstruction


class Handlers:
    """The functions behind the components, over some models by label.

    Uploads arrive from the gate as dicts with a `path`, or None. What a visitor gave and cannot be used raises
    Rejected. What a function returns is in the order of the outputs that the page gives to its event.
    """

    def __init__(self, models: dict[str, DualCodebookVQModel]) -> None:
        self.models = models
        self._reader = UploadReader()

    def show_image(self, file: dict | None, label: str, progress: gr.Progress = PROGRESS) -> list[Any]:
        """Everything on the first tab, what is known of the upload, and the token file."""
        if file is None:
            return self.nothing()
        model = self._model(label)
        progress(0.1, desc="Reading the picture")
        upload = self._read(file)
        progress(0.25, desc="Picture to tokens and back")
        result = reconstruct_image(model, upload.image)
        progress(0.7, desc="JPEG and WebP of the same size")
        baselines = inspection.baselines(result)
        rows = inspection.table(upload, result, baselines)
        return [
            Shown(label, upload, result),
            fragments.tiles(_key_numbers(rows[0])),
            (inspection.enlarged(result.original), inspection.enlarged(result.image)),
            fragments.rate_table(inspection.TABLE_HEADERS, rows),
            inspection.enlarged(error_map(result.original, result.image)),
            *(
                gr.Image(inspection.enlarged(baseline.image), label=row[0])
                for baseline, row in zip(baselines.values(), rows[1:], strict=False)
            ),
            fragments.about_file(upload.name, upload.file_size, upload.file_bytes, upload.notes),
            *self._token_file(model, upload, result),
        ]

    def _token_file(self, model: DualCodebookVQModel, upload: Upload, result: Reconstruction) -> list[Any]:
        """The button that downloads it, and a line about it."""
        try:
            path = inspection.save_image_tokens(model, upload, result.tokens, _new_folder())
        except Rejected as error:  # a codebook of more codes than a token file can number
            return [gr.DownloadButton("Download tokens", value=None, interactive=False), fragments.remark(str(error))]
        codebooks, rows, columns = result.tokens.shape
        button = gr.DownloadButton(f"Download {path.name}", value=str(path), interactive=True)
        return [button, fragments.token_note((columns, rows), codebooks, result.num_bytes, path.stat().st_size)]

    def nothing(self) -> list[Any]:
        """The first tab as it is before any image."""
        hint = fragments.hint(HINT)
        button = gr.DownloadButton("Download tokens", value=None, interactive=False)
        return [None, hint, None, "", None, gr.Image(None, label="JPEG"), gr.Image(None, label="WebP"), "", button, ""]

    def look_inside(self, shown: Shown | None) -> list[Any]:
        """The second tab: [hint, page, 2 maps, half groups, 2 halves, usage, cell, 2 places]."""
        if shown is None:
            return [gr.HTML(visible=True), gr.Column(visible=False), *[gr.skip()] * 9]
        model, tokens, size = self._model(shown.label), shown.result.tokens, shown.result.original.size
        codebooks = list(model.codebook_sizes)
        maps = [token_map(ids, size) for ids in tokens]
        # A codebook alone; where it is the only one, that would be the reconstruction.
        alone = codebooks if len(codebooks) > 1 else []
        halves = [decode_tokens(model, tokens, size[::-1], only=codebook) for codebook in alone]
        middle = tuple(side // 2 for side in tokens.shape[1:])
        return [
            gr.HTML(visible=False),
            gr.Column(visible=True),
            *_pair(maps, [f"{codebook.capitalize()} tokens" for codebook in codebooks]),
            gr.Column(visible=len(codebooks) > 1),
            *_pair(halves, [f"{codebook.capitalize()} half only" for codebook in codebooks]),
            fragments.histograms(inspection.usage(model, tokens)),
            *self._cell(shown, middle),
        ]

    def look_up(self, shown: Shown | None, event: gr.SelectData) -> list[Any]:
        """The token at the point that was clicked: [cell, 2 places]."""
        if shown is None:
            return [gr.skip()] * 3
        return self._cell(shown, inspection.cell_at(self._model(shown.label), shown.result, event.index))

    def _cell(self, shown: Shown, cell: tuple[int, int]) -> list[Any]:
        model, result = self._model(shown.label), shown.result
        codebooks, ids = list(model.codebook_sizes), result.tokens[:, cell[0], cell[1]]
        codes = [
            f"{codebook} code {id_}" if len(codebooks) > 1 else f"code {id_}"
            for codebook, id_ in zip(codebooks, ids.tolist(), strict=True)
        ]
        same = result.tokens == ids[:, None, None]
        counts = [f"{code} occurs {_times(int(count))}" for code, count in zip(codes, same.sum((1, 2)), strict=True)]
        counts += [f"and the two together {_times(int(same.all(0).sum()))}"] if len(codebooks) > 1 else []
        patches = list(inspection.cell_patches(model, result, cell).values())
        captions = ["the original here", "the reconstruction here", *(f"{code} alone" for code in codes)]
        captions += ["both codes, nothing around"] if len(codebooks) > 1 else []
        rows, columns = result.tokens.shape[1:]
        text = fragments.cell(
            f"Row {cell[0] + 1} of {rows}, column {cell[1] + 1} of {columns}",
            f"In this picture {', '.join(counts)}.",
            list(zip(captions, patches, strict=False)),
        )
        places = [inspection.same_code(model, result, index, cell) for index in range(len(codebooks))]
        return [text, *_pair(places, [f"Where else: {code}" for code in codes])]

    def swap(self, shown: Shown | None, other: dict | None) -> list[Any]:
        """Both results of a swap."""
        if shown is None or other is None:
            return [None, None]
        model = self._model(shown.label)
        codebooks = list(model.codebook_sizes)
        if len(codebooks) != 2:
            return [None, None]
        results = inspection.swap(model, shown.result, self._read(other).image)
        labels = [
            f"{codebooks[0]}: yours, {codebooks[1]}: the other's",
            f"{codebooks[0]}: the other's, {codebooks[1]}: yours",
        ]
        return _pair(results, [label.capitalize() for label in labels])

    def open_tokens(self, file: dict | None, label: str) -> list[Any]:
        """The images of a token file, and a line about them."""
        if file is None:
            return [None, ""]
        model = self._model(label)
        images = inspection.read_image_tokens(model, file["path"])
        decoded = [(decode_tokens(model, image.tokens, image.size), image.name) for image in images]
        note = fragments.opened_note([(image.name, image.size[::-1]) for image in images])
        return [gr.Gallery(decoded, selected_index=0), note]

    def reconstruct_endpoint(self, image: dict | None, model: str) -> tuple[Image.Image, list[list[object]]]:
        """A picture through tokens and back, and a table of bytes, bits per pixel, PSNR and SSIM."""
        tokenizer, upload = self._model(model), self._read(image)
        result = reconstruct_image(tokenizer, upload.image)
        return result.image, inspection.table(upload, result, inspection.baselines(result))

    def tokenize_endpoint(self, image: dict | None, model: str) -> str:
        """A picture to its token file (.safetensors)."""
        tokenizer, upload = self._model(model), self._read(image)
        tokens = tokenize_image(tokenizer, upload.image)
        return str(inspection.save_image_tokens(tokenizer, upload, tokens, _new_folder()))

    def detokenize_endpoint(self, file: dict | None, model: str, picture: float) -> Image.Image:
        """A token file to a picture; of several, the one of this number, counted from 1."""
        tokenizer = self._model(model)
        if file is None:
            raise Rejected("`file` must be a token file, got nothing")
        images = inspection.read_image_tokens(tokenizer, file["path"])
        if picture not in range(1, len(images) + 1):
            raise Rejected(f"`picture` must be a whole number from 1 to {len(images)}, got {picture}")
        chosen = images[int(picture) - 1]
        return decode_tokens(tokenizer, chosen.tokens, chosen.size)

    def _read(self, file: dict | None) -> Upload:
        if file is None:
            raise Rejected("`image` must be a picture file, got nothing")
        return self._reader.read(file["path"])

    def _model(self, label: str) -> DualCodebookVQModel:
        if label not in self.models:
            raise Rejected(f"`model` must be one of {', '.join(self.models)}, got {label!r}")
        return self.models[label]


def _new_folder() -> Path:
    """In gradio's cache, where files are served from without a copy and deleted when they are old."""
    cache = Path(get_upload_folder())
    cache.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=cache))


def _key_numbers(row: Sequence[Any]) -> dict[str, str]:
    _, num_bytes, rate, psnr, ssim = row
    return {
        "bytes of tokens": f"{num_bytes:,}",
        "bits per pixel": f"{rate:.4g}",
        "PSNR": f"{psnr:.2f} dB",
        "SSIM (1 is equal)": f"{ssim:.3f}",
    }


def _pair(images: Sequence[Image.Image], labels: Sequence[str]) -> list[gr.Image]:
    """Two components; images that are small are enlarged, and a single codebook leaves the second one empty."""
    shown = [
        gr.Image(inspection.enlarged(image), label=label, visible=True)
        for image, label in zip(images, labels, strict=False)
    ]
    return (shown + [gr.Image(None, visible=False)] * 2)[:2]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
