"""`import dualcodebook_hf` and the command line's first answers import nothing that computes; nothing else changes."""

from __future__ import annotations

import importlib
import pickle
import pydoc
import subprocess
import sys
import textwrap

import pytest

import dualcodebook_hf
from dualcodebook_hf import DualCodebookConfig, default_checkpoint
from dualcodebook_hf.registration import PostImportHook

HEAVY = ("torch", "transformers", "diffusers", "scipy", "gradio", "datasets", "accelerate", "numpy", "matplotlib")
FIRST_ANSWERS = """
import contextlib, importlib.util, io, sys
HEAVY = set(sys.argv[1].split(","))
def check(what):
    assert not HEAVY & set(sys.modules), (what, HEAVY & set(sys.modules))
import dualcodebook_hf
dir(dualcodebook_hf)
check("import")
from dualcodebook_hf.cli import main
from dualcodebook_hf.cli.main import COMMANDS
check("import of the command line")
def run(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code
    check(argv)
    return code, out.getvalue(), err.getvalue()
helps = [("--help",), ("--version",), *((command, "--help") for command in COMMANDS)]
for argv in helps:
    code, out, err = run(*argv)
    assert code == 0 and out and not err, argv
mistakes = [(), ("tokenise",), ("--versoin",), *((command, "--nonsense", "1") for command in COMMANDS)]
mistakes += [(command, "missing.png") for command in ("reconstruct", "tokenize", "detokenize")]
mistakes += [
    ("reconstruct", sys.argv[2], "--model", "nowhere"), ("tokenize", sys.argv[2], "--dtype", "int8"),
    ("tokenize", sys.argv[2], "--output", "tokens.txt"), ("evaluate", "--dataset", "./nowhere"),
    ("evaluate", "--dataset", "x", "--size", "0"), ("evaluate", "--protocol", "imagenet2"), ("evaluate",),
    ("train", "--dataset", "./nowhere"), ("train", "--config", "tinny"), ("train", "--dataset", "x", "--resize", "1"),
    ("train", "--learning_rate", "fast"), ("card", "missing", "--output", "missing/card.md"), ("push", "run"),
    ("demo", "--port", "none"),
]
for argv in mistakes:
    code, out, err = run(*argv)
    assert code == 2 and not out and err.count("\\n") == 1 and err.startswith("dualcodebook: error: "), (argv, err)
if importlib.util.find_spec("gradio"):
    import dualcodebook_hf.demo.reading  # in a process of its own, which is started anew after a hostile file
    check("the reader of uploads")
"""


def test_the_first_answers_import_nothing_that_computes(tmp_path):
    """Help, version, every kind of mistake in usage, all in one process."""
    (tmp_path / "a.png").touch()
    command = [sys.executable, "-c", FIRST_ANSWERS, ",".join(HEAVY), str(tmp_path / "a.png")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


# torch and numpy trigger nothing, and are the same in every scenario: imported once, then forked.
SCENARIO = """
import os, sys, traceback
import accelerate, torch
def check():
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY
    assert "DualCodebookVQModel" in vars(sys.modules["dualcodebook_hf.autoencoder_dualcodebook"])  # for diffusers
    import dualcodebook_hf
    assert AutoConfig.for_model("dualcodebook").__class__ is dualcodebook_hf.DualCodebookConfig
    assert AutoModel._model_mapping[dualcodebook_hf.DualCodebookConfig] is dualcodebook_hf.DualCodebookModel
    processor = AutoImageProcessor.from_pretrained(dualcodebook_hf.default_checkpoint())
    assert type(processor) is dualcodebook_hf.DualCodebookImageProcessor
    assert "image-reconstruction" in PIPELINE_REGISTRY.get_supported_tasks()
    import diffusers  # whose DiffusionPipeline looks for the pipeline there, and for its parts in sys.modules
    name = "DualCodebookMaskGenerationPipeline"
    assert getattr(diffusers, name) is getattr(dualcodebook_hf, name)
    assert "DualCodebookTransformer" in vars(sys.modules["dualcodebook_hf.generation.transformer"])
    assert "MaskedTokenScheduler" in vars(sys.modules["dualcodebook_hf.generation.schedulers"])
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(code)
            check()
        except BaseException:
            print("after", code, file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


def registers(*scenarios):
    command = [sys.executable, "-c", SCENARIO, *scenarios]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


def test_auto_classes_pipelines_and_diffusers_know_the_model_after_an_import_of_the_package_alone():
    registers("import dualcodebook_hf; from diffusers import UNet2DModel")


@pytest.mark.slow
def test_they_know_it_in_whatever_order_things_are_imported():
    registers(
        "import dualcodebook_hf; from transformers import AutoModel",
        "import dualcodebook_hf; import transformers.models.auto.modeling_auto",
        "import dualcodebook_hf; from diffusers.models.autoencoders.vae import Encoder",
        "import transformers; import dualcodebook_hf",
        "from diffusers import DiffusionPipeline; import dualcodebook_hf",
        "from dualcodebook_hf.core import DualCodebookOutput",
        "from dualcodebook_hf.image_processing_dualcodebook import read_image",
        "from dualcodebook_hf import *",
        "import dualcodebook_hf.hub",
    )


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Three packages on the path: `ours_` imports `library_`, `friend_` imports it in the middle of itself."""
    for name, text in {
        "library_/__init__.py": "",
        "library_/part.py": "",
        "friend_.py": "import library_\nwhole = True",
        "ours_/__init__.py": "",
        "ours_/low.py": "import library_.part\nwhole = True",
        "ours_/high.py": "import ours_.low\nwhole = True",
        "ours_/broken.py": "import library_\n1 / 0",
        "ours_/light.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("library_", "friend_", "ours_")]:
        del sys.modules[name]


@pytest.mark.parametrize("module", ["library_", "library_.part", "friend_", "ours_.low", "ours_.high"])
def test_the_hook_calls_once_and_only_when_the_outermost_module_is_whole(packages, module):
    calls = []

    def function():
        names = [name for name in sys.modules if name.split(".")[0] in ("friend_", "ours_") and name != "ours_"]
        calls.append(all(sys.modules[name].whole for name in names))

    hook = PostImportHook(function, ["library_"], ["friend_"], "ours_")
    sys.meta_path.insert(0, hook)
    importlib.import_module("ours_")
    assert calls == []
    found = importlib.import_module(module)
    assert calls == [True] and hook not in sys.meta_path
    assert type(found.__loader__).__module__.startswith("_frozen") and found.__spec__.loader is found.__loader__
    importlib.import_module("ours_.light")
    assert calls == [True]


def test_the_hook_waits_for_the_next_import_where_one_fails_and_the_code_of_modules_can_be_asked_for(packages):
    calls = []
    hook = PostImportHook(lambda: calls.append(1), ["library_"], [], "ours_")
    sys.meta_path.insert(0, hook)
    assert importlib.util.find_spec("ours_.light").loader.get_code("ours_.light")  # as `python -m` does
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("ours_.broken")
    assert calls == []
    importlib.import_module("ours_.light")
    assert calls == [1]


def test_the_package_shows_and_gives_all_its_names():
    names = {}
    exec("from dualcodebook_hf import *", names)
    assert set(dualcodebook_hf.__all__) <= set(names) & set(dir(dualcodebook_hf))
    for name in dualcodebook_hf.__all__:
        assert names[name] is getattr(dualcodebook_hf, name)
    assert names["default_checkpoint"]() == default_checkpoint()
    assert dualcodebook_hf.quantizers is importlib.import_module("dualcodebook_hf.quantizers")
    with pytest.raises(AttributeError, match="has no attribute 'DualCodebookGenerator'"):
        _ = dualcodebook_hf.DualCodebookGenerator
    shown = pydoc.plain(pydoc.render_doc(dualcodebook_hf))
    assert all(f"class {name}" in shown for name in dualcodebook_hf.__all__ if name.startswith("Dual"))


def test_what_is_pickled_is_read_where_nothing_of_the_package_is_imported_yet(tmp_path):
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(DualCodebookConfig(local_dim=64)))
    code = """
        import pickle, sys
        config = pickle.load(open("config.pkl", "rb"))
        from dualcodebook_hf import DualCodebookConfig
        assert type(config) is DualCodebookConfig and config.local_dim == 64
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
