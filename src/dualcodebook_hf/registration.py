"""What makes transformers and diffusers know the classes of this package once it is imported."""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARIES = ("transformers", "diffusers")
# Packages that import transformers while they are imported themselves, or that it needs whole.
NEIGHBOURS = ("accelerate", "peft")


def register() -> None:
    """Adds the classes to transformers' Auto classes and pipelines, and to what diffusers looks for.

    diffusers finds a component of a pipeline in `sys.modules`, under the name that model_index.json gives, and the
    pipeline itself, by `DiffusionPipeline.from_pretrained`, among its own names only.
    """
    import diffusers
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from . import autoencoder_dualcodebook  # noqa: F401
    from .configuration_dualcodebook import DualCodebookConfig
    from .generation.pipeline import DualCodebookMaskGenerationPipeline
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
    setattr(diffusers, DualCodebookMaskGenerationPipeline.__name__, DualCodebookMaskGenerationPipeline)


def register_when_imported() -> None:
    """Registers now where a library is imported already, otherwise as soon as one is.

    Neither library has a door for packages that are not imported yet (an entry point, a lazy registry), so this is a
    post-import hook, as wrapt's, which mlflow and OpenTelemetry use: whoever imports this package and then
    `transformers.AutoModel` finds the model, and whoever only asks for `--help` waits for neither.
    """
    if any(name in sys.modules for name in LIBRARIES):
        register()
    else:
        sys.meta_path.insert(0, PostImportHook(register, LIBRARIES, NEIGHBOURS, __package__))


class PostImportHook(importlib.abc.MetaPathFinder):
    """Calls a function once a library is imported, and goes: a finder at the front of `sys.meta_path`.

    Not in the middle of an import of what the function itself may import: that would be half a module. So of the
    watched modules the outermost one must be done.

    Args:
        function: without arguments.
        libraries: one of them must be imported.
        neighbours: further packages that are watched.
        package: the modules in it are watched.
    """

    def __init__(
        self, function: Callable[[], None], libraries: Sequence[str], neighbours: Sequence[str], package: str
    ) -> None:
        self._function, self._libraries, self._package = function, libraries, package
        self._watched = {*libraries, *neighbours}
        self._state = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find, with a loader that tells this object of the end."""
        if name not in self._watched and not name.startswith(f"{self._package}."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def execute(self, loader: Any, module: ModuleType) -> None:
        """Executes a module; the outermost one is followed by the function."""
        depth = getattr(self._state, "depth", 0)
        self._state.depth = depth + 1
        try:
            loader.exec_module(module)
        finally:
            self._state.depth = depth
        if depth == 0 and any(name in sys.modules for name in self._libraries):
            try:
                sys.meta_path.remove(self)
            except ValueError:  # another thread was first
                return
            self._function()


class _Loader(importlib.abc.Loader):
    """A module's own loader, the one that the module gets to see, and the hook."""

    def __init__(self, loader: Any, hook: PostImportHook) -> None:
        self._loader, self._hook = loader, hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The loader's own."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """The loader's own, by way of the hook."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._hook.execute(self._loader, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # `python -m` asks for the code
