"""Exported graphs give the model's tokens and pixels at sizes and batches that no exporter saw, without torch."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, spread_codes
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.cli import main
from dualcodebook_hf.hub import prepare_folder
from dualcodebook_hf.onnx_export import EncoderGraph, check_exportable, export_onnx, export_programs
from dualcodebook_hf.onnx_runtime import OnnxTokenizer, from_image, to_image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SHAPES = [(1, 1, 1), (2, 1, 9), (4, 7, 64), (1, 65, 34), (3, 16, 16)]


@pytest.fixture(scope="module")
def model() -> DualCodebookVQModel:
    """f is 2; a network with normalization over space is exported by `test_the_programs`."""
    torch.manual_seed(0)
    options = {**TINY, "backbone": "dcae", "layers_per_level": [0, 1]}
    shortcut = {"linear_shortcut": True, "overlapping_shortcut": True, "decoder_layers_per_level": [1, 1]}
    return spread_codes(DualCodebookVQModel(**options, **shortcut)).eval()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> tuple[Path, str]:
    """What the command wrote, and what it said."""
    folder = tmp_path_factory.mktemp("onnx")
    model.save_pretrained(folder / "model")
    command = ["export", str(folder / "model"), "--int8", "--no-programs", "--output", str(folder / "out")]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(command) == 0
    return folder / "out", said.getvalue()


def random_pixels(shape: tuple[int, int, int]) -> np.ndarray:
    values = np.random.default_rng(sum(shape)).uniform(-1, 1, (shape[0], 3, *shape[1:]))
    return values.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_and_pixels_are_the_models(model, exported, shape) -> None:
    tokenizer, pixels = OnnxTokenizer.from_pretrained(exported[0]), random_pixels(shape)
    expected = model.tokenize(torch.from_numpy(pixels))
    tokens = tokenizer.tokenize(pixels)
    assert tokens.dtype == np.int64 and np.array_equal(tokens, expected.numpy())
    for options in ({}, {"size": shape[1:]}, {"only": "global"}, {"only": "local", "size": shape[1:]}):
        decoded = model.detokenize(expected, **options).numpy()
        np.testing.assert_allclose(tokenizer.detokenize(tokens, **options), decoded, atol=1e-4)


def test_the_tokenizer_says_what_the_model_says(model, exported) -> None:
    tokenizer = OnnxTokenizer(exported[0])
    assert tokenizer.codebook_sizes == model.codebook_sizes
    assert tokenizer.downsample_factor == model.downsample_factor
    assert tokenizer.bits_per_position == model.bits_per_position


def test_the_command_prints_what_it_measured(exported) -> None:
    lines = [line for line in exported[1].splitlines() if line.startswith("onnxruntime")]
    assert [line.split()[1] for line in lines] == ["fp32", "fp16", "int8"]
    assert all("tokens equal:" in line and "pixels within" in line and "dB" in line for line in lines)
    equal, total = lines[0].split("tokens equal: ")[1].split()[0:3:2]
    assert equal == total


def test_the_graphs_are_portable(exported) -> None:
    """What WebGPU lacks is not in them, the search for codes stays float32, and nothing tells of this machine."""
    folder = exported[0] / "onnx"
    for path in folder.glob("*.onnx"):
        graph = onnx.load(path).graph
        assert not {node.op_type for node in graph.node} & {"Split", "SplitToSequence", "SequenceAt", "Loop", "If"}
        assert all(node.domain in ("", "ai.onnx", "com.microsoft") for node in graph.node)
        for place in (Path(__file__).parents[1], Path(torch.__file__).parent):
            assert str(place).encode() not in path.read_bytes()
    sizes = {path.stem: path.stat().st_size for path in folder.glob("*.onnx")}
    assert sizes["encoder_model_fp16"] < 0.75 * sizes["encoder_model"]
    types = {}
    for tensor in onnx.load(folder / "encoder_model_fp16.onnx").graph.initializer:
        types.setdefault(tuple(tensor.dims), set()).add(tensor.data_type)
    assert types[(8, 32)] == types[(4, 16)] == {onnx.TensorProto.FLOAT}  # the codes
    assert onnx.TensorProto.FLOAT16 in set().union(*types.values())


@pytest.mark.parametrize("variant", ["fp16", "int8"])
def test_smaller_variants_run_at_any_size(model, exported, variant) -> None:
    tokenizer = OnnxTokenizer.from_pretrained(exported[0], variant=variant)
    pixels = random_pixels((2, 13, 30))
    tokens = tokenizer.tokenize(pixels)
    equal = (tokens == model.tokenize(torch.from_numpy(pixels)).numpy()).mean()
    assert equal > (0.9 if variant == "fp16" else 0.3)
    decoded = model.detokenize(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(tokenizer.detokenize(tokens), decoded, atol=0.02 if variant == "fp16" else 0.5)


def test_a_search_over_more_codes_than_one_tile(images) -> None:
    torch.manual_seed(0)
    model = spread_codes(DualCodebookVQModel(**{**TINY, "local_codebook_size": 20_000})).eval()
    with torch.no_grad():
        assert EncoderGraph(model)(images).equal(model.tokenize(images))


@pytest.mark.slow
@pytest.mark.parametrize("attention", [False, True])
def test_the_programs(tmp_path, attention) -> None:
    torch.manual_seed(0)
    tiny_model = spread_codes(DualCodebookVQModel(**{**TINY, "attention": attention})).eval()
    assert export_programs(tiny_model, tmp_path).passes()
    encode, decode = (
        torch.export.load(tmp_path / f"torch_export/{name}.pt2").module() for name in ("encoder", "decoder")
    )
    pixels = torch.from_numpy(random_pixels((3, 20, 37)))
    tokens = encode(pixels)
    assert tokens.equal(tiny_model.tokenize(pixels))
    torch.testing.assert_close(decode(tokens), tiny_model.detokenize(tokens), atol=1e-4, rtol=0)


def test_graphs_of_the_papers_blocks(tmp_path) -> None:
    """VQGAN's, whose normalization and attention see the whole image."""
    torch.manual_seed(0)
    model = spread_codes(DualCodebookVQModel(**{**TINY, "attention": True})).eval()
    before = model.detokenize(model.tokenize(torch.from_numpy(random_pixels((1, 24, 20)))))
    (check,) = export_onnx(model, tmp_path, [""])
    assert check.passes()
    tokenizer, pixels = OnnxTokenizer(tmp_path), random_pixels((3, 20, 37))
    tokens = model.tokenize(torch.from_numpy(pixels))
    assert np.array_equal(tokenizer.tokenize(pixels), tokens.numpy())
    np.testing.assert_allclose(tokenizer.detokenize(tokens.numpy()), model.detokenize(tokens).numpy(), atol=1e-4)
    after = model.detokenize(model.tokenize(torch.from_numpy(random_pixels((1, 24, 20)))))
    assert torch.equal(before, after)  # the model that was exported stays as it was


WITHOUT_TORCH = """
import sys
from dualcodebook_hf.onnx_runtime import OnnxTokenizer, from_image, read_image, to_image
tokenizer = OnnxTokenizer.from_pretrained(sys.argv[1])
pixels = from_image(read_image(sys.argv[2]))
to_image(tokenizer.detokenize(tokenizer.tokenize(pixels), size=pixels.shape[-2:])).save(sys.argv[3])
assert not {"torch", "transformers", "diffusers"} & set(sys.modules), "torch was imported"
"""


def test_it_runs_without_torch(model, exported, tmp_path) -> None:
    Image.effect_mandelbrot((41, 30), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "a.png")
    command = [sys.executable, "-c", WITHOUT_TORCH, exported[0], tmp_path / "a.png", tmp_path / "b.png"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pixels = torch.from_numpy(from_image(Image.open(tmp_path / "a.png")))
    expected = to_image(model.detokenize(model.tokenize(pixels), size=(30, 41)).numpy())
    assert np.abs(np.subtract(Image.open(tmp_path / "b.png"), expected, dtype=np.int16)).max() <= 1


@pytest.mark.parametrize(
    ("method", "value", "options", "message"),
    [
        ("tokenize", np.zeros((1, 3, 4, 4), np.uint8), {}, "`pixel_values` must be a floating point"),
        ("tokenize", np.zeros((3, 4, 4), np.float32), {}, r"`pixel_values` must be of shape \(B, 3, H, W\)"),
        ("tokenize", np.full((1, 3, 4, 4), 2, np.float32), {}, r"`pixel_values` must lie in \[-1, 1\]"),
        ("tokenize", np.full((1, 3, 4, 4), np.nan, np.float32), {}, r"`pixel_values` must lie in \[-1, 1\]"),
        ("detokenize", np.zeros((1, 2, 1, 1), np.float32), {}, "`tokens` must be integers"),
        ("detokenize", np.zeros((1, 1, 1, 1), np.int64), {}, r"`tokens` must be of shape \(B, 2, h, w\)"),
        ("detokenize", np.full((1, 2, 1, 1), 16), {}, r"local codebook must lie in \[0, 16\), got \[16, 16\]"),
        ("detokenize", np.zeros((1, 2, 1, 1), np.int64), {"size": (5, 4)}, "`size`"),
        ("detokenize", np.zeros((1, 2, 1, 1), np.int64), {"only": "x"}, "`only` must be one of global, local"),
    ],
)
def test_bad_input_is_refused_as_the_model_refuses_it(exported, method, value, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(OnnxTokenizer.from_pretrained(exported[0]), method)(value, **options)


def test_what_is_missing_is_named(exported, tmp_path) -> None:
    with pytest.raises(ValueError, match="does not describe an exported tokenizer"):
        OnnxTokenizer.from_pretrained(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "tokenizer.json").write_bytes((exported[0] / "onnx" / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"there is no encoder_model_int8\.onnx"):
        OnnxTokenizer.from_pretrained(tmp_path, variant="int8")
    with pytest.raises(ValueError, match="`variant` must be None or one of fp16, int8, got 'half'"):
        OnnxTokenizer.from_pretrained(exported[0], variant="half")


@pytest.mark.slow
def test_the_graphs_are_published_with_the_model_on_demand(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "run")
    names = prepare_folder(tmp_path / "run", tmp_path / "plain", "me/tok")
    assert "onnx" not in names and "onnx" not in (tmp_path / "plain" / "README.md").read_text()
    assert "onnx" in prepare_folder(tmp_path / "run", tmp_path / "with", "me/tok", onnx=True)
    card = (tmp_path / "with" / "README.md").read_text()
    assert 'OnnxTokenizer.from_pretrained("me/tok")' in card and "\n- onnx\n" in card
    pixels = random_pixels((1, 9, 9))
    tokens = OnnxTokenizer.from_pretrained(tmp_path / "with").tokenize(pixels)
    assert np.array_equal(tokens, model.tokenize(torch.from_numpy(pixels)).numpy())
    assert (tmp_path / "with" / "onnx" / "encoder_model_fp16.onnx").is_file()


def test_other_quantizers_are_refused_before_any_work(capsys, tmp_path) -> None:
    pytest.importorskip("vector_quantize_pytorch")
    model = DualCodebookVQModel(
        **{
            **TINY,
            "quantizer": "fsq",
            "fsq_levels": [4, 4, 4, 4, 4, 4],
            "global_dim": 3,
            "local_dim": 3,
            "global_codebook_size": 64,
            "local_codebook_size": 64,
            "global_transformer_layers": 0,
        }
    )
    with pytest.raises(ValueError, match="`model` must have the quantizer dual or single to be exported, got fsq"):
        check_exportable(model)
    model.save_pretrained(tmp_path / "fsq")
    assert main(["export", str(tmp_path / "fsq"), "--output", str(tmp_path / "out")]) == 2
    assert "got fsq" in capsys.readouterr().err and not (tmp_path / "out").exists()
