"""What leads to what on the page: which function runs when, and where its results go."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from .generating import MOST_SEED, GeneratingHandlers
from .handlers import EVERY_CODEBOOK, ORIGINAL, OTHERS, Handlers

# Handlers get the paths of files: gradio would open images itself, and fail on those that need our reader.
LISTENER = {"concurrency_id": "model", "concurrency_limit": 2, "preprocess": False}
PRIVATE = {**LISTENER, "api_visibility": "private"}
# By default a step that is still at work ignores what comes next: an image taken away meanwhile would stay.
LATEST = {"trigger_mode": "always_last", **PRIVATE}

# A picture tells of each upload twice by its `change`, and by its `input`, after an example, of what was there before.
# So `change` only notes the path, one after the other, and the path's own change starts the work.
ARRIVAL = {**PRIVATE, "concurrency_id": "arrival", "concurrency_limit": 1, "trigger_mode": "multiple"}


def connect(handlers: Handlers, page: SimpleNamespace) -> None:
    """A new image, or model, runs through all tabs; a failure clears what another image left."""
    source, result, inside, mix, files = page.source, page.result, page.inside, page.mix, page.files
    outputs = _outputs(page)
    source.model.change(handlers.describe_model, source.model, outputs.model, **LATEST)
    for group in (source, mix):
        group.image.change(handlers.arrive, group.image, group.path, **ARRIVAL)
        group.examples.select(handlers.take_example, None, group.image, **PRIVATE)
    start = gr.on(
        [source.path.change, source.model.change],
        handlers.show_image,
        [source.image, source.model, source.left],
        outputs.first,
        show_progress_on=[result.slider, source.about],
        **LATEST,
    )
    start.failure(handlers.give_up, None, [*outputs.first, *outputs.inside, *outputs.mix], **PRIVATE)
    looked = start.success(handlers.look_inside, page.shown, outputs.inside, show_progress_on=inside.maps, **LATEST)
    looked.success(handlers.open_mix, [page.shown, page.cell, mix.which], outputs.mix, **LATEST)
    source.left.change(
        handlers.compare, [page.shown, source.left], outputs.compared, show_progress_on=[result.slider], **LATEST
    )
    _connect_grids(handlers, page, outputs)
    files.file.change(handlers.open_tokens, [files.file, source.model], [files.gallery, files.opened], **PRIVATE)


def _connect_grids(handlers: Handlers, page: SimpleNamespace, outputs: SimpleNamespace) -> None:
    """Squares that are looked up or painted."""
    mix = page.mix
    settings = [mix.grid, page.cell, mix.which, mix.source]
    repaint = {
        "fn": handlers.mix,
        "inputs": [page.shown, page.others, *settings],
        "outputs": mix.mixed,
        "show_progress": "minimal",
        **LATEST,
    }
    for grid in page.inside.maps:
        found = grid.select(handlers.look_up, [page.shown, grid], outputs.found, show_progress="minimal", **LATEST)
        named = found.success(
            handlers.name_source, [page.shown, page.cell], mix.source, show_progress="hidden", **LATEST
        )
        named.success(**repaint)
    # One listener for both, so that of two that overlap the later one wins.
    gr.on(
        [mix.path.change, mix.opened.change],
        handlers.take_other,
        [page.shown, mix.image, *settings],
        outputs.others,
        show_progress_on=[mix.mixed, *mix.swapped],
        **LATEST,
    )
    mix.grid.select(**repaint)
    for choice in (mix.which, mix.source):
        choice.input(**repaint)


# One run at a time: the pipeline's scheduler keeps the state of its steps.
DRAWING = {**PRIVATE, "concurrency_id": "generator", "concurrency_limit": 1, "trigger_mode": "once"}


def connect_generator(handlers: GeneratingHandlers, page: SimpleNamespace) -> None:
    """Pictures are drawn on demand; the grid that is painted follows the picture that is shown."""
    tab = page.generate
    settings = [tab.label, tab.guidance, tab.steps, tab.seed]
    draw = {"fn": handlers.generate, "inputs": settings, "outputs": [tab.drawn, tab.maps, tab.line]}
    public = {**DRAWING, "api_visibility": "public", "api_name": "generate"}
    tab.draw.click(**draw, show_progress="minimal", **public)
    other = tab.again.click(lambda: random.randrange(MOST_SEED), None, tab.seed, show_progress="hidden", **PRIVATE)
    other.success(**draw, show_progress="minimal", **DRAWING)
    page.mix.opened.change(
        handlers.open_repaint, page.shown, [tab.empty, tab.page, tab.grid], show_progress="hidden", **LATEST
    )
    tab.repaint.click(
        handlers.repaint,
        [page.shown, tab.grid, *settings],
        [tab.preview, tab.repainted, tab.repainted_line],
        show_progress="minimal",
        **DRAWING,
    )


def _outputs(page: SimpleNamespace) -> SimpleNamespace:
    """Components in the order in which the handlers answer."""
    source, result, inside, mix, files = page.source, page.result, page.inside, page.mix, page.files
    compared = [result.slider, result.downloads, result.rates]
    first = [page.shown, source.about, result.numbers, *compared, result.error, *result.baselines]
    found = [page.cell, inside.cell, *inside.places]
    others = [page.others, mix.problem, mix.pair, *mix.swapped, mix.mixed]
    return SimpleNamespace(
        model=[source.about_model, page.card],
        compared=compared,
        first=[*first, files.download, files.note],
        found=found,
        inside=[inside.empty, inside.page, *inside.maps, inside.pair, *inside.halves, inside.usage, *found],
        others=others,
        mix=[mix.empty, mix.page, mix.grid, mix.which, mix.source, mix.opened],
    )


def fill_first(handlers: Handlers, page: SimpleNamespace, generating: GeneratingHandlers | None = None) -> None:
    """Puts an example's results onto the page before anybody opens it: computed once, for all visitors."""
    outputs, label = _outputs(page), next(iter(handlers.models))
    picture, other = ({"path": image.value["path"]} for image in (page.source.image, page.mix.image))
    page.source.path.value, page.mix.path.value = handlers.arrive(picture), handlers.arrive(other)
    _fill(outputs.model, handlers.describe_model(label))
    _fill(outputs.first, handlers.show_image(picture, label, ORIGINAL, progress=lambda *_, **__: None))
    _fill(outputs.inside, handlers.look_inside(page.shown.value))
    cell = page.cell.value
    _fill(outputs.mix, handlers.open_mix(page.shown.value, cell, EVERY_CODEBOOK))
    settings = (page.mix.grid.value, cell, EVERY_CODEBOOK, OTHERS)
    _fill(outputs.others, handlers.take_other(page.shown.value, other, *settings))
    if generating is not None:
        tab = page.generate
        _fill([tab.empty, tab.page, tab.grid], generating.open_repaint(page.shown.value))
    # The files stay as long as the app does.
    page.source.image.keep_in_cache.update(str(path) for path in Path(get_upload_folder()).rglob("*") if path.is_file())


def _fill(components: list[gr.components.Component], values: list[Any]) -> None:
    """Sets what an event would: values, or updates of several properties."""
    for component, value in zip(components, values, strict=True):
        is_update = isinstance(value, dict) and value.get("__type__") == "update"
        properties = {key: part for key, part in value.items() if key != "__type__"} if is_update else {"value": value}
        if component.stateful:
            component.value = properties.pop("value")
        elif "value" in properties:
            component.value = type(component)(value=properties.pop("value"), render=False).value
        for key, part in properties.items():
            if key in getattr(component, "props", {}):  # a property of HTML of our own
                component.props[key] = part
            else:
                setattr(component, key, part)
