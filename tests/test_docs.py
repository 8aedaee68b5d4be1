"""The site builds without a warning, fetches nothing, documents the public face and every field; its pages are true."""

import ast
import dataclasses
import html
import inspect
import re
from pathlib import Path

import pytest
from PIL import Image

import dualcodebook_hf
from dualcodebook_hf import hub
from dualcodebook_hf.cli.main import COMMANDS
from dualcodebook_hf.configuration_fields import DualCodebookFields
from dualcodebook_hf.image_datasets import load_images
from dualcodebook_hf.metrics import IMAGE_METRICS
from dualcodebook_hf.training.arguments import CLASSES, parse_run_config
from dualcodebook_hf.training.task import Task

pytest.importorskip("mkdocs")
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = Path(dualcodebook_hf.__file__).parent
NEW_PAGES = ("index.md", "data.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """{path in the site: HTML}, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    build(config)  # raises for a warning: a broken link or anchor, a name that does not exist
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}


def text_of(page):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def test_pages_fetch_nothing_from_elsewhere(site):
    """Links may lead anywhere; scripts, styles, fonts and images come from the site itself."""
    fetching = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"']?([^\"' >]+)")
    found = {page: fetching.findall(text) for page, text in site.items()}
    assert sum(map(len, found.values())) > len(site)
    assert {page: [url for url in urls if re.match(r"(https?:)?//", url)] for page, urls in found.items()} == {
        page: [] for page in site
    }


def test_every_public_name_has_its_place(site):
    anchors = set(re.findall(r'id="(dualcodebook_hf[\w.]+)"', "".join(site.values())))
    documented = {name.rsplit(".", 1)[-1] for name in anchors}
    public = {name for name in dualcodebook_hf.__all__ if not name.startswith("__")} | set(hub.__all__)
    assert public <= documented, public - documented
    for name in ("tokenize", "detokenize", "encode", "decode", "from_pretrained", "from_preset"):
        assert f"dualcodebook_hf.autoencoder_dualcodebook.DualCodebookVQModel.{name}" in anchors
    methods = [name for name, _ in inspect.getmembers(Task, inspect.isfunction) if not name.startswith("_")]
    assert methods
    assert {f"dualcodebook_hf.training.task.Task.{name}" for name in methods} <= anchors


@pytest.mark.parametrize("section", CLASSES)
def test_every_field_stands_in_the_reference_with_default_and_meaning(site, section):
    page = site["api/configuration.html"]
    rows = {name: text_of(row) for name, row in re.findall(r'<tr>\s*<td><span id="(\w+)">(.*?)</tr>', page, re.S)}
    for spec in dataclasses.fields(CLASSES[section]):
        meaning = " ".join(spec.metadata["help"].replace("`", "").split())
        assert meaning in rows[spec.name], spec.name
        if isinstance(spec.default, (int, float, str)) and not isinstance(spec.default, bool):
            assert f" {spec.default} " in rows[spec.name].replace(meaning, " "), spec.name
    assert "int" in rows["in_channels"] and "list[int] or null" in rows["fsq_levels"]


def test_the_reference_has_every_metric_and_the_help_of_every_command(site):
    metrics = text_of(site["api/metrics.html"])
    assert all(f"{name} {spec.title}" in metrics for name, spec in IMAGE_METRICS.items())
    commands = set(COMMANDS) - {"train"}  # its flags are fields
    assert {"reconstruct", "tokenize-dataset", "push"} <= commands
    shown = text_of(site["api/cli.html"])
    for command in commands:
        assert re.search(rf"usage: dualcodebook {command} .*--help", shown), command


def documented_arguments(docstring):
    """Names in the section `Args:` of a docstring."""
    lines = inspect.cleandoc(docstring or "").split("\nArgs:\n")
    section = lines[1].split("\n\n")[0] if len(lines) == 2 else ""
    return [name.lstrip("*") for name in re.findall(r"^    (\*{0,2}\w[\w, *]*): ", section, re.M)]


def test_documented_arguments_exist():
    """Classes and functions of the whole package; what takes **kwargs may document more than its signature."""
    seen = 0
    for source in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            names = documented_arguments(ast.get_docstring(node))
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            functions = [part for part in inner if getattr(part, "name", "") in (node.name, "__init__")]
            if not names or not functions or functions[0].args.kwarg:
                continue
            arguments = functions[0].args
            there = {part.arg for part in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
            there |= {arguments.vararg.arg} if arguments.vararg else set()
            assert set(names) <= there, f"{source.name}: {node.name}: {set(names) - there}"
            seen += 1
    assert seen > 50


@pytest.mark.parametrize("page", NEW_PAGES)
def test_the_python_examples_of_the_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos" / "train")
    (tmp_path / "photos-parquet").mkdir()
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert found
    for code in found:
        exec(compile(code, page, "exec"), {})
    if page == "data.md":
        rows = load_images("photos-parquet/train.parquet")
        assert len(rows) == 2 and rows[0]["image"]["bytes"]


def photos(folder):
    folder.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (40, 30), (number * 80, 90, 20)).save(folder / f"000{number}.png")


def test_the_formats_of_the_data_page_are_read(tmp_path, monkeypatch):
    """Nested folders, folders of classes, metadata.csv; and the run file without validation is a run."""
    text = (DOCS / "data.md").read_text()
    monkeypatch.chdir(tmp_path)
    photos(Path("nested/train/holiday"))
    photos(Path("nested/validation"))
    assert len(load_images("nested", split="train")) == len(load_images("nested", split="validation")) == 2
    for name in ("cat", "dog"):
        photos(Path("classes/train") / name)
    assert set(load_images("classes", split="train")["label"]) == {0, 1}
    photos(Path("captions/train"))
    Path("captions/train/metadata.csv").write_text("file_name,text\n0000.png,a cat on a wall\n0001.png,a dog\n")
    assert load_images("captions", split="train")["text"] == ["a cat on a wall", "a dog"]
    without, two = re.findall(r"```yaml\n(.*?)```", text, re.S)
    Path("two.yaml").write_text(two)
    assert parse_run_config(["--config", "two.yaml"]).data.dataset == ["photos", "lab/paintings"]
    Path("no-validation.yaml").write_text(without)
    run = parse_run_config(["--config", "no-validation.yaml"])
    assert run.data.dataset == "photos" and run.data.validation_split is None
    with pytest.raises(ValueError, match=r"must be one of \['train'\]"):
        load_images("classes", split="validation")


def test_the_site_repeats_nothing_that_the_code_knows():
    """Help texts are in the dataclasses alone."""
    pages = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    for spec in dataclasses.fields(DualCodebookFields):
        assert spec.metadata["help"] not in pages
