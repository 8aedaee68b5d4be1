"""The Space: a Gradio app that shows what the codebooks do to an image. Images stay on its server."""

try:
    import gradio  # noqa: F401
except ModuleNotFoundError as error:
    from ..packages import how_to_install

    raise ModuleNotFoundError(f"the demo needs {how_to_install('space', 'gradio')}", name=error.name) from error

from .page import build_demo, launch_options

__all__ = ["build_demo", "launch_options"]
