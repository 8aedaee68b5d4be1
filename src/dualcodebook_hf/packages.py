"""The packages that this one needs: whether they are installed, in a version within the bounds of pyproject.toml."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DISTRIBUTION = "dualcodebook-hf"


def requirements(extra: str | None = None) -> list[Requirement]:
    """What pyproject.toml asks for, without markers. Raises PackageNotFoundError where only a copy of the code lies.

    Args:
        extra: None: the base install; a name: what this extra adds.
    """
    found = []
    for needed in map(Requirement, metadata.requires(DISTRIBUTION) or ()):
        marker, needed.marker = needed.marker, None
        if marker.evaluate({"extra": extra or ""}) if marker else extra is None:
            found.append(needed)
    return found


def check_versions() -> None:
    """Raises ImportError, in one line, when a package of the base install has a version outside of its bounds."""
    wrong = [needed for needed in _bounds() if _is_outside(needed)]
    if wrong:
        raise ImportError(f"dualcodebook_hf does not work with {_installed(wrong)}: {_pip(wrong)}")


def require_package(module: str, extra: str, user: str = "this command") -> None:
    """Raises ValueError that says what to install when a package is missing or has a version outside of its bounds.

    Args:
        module: the name that is imported.
        extra: of this package, that brings it.
        user: who needs it, for the message.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{user} needs {how_to_install(extra, module)}")
    wrong = [needed for needed in _bounds(extra) if _same(needed.name, module) and _is_outside(needed)]
    if wrong:
        raise ValueError(f"{user} does not work with {_installed(wrong)}: {_pip(wrong)}")


def how_to_install(extra: str, *modules: str) -> str:
    """Missing packages and the command that installs them, for an error's text.

    Args:
        extra: of this package, that brings them.
        *modules: the names that are imported.
    """
    bounds = _bounds(extra)
    missing = [
        next((needed for needed in bounds if _same(needed.name, module)), Requirement(module)) for module in modules
    ]
    names = ", ".join(canonicalize_name(needed.name) for needed in missing)
    # No index has this package yet: its extras are installed from a clone.
    return f"{names}: {_pip(missing)} (or, in a clone of the project: pip install -e '.[{extra}]')"


def _bounds(extra: str | None = None) -> list[Requirement]:
    try:
        return requirements(extra)
    except metadata.PackageNotFoundError:  # in a Space, or a model's remote code: whoever made it chose the versions
        return []


def _is_outside(needed: Requirement) -> bool:
    try:
        return not needed.specifier.contains(metadata.version(needed.name), prereleases=True)
    except metadata.PackageNotFoundError:  # missing, or installed under another name: its import tells
        return False


def _same(name: str, other: str) -> bool:
    return canonicalize_name(name) == canonicalize_name(other)


def _installed(packages: list[Requirement]) -> str:
    return ", ".join(f"{needed.name} {metadata.version(needed.name)}" for needed in packages)


def _pip(packages: list[Requirement]) -> str:
    return "pip install " + " ".join(f"'{needed}'" for needed in packages)
