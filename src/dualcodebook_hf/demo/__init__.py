"""The Space: a Gradio app that shows what the codebooks do to an image. Images stay on its server."""

try:
    import gradio  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the demo needs gradio: pip install 'dualcodebook-hf[space]'", name=error.name) from error

from .page import build_demo, launch_options

__all__ = ["build_demo", "launch_options"]
