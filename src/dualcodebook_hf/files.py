"""Files and folders that appear whole or not at all, even if the power goes; JSON; names that may be published."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name to write to; at the end the file gets its own name, or nothing is left behind.

    Its bytes are on the disk before it has its name.
    """
    path = Path(path)
    partial = _partial(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def shared_file(path: str | Path) -> Iterator[Path]:
    """`atomic_file` for a file that several processes may write at once, all of them the same.

    What other processes left of it goes. One that still writes then finds it finished, which is no error.
    """
    path = Path(path)
    try:
        with atomic_file(path) as partial:
            yield partial
    except FileNotFoundError:
        if not path.exists():
            raise
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        leftover.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields the name of a folder to make and fill; at the end it becomes `path`, or nothing is left behind.

    Its files are on the disk before it has its name.

    Args:
        path: the folder's own name. It must be new or empty, unless `replace`.
        replace: delete what is there, once the new folder is complete.

    Raises ValueError, before anything is written, when `path` holds something.
    """
    path = Path(path).absolute()
    if not (replace or is_free_folder(path)):
        raise ValueError(f"`folder` must be new or empty, got '{path}'")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _partial(path), _removed(path)
    try:
        yield partial
        for entry in (partial, *partial.rglob("*")):
            _sync(entry)
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def staged_files(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder to write files into; at the end they all move into `folder`, or none of them does.

    Files of the same names are replaced, others in `folder` stay.
    """
    folder = Path(folder).absolute()
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    partial = _partial(folder / "files")
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.iterdir()):
            os.replace(path, folder / path.name)
        made = []
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # somebody put something there meanwhile
                parent.rmdir()


def remove_folder(path: Path) -> None:
    """Deletes a folder that must not be found half deleted: it loses its name first."""
    removed = _removed(path)
    os.replace(path, removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left in `folder` under temporary names; nobody else may be writing there."""
    for path in folder.glob(".*.partial"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_free_folder(path: str | Path) -> bool:
    """Nothing is there yet, or an empty folder."""
    path = Path(path)
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def read_json(path: str | Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file. Raises ValueError for anything else."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the second: lists in lists, thousands deep
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' must hold a JSON object, got a {type(content).__name__}")
    return content


def write_json(path: str | Path, content: Any, *, shared: bool = False) -> None:
    """Writes indented JSON; the file appears whole or not at all. `shared`: by several processes, see `shared_file`."""
    with (shared_file if shared else atomic_file)(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def public_name(name: str | Path, parts: int = 1) -> str:
    """A Hub id as it is; of a local path the last parts only: results are published, this machine's folders are not.

    Args:
        name: a Hub id, or a path that exists.
        parts: how many of the path's last parts are kept.
    """
    path = Path(name).expanduser()
    return "/".join(path.resolve().parts[-parts:]) if path.exists() else str(name)


def _partial(path: Path) -> Path:
    # A name may have 255 bytes: of a long one the beginning, whose characters may have four.
    name = path.name if len(os.fsencode(path.name)) <= 200 else path.name[:50]
    # Processes in containers, or on machines that share a folder, may have the same number.
    return path.with_name(f".{name}.{secrets.token_hex(4)}.{os.getpid()}.partial")


def _removed(path: Path) -> Path:
    return _partial(path).with_suffix(".removed.partial")


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    if os.name != "posix" and path.is_dir():  # Windows has no such thing
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
