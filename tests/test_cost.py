"""benchmarks/cost.py: counts by hand, and nothing large computed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.presets import load_preset

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
benchmark = importlib.import_module("cost")


def test_parameters_bits_and_memory_of_a_small_model_by_hand(tiny_config):
    row = benchmark.cost(tiny_config, size=32)
    model = DualCodebookVQModel(**tiny_config)
    parts = sum(row[f"{part}_parameters"] for part in ("encoder", "decoder", "quantizer"))
    assert parts == sum(parameter.numel() for parameter in model.parameters())
    assert (row["codes"], row["bits_per_position"], row["bits_per_pixel"]) == ([32, 16], 9.0, 2.25)
    assert row["codebook_bytes"] == 4 * (32 * 8 + 16 * 4)
    assert row["logits"] == 48
    # 256 positions; a multiplication and an addition for each number of each code.
    assert row["search_flops"] == 2 * 256 * (32 * 8 + 16 * 4)
    assert row["encode_flops"] > row["search_flops"]


def test_a_convolution_is_counted_by_hand_and_four_times_for_twice_the_sides(tiny_config):
    """DC-AE's encoder and decoder have no attention: everything grows with the pixels."""
    model = {**tiny_config, "backbone": "dcae", "linear_shortcut": True, "layers_per_level": [0, 1]}
    small, large = (benchmark.cost(model, size=size) for size in (32, 64))
    assert large["encode_flops"] == 4 * small["encode_flops"]
    assert large["decode_flops"] == 4 * small["decode_flops"]
    shortcut = 2 * 256 * (3 * 2 * 2) * 12
    without = benchmark.cost({**model, "linear_shortcut": False}, size=32)
    assert small["encode_flops"] - without["encode_flops"] == shortcut


def test_the_papers_model_costs_what_is_known_of_it():
    row = benchmark.cost(benchmark.model_arguments("paper"))
    assert row["encode_flops"] / 1e9 == pytest.approx(138, abs=1)
    assert row["decode_flops"] / 1e9 == pytest.approx(252, abs=1)
    assert row["encoder_parameters"] + row["decoder_parameters"] == pytest.approx(71.9e6, rel=2e-3)
    assert row["codebook_bytes"] == 2 * 512 * 128 * 4
    # The transformer over 512 codes, once: 2 x its weights x 512, and attention.
    assert row["codes_flops"] > 2 * 3.5e6 * 512


def test_training_costs_at_least_three_times_both_passes(tiny_config):
    step = benchmark.training_flops({**tiny_config, "backbone": "vqgan"}, size=64)
    row = benchmark.cost(tiny_config, size=64)
    assert step > 3 * (row["encode_flops"] - row["search_flops"] + row["decode_flops"])
    hours = benchmark.gpu_hours(10**12, 0.25)["ADE20K"]["A100"]
    assert hours == pytest.approx(20_210 * 500 * 1e12 / (312e12 * 0.25) / 3600)


def test_rows_with_the_same_model_are_listed_once():
    assert benchmark.distinct(["paper", "celebahq-authors", "vqgan-1024"]) == ["paper", "vqgan-1024"]
    assert load_preset("paper")["model"] == benchmark.model_arguments("celebahq-authors")


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "cost.json"
    assert benchmark.main(["--rows", "tiny", "--size", "64", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    cells = [cell.strip() for cell in printed.splitlines()[2].split("|")]
    assert cells[1] == "`tiny`" and f"{row['decode_flops'] / 1e9:.1f}" in cells
    assert "Computed, not measured" in printed
    assert benchmark.main(["--rows", "tinny"]) == 2
    assert "did you mean tiny" in capsys.readouterr().err
