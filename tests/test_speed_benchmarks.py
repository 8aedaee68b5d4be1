"""The benchmarks of speed at tiny size: rows are the same network, and the trainer takes the plain step."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import yaml
from test_golden import save_images

from dualcodebook_hf.files import read_json

timing, speed, memory, training = map(importlib.import_module, ("timing", "speed", "memory", "training"))


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """The machine's peak is not looked for."""
    monkeypatch.setattr(timing, "PEAK_SHAPES", ((8, 8),))


@pytest.fixture
def config(tmp_path, tiny_config):
    """A run file with VQGAN's blocks, and images beside it."""
    save_images(tmp_path / "data", train=4, test=2)
    file = tmp_path / "tiny.yaml"
    model = {**tiny_config, "attention": True, "global_dim": 8, "local_dim": 8}
    file.write_text(yaml.safe_dump({"include": "paper", "model": model, "training": {"max_train_steps": 9}}))
    return str(file)


def test_a_speedup_is_the_median_of_the_rounds_ratios():
    found = timing.speedup([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert found == {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    assert timing.speedup_text(found) == "2.00 (1.00-3.00)"


def test_rows_take_turns_and_the_first_turn_does_not_count():
    order = []
    times = timing.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2, "cpu")
    assert order == list("ababab")
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_vqmodel_is_the_same_network(tiny_config, images):
    with torch.inference_mode():
        rows = speed.build({**tiny_config, "attention": True, "local_dim": 8}, "cpu")
        ours, theirs = rows[speed.LOADED].model, rows[speed.BASE].model
        padded = images[..., :12, :18]
        assert torch.equal(theirs.encode(padded).latents, ours.encode(padded).latents)
        ids = rows[speed.BASE].encode(padded)
        assert rows[speed.BASE].decode(ids).shape == padded.shape


def test_tokens_are_equal_where_latents_are():
    latents = torch.randn(2, 8, 16, 16)
    assert speed.equal_tokens(latents, latents) == 1
    assert 0.9 < speed.equal_tokens(latents, latents + 1e-3 * torch.randn_like(latents)) < 1
    assert speed.equal_tokens(latents, torch.randn_like(latents)) < 0.1


@pytest.mark.slow
def test_speed_prints_a_table_and_writes_json(config, tmp_path, capsys):
    file = tmp_path / "speed.json"
    data, small = str(tmp_path / "data"), ["--size", "32", "--images", "2", "--rounds", "1"]
    assert speed.main(["--config", config, "--dataset", data, *small, "--json", str(file)]) == 0
    record = read_json(file)
    rows = {row["row"]: row for row in record["rows"]}
    assert list(rows)[:2] == [speed.BASE, speed.LOADED]
    assert rows["optimize_for_inference, float32"]["tokens_equal"] >= 0.99
    assert speed.table(record) + "\n" == capsys.readouterr().out
    assert speed.main(["--dataset", data, "--clock", "cpu", "--threads", "2"]) == 2
    torch.set_num_threads(1)


@pytest.mark.slow
def test_the_trainer_takes_the_plain_step(config, tmp_path, capsys, fresh_accelerate):
    pytest.importorskip("accelerate")
    pytest.importorskip("torchmetrics")
    file = tmp_path / "training.json"
    words = ["--config", config, "--dataset", str(tmp_path / "data"), "--batch-size", "2", "--resolution", "32"]
    words += ["--rounds", "1", "--flags", "discriminator_channels=4", "--json", str(file)]
    assert training.main(words) == 0
    record = json.loads(file.read_text())
    assert record["largest_differences"][0] < 1e-5
    assert 0 <= record["data_wait"] < 1
    assert training.table(record) in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_what_a_pass_adds(tiny_config):
    if not memory.RESET.exists():
        pytest.skip("not on Linux")
    config = {**tiny_config, "attention": True, "local_dim": 8}
    small, large = (memory.measure(config, "cpu", speed.LOADED, side, 1) for side in (64, 512))
    assert small["decode_bytes"] < large["decode_bytes"]
    assert "| as loaded" in memory.table({"rows": [small, large]})
