"""The numbers stay what they are: outputs of the embedded checkpoint, its measurements, and the losses of short runs.

`python tests/test_golden.py` records them anew, into golden/golden.json; a change there needs a reason in the commit.
Tolerances leave room for other processors, which round differently, and for nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dualcodebook_hf import DualCodebookModel, DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.image_processing_dualcodebook import to_pixels

GOLDEN = Path(__file__).parent / "golden" / "golden.json"
SIZES = ((96, 64), (81, 50), (160, 128))  # W, H
SMALL_RUN = {
    "backbone": "dcae", "block_out_channels": "8 8 16", "layers_per_block": 1, "resolution": 32, "num_workers": 0,
    "global_codebook_size": 32, "local_codebook_size": 32, "global_dim": 8, "local_dim": 8, "transformer_heads": 2,
    "global_transformer_layers": 1, "transformer_feed_forward": 16, "discriminator_channels": 4, "learning_rate": 1e-3,
    "max_train_steps": 20, "train_batch_size": 2, "adversarial_start": 4, "perceptual": "ms-ssim", "ema_decay": 0.9,
    "validation_steps": 0, "checkpointing_steps": 0, "report_to": "none",
}  # fmt: skip
RUNS = {
    "paper": {},  # a transformer with dropout, a plain table
    "base": {
        "global_transformer_layers": 0, "global_update": "ema", "local_update": "ema", "linear_shortcut": True,
        "data_initialization": 5, "log_l2_weight": 0.1, "gradient_accumulation_steps": 2,
    },
    "simvq": {"global_transformer_layers": 0, "global_update": "linear", "local_update": "linear"},
}  # fmt: skip
FACES = {"diffusers": DualCodebookVQModel, "transformers": DualCodebookModel}


def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
    """Waves, a disc and a ramp, by integers and sines alone: the same on every machine."""
    y, x = np.mgrid[:height, :width]
    waves = 127.5 + 90 * np.sin(x / (5 + seed)) * np.cos(y / (7 + seed))
    disc = ((x - width // 3) ** 2 + (y - height // 2) ** 2 < (height // (3 + seed)) ** 2) * 180 + 30
    ramp = (3 * x + 2 * y + 40 * seed) % 256
    return Image.fromarray(np.stack([waves, disc, ramp], axis=-1).round().astype(np.uint8))


def outputs(face: str) -> dict[str, dict]:
    """Tokens, and the mean and the deviation of every channel of the reconstruction, of three images."""
    model = FACES[face].from_pretrained(default_checkpoint(), dtype=torch.float32).eval()
    found = {}
    for seed, (width, height) in enumerate(SIZES):
        pixels = to_pixels(drawn(width, height, seed))[None]
        tokens = model.tokenize(pixels)
        restored = model.detokenize(tokens, size=(height, width))
        with torch.no_grad():
            assert torch.equal(model.autoencode(pixels).sample, restored)
        found[f"{width}x{height}"] = {
            "tokens": tokens[0].tolist(),
            "mean": restored.mean((0, 2, 3)).tolist(),
            "std": restored.std((0, 2, 3)).tolist(),
        }
    return found


def measurements(folder: Path) -> dict[str, float]:
    """What `evaluate` says of four images."""
    from dualcodebook_hf.evaluation.data import EvaluationData
    from dualcodebook_hf.evaluation.evaluator import evaluate

    save_images(folder, test=4)
    model = DualCodebookVQModel.from_pretrained(default_checkpoint())
    metrics = evaluate(model, EvaluationData(dataset=str(folder), size=128).open())["metrics"]
    values = {name: value for name, value in metrics.items() if isinstance(value, float)}
    for name, health in metrics["codebooks"].items():
        values |= {f"{name}_{key}": value for key, value in health.items()}
    return values


def losses(folder: Path, name: str) -> dict[str, list[float]]:
    """Every term of the loss of 20 updates of a small model, its adversary from update 4 on."""
    from dualcodebook_hf.training.arguments import parse_run_config
    from dualcodebook_hf.training.run import Trainer
    from dualcodebook_hf.training.tokenizer_task import TokenizerTask

    save_images(folder / "data", train=5, validation=1)
    flags = {**SMALL_RUN, **RUNS[name], "dataset": folder / "data", "output_dir": folder / "run"}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", *str(value).split())]
    run = parse_run_config(["--config", "paper", *words])
    trainer = Trainer(TokenizerTask(run), run.training)
    forward_backward, found = trainer.task.forward_backward, {}

    def recording(batch: dict, step: int) -> dict:
        terms = forward_backward(batch, step)
        for term, value in terms.items():
            found.setdefault(term, []).append(value.item())
        return terms

    trainer.task.forward_backward = recording
    trainer.train()
    return found


def save_images(folder: Path, **splits: int) -> None:
    for split, count in splits.items():
        (folder / split).mkdir(parents=True)
        for seed in range(count):
            drawn(150, 140, seed).save(folder / split / f"{seed}.png")


def golden(part: str) -> dict:
    return json.loads(GOLDEN.read_text())[part]


@pytest.mark.parametrize("face", sorted(FACES))
def test_the_embedded_checkpoint_gives_what_it_gave(face: str) -> None:
    every = outputs(face)
    for size, expected in golden("outputs").items():
        found = every[size]
        differ = np.sum(np.array(found["tokens"]) != np.array(expected["tokens"]))
        assert differ <= 1, f"{differ} tokens of {size}"  # a near tie may fall the other way on another processor
        assert found["mean"] == pytest.approx(expected["mean"], abs=2e-3)
        assert found["std"] == pytest.approx(expected["std"], abs=2e-3)


def test_evaluate_gives_what_it_gave(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    found = measurements(tmp_path / "data")
    assert found == pytest.approx(golden("metrics"), rel=2e-3)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_training_takes_the_steps_that_it_took(name: str, tmp_path: Path, fresh_accelerate) -> None:
    pytest.importorskip("accelerate")
    found, expected = losses(tmp_path, name), golden("losses")[name]
    assert set(found) == set(expected)
    for term, values in expected.items():
        assert found[term] == pytest.approx(values, rel=2e-2, abs=1e-3), term


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        record = {"outputs": outputs("diffusers"), "metrics": measurements(Path(folder) / "data")}
        record["losses"] = {}
        for name in RUNS:
            record["losses"][name] = losses(Path(folder) / name, name)
    GOLDEN.write_text(json.dumps(record) + "\n")
    print(f"written to {GOLDEN}", file=sys.stderr)
