"""What happens when somebody uses the page: from what the browser sent to what the components show."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..figures import error_map, token_map
from ..reconstruction import Reconstruction, decode_tokens, reconstruct_image
from . import fragments, inspection, mixing, widgets
from .gate import FAILURE
from .models import ServedModel
from .reading import Rejected, Upload, UploadReader
from .results import Cell, Shown, file_name, new_folder, save_image, two_images

HINT = "Drop in a picture, or take an example."
NO_PICTURE = "Choose a picture first."
EMPTY_SLIDER = "The picture and its reconstruction meet here."
ORIGINAL = "the original"
OTHERS, ONE_TOKEN = "other", "token"  # where the tokens of a painted region come from
EVERY_CODEBOOK = "all"
PROGRESS = gr.Progress()


class Handlers:
    """The functions behind the components, over some models by label.

    Uploads arrive from the gate as dicts with a `path`, or None. What a visitor gave and cannot be used is told where
    its result would stand. What a function returns is in the order of the outputs that the page gives to its event.
    """

    def __init__(self, models: Mapping[str, ServedModel], reader: UploadReader, examples: Sequence[Path]) -> None:
        self.models, self.examples, self._reader = models, list(examples), reader

    def take_example(self, event: gr.EventData) -> str:
        """The example whose button was pressed."""
        return str(self.examples[event.index])

    def arrive(self, file: dict | None) -> str | None:
        """Where the picture lies that is there now."""
        return file and os.path.realpath(file["path"])

    def describe_model(self, label: str) -> list[Any]:
        """[what its tokens take, its card]."""
        model = self.model(label)
        return [fragments.about_model(model.label, model.rate()), model.card()]

    def show_image(self, file: dict | None, label: str, left: str, progress: gr.Progress = PROGRESS) -> list[Any]:
        """[shown, about, numbers, slider, downloads, rates, error, 2 baselines, token file, its note]."""
        if file is None:
            return self.nothing()
        try:
            model = self.model(label)
            progress(0.1, desc="Reading the picture")
            upload = self.read(file)
            progress(0.25, desc="Picture to tokens and back")
            result = reconstruct_image(model.tokenizer, upload.image)
            progress(0.7, desc="JPEG and WebP of the same size")
            shown, baselines = self._measure(label, upload, result)
            compared = self.compare(shown, left)
            token_file = self._token_file(model, upload, result)
        except Rejected as error:
            return self.nothing(str(error))
        return [
            shown,
            fragments.about_file(upload.name, upload.file_size, upload.file_bytes, upload.notes),
            fragments.tiles(_key_numbers(shown.rows[0])),
            *compared,
            gr.update(value=shown.files["error map"]),
            *(gr.update(value=shown.files[name], label=row) for name, row in baselines.items()),
            *token_file,
        ]

    def nothing(self, problem: str = "") -> list[Any]:
        """The first tab without a picture: a hint, or why there is none."""
        words = HINT if not problem else "There is nothing to show: choose another picture."
        return [
            None,
            fragments.problem(problem) if problem else "",
            fragments.hint(words),
            widgets.empty_slider(EMPTY_SLIDER),
            "",
            "",
            None,
            *(gr.update(value=None, label=name) for name in inspection.BASELINES),
            gr.update(label="Download tokens", value=None, interactive=False),
            "",
        ]

    def give_up(self) -> list[Any]:
        """All tabs without a picture, after a failure of the app's own."""
        return [*self.nothing(FAILURE), *self.look_inside(None), *self.open_mix(None, None, "")]

    def compare(self, shown: Shown | None, left: str) -> list[Any]:
        """[slider, downloads, rates], with the original or another model's reconstruction on the slider's left."""
        if shown is None:
            return [gr.skip()] * 3
        files, rows = dict(shown.files), list(shown.rows)
        right_name = "Reconstruction" if len(self.models) == 1 else shown.label
        left_name, left_file = "Original", files.pop("original")
        if left != ORIGINAL:
            other = reconstruct_image(self.model(left).tokenizer, shown.upload.image)
            left_name, left_file = left, save_image(new_folder(), shown.upload, other.image, left)
            rows[0] = [f"Tokens of {shown.label}", *rows[0][1:]]
            rows.insert(1, inspection.token_row(f"Tokens of {left}", other))
        slider = widgets.slider(
            (left_name, left_file), (right_name, files["reconstruction"]), shown.result.original.size
        )
        links = widgets.downloads({"Download the reconstruction": files["reconstruction"]})
        return [slider, links, fragments.rate_table(inspection.TABLE_HEADERS, rows)]

    def look_inside(self, shown: Shown | None) -> list[Any]:
        """[hint, page, 2 maps, pair, 2 halves, usage, the cell looked up, what is there, 2 places]."""
        if shown is None:
            return [gr.update(visible=True), gr.update(visible=False), *[gr.skip()] * 10]
        model, tokens, size = self.model(shown.label), shown.result.tokens, shown.result.original.size
        factor, names = model.tokenizer.downsample_factor, model.codebooks
        maps = [
            widgets.token_grid(
                f"{name.capitalize()} tokens",
                token_map(ids, size, colours),
                factor,
                shown.middle,
                file_name(shown.upload, f"{name}-tokens"),
            )
            for name, ids, colours in zip(names, tokens, model.colours, strict=True)
        ]
        # A codebook alone; where it is the only one, that would be the reconstruction.
        alone = names if len(names) > 1 else []
        halves = [decode_tokens(model.tokenizer, tokens, size[::-1], only=name) for name in alone]
        return [
            gr.update(visible=False),
            gr.update(visible=True),
            *(gr.update(picture=text, visible=bool(text)) for text in (*maps, "")[:2]),
            gr.update(visible=len(names) > 1),
            *two_images(shown.upload, halves, [f"{name.capitalize()} half only" for name in names]),
            fragments.histograms(inspection.usage(model.tokenizer, tokens)),
            *self._cell(shown, shown.middle),
        ]

    def look_up(self, shown: Shown | None, place: str) -> list[Any]:
        """The token at the square that was chosen, "row column": [the cell looked up, what is there, 2 places]."""
        if shown is None:
            return [gr.skip()] * 4
        rows, columns = shown.result.tokens.shape[1:]
        row, column = (int(number) for number in place.split())
        return self._cell(shown, (min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)))

    def _cell(self, shown: Shown, cell: Cell) -> list[Any]:
        model, result = self.model(shown.label), shown.result
        codes, names = self._codes(shown, cell), model.codebooks
        same = result.tokens == result.tokens[:, cell[0], cell[1]][:, None, None]
        counts = [f"{code} occurs {_times(int(count))}" for code, count in zip(codes, same.sum((1, 2)), strict=True)]
        counts += [f"and the two together {_times(int(same.all(0).sum()))}"] if len(names) > 1 else []
        patches = list(inspection.cell_patches(model.tokenizer, result, cell).values())
        captions = ["the original here", "the reconstruction here", *(f"{code} alone" for code in codes)]
        captions += ["both codes, nothing around"] if len(names) > 1 else []
        rows, columns = result.tokens.shape[1:]
        text = fragments.cell(
            f"Row {cell[0] + 1} of {rows}, column {cell[1] + 1} of {columns}",
            f"In this picture {', '.join(counts)}.",
            list(zip(captions, patches, strict=False)),
        )
        places = [inspection.same_code(model.tokenizer, result, index, cell) for index in range(len(names))]
        return [cell, text, *two_images(shown.upload, places, [f"Where else: {code}" for code in codes])]

    def _codes(self, shown: Shown, cell: Cell) -> list[str]:
        """The codes at a square, in words."""
        ids = shown.result.tokens[:, cell[0], cell[1]].tolist()
        names = self.model(shown.label).codebooks
        return [f"{name} code {id_}" if len(names) > 1 else f"code {id_}" for name, id_ in zip(names, ids, strict=True)]

    def open_mix(self, shown: Shown | None, cell: Cell | None, which: str) -> list[Any]:
        """[hint, page, grid, which, source, what is open: another value for every result]."""
        if shown is None:
            return [gr.update(visible=True), gr.update(visible=False), *[gr.skip()] * 3, None]
        model = self.model(shown.label)
        region = mixing.first_region(*shown.result.tokens.shape[1:])
        factor = model.tokenizer.downsample_factor
        grid = widgets.token_grid("Your reconstruction", shown.result.image, factor, shown.middle, region=region)
        names = model.codebooks
        choices = [("both codebooks", EVERY_CODEBOOK), *((f"the {name} codebook alone", name) for name in names)]
        which = which if which in (EVERY_CODEBOOK, *names) else EVERY_CODEBOOK
        return [
            gr.update(visible=False),
            gr.update(visible=True),
            gr.update(value=mixing.region_text(region), picture=grid),
            gr.update(choices=choices, value=which, visible=len(names) > 1),
            self.name_source(shown, cell),
            shown.files["reconstruction"],
        ]

    def name_source(self, shown: Shown | None, cell: Cell | None) -> Any:
        """The choice of where tokens come from, which names the token that was looked up."""
        if shown is None:
            return gr.skip()
        codes = " and ".join(self._codes(shown, cell or shown.middle))
        return gr.update(
            choices=[("the other picture's tokens there", OTHERS), (f"the token looked up: {codes}", ONE_TOKEN)]
        )

    def take_other(
        self,
        shown: Shown | None,
        other: dict | None,
        region: str,
        cell: Cell | None,
        which: str,
        source: str,
    ) -> list[Any]:
        """[other tokens, problem, pair, 2 swapped, mixed]."""
        if shown is None:
            return [gr.skip()] * 6
        model, others, problem = self.model(shown.label), None, ""
        names, swapped = model.codebooks, [None, None]
        try:
            if other is not None:
                others = mixing.fitted_tokens(model.tokenizer, shown.result, self.read(other).image)
        except Rejected as error:
            problem = fragments.problem(str(error))
        if others is not None and len(names) == 2:
            labels = [f"{names[0]}: yours, {names[1]}: the other's", f"{names[0]}: the other's, {names[1]}: yours"]
            images = mixing.swap(model.tokenizer, shown.result, others)
            swapped = two_images(shown.upload, images, [label.capitalize() for label in labels])
        pair = gr.update(visible=len(names) == 2)
        return [others, problem, pair, *swapped, self.mix(shown, others, region, cell, which, source)]

    def mix(
        self,
        shown: Shown | None,
        others: torch.Tensor | None,
        region: str,
        cell: Cell | None,
        which: str,
        source: str,
    ) -> Any:
        """The picture with other tokens in the painted region, in runs of squares, beside its reconstruction."""
        if shown is None:
            return gr.skip()
        model, result = self.model(shown.label), shown.result
        try:
            squares = mixing.read_region(region, *result.tokens.shape[1:])
        except ValueError:  # painted on the grid of the picture before
            return gr.skip()
        if source == ONE_TOKEN:
            row, column = cell or shown.middle
            others = result.tokens[:, row : row + 1, column : column + 1]
        if others is None:
            return widgets.empty_slider("Choose the other picture, or take the token looked up.")
        names = model.codebooks
        chosen = [index for index, name in enumerate(names) if which in (EVERY_CODEBOOK, name)]
        tokens = mixing.replace_tokens(result.tokens, others, squares, chosen)
        image = decode_tokens(model.tokenizer, tokens, result.original.size[::-1])
        path = save_image(new_folder(), shown.upload, image, "mixed")
        count = int((tokens != result.tokens).sum())
        return (
            widgets.slider(("Reconstruction", shown.files["reconstruction"]), ("Mixed", path), result.original.size)
            + widgets.downloads({"Download the mixed picture": path})
            + fragments.remark(f"{count:,} of {tokens.numel():,} tokens are others now.")
        )

    def open_tokens(self, file: dict | None, label: str) -> list[Any]:
        """[images of a token file, a line about them]."""
        nothing = gr.update(value=None, visible=False)
        if file is None:
            return [nothing, ""]
        try:
            served = self.model(label)
            images = inspection.read_image_tokens(served.tokenizer, served.weights, file["path"])
        except Rejected as error:
            return [nothing, fragments.problem(str(error))]
        decoded = [(decode_tokens(served.tokenizer, image.tokens, image.size), image.name) for image in images]
        note = fragments.opened_note([(image.name, image.size[::-1]) for image in images])
        return [gr.update(value=decoded, selected_index=0, visible=True), note]

    def read(self, file: dict | None) -> Upload:
        """An upload. Raises Rejected for one that cannot be used."""
        if file is None:
            raise Rejected("`image` must be a picture file, got nothing")
        return self._reader.read(file["path"])

    def model(self, label: str) -> ServedModel:
        """A model. Raises Rejected for a label that there is not."""
        if label not in self.models:
            raise Rejected(f"`model` must be one of {', '.join(self.models)}, got {label!r}")
        return self.models[label]

    def _measure(self, label: str, upload: Upload, result: Reconstruction) -> tuple[Shown, dict[str, str]]:
        """What is shown of a result, and the baselines' names with what they are in a few words."""
        baselines = inspection.baselines(result)
        rows = inspection.table(upload, result, baselines)
        images = {
            "original": result.original,
            "reconstruction": result.image,
            "error map": error_map(result.original, result.image),
            **{name: baseline.image for name, baseline in baselines.items()},
        }
        folder = new_folder()
        files = {name: save_image(folder, upload, image, name) for name, image in images.items()}
        shown = Shown(label, upload, result, rows, files)
        return shown, {name: row[0] for name, row in zip(baselines, rows[1:], strict=False)}

    def _token_file(self, model: ServedModel, upload: Upload, result: Reconstruction) -> list[Any]:
        """The button that downloads it, and a line about it."""
        try:
            path = inspection.save_image_tokens(model.tokenizer, model.weights, upload, result.tokens, new_folder())
        except Rejected as error:  # a codebook of more codes than a token file can number
            return [gr.update(label="Download tokens", value=None, interactive=False), fragments.remark(str(error))]
        codebooks, rows, columns = result.tokens.shape
        button = gr.update(label=f"Download {path.name}", value=str(path), interactive=True)
        return [button, fragments.token_note((columns, rows), codebooks, result.num_bytes, path.stat().st_size)]


def _key_numbers(row: Sequence[Any]) -> dict[str, str]:
    _, num_bytes, rate, psnr, ssim = row
    return {
        "bytes of tokens": f"{num_bytes:,}",
        "bits per pixel": f"{rate:.4g}",
        "PSNR": f"{psnr:.2f} dB",
        "SSIM (1 is equal)": f"{ssim:.3f}",
    }


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
