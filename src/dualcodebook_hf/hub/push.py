"""Publishing on the Hugging Face Hub: tokenizers, diffusers' pipelines that hold one, and the Space.

Everything is prepared in a folder first and published by one commit: it is there as a whole or not at all. What stands
in the way is said before anything is created, where the Hub tells: ValueError for what the caller can put right (the
repository's id, the token and its rights, a repository that holds something else), OSError for the network and the Hub.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..onnx_runtime import FOLDER as ONNX_FOLDER
from ..run_folder import RECORDS
from ..version import __version__
from .export import PACKAGE, RECONSTRUCTIONS, SAMPLES, TrainedModel, export_pipeline, prepare_folder
from .records import public_record
from .space import check_static_space, write_space

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# A repository is one of ours, and may be updated, when this file of it holds this text.
MARKS = {
    "model": ("config.json", '"dualcodebook"'),
    "pipeline": ("model_index.json", PACKAGE.name),
    "space": (f"{PACKAGE.name}/version.py", "__version__"),
    "static": ("build.json", f'"{PACKAGE.name}"'),
}
SPACE_SDKS = {"space": "gradio", "static": "static"}


def push_model(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    license: str | None = None,
    metrics: str | Path | None = None,
    samples: bool = True,
    images: Sequence[str | Path] | None = None,
    onnx: bool = False,
    overwrite: bool = False,
) -> str:
    """Publishes a trained tokenizer (see `prepare_folder`) by one commit, and returns the repository's URL.

    A tokenizer that is there already is updated: its card is written anew, and records that the new one lacks go.

    Args:
        run: the folder of a run, a checkpoint or a saved model.
        repo_id: owner/name; the repository is created where there is none.
        private: make a new repository private.
        token: None: that of HF_TOKEN or of `hf auth login`.
        license: see `prepare_folder`.
        metrics: see `prepare_folder`.
        samples: see `prepare_folder`.
        images: see `prepare_folder`.
        onnx: see `prepare_folder`.
        overwrite: publish into a repository that holds something else; its other files stay.

    Raises ValueError for what the caller can put right, and OSError for the network and the Hub.
    """
    TrainedModel.find(run, metrics)  # before the Hub is asked anything

    def prepare(folder: Path) -> None:
        prepare_folder(
            run, folder, repo_id, license=license, metrics=metrics, samples=samples, images=images, onnx=onnx
        )

    optional = {
        SAMPLES,
        RECONSTRUCTIONS,
        *RECORDS.values(),
        "model.safetensors",
    }  # the last: transformers' own, stale beside ours

    def replaceable(name: str) -> bool:
        return name in optional or name.startswith(f"{ONNX_FOLDER}/")

    return _push(prepare, repo_id, "model", replaceable, token=token, private=private, overwrite=overwrite)


def push_pipeline(
    pipeline: DiffusionPipeline,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    overwrite: bool = False,
    train: Mapping[str, dict] | None = None,
) -> str:
    """Publishes a diffusers pipeline that holds a tokenizer of ours by one commit, and returns the repository's URL.

    Args:
        pipeline: see `export_pipeline`.
        repo_id: see `push_model`, as for the others and the errors.
        private: make a new repository private.
        token: None: that of HF_TOKEN or of `hf auth login`.
        overwrite: publish into a repository that holds something else; its other files stay.
        train: see `export_pipeline`; local paths become names.
    """

    def prepare(folder: Path) -> None:
        export_pipeline(pipeline, folder, repo_id, None if train is None else public_record(train))

    return _push(prepare, repo_id, "pipeline", lambda _: False, token=token, private=private, overwrite=overwrite)


def push_space(
    repo_id: str,
    *,
    models: Sequence[str] = (),
    static: str | Path | None = None,
    private: bool = False,
    token: str | None = None,
    overwrite: bool = False,
) -> str:
    """Publishes the Space with this package beside app.py, and returns its URL.

    Args:
        repo_id: see `push_model`, as for the others and the errors.
        models: Hub ids that it shows; none: the checkpoints inside the package.
        static: the folder that `make static-space` wrote: the page that runs in the browser is published instead.
        private: make a new repository private.
        token: None: that of HF_TOKEN or of `hf auth login`.
        overwrite: publish into a repository that holds something else; its other files stay.
    """
    for model in models:
        check_repo_id(model, "models")
    options: dict[str, Any] = {"token": token, "private": private, "overwrite": overwrite}
    if static is not None:
        check_static_space(static)
        return _push(lambda folder: _copy(static, folder), repo_id, "static", _is_of_static_space, **options)

    def prepare(folder: Path) -> None:
        write_space(folder, models)

    bundled = f"{PACKAGE.name}/"
    return _push(prepare, repo_id, "space", lambda name: name.startswith(bundled), **options)


def _copy(built: str | Path, folder: Path) -> None:
    shutil.copytree(built, folder, ignore=shutil.ignore_patterns(".*"))


def _is_of_static_space(name: str) -> bool:
    return name.startswith(("onnx/", "ort/", "examples/"))


def check_repo_id(repo_id: str, name: str = "repo_id") -> None:
    """Raises ValueError unless `repo_id` is owner/name in the Hub's spelling."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"`{name}` must be owner/name, got {repo_id!r}: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"`{name}` must be owner/name, got {repo_id!r}")


def check_access(repo_id: str, token: str | None = None) -> None:
    """Raises ValueError where the Hub says that the token cannot publish there; creates nothing. For before a run."""
    check_repo_id(repo_id)
    api, owner = _connect(token), repo_id.split("/")[0]
    with _plain_errors(api, repo_id):
        try:
            identity = api.whoami()
        except HfHubHTTPError as error:
            if error.response.status_code == 404:  # a mirror of the Hub that does not know its users
                return
            raise
    role = identity.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError("the token may only read: make one with the role `write` at huggingface.co/settings/tokens")
    owners = [identity["name"], *(organization["name"] for organization in identity.get("orgs", []))]
    # A fine-grained token need not show every organization that it may write to.
    if role == "write" and owner.lower() not in map(str.lower, owners):
        raise ValueError(f"`repo_id` {repo_id!r}: the token is of {', '.join(owners)}, and cannot write to {owner}")


def _connect(token: str | None) -> HfApi:
    token = token or get_token()
    if not token:
        raise ValueError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token, library_name=PACKAGE.name, library_version=__version__)


def _push(
    prepare: Callable[[Path], None],
    repo_id: str,
    kind: str,
    replaceable: Callable[[str], bool],
    *,
    token: str | None,
    private: bool,
    overwrite: bool,
) -> str:
    """Prepares a folder and publishes it; see `push_model` for the last three arguments.

    Args:
        prepare: fills a folder, given by its name.
        repo_id: owner/name.
        kind: key of `MARKS`.
        replaceable: whether a file in the repository that is not in the folder is deleted, by its name.
    """
    check_repo_id(repo_id)
    target = _Target(_connect(token), repo_id, kind)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / repo_id.split("/")[1]
        prepare(folder)
        there, created = target.look(), False
        if there is None:
            there, created = target.create(private)
        if not created:
            target.check(there, private, overwrite)
        paths = {str(path.relative_to(folder).as_posix()): path for path in folder.rglob("*") if path.is_file()}
        gone = [name for name in _names(there) if name not in paths and replaceable(name)]
        operations = [CommitOperationAdd(name, path) for name, path in sorted(paths.items())]
        target.commit([*operations, *(CommitOperationDelete(name) for name in gone)], there, created)
    return target.url


@dataclass
class _Target:
    """One repository on the Hub."""

    api: HfApi
    repo_id: str
    kind: str

    @property
    def repo_type(self) -> str:
        return "space" if self.kind in SPACE_SDKS else "model"

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{'spaces/' if self.kind in SPACE_SDKS else ''}{self.repo_id}"

    def look(self) -> Any | None:
        """The Hub's description of the repository; None where there is none, or none that this token may see."""
        with _plain_errors(self.api, self.repo_id):
            try:
                return self.api.repo_info(self.repo_id, repo_type=self.repo_type)
            except HfHubHTTPError as error:
                if error.response.status_code != 404:
                    raise
                return None

    def create(self, private: bool) -> tuple[Any, bool]:
        """Creates the repository -> its description, and whether it was created: somebody may have been faster."""
        created = True
        with _plain_errors(self.api, self.repo_id):
            try:
                sdk = SPACE_SDKS.get(self.kind)
                self.api.create_repo(self.repo_id, repo_type=self.repo_type, private=private or None, space_sdk=sdk)
            except HfHubHTTPError as error:
                if error.response.status_code != 409:
                    raise
                created = False
        there = self.look()
        if there is None and not created:
            raise ValueError(f"`repo_id` {self.repo_id!r} is taken by a repository that this token may not see")
        return there, created

    def check(self, there: Any, private: bool, overwrite: bool) -> None:
        """Raises ValueError where publishing would mix with somebody's other work, or show what should be private.

        Args:
            there: the Hub's description of the repository.
            private: the caller wants a private repository.
            overwrite: the caller allows to publish beside other work.
        """
        if private and there.private is False:
            raise ValueError(f"`private`: {self.url} exists and is public; make it private first, or name another")
        names, (file, text) = set(_names(there)) - {".gitattributes"}, MARKS[self.kind]
        if overwrite or not names:
            return
        ours = False
        if file in names:
            with _plain_errors(self.api, self.repo_id), tempfile.TemporaryDirectory() as folder:
                path = self.api.hf_hub_download(self.repo_id, file, repo_type=self.repo_type, local_dir=folder)
                ours = text in Path(path).read_text(encoding="utf-8")
        if not ours:
            raise ValueError(
                f"{self.url} exists and holds something else ({', '.join(sorted(names)[:4])}): name another "
                "repository, or set `overwrite` to publish into it"
            )

    def commit(self, operations: list, there: Any, created: bool) -> None:
        """One commit. Raises ValueError or OSError that says what is there now."""
        message = f"Publish with {PACKAGE.name} {__version__}"
        try:
            with _plain_errors(self.api, self.repo_id):
                self.api.create_commit(self.repo_id, operations, commit_message=message, repo_type=self.repo_type)
        except Exception as error:  # uploads fail with RuntimeError too, and with what hf_xet raises
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(f"{error}. {self._aftermath(there, created)}") from error

    def _aftermath(self, before: Any, created: bool) -> str:
        try:
            now = self.look()
        except (OSError, ValueError):
            left = " The repository was created just now, and may be empty" if created else ""
            return f"Whether the commit arrived is not known, since the Hub cannot be asked: look at {self.url}.{left}"
        if now is not None and _head(now) != _head(before):
            return f"The repository has a new commit all the same: look at {self.url}, everything is in it or nothing"
        left = f"an empty repository was left behind at {self.url}" if created else f"{self.url} is as it was"
        return f"Nothing was published; {left}"


def _names(there: Any | None) -> list[str]:
    return [file.rfilename for file in (there.siblings if there is not None else None) or []]


def _head(there: Any | None) -> str | None:
    return None if there is None else there.sha


@contextmanager
def _plain_errors(api: HfApi, repo_id: str) -> Iterator[None]:
    """Errors of huggingface_hub as ValueError for what the caller can put right, and OSError for the rest."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError("nothing can be published while HF_HUB_OFFLINE is set") from error
    except HfHubHTTPError as error:
        status, said = error.response.status_code, error.server_message or str(error).splitlines()[0]
        if status == 401:
            raise ValueError("the Hub does not know the token (401): run `hf auth login`, or set HF_TOKEN") from error
        if status == 403:
            raise ValueError(f"the token has no right to write to {repo_id!r} (403): {said}") from error
        if status == 402:
            raise ValueError(f"the Hub asks for a subscription for {repo_id!r} (402): {said}") from error
        raise OSError(f"the Hub answered {status} for {repo_id!r}: {said}") from error
    except (
        HTTPError,
        LocalEntryNotFoundError,
    ) as error:  # httpx's, which is not an OSError, also under a download's own
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        raise ConnectionError(f"the connection to {api.endpoint} failed: {cause or type(error).__name__}") from error
