"""The command line does what the Python interface does, and refuses bad input before it does anything."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_F16 as TINY
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.cli import main
from dualcodebook_hf.cli.evaluate import DEFAULTS
from dualcodebook_hf.cli.inputs import _unique_stems
from dualcodebook_hf.cli.main import build_parser
from dualcodebook_hf.cli.train import _run_forwarding_signals, complete_launch_flags
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.linear_codec import fit_linear_codec
from dualcodebook_hf.flags import Parser, Switch
from dualcodebook_hf.generation.transformer import LARGEST_VOCABULARY
from dualcodebook_hf.hub.space import STATIC_BUILD
from dualcodebook_hf.image_processing_dualcodebook import read_image, to_image, to_pixels
from dualcodebook_hf.metrics.images import psnr, ssim
from dualcodebook_hf.perceptual.vgg import VGG16
from dualcodebook_hf.tokens.file import LARGEST_CODEBOOK, load_tokens, save_tokens
from dualcodebook_hf.training.arguments import TrainArguments


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    DualCodebookVQModel(**TINY).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(checkpoint) -> DualCodebookVQModel:
    return DualCodebookVQModel.from_pretrained(checkpoint).eval()


@pytest.fixture
def images(tmp_path) -> list[str]:
    """A photograph's size, one that is no multiple of 16, a single pixel."""
    paths = [tmp_path / name for name in ("wide.png", "odd.jpg", "dot.png")]
    for path, (width, height) in zip(paths, [(96, 64), (50, 33), (1, 1)], strict=True):
        image(width, height).save(path)
    return [str(path) for path in paths]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def expected(model: DualCodebookVQModel, path: str) -> np.ndarray:
    pixels = to_pixels(read_image(path))
    return np.asarray(to_image(model.detokenize(model.tokenize(pixels[None]), size=tuple(pixels.shape[1:]))[0]))


def refused(capsys, tmp_path: Path, *argv: str) -> str:
    """Runs a command that must fail cleanly; returns its message."""
    before = files(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    *bars, message, end = captured.err.split("\n")
    assert captured.out == end == "" and message.startswith("dualcodebook: error: ")
    assert all("Generating" in bar for bar in bars)  # `datasets` shows its bars on stderr
    assert files(tmp_path) == before
    return message


def test_reconstruct_writes_what_the_model_reconstructs(tmp_path, images, checkpoint, model) -> None:
    output = tmp_path / "new" / "out"
    assert main(["reconstruct", *images, "--model", checkpoint, "--output", str(output)]) == 0
    assert files(output) == {f"{n}-{k}.png" for n in ("wide", "odd", "dot") for k in ("comparison", "reconstruction")}
    for path in images:
        written = Image.open(output / f"{Path(path).stem}-reconstruction.png")
        assert np.array_equal(written, expected(model, path))


def test_the_reconstruction_panel_is_the_decoded_tokens(tmp_path, checkpoint, model) -> None:
    path = tmp_path / "a.png"
    image(300, 200).save(path)
    assert main(["reconstruct", str(path), "--model", checkpoint, "--output", str(tmp_path)]) == 0
    figure, panel = np.asarray(Image.open(tmp_path / "a-comparison.png")), expected(model, str(path))
    for shown in (np.asarray(Image.open(path)), panel):
        tall, wide = figure.shape[0] - 199, figure.shape[1] - 299
        corners = np.argwhere(np.abs(figure[:tall, :wide] - shown[0, 0].astype(int)).max(-1) <= 1)
        windows = [
            (top, left)
            for top, left in corners
            if np.abs(figure[top, left : left + 300] - shown[0].astype(int)).max() <= 1
        ]
        # Inference is optimized: a value between two grey levels may be rounded to the other one.
        differences = [np.abs(figure[top : top + 200, left : left + 300] - shown.astype(int)) for top, left in windows]
        assert min(map(np.max, differences)) <= 1


def test_tokenize_then_detokenize_gives_the_images_of_reconstruct(tmp_path, images, checkpoint) -> None:
    tokens, model = str(tmp_path / "t.safetensors"), ["--model", checkpoint]
    assert main(["reconstruct", *images, *model, "--output", str(tmp_path / "direct")]) == 0
    assert main(["tokenize", *images, *model, "--output", tokens]) == 0
    assert main(["detokenize", tokens, *model, "--output", str(tmp_path / "decoded")]) == 0
    assert files(tmp_path / "decoded") == {"wide.png", "odd.png", "dot.png"}
    for name in ("wide", "odd", "dot"):
        direct = (tmp_path / "direct" / f"{name}-reconstruction.png").read_bytes()
        assert (tmp_path / "decoded" / f"{name}.png").read_bytes() == direct


def test_the_token_file_holds_the_models_tokens(tmp_path, images, checkpoint, model) -> None:
    output = tmp_path / "t.safetensors"
    assert main(["tokenize", *images, "--model", checkpoint, "--output", str(output)]) == 0
    content = load_tokens(output)
    assert content.codebooks == {"global": 32, "local": 40} and content.downsample_factor == 16
    assert [item.name for item in content.images] == ["wide.png", "odd.jpg", "dot.png"]
    assert [item.size for item in content.images] == [(64, 96), (33, 50), (1, 1)]
    for item, path in zip(content.images, images, strict=True):
        assert torch.equal(item.tokens, model.tokenize(to_pixels(read_image(path))[None])[0])


def test_the_table_states_bytes_bits_quality_and_usage(tmp_path, images, checkpoint, model, capsys) -> None:
    assert main(["reconstruct", *images, "--model", checkpoint, "--output", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    bits = math.log2(32) + math.log2(40)
    total = 0
    for row, path in zip(lines[2:5], images, strict=True):
        pixels = to_pixels(read_image(path))[None]
        tokens, (height, width) = model.tokenize(pixels), pixels.shape[2:]
        positions = tokens[0, 0].numel()
        x, y = (model.detokenize(tokens, size=(height, width)) + 1) / 2, (pixels + 1) / 2
        used = [f"{len(ids.unique())}/{size}" for ids, size in zip(tokens[0], (32, 40), strict=True)]
        total += math.ceil(positions * bits / 8)
        assert row[:3] == [Path(path).name, f"{width}x{height}", "x".join(map(str, tokens.shape[1:]))]
        assert row[3:5] == [str(math.ceil(positions * bits / 8)), f"{positions * bits / (height * width):.4f}"]
        assert row[5:] == [f"{psnr(x, y).item():.2f}", f"{ssim(x, y).item():.4f}", *used]
    assert lines[5][:3] == ["all", "3", str(total)]


def test_every_image_is_opened_once(tmp_path, images, checkpoint, monkeypatch) -> None:
    opened, open_image = [], Image.open

    def record(path, *arguments, **options):
        opened.append(str(path))
        return open_image(path, *arguments, **options)

    monkeypatch.setattr(Image, "open", record)
    for command, output in (("reconstruct", "out"), ("tokenize", "t.safetensors")):
        opened.clear()
        assert main([command, *images, "--model", checkpoint, "--output", str(tmp_path / output)]) == 0
        assert opened == images


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path, checkpoint, model) -> None:
    for index, name in enumerate(("a.png", "a.jpg", "sub/A.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image(20, 20, seed=index).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("a.png", "a.jpg", "sub/A.png")]
    output = tmp_path / "out"
    assert main(["reconstruct", *paths, "--model", checkpoint, "--output", str(output)]) == 0
    for path, stem in zip(paths, ("a", "a-2", "A-3"), strict=True):
        assert np.array_equal(Image.open(output / f"{stem}-reconstruction.png"), expected(model, path))


def test_numbered_names_are_unique_whatever_the_names() -> None:
    assert _unique_stems(["a.png", "a-2.png", "a.jpg", "A.gif", "b.tar.gz", ".png"]) == [
        "a",
        "a-2",
        "a-3",
        "A-4",
        "b.tar",
        ".png",
    ]


def test_a_folder_stands_for_the_images_in_it(tmp_path, images, checkpoint) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    output = tmp_path / "t.safetensors"
    assert main(["tokenize", str(tmp_path), "--model", checkpoint, "--output", str(output)]) == 0
    assert [item.name for item in load_tokens(output).images] == ["dot.png", "odd.jpg", "wide.png"]


def token_names(path: Path) -> list[str]:
    return [item.name for item in load_tokens(path).images]


def test_what_is_no_image_is_left_out_of_a_folder_and_counted(
    tmp_path, images, checkpoint, capsys, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("._wide.png", ".hidden.jpg", "a.h5", "a.mpg", "a.eps", "a.grib", "a.wmf", "a.pdf", "a.heic", "a.txt"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "sub").mkdir()
    output = tmp_path / "sub" / "t.safetensors"
    assert main(["tokenize", str(tmp_path), "--model", checkpoint, "--output", str(output)]) == 0
    assert token_names(output) == ["dot.png", "odd.jpg", "wide.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out of '{tmp_path}': ")
    assert set(line.partition("': ")[2].split(", ")) == {
        "hidden: 2",
        "no image format: 7",
        "folders (see --recursive): 1",
        "HEIC (needs the package pillow-heif): 1",
    }


def test_a_folder_without_a_readable_format_says_what_is_missing(tmp_path, checkpoint, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.HEIC").write_bytes(b"no image")
    error = refused(capsys, tmp_path, "tokenize", str(tmp_path / "photos"), "--output", str(tmp_path / "t.safetensors"))
    assert "no image in the folder" in error and "pillow-heif" in error


def test_subfolders_are_read_where_asked_for(tmp_path, checkpoint) -> None:
    for number, name in enumerate(("b.png", "x/a.png", "x/y/a.png", "x/.hidden/c.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        image(20, 20, number).save(tmp_path / "in" / name)
    command = [str(tmp_path / "in"), "--recursive", "--model", checkpoint, "--output"]
    assert main(["tokenize", *command, str(tmp_path / "t.safetensors")]) == 0
    assert token_names(tmp_path / "t.safetensors") == ["b.png", "x-a.png", "x-y-a.png"]
    assert main(["reconstruct", *command, str(tmp_path / "out")]) == 0
    assert {f"{name}-reconstruction.png" for name in ("b", "x-a", "x-y-a")} < files(tmp_path / "out")


def test_images_of_one_size_are_done_together_and_give_the_same(tmp_path, checkpoint) -> None:
    sizes = [(48, 32)] * 3 + [(32, 48), (48, 32)]
    paths = [str(tmp_path / f"{number}.png") for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        image(*size, number).save(path)
    for batch in ("1", "3"):
        options = ["--model", checkpoint, "--batch-size", batch, "--output"]
        assert main(["tokenize", *paths, *options, str(tmp_path / f"{batch}.safetensors")]) == 0
        assert main(["reconstruct", *paths, *options, str(tmp_path / batch)]) == 0
    expected = load_tokens(tmp_path / "1.safetensors")
    found = load_tokens(tmp_path / "3.safetensors")
    assert [item.name for item in found.images] == [item.name for item in expected.images]
    for item, other in zip(found.images, expected.images, strict=True):
        assert torch.equal(item.tokens, other.tokens)
    for number in range(len(sizes)):
        written = [tmp_path / folder / f"{number}-reconstruction.png" for folder in ("1", "3")]
        pair = [np.asarray(Image.open(path), np.int16) for path in written]
        assert np.abs(pair[0] - pair[1]).max() <= 1


def test_tokens_of_one_grid_are_decoded_together_and_give_the_same(tmp_path, checkpoint) -> None:
    sizes = [(48, 32), (47, 31), (40, 30), (32, 48), (33, 20)]
    paths = [str(tmp_path / f"{number}.png") for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        image(*size, number).save(path)
    tokens, options = str(tmp_path / "t.safetensors"), ["--model", checkpoint]
    assert main(["tokenize", *paths, *options, "--output", tokens]) == 0
    for batch in ("1", "8"):
        assert main(["detokenize", tokens, *options, "--batch-size", batch, "--output", str(tmp_path / batch)]) == 0
    for path, size in zip(paths, sizes, strict=True):
        pair = [Image.open(tmp_path / batch / Path(path).name) for batch in ("1", "8")]
        assert pair[0].size == pair[1].size == size
        assert np.abs(np.subtract(*(np.asarray(each, np.int16) for each in pair))).max() <= 1


def test_tokens_have_a_file_by_default(tmp_path, images, checkpoint, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tokenize", images[0], "--model", checkpoint]) == 0
    assert token_names(tmp_path / "tokens.safetensors") == ["wide.png"]


def test_bad_images_are_left_out_named_and_counted_where_asked_for(tmp_path, images, checkpoint, capsys) -> None:
    broken = [str(tmp_path / name) for name in ("broken.jpg", "empty.png")]
    Path(broken[0]).write_bytes(Path(images[1]).read_bytes()[:300])
    Path(broken[1]).touch()
    paths, skip = [broken[0], images[0], broken[1], *images[1:]], ["--on-bad-image", "skip"]
    sheet = tmp_path / "sheet.png"
    for command, output, options in (
        ("tokenize", tmp_path / "t.safetensors", []),
        ("reconstruct", tmp_path / "out", ["--sheet", str(sheet)]),
    ):
        assert main([command, *paths, "--model", checkpoint, "--output", str(output), *options, *skip]) == 0
        *named, count = capsys.readouterr().err.splitlines()
        assert [path in line for path, line in zip(broken, named, strict=True)] == [True, True]
        assert count == "2 of 5 images were left out"
    assert token_names(tmp_path / "t.safetensors") == ["wide.png", "odd.jpg", "dot.png"]
    direct = tmp_path / "direct"
    assert main(["reconstruct", *images, "--model", checkpoint, "--output", str(direct)]) == 0
    assert files(direct) == files(tmp_path / "out")
    for name in files(direct):
        assert (direct / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert Image.open(sheet).height == sum(Image.open(path).height for path in direct.glob("*-comparison.png"))


def test_where_no_image_can_be_read_skipping_is_an_error_too(tmp_path, checkpoint, capsys) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    command = [str(tmp_path / "broken.jpg"), "--model", checkpoint, "--on-bad-image", "skip", "--output"]
    assert main(["tokenize", *command, str(tmp_path / "t.safetensors")]) == 2
    assert "error: cannot read image" in capsys.readouterr().err
    assert files(tmp_path) == {"broken.jpg"}


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path, images, checkpoint, monkeypatch, encoding) -> None:
    names = ["\u732b.png", os.fsdecode(b"\xe9.png")]
    for name in names:
        (tmp_path / name).write_bytes(Path(images[0]).read_bytes())
    (tmp_path / names[1]).write_bytes(b"no image")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    paths = [str(tmp_path / name) for name in names]
    command = ["tokenize", *paths, "--model", checkpoint, "--output", str(tmp_path / "t.safetensors")]
    assert main([*command, "--on-bad-image", "skip"]) == 0
    for stream in streams.values():
        stream.flush()
    out, err = (stream.buffer.getvalue() for stream in streams.values())
    assert ("\u732b.png".encode() if encoding == "utf-8" else rb"\u732b.png") in out
    assert rb"\udce9.png" in err


def test_large_images_are_shrunk_as_asked_and_the_table_says_so(tmp_path, checkpoint, capsys) -> None:
    image(120, 90).save(tmp_path / "a.png")
    command = ["tokenize", str(tmp_path / "a.png"), "--model", checkpoint, "--output", str(tmp_path / "t.safetensors")]
    for limit, size in (("2700", (45, 60)), ("0", (90, 120)), ("1000000", (90, 120))):
        assert main([*command, "--max-pixels", limit]) == 0
        assert load_tokens(tmp_path / "t.safetensors").images[0].size == size
        assert ("60x45 (of 120x90)" in capsys.readouterr().out) == (limit == "2700")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_tokenizes_and_decodes(tmp_path, images, checkpoint, dtype: str) -> None:
    tokens, options = str(tmp_path / "t.safetensors"), ["--model", checkpoint, "--dtype", dtype]
    assert main(["tokenize", *images, *options, "--output", tokens]) == 0
    assert main(["detokenize", tokens, *options, "--output", str(tmp_path / "out")]) == 0
    assert main(["reconstruct", *images, *options, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/odd.png").read_bytes() == (tmp_path / "out/odd-reconstruction.png").read_bytes()


def test_a_single_codebook_model_works_too(tmp_path, images) -> None:
    single = {**TINY, "quantizer": "single", "global_codebook_size": 0, "global_dim": 0, "global_transformer_layers": 0}
    DualCodebookVQModel(**single).save_pretrained(tmp_path / "single")
    options = ["--model", str(tmp_path / "single"), "--output", str(tmp_path / "out")]
    assert main(["reconstruct", *images, *options, "--sheet", str(tmp_path / "sheet.png")]) == 0
    figures = [Image.open(tmp_path / "out" / f"{name}-comparison.png") for name in ("wide", "odd", "dot")]
    assert Image.open(tmp_path / "sheet.png").size == (max(f.width for f in figures), sum(f.height for f in figures))


def test_results_of_an_earlier_run_are_replaced_and_other_files_are_not(tmp_path, images, checkpoint, capsys) -> None:
    tokens, model = str(tmp_path / "t.safetensors"), ["--model", checkpoint]
    for _ in range(2):
        assert main(["tokenize", *images, *model, "--output", tokens]) == 0
        assert main(["detokenize", tokens, *model, "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert "wide.png" in refused(capsys, tmp_path, "detokenize", tokens, *model, "--output", str(tmp_path))
    weights = str(Path(checkpoint) / "diffusion_pytorch_model.safetensors")
    assert "not written by" in refused(capsys, tmp_path, "tokenize", images[0], *model, "--output", weights)
    sheet = [*model, "--output", str(tmp_path / "new"), "--sheet", images[0]]
    assert "wide.png" in refused(capsys, tmp_path, "reconstruct", images[1], *sheet)


def test_one_unreadable_image_among_several_is_named_and_nothing_is_written(
    tmp_path, images, checkpoint, capsys
) -> None:
    (tmp_path / "broken.jpg").write_bytes(Path(images[1]).read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    for bad in ("broken.jpg", "missing.png", "empty"):
        arguments = [*images, str(tmp_path / bad), "--model", checkpoint, "--output"]
        sheet = ["--sheet", str(tmp_path / "new" / "sheet.png")]
        assert bad in refused(capsys, tmp_path, "reconstruct", *arguments, str(tmp_path / "new" / "out"), *sheet)
        assert bad in refused(capsys, tmp_path, "tokenize", *arguments, str(tmp_path / "new" / "t.safetensors"))
        # Into a folder that is already there: what it holds stays as it was.
        assert bad in refused(capsys, tmp_path, "reconstruct", *arguments, str(tmp_path))


def test_missing_files_and_empty_folders_are_known_before_the_model_is_loaded(tmp_path, images, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("no model")
    for bad in ("missing.png", "empty"):
        arguments = [images[0], str(tmp_path / bad), "--model", str(tmp_path / "model"), "--output"]
        assert bad in refused(capsys, tmp_path, "reconstruct", *arguments, str(tmp_path / "out"))
        assert bad in refused(capsys, tmp_path, "tokenize", *arguments, str(tmp_path / "t.safetensors"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "no/such/folder"], "`--model`.*no/such/folder"),
        (["--model", "nothing"], "`--model`.*'nothing'"),
        (["--model", "."], "`--model`.*config.json"),
        (["--device", "cuda:99"], "`--device` cuda:99"),
        (["--device", "abacus"], "`--device` abacus"),
        (["--dtype", "float"], "`--dtype` must be one of auto, float32, .*, got 'float'; did you mean float"),
        (["--max-pixels", "-1"], "`--max-pixels`.*-1"),
        (["--output", "a-file/out"], "`--output`.*a-file"),
        (["--sheet", "sheet.jpg"], r"`--sheet`.*\.png"),
        (["--colour", "red"], "unknown argument `--colour`"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(
    tmp_path, images, checkpoint, capsys, monkeypatch, flags: list[str], message: str
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    error = refused(capsys, tmp_path, "reconstruct", images[0], "--model", checkpoint, *flags)
    assert re.search(message, error)


def given(action: argparse.Action) -> list[str]:
    """Words that an option or a positional argument accepts as its values."""
    if action.nargs == 0 or isinstance(action, Switch):
        return []
    return [str(action.choices[0]) if action.choices else "3"]


FLAGS = [
    (name, flag)
    for name, parser in build_parser().commands().items()
    for action in parser._actions
    for flag in action.option_strings
    if flag.startswith("--") and flag != "--help"
]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_every_flag_is_taken_with_hyphens_and_with_underscores(name: str, flag: str) -> None:
    """Over all flags of all commands, as the parsers list them."""
    parser = build_parser([name]).commands()[name]
    action = parser._option_string_actions[flag]
    needed = [other for other in parser._actions if other.required and other is not action]
    words = [word for other in needed for word in [*other.option_strings[:1], *given(other)]]
    values = given(action)
    underscored = "--" + flag.removeprefix("--").replace("-", "_")
    spellings = [[flag, *values], [underscored, *values]]
    if values:
        spellings += [[f"{flag}={values[0]}"], [f"{underscored}={values[0]}"]]
    expected, *others = (vars(build_parser([name]).parse_args([name, *words, *spelling])) for spelling in spellings)
    assert all(other == expected for other in others)


def test_the_flags_of_all_commands_were_found() -> None:
    assert {("reconstruct", "--max-pixels"), ("evaluate", "--no-rfid"), ("push", "--repo-id")} <= set(FLAGS)
    assert {name for name, _ in FLAGS} == set(build_parser().commands())


def test_values_and_files_keep_their_underscores() -> None:
    command = ["reconstruct", "--output=c_d", "--model", "me/e_f", "--", "a_b.png", "--g_h.png"]
    arguments = build_parser().parse_args(command)
    assert [str(path) for path in arguments.images] == ["a_b.png", "--g_h.png"]
    assert (str(arguments.output), arguments.model) == ("c_d", "me/e_f")


def test_tokens_of_another_model_and_broken_files_are_refused(tmp_path, images, checkpoint, capsys) -> None:
    tokens = tmp_path / "t.safetensors"
    assert main(["tokenize", *images, "--model", checkpoint, "--output", str(tokens)]) == 0
    capsys.readouterr()
    DualCodebookVQModel(**{**TINY, "local_codebook_size": 41}).save_pretrained(tmp_path / "other")
    output = ["--output", str(tmp_path / "out")]
    error = refused(capsys, tmp_path, "detokenize", str(tokens), "--model", str(tmp_path / "other"), *output)
    assert "--model" in error and "'local': 40" in error
    tokens.write_bytes(tokens.read_bytes()[:-9])
    assert "t.safetensors" in refused(capsys, tmp_path, "detokenize", str(tokens), "--model", checkpoint, *output)
    (tmp_path / "other/diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    options = ["--model", str(tmp_path / "other"), *output]
    assert "cannot load the model" in refused(capsys, tmp_path, "reconstruct", images[0], *options)


def test_names_that_no_file_can_have_are_refused_and_named(tmp_path, images, checkpoint, capsys) -> None:
    tokens, output = tmp_path / "tokens.safetensors", str(tmp_path / "out")
    assert main(["tokenize", images[0], "--model", checkpoint, "--output", str(tokens)]) == 0
    capsys.readouterr()
    content = load_tokens(tokens)
    for name in ("a" * 252, "\u00e9" * 126):  # with ".png" they are too long
        save_tokens(tokens, dataclasses.replace(content, images=[dataclasses.replace(content.images[0], name=name)]))
        message = refused(capsys, tmp_path, "detokenize", str(tokens), "--model", checkpoint, "--output", output)
        assert name in message and "too long" in message
    original = tmp_path / ("b" * 250 + ".png")
    Image.new("RGB", (8, 8)).save(original)
    options = ["--model", checkpoint, "--output"]
    assert original.stem in refused(capsys, tmp_path, "reconstruct", str(original), *options, output)
    too_long = str(tmp_path / ("c" * 250 + ".safetensors"))
    assert "too long" in refused(capsys, tmp_path, "tokenize", images[0], *options, too_long)
    fitting = tmp_path / ("c" * 243 + ".safetensors")
    assert main(["tokenize", str(original), *options, str(fitting)]) == 0
    assert main(["detokenize", str(fitting), *options, output]) == 0
    assert files(Path(output)) == {original.name}


def test_more_images_than_a_file_holds_are_refused_before_the_model_is_loaded(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dualcodebook_hf.tokens.file.LARGEST_HEADER", 1000)
    for index in range(9):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    output = tmp_path / "tokens.safetensors"
    message = refused(
        capsys, tmp_path / "out", "tokenize", str(tmp_path), "--model", "nobody/tok", "--output", str(output)
    )
    assert "can hold about" in message and "got 9: write several files" in message


def test_evaluate_measures_models_and_the_patch_linear_codec_side_by_side(tmp_path, checkpoint, capsys) -> None:
    pytest.importorskip("datasets")
    for split, count in (("train", 4), ("test", 3)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(count):
            image(64, 80, seed=index).save(tmp_path / "data" / split / f"{index}.png")
    output = tmp_path / "new" / "result.json"
    data = ["--dataset", str(tmp_path / "data"), "--size", "64", "--patch-linear"]
    command = ["evaluate", "--model", checkpoint, "--model", checkpoint, *data, "--output", str(output)]
    assert main(command) == 0
    table = capsys.readouterr().out
    results = json.loads(output.read_text())["results"]
    assert [result["protocol"]["pictures"] for result in results] == [3, 3, 3]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert len({result["metrics"]["bits_per_pixel"] for result in results}) == 1
    for result in results:
        assert result["model"]["name"] in table and f"{result['metrics']['psnr']:.2f}" in table
    assert str(tmp_path) not in output.read_text()
    saved = tmp_path / "pictures"
    assert main([*command, "--limit", "2", "--save-pictures", str(saved)]) == 0
    assert json.loads(output.read_text())["results"][0]["protocol"]["pictures"] == 2
    folders = sorted(folder.name for folder in saved.iterdir())
    model = "-".join(Path(checkpoint).resolve().parts[-2:])
    assert folders == [f"0-{model}", f"1-{model}", "2-patch-linear"]
    for folder in folders:
        for kind in ("original", "reconstruction"):
            assert [path.name for path in sorted((saved / folder / kind).iterdir())] == ["00000.png", "00001.png"]


def test_evaluate_lists_the_images_that_it_left_out(tmp_path, checkpoint, capsys) -> None:
    pytest.importorskip("datasets")
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(3):
            image(64, 80, seed=index).save(tmp_path / "data" / split / f"{index}.png")
        (tmp_path / "data" / split / "1b.png").write_bytes(b"no image")
    command = ["evaluate", "--model", checkpoint, "--dataset", str(tmp_path / "data"), "--size", "64", "--patch-linear"]
    message = refused(capsys, tmp_path, *command)
    assert "1b.png" in message
    output = ["--output", str(tmp_path / "result.json"), "--fit-pictures", "3"]
    assert main([*command, *output, "--on-bad-image", "skip"]) == 0
    named, count = capsys.readouterr().err.splitlines()[-2:]
    assert named.startswith("left out: cannot read row 2 of ") and "1b.png': not in an image" in named
    assert count == "1 of 4 images were left out"
    for result in json.loads((tmp_path / "result.json").read_text())["results"]:
        assert result["protocol"]["pictures"] == 3
        assert [item["file"] for item in result["protocol"]["skipped"]] == ["1b.png"]


def test_defaults_that_stand_in_two_places_are_equal() -> None:
    commands = build_parser(["evaluate", "evaluate-generator", "push"]).commands()
    evaluate, generator = (commands[name].parse_args([]) for name in ("evaluate", "evaluate-generator"))
    fields = {spec.name: spec.default for spec in dataclasses.fields(EvaluationData)}
    assert DEFAULTS.items() <= fields.items()
    for name in ("split", "image_column", "size", "resample"):
        assert getattr(generator, name) == fields[name]
    assert evaluate.fit_pictures == inspect.signature(fit_linear_codec).parameters["count"].default
    assert next(action.const for action in commands["push"]._actions if action.dest == "static") == STATIC_BUILD
    assert TrainArguments().vgg_weights == VGG16
    assert LARGEST_VOCABULARY == LARGEST_CODEBOOK


def test_evaluate_refuses_bad_input_before_any_work(tmp_path, checkpoint, capsys) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "data" / "test").mkdir(parents=True)
    image(64, 80).save(tmp_path / "data" / "test" / "a.png")
    (tmp_path / "mine.json").write_text("{}")
    command = ["evaluate", "--model", checkpoint, "--dataset", str(tmp_path / "data")]
    assert "nowhere" in refused(capsys, tmp_path, *command[:3], "--dataset", "./nowhere")
    assert "validation" in refused(capsys, tmp_path, *command, "--split", "validation")
    assert "train" in refused(capsys, tmp_path, *command, "--patch-linear")
    assert "mine.json" in refused(capsys, tmp_path, *command, "--output", str(tmp_path / "mine.json"))
    assert "--limit" in refused(capsys, tmp_path, *command, "--limit", "0")
    assert "--save-pictures" in refused(capsys, tmp_path, *command, "--save-pictures", str(tmp_path / "data"))
    assert "'none'" in refused(capsys, tmp_path, *command, "--model", "none")
    assert "required: --dataset" in refused(capsys, tmp_path, "evaluate")
    assert "`--fit-split` is of the codec: give --patch-linear" in refused(
        capsys, tmp_path, *command, "--fit-split", "x"
    )
    fit = ["--patch-linear", "--fit-split", "test", "--fit-pictures", "1", "--size", "4"]
    assert "`--fit-pictures` 1 of" in refused(
        capsys, tmp_path, *command, *fit, "--save-pictures", str(tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()
    assert "unknown argument `--patch`; did you mean" in refused(capsys, tmp_path, *command, "--patch")


def test_messages_name_the_flags_of_the_command_and_not_the_arguments_behind_them(tmp_path, checkpoint, capsys) -> None:
    (tmp_path / "data" / "test").mkdir(parents=True)
    image(64, 80).save(tmp_path / "data" / "test" / "a.png")
    for command, named in (
        (["evaluate", "--model", checkpoint, "--dataset", str(tmp_path / "data"), "--split", "none"], "`--split` must"),
        (["reconstruct", str(tmp_path / "data" / "test"), "--device", "nowhere"], "`--device` nowhere cannot be used"),
        (["push", checkpoint, "--repo-id", "a"], "`--repo-id` must be owner/name"),
        (["card", str(tmp_path / "nowhere")], "`RUN` must be the folder"),
        (["card", checkpoint, "--metrics", str(tmp_path / "none.json")], "`--metrics` must be a file"),
        (
            ["convert", str(tmp_path / "none.ckpt"), "--output", str(tmp_path / "o"), "--kind", "x"],
            "`--kind` must be one",
        ),
    ):
        assert named in refused(capsys, tmp_path, *command)


def test_train_checks_its_arguments_before_it_launches_anything(tmp_path, capsys) -> None:
    pytest.importorskip("accelerate")
    assert "did you mean `--learning-rate`" in refused(
        capsys, tmp_path, "train", "--dataset", "d", "--learning_rat", "1"
    )
    assert "`dataset`" in refused(capsys, tmp_path, "train", "--config", "tiny")
    assert "./nowhere" in refused(capsys, tmp_path, "train", "--config", "tiny", "--dataset", "./nowhere")


# A launcher as accelerate's: it starts a rank, waits, returns 0 or 1, and would die of a signal itself.
LAUNCHER = "import subprocess, sys; sys.exit(bool(subprocess.call([sys.executable, '-c', sys.argv[1], sys.argv[2]])))"
RANK = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, _):
    time.sleep(0.3)
    (folder / "saved").write_text(str(number))
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, save)
(folder / "ready").touch()
time.sleep(60)
"""


def signal_when(ready: Path, *numbers: int) -> None:
    """Signals this process from another thread as soon as the file is there."""

    def run() -> None:
        while not ready.exists():
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    threading.Thread(target=run, daemon=True).start()


@pytest.mark.parametrize("sent, arrives", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM")])
def test_signals_reach_the_training_process_which_is_waited_for(tmp_path, sent: str, arrives: str) -> None:
    pytest.importorskip("psutil")
    before = signal.getsignal(signal.SIGTERM)
    signal_when(tmp_path / "ready", getattr(signal, sent))
    assert _run_forwarding_signals([sys.executable, "-c", LAUNCHER, RANK, str(tmp_path)]) == 0
    assert (tmp_path / "saved").read_text() == str(int(getattr(signal, arrives)))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_kills_what_does_not_end(tmp_path) -> None:
    pytest.importorskip("psutil")
    stubborn = RANK.replace("sys.exit(0)", "time.sleep(60)")
    signal_when(tmp_path / "ready", signal.SIGINT, signal.SIGINT)
    assert _run_forwarding_signals([sys.executable, "-c", LAUNCHER, stubborn, str(tmp_path)]) == 128 + signal.SIGINT


def test_the_launchers_exit_code_is_returned() -> None:
    assert _run_forwarding_signals([sys.executable, "-c", "raise SystemExit(7)"]) == 7


@pytest.fixture
def launcher(monkeypatch):
    """accelerate's launcher on a CPU, and what it says about flags."""
    commands = pytest.importorskip("accelerate.commands.launch")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said = []
    monkeypatch.setattr(commands.logger, "warning", said.append)

    def validate(flags):
        args = commands.launch_command_parser().parse_args([*flags, "trainer.py"])
        return commands._validate_launch_command(args)[0], said

    return validate


@pytest.mark.parametrize("flags", [[], ["--cpu"], ["--mixed_precision", "bf16"]])
def test_accelerates_launcher_has_nothing_to_announce(launcher, flags) -> None:
    args, said = launcher(complete_launch_flags(flags))
    assert said == []
    assert (args.num_processes, args.num_machines, args.multi_gpu) == (1, 1, False)
    assert args.mixed_precision == (flags[1] if len(flags) > 1 else "no")


def test_a_cpu_trains_with_all_its_threads_unless_told_otherwise(launcher, monkeypatch) -> None:
    def threads(flags):
        return launcher(complete_launch_flags(flags))[0].num_cpu_threads_per_process

    assert threads([]) == torch.get_num_threads()
    assert threads(["--num_cpu_threads_per_process", "4"]) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads([]) == 3


def test_what_the_launcher_would_not_do_is_refused(launcher, tmp_path) -> None:
    """Of two processes on a CPU it starts one, whether a flag or its own file asks for them."""
    (tmp_path / "accelerate.yaml").write_text(
        "{compute_environment: LOCAL_MACHINE, distributed_type: 'NO', num_processes: 2, mixed_precision: 'no'}"
    )
    for flags in (["--cpu", "--num_processes", "2"], ["--config_file", str(tmp_path / "accelerate.yaml")]):
        with pytest.raises(ValueError, match=r"`--num_processes 2`: on a CPU .* starts one process.*torchrun"):
            complete_launch_flags(flags)
    with pytest.raises(ValueError, match=r"--mixed_precision.*flags of `accelerate launch`"):
        complete_launch_flags(["--mixed_precision", "half"])


def test_a_tilde_after_an_equals_sign_is_the_home_folder(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = Parser()
    parser.add_argument("--output-file")
    assert parser.parse_args(["--output_file=~/a_b.png"]).output_file == "/home/somebody/a_b.png"
