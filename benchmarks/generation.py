"""Which tokens are easier to generate? The same small generator on each tokenizer, in equal updates of equal images:

    python benchmarks/quality.py --dataset DATA --rows base base-1024 both-ema --output runs/quality
    python benchmarks/generation.py --dataset DATA --output runs/generation --json docs/generation/generation.json \\
        --tokenizers base=runs/quality/runs/base-seed0-KEY/final base-1024=... both-ema=...

`--maskings tokens positions books` trains a generator for each. Interrupt it at any time: the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sampling import sample, score
from timing import add_timing, machine, report, set_up

from dualcodebook_hf.cli.inputs import positive
from dualcodebook_hf.cli.main import main as dualcodebook
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.generator_evaluation import measure_images
from dualcodebook_hf.evaluation.table import markdown_table
from dualcodebook_hf.files import read_json, write_json
from dualcodebook_hf.generation.arguments import parse_generator_config
from dualcodebook_hf.generation.choices import UNITS
from dualcodebook_hf.generation.loading import load_generator
from dualcodebook_hf.generation.task import GeneratorTask
from dualcodebook_hf.loading import load_tokenizer
from dualcodebook_hf.metrics.efficientnet import effnetlite2_features
from dualcodebook_hf.presets import GENERATOR, load_preset
from dualcodebook_hf.run_folder import RunFolder
from dualcodebook_hf.training.run import StopRequest, Trainer
from dualcodebook_hf.weights import weights_hash

SMALL = Path(__file__).parent / "small-generator.yaml"
SAMPLING = {"num_inference_steps": 16, "guidance_scale": 2.0, "sampling_temperature": 1.0}
COLUMN = "label"
DONE, ASKED = "measured.json", "asked.json"  # results, and the settings that they and their training are of


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 2 and one line for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", required=True, metavar="NAME=FOLDER", help="what is compared")
    parser.add_argument("--dataset", required=True, help="images with train, validation and test splits and classes")
    parser.add_argument("--output", type=Path, default=Path("runs/generation"), help="(default: %(default)s)")
    parser.add_argument("--config", default=str(SMALL), help="the generator: YAML file (default: %(default)s)")
    parser.add_argument("--maskings", nargs="+", choices=UNITS, default=["tokens"], help="(default: tokens)")
    parser.add_argument("--size", type=positive, default=64, help="side of the images (default: %(default)s)")
    parser.add_argument("--crops", type=positive, default=8, help="of each training image (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=32, help="of the sampling (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the training (default: 0)")
    add_timing(parser, rounds=1)
    arguments = parser.parse_args(argv)
    return report(parser, lambda: measure(arguments, set_up(arguments)), table, arguments.json)


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """The record that is printed and written."""
    tokenizers = dict(_named(text) for text in arguments.tokenizers)
    test = EvaluationData(dataset=arguments.dataset, size=arguments.size, resample="lanczos")
    images, features = test.open(), effnetlite2_features(device)
    labels = list(images.rows["label"][: images.count])
    record = {"data": test.record(images.count), "crops": arguments.crops, "sampling": SAMPLING}
    record |= {"machine": machine(device), "rows": []}
    generator = load_preset(arguments.config, GENERATOR)
    for name, folder in tokenizers.items():
        asked = {"data": record["data"], "crops": arguments.crops, "sampling": SAMPLING, "generator": generator}
        asked["tokenizer"] = weights_hash(load_tokenizer(folder))
        places = {
            (masking, seed): arguments.output / name / f"{masking}-seed{seed}"
            for masking in arguments.maskings
            for seed in arguments.seeds
        }
        if not all((place / DONE).is_file() for place in places.values()):
            _tokenize(folder, arguments, arguments.output / name)
            bound = measure_images(images.batches(arguments.batch_size), features, device, load_tokenizer(folder))
        for (masking, seed), place in places.items():
            row = read_json(place / DONE)
            if place.exists() and read_json(place / ASKED) != asked:
                raise ValueError(f"`--output`: '{place}' was begun with other settings, choose a new folder")
            if row is None:
                place.mkdir(parents=True, exist_ok=True)
                write_json(place / ASKED, asked)
                row = _train(folder, place, masking, seed, arguments)
                pipeline = load_generator(str(RunFolder(place).final), device=device)
                pipeline.set_progress_bar_config(disable=True)
                row |= sample(pipeline, labels, SAMPLING, arguments.batch_size, features, bound.features, device)
                row["reconstructions"] = score(bound.reconstructed, bound.features)
                write_json(place / DONE, row)
            record["rows"].append({"tokenizer": name, "masking": masking, "seed": seed, **row})
    return record


def _named(text: str) -> tuple[str, str]:
    name, found, folder = text.partition("=")
    if not found or Path(name).name != name:
        raise ValueError(f"`--tokenizers` must be NAME=FOLDER, got {text!r}")
    return name, folder


def _tokenize(tokenizer: str, arguments: argparse.Namespace, output: Path) -> None:
    common = ["--model", tokenizer, "--size", str(arguments.size), "--columns", COLUMN]
    random = ["--augmentation", "random-crop", "--crops", str(arguments.crops)]
    for split, crops in (("train", random), ("validation", [])):
        flags = ["--split", split, *crops, *common, "--output", str(output / split)]
        if dualcodebook(["tokenize-dataset", arguments.dataset, *flags]):
            raise ValueError(f"`--tokenizers`: the data set could not be tokenized by '{tokenizer}'")


def _train(tokenizer: str, place: Path, masking: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Bits per position on the validation split at the end of a training, or of what was left of one."""
    folders = {"tokens": place.parent / "train", "validation_tokens": place.parent / "validation"}
    flags = {**folders, "tokenizer": tokenizer, "output_dir": place, "masking": masking, "seed": seed}
    flags |= {"class_column": COLUMN, "num_threads": torch.get_num_threads()}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run = parse_generator_config(["--config", arguments.config, *words])
    with StopRequest().watching() as stop:
        trainer = Trainer(GeneratorTask(run), run.training, stop)
        trainer.train()
        if stop.requested:
            raise SystemExit(f"stopped; the same command goes on ({arguments.output})")
    with trainer.averaged_weights() as network:
        found = trainer.task.validate()[0]
        parameters = sum(weight.numel() for weight in network.parameters())
    return {**found, "bits": trainer.task.tokenizer.bits_per_position, "parameters": parameters, "run": _public(run)}


def _public(run: Any) -> dict[str, Any]:
    sections = run.to_dict()
    kept = ("max_train_steps", "train_batch_size", "learning_rate", "ema_decay", "masking", "masking_schedule", "seed")
    return {**sections["generator"], **{name: sections["training"][name] for name in kept}}


def table(record: dict[str, Any]) -> str:
    """Markdown, a row for each generator."""
    titles = ["tokenizer", "masking", "seed", "bits, tokens", "bits, generator", "share", "KD lite2", "95%"]
    titles += ["precision", "recall", "KD of reconstructions"]
    rows = []
    for row in record["rows"]:
        cells = [row["tokenizer"], row["masking"], str(row["seed"]), f"{row['bits']:.0f}"]
        cells += [f"{row['bits_per_position']:.2f}", f"{row['bits_per_position'] / row['bits']:.3f}"]
        cells += [f"{row['kd_effnetlite2']:.1f}", "-".join(f"{end:.1f}" for end in row["interval"])]
        cells += [f"{row['precision']:.3f}", f"{row['recall']:.3f}"]
        rows.append([*cells, f"{row['reconstructions']['kd_effnetlite2']:.1f}"])
    return markdown_table(titles, rows)


if __name__ == "__main__":
    raise SystemExit(main())
