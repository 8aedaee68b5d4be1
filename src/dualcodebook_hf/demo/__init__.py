"""The Space: a Gradio app that shows what the codebooks do to an image. Images stay on its server."""

import importlib.util

if importlib.util.find_spec("gradio") is None:
    from ..packages import how_to_install

    raise ModuleNotFoundError(f"the demo needs {how_to_install('space', 'gradio')}", name="gradio")

__all__ = ["build_demo", "launch_options"]


def __getattr__(name: str) -> object:
    """Imports the page when it is asked for: the process that reads images needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import page

    return getattr(page, name)
