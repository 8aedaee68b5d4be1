"""Packages that only some of the code needs."""

from __future__ import annotations

import importlib.util


def require_package(module: str, extra: str, user: str = "this command") -> None:
    """Raises ValueError, naming the extra to install, when a package is missing.

    Args:
        module: the name that is imported.
        extra: of this package, that brings it.
        user: who needs it, for the message.
    """
    if importlib.util.find_spec(module) is None:
        name = module.replace("_", "-")
        raise ValueError(f"{user} needs the package {name}: pip install 'dualcodebook-hf[{extra}]'")
