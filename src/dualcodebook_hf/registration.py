"""What makes transformers and diffusers know the classes of this package once it is imported."""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __package__
LIBRARIES = ("transformers", "diffusers")
# These import transformers while they are imported themselves, or are needed whole by what is registered.
WATCHED = {*LIBRARIES, "accelerate", "peft"}


def register() -> None:
    """Adds the classes to transformers' Auto classes and pipelines, and imports the module that diffusers looks for.

    diffusers finds a component of a pipeline in `sys.modules`, under the name that model_index.json gives.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from . import autoencoder_dualcodebook  # noqa: F401
    from .configuration_dualcodebook import DualCodebookConfig
    from .image_processing_dualcodebook import DualCodebookImageProcessor
    from .modeling_dualcodebook import DualCodebookModel
    from .reconstruction_pipeline import TASK, ImageReconstructionPipeline

    AutoConfig.register(DualCodebookConfig.model_type, DualCodebookConfig, exist_ok=True)
    AutoModel.register(DualCodebookConfig, DualCodebookModel, exist_ok=True)
    AutoImageProcessor.register(
        DualCodebookConfig, image_processor_classes={"pil": DualCodebookImageProcessor}, exist_ok=True
    )
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=ImageReconstructionPipeline, pt_model=AutoModel, type="image"
    )
    # Without it a saved pipeline would carry a copy of its code, and want trust_remote_code where the package is there.
    del ImageReconstructionPipeline._registered_impl


def register_when_imported() -> None:
    """Registers now where a library is imported already, otherwise as soon as one is.

    Neither library has a door for packages that are not imported yet (an entry point, a lazy registry), so this is a
    post-import hook, as wrapt's, which mlflow and OpenTelemetry use: whoever imports this package and then
    `transformers.AutoModel` finds the model, and whoever only asks for `--help` waits for neither.
    """
    if any(name in sys.modules for name in LIBRARIES):
        register()
    else:
        sys.meta_path.insert(0, _PostImportHook())


class _PostImportHook(importlib.abc.MetaPathFinder):
    """Calls `register` once a library is imported, and goes.

    Not within an import of a watched package or of a module of ours: what is imported by half would be imported again
    in a circle. So the outermost of them must be done.
    """

    def __init__(self) -> None:
        self._state = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find, with a loader that tells this object of the end."""
        if name not in WATCHED and not name.startswith(f"{PACKAGE}."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def execute(self, loader: Any, module: ModuleType) -> None:
        """Executes a module; the outermost one is followed by `register`."""
        depth = getattr(self._state, "depth", 0)
        self._state.depth = depth + 1
        try:
            loader.exec_module(module)
        finally:
            self._state.depth = depth
        if depth == 0 and any(name in sys.modules for name in LIBRARIES):
            try:
                sys.meta_path.remove(self)
            except ValueError:  # another thread was first
                return
            register()


class _Loader(importlib.abc.Loader):
    """A module's own loader, which the module gets to see, and a word to the hook."""

    def __init__(self, loader: Any, hook: _PostImportHook) -> None:
        self._loader, self._hook = loader, hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The loader's own."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """The loader's own, between two words to the hook."""
        module.__spec__.loader = module.__loader__ = self._loader
        self._hook.execute(self._loader, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # `python -m` asks for the code
