"""Versions: the bounds are one line at import, and every floor is one that was run."""

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dualcodebook_hf.packages import how_to_install, require_package

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: list(map(Requirement, lines)) for name, lines in PROJECT["optional-dependencies"].items()}
DEVELOPMENT = {needed.name for extra in ("dev", "docs") for needed in EXTRAS[extra]} - {"pytest"}
# Those that could not be installed where the floors were run; docs/versions.md says why.
NOT_RUN = {"torch", "torch-fidelity", "ray"}


def pins(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_the_lowest_versions_that_are_tested_are_the_floors_of_pyproject():
    lowest = pins("constraints-lowest.txt")
    for needed in chain(map(Requirement, PROJECT["dependencies"]), *EXTRAS.values()):
        floors = [Version(bound.version) for bound in needed.specifier if bound.operator == ">="]
        if needed.name not in DEVELOPMENT | NOT_RUN:
            assert floors == [lowest[canonicalize_name(needed.name)]], needed


@pytest.mark.parametrize("file", ["constraints-cpu.txt", "constraints-lowest.txt"])
def test_what_is_tested_lies_within_the_bounds(file):
    found = pins(file)
    for needed in chain(map(Requirement, PROJECT["dependencies"]), *EXTRAS.values()):
        version = found.get(canonicalize_name(needed.name))
        assert version is None or needed.specifier.contains(version), needed


def test_the_oldest_python_is_the_same_everywhere_and_every_one_that_is_claimed_was_run():
    oldest = Version(PROJECT["requires-python"].removeprefix(">="))
    assert f"sys.version_info < {oldest.release}" in (ROOT / "Makefile").read_text()
    prefix = "Programming Language :: Python :: 3."
    claimed = {Version(f"3.{name.removeprefix(prefix)}") for name in PROJECT["classifiers"] if name.startswith(prefix)}
    table = (ROOT / "docs" / "versions.md").read_text().split("## What was run")[1].split("## Floors")[0]
    run = {Version(row.split("|")[2].strip()) for row in table.splitlines() if re.match(r"\|[^|]+\| 3\.", row)}
    assert min(claimed) == oldest and claimed == run


def installed(folder, name, version, requires=()):
    """A package's metadata, as pip leaves them."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {needed}" for needed in requires)]) + "\n")


@pytest.fixture
def old_versions(tmp_path, monkeypatch):
    """This package with bounds, beside a diffusers and a datasets that are too old."""
    installed(tmp_path, "dualcodebook-hf", "0.1.0", ["diffusers<1,>=0.40", "pyyaml", 'datasets>=4.0; extra == "train"'])
    installed(tmp_path, "diffusers", "0.35.2")
    installed(tmp_path, "datasets", "3.6.0")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_dependency_that_is_too_old_is_one_line_at_import(old_versions):
    code = f"import sys; sys.path.insert(0, {str(old_versions)!r}); import dualcodebook_hf"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "ImportError: dualcodebook_hf does not work with diffusers 0.35.2: pip install 'diffusers<1,>=0.40'"
    )


def test_a_package_of_an_extra_that_is_too_old_is_named(old_versions):
    message = "training does not work with datasets 3.6.0: pip install 'datasets>=4.0'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_package("datasets", "train", user="training")
    require_package("yaml", "train")


def test_a_missing_package_is_named_with_commands_that_work_before_any_index_has_this_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError) as error:
        require_package("gradio", "space")
    wanted = next(needed for needed in EXTRAS["space"] if needed.name == "gradio")
    command = f"pip install '{wanted}' (or, in a clone of the project: pip install -e '.[space]')"
    assert str(error.value) == f"this command needs gradio: {command}"
    assert "dualcodebook-hf[" not in how_to_install("fid", "torch_fidelity", "torchvision")
