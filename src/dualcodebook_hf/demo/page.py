"""The layout of the app, its events and its endpoints."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from ..figures import ERROR_SCALE
from . import fragments
from .gate import GatedBlocks
from .handlers import HINT, Handlers, load_models
from .inspection import TABLE_HEADERS
from .limits import LARGEST_FILE, QUEUE, RETENTION, RequestLimits, use_own_folder

TITLE = "Dual Codebook VQ"
INTRODUCTION = (
    "A picture becomes two small grids of tokens, one from a global and one from a local codebook, and the tokens "
    "become the picture again. No picture leaves the machine that serves this page."
)
EXAMPLES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
LEGEND = (
    f"Error map: black where nothing differs, cream where the channels differ by {ERROR_SCALE:.0%} of their range or "
    "more. JPEG and WebP: as many bytes as the tokens take, or as few as the format can do."
)
# Gradio's own files; its semi-bold cut, which is the default, lacks most letters.
FONTS = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif")
# Handlers get the paths of files: gradio would open images itself, and fail on those that need our reader.
LISTENER = {"concurrency_id": "model", "concurrency_limit": 2, "preprocess": False}
PRIVATE = {**LISTENER, "api_visibility": "private"}


def build_demo(models: Sequence[str] | None = None) -> gr.Blocks:
    """The app over these models, folders or Hub ids; by default the embedded checkpoint alone.

    Raises ValueError, naming the model, for one that cannot be loaded.
    """
    use_own_folder()
    handlers = Handlers(load_models(models))
    with GatedBlocks(title=TITLE, analytics_enabled=False, delete_cache=(RETENTION, RETENTION)) as demo:
        gr.HTML(fragments.heading(TITLE, INTRODUCTION, level=1))
        shown = gr.State(time_to_live=RETENTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                source = _lay_out_source(list(handlers.models))
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Reconstruct"):
                    result = _lay_out_reconstruct()
                with gr.Tab("Look inside"):
                    inside = _lay_out_inside()
                with gr.Tab("Tokens"):
                    files = _lay_out_tokens()
        _add_endpoints(handlers)
        _connect(handlers, shown, source, result, inside, files)
    return demo.queue(max_size=QUEUE, api_open=False)  # open: every request would run at once, past the queue


def launch_options() -> dict[str, Any]:
    """What `demo.launch` needs for this app: its looks and limits, and nothing that calls elsewhere."""
    return {
        "theme": gr.themes.Default(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=FONTS),
        "css": fragments.CSS,
        "footer_links": ["api", "settings"],
        "max_file_size": LARGEST_FILE,
        "app_kwargs": {"middleware": [Middleware(RequestLimits)]},
        "show_error": False,
        "enable_monitoring": False,
        "state_session_capacity": 100,  # about 10 MB each
        "run_history": False,
        "share": False,
        "ssr_mode": False,
        "pwa": False,
    }


def _lay_out_source(labels: list[str]) -> SimpleNamespace:
    return SimpleNamespace(
        image=_input("Your picture", "picture", 260),
        model=gr.Dropdown(labels, value=labels[0], label="Model", elem_id="model", visible=len(labels) > 1),
        about=gr.HTML(elem_id="about"),
    )


def _lay_out_reconstruct() -> SimpleNamespace:
    numbers = gr.HTML(fragments.hint(HINT), elem_id="numbers")
    slider = gr.ImageSlider(
        label="Original | reconstruction",
        type="pil",
        format="png",
        max_height=520,
        buttons=["fullscreen"],
        elem_id="slider",
    )
    rates = gr.HTML(elem_id="rates")
    with gr.Row():
        error = _output("Error map", "error", 260)
        baselines = [_output(name, name.lower(), 260) for name in ("JPEG", "WebP")]
    gr.HTML(fragments.remark(LEGEND))
    return SimpleNamespace(numbers=numbers, slider=slider, rates=rates, error=error, baselines=baselines)


def _lay_out_inside() -> SimpleNamespace:
    empty = gr.HTML(fragments.hint("Choose a picture first."), elem_id="inside-empty")
    with gr.Column(visible=False) as page:
        gr.HTML(fragments.heading("Token maps", "Equal colours are equal codes. Click on a square to look it up."))
        with gr.Row():
            maps = [_output("Tokens", f"map-{index}", 300, "clickable", "sharp") for index in range(2)]
        cell = gr.HTML(elem_id="cell")
        with gr.Row():
            places = [_output("Where else", f"places-{index}", 300, "clickable") for index in range(2)]
        gr.HTML(
            fragments.heading(
                "Codes in use", "How often each code occurs in this picture, from the most used to the least."
            )
        )
        usage = gr.HTML(elem_id="usage")
        with gr.Column() as pair:
            gr.HTML(
                fragments.heading("One half alone", "One codebook's tokens; the other one gives the mean of its codes.")
            )
            with gr.Row():
                halves = [_output("One half", f"half-{index}", 300) for index in range(2)]
            gr.HTML(
                fragments.heading(
                    "Swap", "One codebook's tokens of your picture with the other one's tokens of another picture."
                )
            )
            with gr.Row():
                with gr.Column(min_width=240):
                    other = _input("The other picture", "other", 220)
                swapped = [_output("Swapped", f"swap-{index}", 300) for index in range(2)]
    return SimpleNamespace(
        empty=empty,
        page=page,
        maps=maps,
        cell=cell,
        places=places,
        usage=usage,
        pair=pair,
        halves=halves,
        other=other,
        swapped=swapped,
    )


def _lay_out_tokens() -> SimpleNamespace:
    with gr.Row():
        with gr.Column(min_width=280):
            gr.HTML(fragments.heading("Save", "The tokens of your picture as a .safetensors file."))
            note = gr.HTML(elem_id="token-note")
            download = gr.DownloadButton("Download tokens", interactive=False, elem_id="download")
        with gr.Column(min_width=280):
            gr.HTML(
                fragments.heading(
                    "Open", "A token file made by the chosen model; its pictures come back from it alone."
                )
            )
            file = gr.File(label="Token file", file_types=[".safetensors"], height=140, elem_id="token-file")
    opened = gr.HTML(elem_id="opened")
    gallery = gr.Gallery(
        label="Decoded",
        format="png",
        height=460,
        object_fit="contain",
        buttons=["download"],
        interactive=False,
        elem_id="decoded",
    )
    return SimpleNamespace(note=note, download=download, file=file, opened=opened, gallery=gallery)


def _input(label: str, name: str, height: int) -> gr.Image:
    """A place for an image, with examples below."""
    image = gr.Image(
        label=label, sources=["upload", "clipboard"], type="filepath", height=height, buttons=[], elem_id=name
    )
    gr.Examples(
        _example_images(), image, label="Or take an example", api_visibility="private", elem_id=f"{name}-examples"
    )
    return image


def _output(label: str, name: str, height: int, *classes: str) -> gr.Image:
    return gr.Image(
        label=label,
        type="pil",
        format="png",
        height=height,
        interactive=False,
        buttons=["download", "fullscreen"],
        alt_text=label,
        elem_id=name,
        elem_classes=list(classes),
    )


def _example_images() -> list[str]:
    """Photographs of scikit-image's wheel; where it is not installed, two drawn images."""
    package = importlib.util.find_spec("skimage")
    folder = Path(package.origin).parent / "data" if package else None
    if folder is None or not all((folder / name).is_file() for name in EXAMPLES):
        return [str(path) for path in sorted(Path(_drawn_images().name).glob("*.png"))]
    return [str(folder / name) for name in EXAMPLES]


@functools.cache
def _drawn_images() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="dualcodebook-")
    disc = Image.radial_gradient("L").resize((512, 384))
    fractal = Image.effect_mandelbrot(disc.size, (-2, -1.2, 0.8, 1.2), 90)
    slope = Image.linear_gradient("L").resize(disc.size)
    Image.merge("RGB", (fractal, disc, slope)).save(Path(folder.name) / "fractal.png")
    Image.merge("RGB", (slope, disc, disc.rotate(180))).save(Path(folder.name) / "gradients.png")
    return folder


def _connect(
    handlers: Handlers,
    shown: gr.State,
    source: SimpleNamespace,
    result: SimpleNamespace,
    inside: SimpleNamespace,
    files: SimpleNamespace,
) -> None:
    """A new image, or model, runs through all tabs; a failure clears what another image left."""
    first = [shown, result.numbers, result.slider, result.rates, result.error, *result.baselines]
    first += [source.about, files.download, files.note]
    found = [inside.cell, *inside.places]
    second = [inside.empty, inside.page, *inside.maps, inside.pair, *inside.halves, inside.usage, *found]
    # By default a step that is still at work ignores what comes next: an image taken away meanwhile would stay.
    latest = {"trigger_mode": "always_last", **PRIVATE}
    swap = {"fn": handlers.swap, "inputs": [shown, inside.other], "outputs": inside.swapped, **latest}
    start = gr.on(
        [source.image.change, source.model.change],
        handlers.show_image,
        [source.image, source.model],
        first,
        show_progress_on=[result.slider],
        **latest,
    )
    for done in (start, start.failure(handlers.nothing, None, first, **PRIVATE)):
        done.success(handlers.look_inside, [shown], second, **latest).success(**swap)
    inside.other.change(**swap).failure(lambda: [None, None], None, inside.swapped, **PRIVATE)
    for image in (*inside.maps, *inside.places):
        image.select(handlers.look_up, [shown], found, **latest)
    opened = [files.gallery, files.opened]
    event = files.file.change(handlers.open_tokens, [files.file, source.model], opened, **PRIVATE)
    event.failure(lambda: [None, ""], None, opened, **PRIVATE)


def _add_endpoints(handlers: Handlers) -> None:
    """What gradio_client calls; nothing of it is on the page."""
    with gr.Column(visible=False):
        image, file = gr.Image(label="image", type="filepath"), gr.File(label="file")
        model = gr.Dropdown(list(handlers.models), value=next(iter(handlers.models)), label="model")
        number = gr.Number(1, label="picture", precision=0)
        restored = gr.Image(label="reconstruction", type="pil", format="png")
        table = gr.Dataframe(headers=TABLE_HEADERS, label="table")
        run = gr.Button()
    public = {**LISTENER, "api_visibility": "public"}
    run.click(handlers.reconstruct_endpoint, [image, model], [restored, table], api_name="reconstruct", **public)
    run.click(handlers.tokenize_endpoint, [image, model], file, api_name="tokenize", **public)
    run.click(handlers.detokenize_endpoint, [file, model, number], restored, api_name="detokenize", **public)
