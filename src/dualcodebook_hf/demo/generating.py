"""The page's generator: pictures of a class, or a painted part of the visitor's own, that fill in step by step."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image

from ..figures import code_colours, token_map
from ..generation import loading
from ..generation.masking import hidden_tokens, mask_tokens
from ..image_processing_dualcodebook import to_image
from ..loading import default_generator
from ..reconstruction import Reconstruction, reconstruct_image
from ..weights import weights_hash
from . import fragments, mixing, widgets
from .reading import Rejected
from .results import Shown, new_folder, save_image

if TYPE_CHECKING:
    from ..generation.pipeline import DualCodebookMaskGenerationPipeline

ANY_CLASS = "any"
PICTURES = 4
MOST_STEPS, MOST_GUIDANCE, MOST_SEED = 64, 8.0, 2**32 - 1
LARGEST_GRID = 1024  # positions of a picture that is repainted: attention takes the square of it
NOTHING_PAINTED = "Paint over a part of the picture first."
HIDDEN = np.array([150, 154, 162], np.uint8)  # grey, as which hidden tokens are shown


@dataclass(frozen=True)
class Frame:
    """The state after a step.

    Attributes:
        step: steps taken.
        tokens: int64 (B, codebooks, h, w), hidden ones among them.
        predicted: likewise, with those that the step drew in place of the hidden ones.
    """

    step: int
    tokens: torch.Tensor
    predicted: torch.Tensor


class ServedGenerator:
    """A generator, and how its steps become pictures.

    Args:
        pipeline: in eval mode.

    Attributes:
        classes: their names; none for a generator without classes.
        tokenizer_hash: `weights_hash` of its tokenizer, decoder included.
    """

    def __init__(self, pipeline: DualCodebookMaskGenerationPipeline) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.classes = pipeline, list(pipeline.labels)
        self.tokenizer_hash = weights_hash(pipeline.vqvae)
        codes = next(iter(pipeline.vqvae.quantize.codebooks.values())).codes()
        self.colours = np.concatenate([code_colours(codes), HIDDEN[None]])

    @property
    def side(self) -> int:
        """Pixels of a drawn picture's side."""
        return self.pipeline.vqvae.downsample_factor * self.pipeline.transformer.config.sample_size[0]

    def frames(self, **arguments: Any) -> Iterator[Frame]:
        """Runs the pipeline with these arguments in a thread, and yields the state after each of its steps.

        The run ends after the step at hand when the iterator is closed.
        """
        found: queue.SimpleQueue[Frame | BaseException | None] = queue.SimpleQueue()
        closed = threading.Event()

        def report(pipeline: Any, step: int, _: Any, tensors: dict[str, torch.Tensor]) -> dict:
            found.put(Frame(step + 1, tensors["tokens"].clone(), tensors["predicted_tokens"].clone()))
            pipeline._interrupt = closed.is_set()
            return {}

        def run() -> None:
            try:
                self.pipeline(
                    output_type="tokens",
                    callback_on_step_end=report,
                    callback_on_step_end_tensor_inputs=["tokens", "predicted_tokens"],
                    **arguments,
                )
                found.put(None)
            except BaseException as error:  # told where the frames are read
                found.put(error)

        thread = threading.Thread(target=run, name="generator", daemon=True)
        thread.start()
        try:
            while (frame := found.get()) is not None:
                if isinstance(frame, BaseException):
                    raise frame
                yield frame
        finally:
            closed.set()
            thread.join()  # the next run needs the scheduler for itself

    def pictures(self, frame: Frame, size: tuple[int, int] | None = None) -> list[Image.Image]:
        """What is predicted, greyed where tokens are hidden: half where one of two is.

        Args:
            frame: of a step.
            size: (H, W); None: that of the whole grid.
        """
        pixels = self.pipeline.vqvae.detokenize(frame.predicted, size=size).float().clamp(-1, 1)
        share = hidden_tokens(frame.tokens, self.pipeline.transformer.mask_token_ids).float().mean(1)
        factor = self.pipeline.vqvae.downsample_factor
        share = share.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, None]
        share = 0.8 * share[..., : pixels.shape[2], : pixels.shape[3]]
        grey = torch.from_numpy(HIDDEN.astype(np.float32))[:, None, None] / 127.5 - 1
        return [to_image(each) for each in pixels * (1 - share) + grey * share]

    def map(self, tokens: torch.Tensor) -> Image.Image:
        """The first codebook's tokens (h, w) as squares, grey where they are hidden."""
        factor = self.pipeline.vqvae.downsample_factor
        return token_map(tokens, (tokens.shape[1] * factor, tokens.shape[0] * factor), self.colours)


def load_generator(name: str | None) -> ServedGenerator | None:
    """The generator of a folder or Hub id; without a name the one inside the package, None where there is none.

    Raises ValueError for one that cannot be loaded.
    """
    if name is None:
        try:
            default_generator()
        except ValueError:
            return None
    return ServedGenerator(loading.load_generator(name, device="cpu", argument="generator"))


class GeneratingHandlers:
    """The functions behind the tab, as `Handlers` are of the others.

    Args:
        generator: what draws.
        hashes: {what the page calls a model: its `weights_hash`, decoder included}.
    """

    def __init__(self, generator: ServedGenerator, hashes: dict[str, str]) -> None:
        self.generator, self._hashes = generator, hashes
        self._read: tuple[Shown, Reconstruction] | None = None  # the last picture beside another model

    def generate(self, label: str, guidance: float, steps: float, seed: float) -> Iterator[list[Any]]:
        """[pictures, token maps, a line] after each step."""
        try:
            arguments = self._arguments(label, guidance, steps, seed)
        except Rejected as error:
            yield [None, None, fragments.problem(str(error))]
            return
        name = label if label == ANY_CLASS else f"{label}, seed {int(seed)}"
        for frame in self.generator.frames(num_images=PICTURES, **arguments):
            sheet, maps = self.generator.pictures(frame), [self.generator.map(each[0]) for each in frame.tokens]
            yield [_two_by_two(sheet), _two_by_two(maps), fragments.remark(_progress(frame, int(steps), name))]

    def open_repaint(self, shown: Shown | None) -> list[Any]:
        """[hint, page, grid] for the picture that is shown."""
        problem = "Choose a picture first." if shown is None else self._problem(shown)
        if shown is None or problem:
            return [gr.update(visible=True, value=fragments.hint(problem)), gr.update(visible=False), gr.skip()]
        start = self._start(shown)
        rows, columns = start.tokens.shape[1:]
        region = mixing.first_region(rows, columns)
        factor = self.generator.pipeline.vqvae.downsample_factor
        title = "Your reconstruction" if start is shown.result else "Your picture in the generator's own tokens"
        grid = widgets.token_grid(title, start.image, factor, (rows // 2, columns // 2), region=region)
        value = gr.update(value=mixing.region_text(region), picture=grid)
        return [gr.update(visible=False), gr.update(visible=True), value]

    def repaint(
        self, shown: Shown | None, region: str, label: str, guidance: float, steps: float, seed: float
    ) -> Iterator[list[Any]]:
        """[picture, slider, a line] after each step; the slider at the end."""
        if shown is None:
            yield [gr.skip()] * 3
            return
        try:
            if problem := self._problem(shown):
                raise Rejected(problem)
            start = self._start(shown)
            painted = mixing.read_region(region, *start.tokens.shape[1:])
            if not painted.any():
                raise Rejected(NOTHING_PAINTED)
            arguments = self._arguments(label, guidance, steps, seed)
        except (Rejected, ValueError) as error:
            yield [gr.update(value=None, visible=False), "", fragments.problem(str(error))]
            return
        masks = mask_tokens(self.generator.pipeline.transformer.mask_token_ids)
        tokens = torch.where(painted, masks, start.tokens)[None]
        size = start.original.size[::-1]
        image = start.image
        for frame in self.generator.frames(tokens=tokens, **arguments):
            image = self.generator.pictures(frame, size)[0]
            line = fragments.remark(_progress(frame, int(steps), f"{int(painted.sum()):,} positions"))
            yield [gr.update(value=image, visible=True), "", line]
        folder = new_folder()
        path = save_image(folder, shown.upload, image, "repainted")
        before = save_image(folder, shown.upload, start.image, "reconstruction")
        slider = widgets.slider(("Reconstruction", before), ("Repainted", path), start.original.size)
        slider += widgets.downloads({"Download the repainted picture": path})
        yield [gr.update(value=None, visible=False), slider, line]

    def _start(self, shown: Shown) -> Reconstruction:
        """A picture in the generator's tokens and by its decoder: the page's own, or read anew beside another model."""
        if self._hashes.get(shown.label) == self.generator.tokenizer_hash:
            return shown.result
        read = self._read
        if read is None or read[0] is not shown:
            read = self._read = shown, reconstruct_image(self.generator.pipeline.vqvae, shown.result.original)
        return read[1]

    def _problem(self, shown: Shown) -> str | None:
        """Why a picture cannot be repainted."""
        factor = self.generator.pipeline.vqvae.downsample_factor
        columns, rows = (math.ceil(side / factor) for side in shown.result.original.size)
        if rows * columns > LARGEST_GRID:
            return (
                f"Pictures of at most {LARGEST_GRID:,} positions can be repainted, such as 512 x 512 pixels; this one "
                f"has {rows} x {columns}."
            )
        return None

    def _arguments(self, label: str, guidance: float, steps: float, seed: float) -> dict[str, Any]:
        """Of the pipeline. Raises Rejected for what the page's controls do not send."""
        names = [ANY_CLASS, *self.generator.classes]
        if label not in names:
            raise Rejected(f"`class` must be one of {', '.join(names)}, got {label!r}")
        for name, value, low, high in (
            ("guidance", guidance, 0, MOST_GUIDANCE),
            ("steps", steps, 1, MOST_STEPS),
            ("seed", seed, 0, MOST_SEED),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise Rejected(f"`{name}` must lie in [{low:g}, {high:g}], got {value!r}")
            if name != "guidance" and int(value) != value:
                raise Rejected(f"`{name}` must be a whole number, got {value!r}")
        return {
            "class_labels": None if label == ANY_CLASS else label,
            "guidance_scale": float(guidance),
            "num_inference_steps": int(steps),
            "generator": torch.Generator().manual_seed(int(seed)),
        }


def _two_by_two(images: list[Image.Image]) -> Image.Image:
    return make_image_grid(images, rows=2, cols=len(images) // 2)


def _progress(frame: Frame, steps: int, what: str) -> str:
    return f"{what}: step {frame.step} of {steps}"
