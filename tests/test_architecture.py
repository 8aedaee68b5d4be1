"""The house: imports have no circle, the base install is enough for the tokenizer, configs stay small."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import dualcodebook_hf
from dualcodebook_hf.presets import load_preset
from dualcodebook_hf.training.arguments import RunConfig, parse_run_config

SOURCES = Path(dualcodebook_hf.__file__).parent
ROOT = Path(__file__).parents[1]


def module_name(path):
    """A file of the package as "folder.module"; a folder's __init__ as "folder", the package's own as ""."""
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in SOURCES.rglob("*.py")}


def imported(path):
    """Modules of this package that a file imports, anywhere in it, and the folders whose __init__ runs before them."""
    package = list(path.relative_to(SOURCES).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            parts = [*base, *(node.module.split(".") if node.module else [])]
            found = {".".join([*parts, alias.name]) for alias in node.names} & set(FILES)
            yield from found or {".".join(parts)}
            for end in range(len(base) + 1, len(parts) + 1):
                yield ".".join(parts[:end])


def folder(module):
    """The room of a module: its folder, or the module itself where it lies at the top."""
    return module.split(".")[0]


def imports():
    """{module: modules that it imports}. An __init__ hands its folder on, and does not count as its user."""
    graph = {name: set(imported(path)) - {name} for name, path in FILES.items()}
    return {name: {other for other in found if not name.startswith(f"{other}.")} for name, found in graph.items()}


def test_no_file_imports_the_package_itself():
    """Its __init__ imports the faces: who imports it stands above everything."""
    assert [name for name, found in imports().items() if "" in found] == []


def test_the_imports_of_files_and_of_folders_have_no_circle():
    graph = imports()
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle
    rooms = {}
    for name, found in graph.items():
        rooms.setdefault(folder(name), set()).update(room for room in map(folder, found) if room != folder(name))
    graphlib.TopologicalSorter(rooms).prepare()


# Of generation/, what draws images: transformers and diffusers know it at import, as they know the tokenizer.
DRAWING = {"generation"} | {
    f"generation.{name}"
    for name in ("transformer", "schedulers", "inputs", "pipeline", "loading", "masking", "choices")
}


def test_only_what_trains_measures_publishes_and_serves_stands_above_the_ground():
    """Whoever tokenizes or draws needs neither training nor evaluation; whoever measures needs no trainer."""
    graph = imports()

    def below(name):
        found, waiting = set(), [name]
        while waiting:
            for other in graph[waiting.pop()] - found:
                found.add(other)
                waiting.append(other)
        return {folder(other) for other in found - DRAWING}

    rooms = {folder(name) for name, path in FILES.items() if path.parent != SOURCES}
    upper = {"training", "evaluation", "hub", "generation", "demo", "cli"}
    assert upper < rooms
    for name in FILES:
        if folder(name) not in upper or name in DRAWING:
            assert not below(name) & upper, name
        elif folder(name) == "evaluation":
            assert below(name).isdisjoint(upper - {"evaluation"}), name


HIDDEN = ("datasets", "accelerate", "gradio", "torchmetrics", "tensorboard", "skimage", "evaluate")
HIDDEN += ("vector_quantize_pytorch", "playwright")
BASE_INSTALL = f"""
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.split(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in {HIDDEN!r} else found(name, *rest)
from dualcodebook_hf.cli import main
sys.exit(main(["reconstruct", *sys.argv[1:]]))
"""


def test_the_base_install_reconstructs_with_the_embedded_checkpoint(tmp_path):
    from PIL import Image

    Image.effect_mandelbrot((70, 50), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "a.png")
    command = [sys.executable, "-c", BASE_INSTALL, str(tmp_path / "a.png"), "--dtype", "bfloat16"]
    command += ["--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "out" / "a-reconstruction.png").size == (70, 50)
    assert "70x50" in result.stdout
    assert not result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_short_and_valid(path):
    assert len(path.read_text().splitlines()) <= 10
    assert isinstance(parse_run_config(["--config", str(path), "--dataset", "x"]), RunConfig)
    assert load_preset(str(path))["model"]


def test_no_machine_path_and_no_long_function():
    for path in SOURCES.rglob("*.py"):
        text = path.read_text()
        assert str(ROOT) not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                told = len((ast.get_docstring(node) or "").splitlines())  # an argument a line
                assert node.end_lineno - node.lineno - told < 60, f"{path.name}: {node.name}"
