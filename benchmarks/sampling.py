"""How a generator is best sampled: one setting changed at a time, measured against the test split:

    python benchmarks/sampling.py --generator FOLDER --dataset DATA --size 128 --json docs/generation/sampling.json
    python benchmarks/sampling.py --dataset DATA --size 256 --settings sampling_temperature num_inference_steps

Sample i has the class of test image i and the seed `--seed` + i. Times are of the drawing alone, without decoding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timing import add_timing, machine, report, set_up

from dualcodebook_hf.cli.inputs import positive
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.generator_evaluation import measure_images
from dualcodebook_hf.evaluation.table import markdown_table
from dualcodebook_hf.files import public_name
from dualcodebook_hf.generation.loading import load_generator
from dualcodebook_hf.generation.schedulers import MaskedTokenScheduler
from dualcodebook_hf.metrics.efficientnet import effnetlite2_features
from dualcodebook_hf.metrics.kernel import NORMAL_95, kernel_distance
from dualcodebook_hf.metrics.precision_recall import precision_recall
from dualcodebook_hf.weights import weights_hash

SCHEDULER = ("order", "units")  # the others are the call's
BASE = {
    "order": "confidence",
    "units": "tokens",
    "num_inference_steps": 16,
    "guidance_scale": 2.0,
    "guidance_schedule": "constant",
    "choice_temperature": 4.5,
    "sampling_temperature": 1.0,
}
ROWS: list[dict[str, Any]] = [
    {},
    {"order": "halton"},
    {"order": "halton", "units": "positions"},
    {"units": "positions"},
    {"units": "books"},
    {"num_inference_steps": 4},
    {"num_inference_steps": 8},
    {"num_inference_steps": 32},
    {"guidance_scale": 1.0},
    {"guidance_scale": 1.5},
    {"guidance_scale": 3.0},
    {"guidance_scale": 5.0},
    {"guidance_scale": 3.0, "guidance_schedule": "cosine"},
    {"choice_temperature": 1.0},
    {"choice_temperature": 9.0},
    {"sampling_temperature": 0.9},
    {"sampling_temperature": 0.8},
    {"sampling_temperature": 0.7},
    {"sampling_temperature": 0.8, "num_inference_steps": 32},
    {"order": "halton", "sampling_temperature": 0.9},
]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 2 and one line for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", help="folder or Hub id (default: the embedded generator)")
    parser.add_argument("--dataset", required=True, help="images: Hub id, folder or parquet file")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--size", type=positive, default=128, help="side of the images (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=32, help="(default: %(default)s)")
    parser.add_argument("--limit", type=positive, help="images, at most (default: the whole split)")
    parser.add_argument("--settings", nargs="+", choices=BASE, help="change these alone (default: all, one at a time)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_timing(parser, rounds=1)
    arguments = parser.parse_args(argv)
    return report(parser, lambda: measure(arguments, set_up(arguments)), table, arguments.json)


@torch.no_grad()
def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """The record that is printed and written."""
    data = EvaluationData(
        dataset=arguments.dataset, split=arguments.split, size=arguments.size, resample="lanczos", limit=arguments.limit
    )
    images, features = data.open(), effnetlite2_features(device)
    pipeline = load_generator(arguments.generator, device=device)
    pipeline.set_progress_bar_config(disable=True)
    names = images.rows.features["label"].names
    labels = pipeline.get_label_ids([names[label] for label in images.rows["label"][: images.count]])
    test = measure_images(images.batches(arguments.batch_size), features, device, pipeline.vqvae)
    record = {
        "generator": public_name(arguments.generator or "embedded generator"),
        "transformer_sha256": weights_hash(pipeline.transformer),
        "data": data.record(len(test)),
        "base": BASE,
        "seed": arguments.seed,
        "machine": machine(device),
        "reconstructions": score(test.reconstructed, test.features),
        "rows": [],
    }
    for changes in (row for row in ROWS if set(row) <= set(arguments.settings or BASE)):
        row = one_row(pipeline, {**BASE, **changes}, labels, arguments, features, test.features, device)
        record["rows"].append({"changes": changes, **row})
        print(table({**record, "rows": record["rows"][-1:]}).splitlines()[-1], flush=True)
    return record


def one_row(
    pipeline: Any,
    settings: dict[str, Any],
    labels: list[int],
    arguments: argparse.Namespace,
    features: Any,
    test: torch.Tensor,
    device: str,
) -> dict[str, Any]:
    """The numbers of one setting."""
    scheduler = {name: settings[name] for name in SCHEDULER}
    pipeline.scheduler = MaskedTokenScheduler.from_config(pipeline.scheduler.config, **scheduler)
    options = {name: value for name, value in settings.items() if name not in SCHEDULER}
    options |= {"height": arguments.size, "width": arguments.size}
    return sample(pipeline, labels, options, arguments.batch_size, features, test, device, arguments.seed)


def sample(
    pipeline: Any,
    labels: list[int],
    options: dict[str, Any],
    batch_size: int,
    features: Any,
    test: torch.Tensor,
    device: str,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of an image of each label, drawn with `options`; image i has the seed `seed` + i."""
    seconds = []

    def drawn() -> Iterator[torch.Tensor]:
        for start in range(0, len(labels), batch_size):
            chosen = labels[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chosen))]
            began = time.process_time()
            tokens = pipeline(chosen, generator=generators, output_type="tokens", **options).images
            seconds.append(time.process_time() - began)
            yield pipeline.vqvae.detokenize(tokens).float().clamp(-1, 1)

    samples = measure_images(drawn(), features, device)
    return {**score(samples.features, test), "cpu_seconds": sum(seconds) / len(labels)}


def score(samples: torch.Tensor, test: torch.Tensor) -> dict[str, Any]:
    """Distance with its interval, precision and recall."""
    distance, error = kernel_distance(samples, test, paired=False)
    interval = [1000 * (distance + sign * NORMAL_95 * error) for sign in (-1, 1)]
    return {"kd_effnetlite2": 1000 * distance, "interval": interval, **precision_recall(samples, test)}


def table(record: dict[str, Any]) -> str:
    """Markdown, a row for each setting."""
    rows = [("(reconstructions of the test images)", record["reconstructions"], "")]
    for row in record["rows"]:
        changes = ", ".join(f"{name} {value}" for name, value in row["changes"].items()) or "base"
        rows.append((changes, row, f"{row['cpu_seconds']:.2f}"))
    titles = ["setting", "KD lite2", "95%", "precision", "recall", "CPU s per image"]
    cells = [
        [
            name,
            f"{row['kd_effnetlite2']:.1f}",
            f"{row['interval'][0]:.1f}-{row['interval'][1]:.1f}",
            f"{row['precision']:.3f}",
            f"{row['recall']:.3f}",
            seconds,
        ]
        for name, row, seconds in rows
    ]
    return markdown_table(titles, cells)


if __name__ == "__main__":
    raise SystemExit(main())
