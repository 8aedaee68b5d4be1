"""The layout of the app."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ..figures import ERROR_SCALE
from ..generation.choices import GUIDANCE_SCALE, STEPS
from . import fragments, widgets
from .endpoints import add_endpoints
from .events import LISTENER, connect, connect_generator, fill_first
from .examples import example_images, thumbnail
from .gate import GatedBlocks
from .generating import (
    ANY_CLASS,
    MOST_GUIDANCE,
    MOST_SEED,
    MOST_STEPS,
    GeneratingHandlers,
    ServedGenerator,
    load_generator,
)
from .handlers import EVERY_CODEBOOK, HINT, NO_PICTURE, ORIGINAL, OTHERS, Handlers
from .limits import LARGEST_FILE, QUEUE, RETENTION, RequestLimits, use_own_folder
from .models import links, load_models
from .reading import UploadReader
from .results import new_folder

TITLE = "Dual Codebook VQ"
INTRODUCTION = (
    "A picture becomes two small grids of tokens, one from a global and one from a local codebook, and the tokens "
    "become the picture again. No picture leaves the machine that serves this page."
)
LEGEND = (
    f"Error map: black where nothing differs, cream where the channels differ by {ERROR_SCALE:.0%} of their range or "
    "more. JPEG and WebP: as many bytes as the tokens take, or as few as the format can do."
)
COLOURS = (
    "Codes whose vectors are alike have colours alike: lightness and hue are the three directions in which a "
    "codebook's vectors differ most. Click on a square, or move with the arrow keys, to look its token up."
)
GENERATE = (
    "A small transformer fills an empty grid of tokens, the surest ones first, and the tokens become {side} x {side} "
    "pixels. Grey is not known yet. What it draws is what it has learned: the generator inside the package saw three "
    "thousand photographs of clothes, and draws outlines and colours."
)
REPAINT = (
    "Paint over squares of your picture: the generator draws their tokens anew, with the class, guidance, steps and "
    "seed from above, and sees the tokens around them."
)
# Gradio's own files; its semi-bold cut, which is the default, lacks most letters.
FONTS = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif")
SLIDER_JS = "watch('value', () => element.querySelector('input')?.dispatchEvent(new Event('input')));"
EXAMPLES_JS = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) trigger('select', {index: Number(button.dataset.index)});
});"""


def build_demo(models: Sequence[str] | None = None, generator: str | None = None) -> gr.Blocks:
    """The app over these models, folders or Hub ids; by default both decoders of the embedded checkpoint.

    Args:
        models: tokenizers.
        generator: None: the one inside the package, where there is one; the page has no tab for it otherwise.

    Raises ValueError, naming the model, for one that cannot be loaded.
    """
    use_own_folder()
    served, drawing = load_models(models), load_generator(generator)
    examples = example_images(new_folder())
    handlers = Handlers(served, UploadReader(), list(examples.values()))
    with GatedBlocks(title=TITLE, analytics_enabled=False, delete_cache=(RETENTION, RETENTION)) as demo:
        page = _lay_out(list(served), examples, drawing)
        connect(handlers, page)
        add_endpoints(handlers, **LISTENER, api_visibility="public")
        generating = None
        if drawing is not None:
            generating = GeneratingHandlers(drawing, {label: model.hash for label, model in served.items()})
            connect_generator(generating, page)
    fill_first(handlers, page, generating)
    return demo.queue(max_size=QUEUE, api_open=False)  # open: every request would run at once, past the queue


def launch_options() -> dict[str, Any]:
    """What `demo.launch` needs for this app: its looks and limits, and nothing that calls elsewhere."""
    folder = Path(__file__).parent
    return {
        "theme": _theme(),
        "css_paths": folder / "page.css",
        "js": (folder / "page.js").read_text(encoding="utf-8"),
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


def _theme() -> gr.themes.Base:
    theme = gr.themes.Default(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=FONTS)
    links = {"link_text_color": "*primary_700", "link_text_color_dark": "*primary_300"}  # the default is too pale
    # White on the default is too pale, too.
    fills = {"": "*primary_700", "_hover": "*primary_800", "_dark": "*primary_700", "_hover_dark": "*primary_800"}
    buttons = {f"button_primary_background_fill{state}": fill for state, fill in fills.items()}
    return theme.set(**links, **buttons)


def _lay_out(labels: list[str], examples: Mapping[str, Path], generator: ServedGenerator | None) -> SimpleNamespace:
    gr.HTML(fragments.introduction(TITLE, INTRODUCTION, links()))
    states = {name: gr.State(time_to_live=RETENTION) for name in ("shown", "cell", "others")}
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            source = _lay_out_source(labels, examples)
        with gr.Column(scale=5, min_width=320, elem_id="results"), gr.Tabs():
            with gr.Tab("Reconstruct"):
                result = _lay_out_reconstruct()
            with gr.Tab("Look inside"):
                inside = _lay_out_inside()
            with gr.Tab("Mix"):
                mix = _lay_out_mix(examples)
            with gr.Tab("Tokens"):
                files = _lay_out_tokens()
            generate = None
            if generator is not None:
                with gr.Tab("Generate"):
                    generate = _lay_out_generate(generator)
    with gr.Accordion("Model card", open=False, elem_id="card"):
        card = gr.Markdown()
    tabs = {"result": result, "inside": inside, "mix": mix, "files": files, "generate": generate}
    return SimpleNamespace(**states, **tabs, card=card, source=source)


def _lay_out_source(labels: list[str], examples: Mapping[str, Path]) -> SimpleNamespace:
    image = _input("Your picture", "picture", next(iter(examples.values())))
    about = gr.HTML(elem_id="about")
    buttons = _lay_out_examples(examples, "picture-examples")
    several = len(labels) > 1
    model = gr.Dropdown(labels, value=labels[0], label="Model", elem_id="model", visible=several)
    left = gr.Dropdown(
        [(f"{ORIGINAL} picture", ORIGINAL), *((label, label) for label in labels)],
        value=ORIGINAL,
        label="Compare with, left of the slider",
        elem_id="left",
        visible=several,
    )
    about_model = gr.HTML(elem_id="about-model")
    return SimpleNamespace(
        image=image, path=gr.State(), examples=buttons, about=about, model=model, left=left, about_model=about_model
    )


def _lay_out_reconstruct() -> SimpleNamespace:
    numbers = gr.HTML(fragments.hint(HINT), elem_id="numbers")
    slider = gr.HTML(widgets.empty_slider(""), js_on_load=SLIDER_JS, elem_id="slider")
    downloads = gr.HTML(elem_id="downloads")
    rates = gr.HTML(elem_id="rates")
    with gr.Row():
        error = _output("Error map", "error", 260)
        baselines = [_output(name, name.lower(), 260) for name in ("JPEG", "WebP")]
    gr.HTML(fragments.remark(LEGEND))
    return SimpleNamespace(
        numbers=numbers, slider=slider, downloads=downloads, rates=rates, error=error, baselines=baselines
    )


def _lay_out_inside() -> SimpleNamespace:
    empty = gr.HTML(fragments.hint(NO_PICTURE), elem_id="inside-empty")
    with gr.Column(visible=False) as page:
        gr.HTML(fragments.heading("Token maps", COLOURS))
        with gr.Row():
            maps = [_lay_out_map(index) for index in range(2)]
        cell = gr.HTML(elem_id="cell")
        with gr.Row():
            places = [_output("Where else", f"places-{index}", 300) for index in range(2)]
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
    return SimpleNamespace(
        empty=empty, page=page, maps=maps, cell=cell, places=places, usage=usage, pair=pair, halves=halves
    )


def _lay_out_map(index: int) -> gr.HTML:
    with gr.Column(min_width=280):
        return _grid(f"map-{index}")


def _lay_out_mix(examples: Mapping[str, Path]) -> SimpleNamespace:
    empty = gr.HTML(fragments.hint(NO_PICTURE), elem_id="mix-empty")
    with gr.Column(visible=False) as page:
        gr.HTML(
            fragments.heading(
                "Paint other tokens in",
                "Paint over squares of your picture, with the pointer or with arrow keys and the space bar: their "
                "tokens are replaced, and the picture is decoded again.",
            )
        )
        with gr.Row():
            with gr.Column(min_width=280):
                other = _input("The other picture", "other", list(examples.values())[1])
                buttons = _lay_out_examples(examples, "other-examples")
                problem = gr.HTML(elem_id="other-problem")
            with gr.Column(min_width=280):
                grid = _grid("paint")
        with gr.Row():
            source = gr.Radio(
                [("the other picture's tokens there", OTHERS)],
                value=OTHERS,
                label="Replace the tokens by",
                min_width=300,
                elem_id="by",
            )
            which = gr.Radio(
                [("both codebooks", EVERY_CODEBOOK)],
                value=EVERY_CODEBOOK,
                label="Of which codebook",
                min_width=300,
                elem_id="which",
            )
        mixed = gr.HTML(widgets.empty_slider(""), js_on_load=SLIDER_JS, elem_id="mixed")
        with gr.Column() as pair:
            gr.HTML(
                fragments.heading(
                    "Swap", "All of one codebook's tokens of your picture with the other one's tokens of the other."
                )
            )
            with gr.Row():
                swapped = [_output("Swapped", f"swap-{index}", 300) for index in range(2)]
    return SimpleNamespace(
        empty=empty,
        page=page,
        image=other,
        path=gr.State(),
        opened=gr.State(),
        examples=buttons,
        problem=problem,
        grid=grid,
        source=source,
        which=which,
        mixed=mixed,
        pair=pair,
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
        visible=False,
        elem_id="decoded",
    )
    return SimpleNamespace(note=note, download=download, file=file, opened=opened, gallery=gallery)


def _lay_out_generate(generator: ServedGenerator) -> SimpleNamespace:
    gr.HTML(fragments.heading("Draw", GENERATE.format(side=generator.side)))
    classes = [ANY_CLASS, *generator.classes]
    label = gr.Radio(classes, value=classes[-1], label="Class", elem_id="class", visible=len(classes) > 1)
    with gr.Row():
        guidance = gr.Slider(0, MOST_GUIDANCE, GUIDANCE_SCALE, step=0.1, label="Guidance", elem_id="guidance")
        steps = gr.Slider(1, MOST_STEPS, STEPS, step=1, label="Steps", elem_id="steps")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, elem_id="seed")
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
        again = gr.Button("Draw with another seed", elem_id="again")
    line = gr.HTML(elem_id="drawn-line")
    with gr.Row():
        drawn = _output("Drawn", "drawn", 380)
        maps = _output("Tokens of the first codebook", "drawn-tokens", 380)
    gr.HTML(fragments.heading("Repaint", REPAINT))
    empty = gr.HTML(fragments.hint(NO_PICTURE), elem_id="repaint-empty")
    with gr.Column(visible=False) as page, gr.Row():
        with gr.Column(min_width=280):
            grid = _grid("repaint-grid")
            repaint = gr.Button("Repaint", variant="primary", elem_id="repaint")
            repainted_line = gr.HTML(elem_id="repainted-line")
        with gr.Column(min_width=280):
            preview = _output("Filling in", "repainting", 420)
            repainted = gr.HTML("", js_on_load=SLIDER_JS, elem_id="repainted")
    return SimpleNamespace(
        label=label,
        guidance=guidance,
        steps=steps,
        seed=seed,
        draw=draw,
        again=again,
        line=line,
        drawn=drawn,
        maps=maps,
        empty=empty,
        page=page,
        grid=grid,
        repaint=repaint,
        repainted_line=repainted_line,
        preview=preview,
        repainted=repainted,
    )


def _grid(name: str) -> gr.HTML:
    """Its value is what was chosen on it; what it shows is its property `picture`."""
    return gr.HTML("", html_template="${picture}", picture="", js_on_load=widgets.GRID_JS, elem_id=name)


def _lay_out_examples(examples: Mapping[str, Path], name: str) -> gr.HTML:
    thumbnails = {title: thumbnail(path) for title, path in examples.items()}
    return gr.HTML(fragments.examples(thumbnails), js_on_load=EXAMPLES_JS, elem_id=name)


def _input(label: str, name: str, first: Path) -> gr.Image:
    return gr.Image(
        str(first),
        label=label,
        sources=["upload", "clipboard"],
        type="filepath",
        height=260,
        buttons=[],
        elem_id=name,
    )


def _output(label: str, name: str, height: int) -> gr.Image:
    return gr.Image(
        label=label,
        type="filepath",
        height=height,
        interactive=False,
        buttons=["download", "fullscreen"],
        alt_text=label,
        elem_id=name,
    )
