"""`evaluate.load("metrics/...")`: the folders give our own numbers, by every way of adding, without a network."""

import re
import socket
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dualcodebook_hf.metrics import images as metrics
from dualcodebook_hf.metrics.tokens import TokenStatistics

evaluate = pytest.importorskip("evaluate")

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.name for path in (ROOT / "metrics").iterdir())


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """No network, and nothing written outside the tests' folder."""

    def refuse(*_):
        raise AssertionError("a metric asked for the network")

    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("evaluate")
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", cache / "metrics")
        patch.setattr(socket.socket, "connect", refuse)
        patch.chdir(ROOT)
        yield


def load(name, **options):
    return evaluate.load(f"metrics/{name}", **{"keep_in_memory": True, **options})


def floats(count=5, side=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    originals = torch.rand(count, 3, side, side, generator=generator)
    return originals + 0.1 * torch.randn(originals.shape, generator=generator), originals


def bytes_of(images):
    """(B, 3, H, W) in [0, 1] -> uint8 (B, H, W, 3)."""
    return (images.clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()


def moments(images):
    return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)


def test_psnr_of_floats_is_ours_and_is_not_rounded_to_8_bits():
    reconstructions, originals = floats()
    expected = metrics.psnr(reconstructions, originals).mean().item()
    assert load("psnr").compute(predictions=reconstructions, references=originals)["psnr"] == pytest.approx(expected)
    barely = originals + 1e-4
    found = load("psnr").compute(predictions=barely.numpy(), references=originals.numpy())["psnr"]
    assert found == pytest.approx(metrics.psnr(barely, originals).mean().item()) and found > 75


def test_psnr_of_images_arrays_and_files_is_that_of_their_bytes(tmp_path):
    arrays = [bytes_of(images) for images in floats(3)]
    expected = metrics.psnr(*(torch.from_numpy(array).movedim(-1, 1) / 255 for array in arrays)).mean().item()
    images = [[Image.fromarray(item) for item in array] for array in arrays]
    files = [[str(tmp_path / f"{side}-{index}.png") for index in range(3)] for side in range(2)]
    for side, paths in enumerate(files):
        for image, path in zip(images[side], paths, strict=True):
            image.save(path)
    for predictions, references in (arrays, images, files, (arrays[0], images[1])):
        found = load("psnr").compute(predictions=predictions, references=references)["psnr"]
        assert found == pytest.approx(expected, rel=1e-6)


def test_unrounded_reconstructions_against_image_files():
    reconstructions, originals = floats(2)
    references = bytes_of(originals)
    expected = metrics.psnr(reconstructions, torch.from_numpy(references).movedim(-1, 1) / 255).mean().item()
    found = load("psnr").compute(predictions=reconstructions, references=list(map(Image.fromarray, references)))
    assert found["psnr"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_every_way_of_adding_is_the_same_and_a_second_use_starts_empty(keep_in_memory):
    reconstructions, originals = floats()
    metric = load("psnr", keep_in_memory=keep_in_memory)
    at_once = metric.compute(predictions=reconstructions, references=originals)
    for pair in zip(reconstructions.split(2), originals.split(2), strict=True):
        metric.add_batch(predictions=pair[0], references=pair[1])
    assert metric.compute() == at_once
    for pair in zip(reconstructions, originals, strict=True):
        metric.add(prediction=pair[0], reference=pair[1])
    assert metric.compute() == at_once


def test_the_mean_is_over_images_of_any_size():
    (small, small_originals), (large, large_originals) = floats(1, 6), floats(1, 20, seed=1)
    expected = [metrics.psnr(small, small_originals).item(), metrics.psnr(large, large_originals).item()]
    found = load("psnr").compute(predictions=[small[0], large[0]], references=[small_originals[0], large_originals[0]])
    assert found["psnr"] == pytest.approx(sum(expected) / 2)


def test_codebook_usage_by_hand():
    tokens = torch.tensor(
        [[[[0, 0, 1, 1]], [[0, 1, 2, 3]]]]
    )  # global codebook: 1 bit; local codebook: 2 bits; pairs: 2 bits
    found = load("codebook_usage").compute(predictions=tokens, sizes={"global": 4, "local": 4})
    assert found == {
        "pair_entropy": 2.0,
        "global_usage": 0.5,
        "global_perplexity": 2.0,
        "global_normalized_entropy": 0.5,
        "local_usage": 1.0,
        "local_perplexity": 4.0,
        "local_normalized_entropy": 1.0,
    }


def test_codebook_usage_of_a_models_tokens_in_grids_of_several_sizes(tiny_model, images):
    sizes = dict(zip(tiny_model.quantize.codebooks, tiny_model.quantize.sizes, strict=True))
    grids = [tiny_model.tokenize(images), tiny_model.tokenize(images[..., :5])]
    statistics, metric = TokenStatistics(sizes), load("codebook_usage")
    for grid in grids:
        statistics.update(grid)
        metric.add_batch(predictions=grid.numpy())
    found = metric.compute(sizes=sizes)
    assert found.pop("pair_entropy") == statistics.pair_entropy
    expected = statistics.codebooks()
    assert found == {f"{name}_{key}": expected[name][key] for name in sizes for key in expected[name] if key != "size"}


def test_rfid_is_the_definition_with_scipys_square_root():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    reconstructions, originals = floats(40)
    found = load("rfid", feature_extractor=moments).compute(predictions=reconstructions, references=originals)
    a, b = (moments(images.clamp(0, 1)).double().numpy() for images in (reconstructions, originals))
    covariances = np.cov(a.T), np.cov(b.T)
    trace = np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert found["rfid"] == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + trace, rel=1e-5)


def test_rfid_does_not_depend_on_the_batch_and_takes_several_sizes():
    batches = []

    def extractor(images):
        batches.append(tuple(images.shape[:1] + images.shape[2:]))
        return moments(images)

    (small, small_originals), (large, large_originals) = floats(9), floats(5, 20, seed=1)
    metric = load("rfid", feature_extractor=extractor)
    columns = {"predictions": [*small, *large], "references": [*small_originals, *large_originals]}
    first = metric.compute(**columns, batch_size=4)["rfid"]
    assert batches[::2] == [(4, 12, 12), (4, 12, 12), (1, 12, 12), (4, 20, 20), (1, 20, 20)]
    assert metric.compute(**columns)["rfid"] == pytest.approx(first, rel=1e-6)
    assert metric.compute(predictions=columns["references"], references=columns["references"])["rfid"] < 1e-9


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_rfid_without_inception_says_what_to_install_before_any_image_is_read():
    with pytest.raises(ImportError, match=r"pip install -e '\.\[fid\]'"):
        load("rfid")


def test_metrics_of_one_kind_combine():
    reconstructions, originals = floats(8)
    combined = evaluate.combine([load("psnr"), load("rfid", feature_extractor=moments)])
    combined.add_batch(predictions=reconstructions, references=originals)
    found = combined.compute()
    assert found["psnr"] == load("psnr").compute(predictions=reconstructions, references=originals)["psnr"]
    assert set(found) == {"psnr", "rfid"} and found["rfid"] > 0


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("psnr", {"predictions": torch.zeros(1, 3, 4, 4), "references": -torch.ones(1, 3, 4, 4)}, r"in \[0, 1\]"),
        ("psnr", {"predictions": torch.zeros(1, 3, 4, 4), "references": torch.zeros(1, 3, 4, 5)}, "same shapes"),
        ("psnr", {"predictions": torch.zeros(1, 4, 4, 3), "references": torch.zeros(1, 4, 4, 3)}, r"\(C, H, W\)"),
        ("psnr", {"predictions": torch.zeros(1, 4, 4), "references": torch.zeros(1, 4, 4)}, r"\(C, H, W\)"),
        ("codebook_usage", {"predictions": torch.zeros(1, 2, 1, 1).long()}, "`sizes` must name the codebooks"),
        ("codebook_usage", {"predictions": torch.full((1, 1, 1, 1), 7), "sizes": {"a": 7}}, r"\[0, 7\)"),
        ("codebook_usage", {"predictions": torch.full((1, 1, 1, 1), 1.7), "sizes": {"a": 7}}, "integer.*1.7"),
    ],
)
def test_wrong_input_is_named(name, inputs, message):
    with pytest.raises(ValueError, match=message):
        load(name).compute(**inputs)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_readme_example_runs(name, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "metrics" / name / "README.md").read_text(), re.S).group(1)
    exec(compile(code, name, "exec"), {})
    printed = eval(capsys.readouterr().out, {})
    promised = re.search(r"# (\{.*\})", code)
    if promised:
        assert printed == pytest.approx(eval(promised.group(1), {}), rel=1e-5)
    assert all(isinstance(value, float) and value >= 0 for value in printed.values())
