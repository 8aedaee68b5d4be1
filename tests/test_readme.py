"""The README is true: its example runs, its commands and files exist, its table is the embedded checkpoint's."""

import json
import re
from pathlib import Path

import pytest

from dualcodebook_hf import default_checkpoint
from dualcodebook_hf.presets import preset_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_examples_run_and_what_they_assert_holds(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "\nassert " in code
    exec(compile(code, "README.md", "exec"), {})


def test_make_targets_and_presets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", "\n".join(blocks("bash")), re.M)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)
    assert all(f"`{name}`" in README for name in preset_names())
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_tree_names_every_source_file_and_nothing_else():
    tree = README.split("## What is where")[1].split("```")[1]
    named = set(re.findall(r"[\w.-]+\.py\b|[\w-]+/", tree))
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        if not path.name.startswith("__"):
            assert path.name in named, path
            if path.parent.parent.name == "dualcodebook_hf":
                assert f"{path.parent.name}/" in named, path
    folders = ("src", "scripts", "benchmarks", "configs", "spaces", "metrics", "docs", "tests", "examples", "notebooks")
    there = {*folders, *(path.name for folder in folders for path in (ROOT / folder).rglob("*"))}
    assert {name.rstrip("/") for name in named} <= there


def test_it_is_short():
    assert len(README.splitlines()) < 220


def test_the_embedded_checkpoint_beats_the_linear_codec_at_the_same_bits():
    results = json.loads((Path(default_checkpoint()) / "metrics.json").read_text())["results"]
    ours, codec = (result["metrics"] for result in results[:2])
    assert results[0]["protocol"]["dataset"] == "clothing-256"
    assert results[0]["protocol"]["pictures"] == results[1]["protocol"]["pictures"] == 372
    assert ours["bits_per_position"] == codec["bits_per_position"] == 18
    assert ours["psnr"] > codec["psnr"]
    assert all(codebook["usage"] > 0.95 for codebook in ours["codebooks"].values())


@pytest.mark.parametrize("decoder", ["sharp", "faithful"])
def test_the_embedded_checkpoint_is_small_and_its_codebooks_are_float32(decoder):
    from safetensors import safe_open

    folder = Path(default_checkpoint(decoder))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        for name in file.keys():
            expected = "F32" if name.startswith("quantize.") else "BF16"
            assert file.get_slice(name).get_dtype() == expected, name
