"""The house: files import from lower floors only, the base install is enough for the tokenizer, configs stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dualcodebook_hf
from dualcodebook_hf.presets import load_preset
from dualcodebook_hf.training.arguments import RunConfig, parse_run_config

SOURCES = Path(dualcodebook_hf.__file__).parent
ROOT = Path(__file__).parents[1]
FLOORS = [
    "configuration_dualcodebook codebooks rival_quantizers image_processing_dualcodebook pipelines token_file presets "
    "version hub.space evaluation.metrics evaluation.protocols evaluation.wasserstein "
    "evaluation.charts training.perceptual training.discriminator",
    "backbone quantizers picture_datasets evaluation.figures evaluation.metric_inputs evaluation.codecs "
    "evaluation.frechet training.arguments training.losses",
    "core evaluation.patch_linear training.adversary training.data",
    "autoencoder_dualcodebook modeling_dualcodebook evaluation.paper_figures",
    "demo.inspection demo.fragments",
    "demo.handlers",
    "demo.page",
    "demo",
    "convert training.checkpoints training.initialization training.validation evaluation.evaluate",
    "hub.records",
    "hub.card",
    "hub.export",
    "hub.push",
    "hub",
    "training.trainer",
    "cli.inputs",
    "cli.pictures cli.evaluate cli.train cli.convert cli.publish cli.demo",
    "cli.main",
    "cli cli.__main__",
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names.split()}


def module_name(path):
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Modules of this package that a file imports, anywhere in it."""
    package = list(path.relative_to(SOURCES).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            for name in (".".join([*base, module]) for module in modules):
                # `from .. import default_checkpoint` names the package itself.
                yield name if name in LEVEL else ".".join(base)


def test_every_file_imports_from_lower_floors_only():
    files = {module_name(path): path for path in SOURCES.rglob("*.py")}
    assert set(files) - set(LEVEL) == {"", "training", "evaluation"}
    for name, path in files.items():
        if name in LEVEL:
            for other in imported(path):
                if other:  # the package itself, which only the command line imports, lazily
                    assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"


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
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
