"""What gradio_client calls; nothing of it is on the page."""

from __future__ import annotations

import gradio as gr
from PIL import Image

from ..reconstruction import decode_tokens, reconstruct_image, tokenize_image
from . import inspection
from .handlers import Handlers
from .reading import Rejected
from .results import new_folder


class Endpoints:
    """The public functions, over the same models and the same reader as the page's."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers

    def reconstruct(self, image: dict | None, model: str) -> tuple[Image.Image, list[list[object]]]:
        """A picture through tokens and back, and a table of bytes, bits per pixel, PSNR and SSIM."""
        tokenizer, upload = self._handlers.model(model).tokenizer, self._handlers.read(image)
        result = reconstruct_image(tokenizer, upload.image)
        return result.image, inspection.table(upload, result, inspection.baselines(result))

    def tokenize(self, image: dict | None, model: str) -> str:
        """A picture to its token file (.safetensors)."""
        served, upload = self._handlers.model(model), self._handlers.read(image)
        tokens = tokenize_image(served.tokenizer, upload.image)
        return str(inspection.save_image_tokens(served.tokenizer, served.weights, upload, tokens, new_folder()))

    def detokenize(self, file: dict | None, model: str, picture: float) -> Image.Image:
        """A token file to a picture; of several, the one of this number, counted from 1."""
        served = self._handlers.model(model)
        if file is None:
            raise Rejected("`file` must be a token file, got nothing")
        images = inspection.read_image_tokens(served.tokenizer, served.weights, file["path"])
        if picture not in range(1, len(images) + 1):
            raise Rejected(f"`picture` must be a whole number from 1 to {len(images)}, got {picture}")
        chosen = images[int(picture) - 1]
        return decode_tokens(served.tokenizer, chosen.tokens, chosen.size)


def add_endpoints(handlers: Handlers, **options: object) -> None:
    """Adds the functions to the app that is being built, with `options` of their listeners."""
    endpoints = Endpoints(handlers)
    with gr.Column(visible=False):
        image, file = gr.Image(label="image", type="filepath"), gr.File(label="file")
        model = gr.Dropdown(list(handlers.models), value=next(iter(handlers.models)), label="model")
        number = gr.Number(1, label="picture", precision=0)
        restored = gr.Image(label="reconstruction", type="pil", format="png")
        table = gr.Dataframe(headers=inspection.TABLE_HEADERS, label="table")
        run = gr.Button()
    run.click(endpoints.reconstruct, [image, model], [restored, table], api_name="reconstruct", **options)
    run.click(endpoints.tokenize, [image, model], file, api_name="tokenize", **options)
    run.click(endpoints.detokenize, [file, model, number], restored, api_name="detokenize", **options)
