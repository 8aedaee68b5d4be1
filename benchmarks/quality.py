"""Trains quantizers side by side and measures them: same trainer, backbone, data order, seed, steps and protocol.

A row is a file of configs/ (or a preset, or a path). Of it are taken, and laid over the backbone's file, only the keys
in which it differs from the preset `paper`: the quantizer's fields and `linear_shortcut` of its section `model`, and of
its section `training` what belongs to a recipe (optimizer, codebooks' rate and weight, averaging, initialisation, token
noise).
Network, data, pixel losses, schedule, batch and steps come from the backbone's file and the flags, for every row alike.
So a row without keys under `training` differs from its neighbours in the quantizer alone; those that a row has are in
the table. For one seed all rows start with the same encoder and decoder (where latents are narrower: the same encoder
up to its last convolution), but for those with `data_initialization`, whose last convolutions start at zero.

    python benchmarks/quality.py --dataset PATH_OR_HUB_ID --eval-datasets A B --output runs/quality --seeds 0 1 2

With `--backbone benchmarks/small-f16-sharp.yaml` every row has a perceptual loss and an adversary besides, and with
`--lite2` distances in features of EfficientNet-Lite2 are measured.

Interrupt it at any time (SIGTERM, --max-minutes): the same command goes on from the last checkpoint, and the numbers
are those of an uninterrupted run. `--output` gets results.jsonl (a line for each row, seed and data set, with all that
is needed to repeat it), table.md, psnr.png, error.png, usage.png, entropy.png, and runs/ with the trained models and
the images that were measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock, Timeout
from quality_report import read_lines, write_report

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.codebooks import TransformerCodebook
from dualcodebook_hf.configuration_dualcodebook import DualCodebookFields, config_hash
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.evaluator import evaluate as measure
from dualcodebook_hf.evaluation.evaluator import hardware
from dualcodebook_hf.evaluation.linear_codec import PatchLinearCodec
from dualcodebook_hf.files import public_name, read_json, write_json
from dualcodebook_hf.image_datasets import load_images
from dualcodebook_hf.metrics import DEFAULT_METRICS, EFFNETLITE2_METRICS, image_metrics, load_metric_network
from dualcodebook_hf.presets import load_preset, preset_names
from dualcodebook_hf.run_folder import RunFolder
from dualcodebook_hf.tokenizer import Tokenizer
from dualcodebook_hf.training.arguments import DataArguments, RunConfig, TrainArguments, parse_run_config
from dualcodebook_hf.training.data import TrainingImages
from dualcodebook_hf.training.run import NonFiniteError, StopRequest, Trainer
from dualcodebook_hf.training.tokenizer_task import TokenizerTask

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"
CODECS = {"patch-linear": (512, 512), "patch-linear-32": (32, 32)}  # sizes of the linear codec's two stages
CODEC_IMAGES, CODEC_COMPONENTS = 400, 48
DRAWN = "+dropout"  # of a row's name, where its codes are one draw with the transformer's dropout on
# fmt: off
DEFAULT_ROWS = [
    "patch-linear", "patch-linear-32", "vqgan-1024", "pair-32", "pair-256", "paper-quantizer", "both-plain",
    "both-transformer", "depth-2", "depth-2-scaled", "local-ema", "both-ema", "both-linear", "fsq", "lfq", "residual",
    "paper-slow-codes", "paper-shortcut", "base", "base-scratch", "base-transformer", "base-32", "base-1024",
    "single-262144", "base-262144",
]
MODEL_FIELDS = [
    "linear_shortcut", "quantizer", "global_codebook_size", "local_codebook_size", "global_dim", "local_dim",
    "fsq_levels", "global_transformer_layers", "local_transformer_layers", "transformer_heads",
    "transformer_feed_forward", "transformer_dropout", "scale_codes_to_latents", "global_update", "local_update",
    "codebook_ema_decay", "revival_threshold", "commitment_cost",
]
RECIPE_FIELDS = [
    "codebook_weight", "codebook_learning_rate", "anneal_codebook_lr", "adam_beta1", "adam_beta2", "weight_decay",
    "max_grad_norm", "ema_decay", "data_initialization", "token_noise", "token_noise_images", "token_noise_neighbours",
]
# Of a row's `training` these are the backbone's: presets have them for runs of their own.
LEFT_TO_THE_BACKBONE = {
    "adversarial_weight", "checkpointing_steps", "discriminator_beta2", "l1_weight", "learning_rate", "log_l2_weight",
    "lr_schedule", "lr_warmup_steps", "max_train_steps", "perceptual", "train_batch_size", "validation_steps",
    "weights_dtype",
}
# fmt: on
# What may change between two parts of one run without changing its result.
INCIDENTAL = ("output_dir", "resume_from_checkpoint", "max_train_minutes", "num_threads", "checkpointing_steps")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: of its file, without the suffix.
        model: what the file changes in the paper's quantizer.
        training: what it changes in the recipe.
    """

    name: str
    model: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row under one seed.

    Attributes:
        row: what is trained.
        seed: of the network and of the data order.
        run: all settings.
        key: identifies everything that decides its numbers, but for the package's code.
    """

    row: Row
    seed: int
    run: RunConfig
    key: str

    @property
    def folder(self) -> Path:
        """Where its checkpoints and its trained model are."""
        return Path(self.run.training.output_dir)

    @property
    def record(self) -> Path:
        """Written when the training is complete: steps, seconds, hardware, versions, parameters."""
        return self.folder / "trained.json"


def read_row(name: str) -> Row:
    """A name of configs/, a preset or a YAML file -> its differences from the preset `paper`.

    Raises ValueError for an unknown name, for what a row cannot change, and for `paper`: without LPIPS and GAN that row
    is `paper-quantizer`.
    """
    if name == "paper":
        raise ValueError("`--rows`: without LPIPS and GAN it is not the paper: use paper-quantizer, got 'paper'")
    if name in CODECS:
        return Row(name, {}, {})
    known = CONFIGS / f"{name}.yaml"
    if not (known.is_file() or name in preset_names() or Path(name).is_file()):
        names = sorted({path.stem for path in CONFIGS.glob("*.yaml")} | {*preset_names(), *CODECS} - {"paper"})
        raise ValueError(f"`--rows` must be YAML files or of {', '.join(names)}, got {name!r}")
    sections, paper = load_preset(str(known) if known.is_file() else name), load_preset("paper")
    parts = []
    kinds = (("model", MODEL_FIELDS, DualCodebookFields), ("training", RECIPE_FIELDS, TrainArguments))
    for section, fields, kind in kinds:
        defaults = {**asdict(kind()), **paper[section]}
        changed = {key: value for key, value in sections[section].items() if value != defaults[key]}
        parts.append({key: value for key, value in changed.items() if key in fields})
    if lost := sorted(changed.keys() - {*RECIPE_FIELDS} - LEFT_TO_THE_BACKBONE):  # of the training
        told = ", ".join(lost)
        raise ValueError(f"`--rows` must differ in quantizer and recipe alone, got {name!r}, which changes {told}")
    return Row(Path(name).stem, *parts)


def build_job(row: Row, seed: int, arguments: argparse.Namespace) -> Job:
    """The row over the backbone; its `training` keeps what is not the backbone's anyway.

    Raises ValueError for a backbone that has a quantizer of its own, and for wrong fields.
    """
    backbone = load_preset(str(arguments.backbone))
    paper = {**asdict(DualCodebookFields()), **load_preset("paper")["model"]}
    own = [key for key, value in backbone["model"].items() if key in MODEL_FIELDS[1:] and value != paper[key]]
    if own:
        raise ValueError(f"`--backbone` {arguments.backbone} must leave the quantizer to the rows: {', '.join(own)}")
    recipe = {**asdict(TrainArguments()), **backbone["training"]}
    row = dataclasses.replace(row, training={k: value for k, value in row.training.items() if value != recipe[k]})
    steps = arguments.steps or recipe["max_train_steps"]
    size = arguments.size or backbone["data"].get("resolution", 256)
    settings = {
        **row.model,
        **row.training,
        "dataset": arguments.dataset,
        "seed": seed,
        "resolution": size,
        "resize": size * 17 // 16,
        "max_train_steps": steps,
        "lr_warmup_steps": min(backbone["training"].get("lr_warmup_steps", 0), steps // 10),
        "mixed_precision": arguments.mixed_precision,
        "validation_steps": 0,
        "checkpointing_steps": arguments.checkpoint_every,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "report_to": "none",
    }
    if arguments.batch_size:
        settings["train_batch_size"] = arguments.batch_size
    run = parse_run_config(["--config", str(arguments.backbone), *_flags(settings)])
    what = [CODECS.get(row.name), config_hash(run.model), _recipe(asdict(run.training))]
    key = _digest([*what, _conditions(run), seed])
    run.training.output_dir = str(Path(arguments.output) / "runs" / f"{row.name}-seed{seed}-{key}")
    return Job(row, seed, run, key)


def conditions(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """What all lines of one table have in common."""
    skipped = {*MODEL_FIELDS, "vq_embed_dim", "latent_channels"}
    network = {key: value for key, value in job.run.model.fields_dict().items() if key not in skipped}
    evaluation = {"split": arguments.eval_split, "limit": arguments.eval_limit, "size": job.run.data.resolution}
    name, recipe = Path(arguments.backbone).stem, _recipe(load_preset(str(arguments.backbone))["training"])
    return {"backbone": name, "network": network, "recipe": recipe, **_conditions(job.run), "evaluation": evaluation}


def train(job: Job, stop: StopRequest, minutes: float = 0.0) -> bool:
    """Trains a row, or goes on with it, for at most `minutes` (0: no limit); True once all its steps are done.

    Raises NonFiniteError when it diverges.
    """
    if job.record.is_file():
        return True
    if job.row.name in CODECS:
        return _fit_codec(job)
    job.run.training.max_train_minutes = minutes
    trainer = Trainer(TokenizerTask(job.run), job.run.training, stop)
    clock, before, started = job.folder / "clock.json", trainer.progress.step, time.perf_counter()
    trainer.train()
    spent = read_json(clock) or {"steps": 0, "seconds": 0.0}
    spent["steps"] += trainer.progress.step - before
    spent["seconds"] += time.perf_counter() - started
    write_json(clock, spent)
    done = trainer.progress.step >= job.run.training.max_train_steps
    if done:
        per_step = round(spent["seconds"] / spent["steps"], 4) if spent["steps"] else None
        times = {"seconds_per_step": per_step, "timed_steps": spent["steps"]}
        record = {"steps": trainer.progress.step, **times, **_machine(trainer.accelerator.device)}
        write_json(job.record, {**record, "parameters": count_parameters(trainer.network)})
    trainer.accelerator.free_memory()
    del trainer
    clear_device_cache(garbage_collection=True)
    return done


def evaluate(job: Job, datasets: Sequence[str], arguments: argparse.Namespace, stop: StopRequest) -> bool:
    """Appends the lines of results.jsonl that are missing; False when it was asked to stop before the last."""
    path = Path(arguments.output) / "results.jsonl"
    asked = set(EFFNETLITE2_METRICS if arguments.lite2 else ())
    lines = [line for line in read_lines(path) if line["key"] == job.key and asked <= line["metrics"].keys()]
    done = {(line["row"], line["evaluated_on"]) for line in lines}
    for row in _measured_rows(job):
        missing = [dataset for dataset in datasets if (row, public_name(dataset)) not in done]
        model = _model_of(job, row) if missing else None
        for dataset in missing:
            if stop.requested:
                return False
            line = _measure(job, row, model, dataset, arguments)
            with _sole_writer(arguments):
                _append(path, line)
        del model
        clear_device_cache(garbage_collection=True)
    for checkpoint in RunFolder(job.folder).checkpoints():
        shutil.rmtree(checkpoint)
    return True


def _measured_rows(job: Job) -> list[str]:
    """The row; and again with the dropout of its codes kept, where they have one."""
    model, layers = job.run.model, 0
    if model.quantizer in ("dual", "single") and job.row.name not in CODECS:
        layers = model.local_transformer_layers + model.global_transformer_layers * (model.quantizer == "dual")
    return [job.row.name, *([job.row.name + DRAWN] if layers and model.transformer_dropout else [])]


def _model_of(job: Job, row: str) -> Tokenizer:
    model = load_trained(job).to("cuda" if torch.cuda.is_available() else "cpu")
    return model if row == job.row.name else with_drawn_codes(model, job.seed)


def _measure(job: Job, row: str, model: Tokenizer, dataset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A line of results.jsonl; the images that it is about are saved in the job's folder."""
    folder = public_name(dataset).replace("/", "-") + row.removeprefix(job.row.name)
    images_folder = job.folder / "pictures" / folder
    shutil.rmtree(images_folder, ignore_errors=True)  # of an interrupted measurement
    images = EvaluationData(
        dataset=dataset,
        split=arguments.eval_split,
        size=job.run.data.resolution,
        limit=arguments.eval_limit or None,
    )
    networks = _load_networks(arguments, job, model.device)
    metrics = image_metrics([*DEFAULT_METRICS, *networks], networks)
    options = {"batch_size": arguments.eval_batch_size, "name": row, "save_images": images_folder}
    result = measure(model, images.open(), metrics, **options)
    head = {"row": row, "seed": job.seed, "evaluated_on": public_name(dataset), "key": job.key}
    line = {**head, "differences": {"model": job.row.model, "training": job.row.training}}
    return {**line, "run": _public_run(job.run), "training": read_json(job.record), **result}


def _load_networks(arguments: argparse.Namespace, job: Job, device: torch.device) -> dict[str, Any]:
    """Those that `--lite2` asks for; all names have the same one, which is loaded once."""
    names = EFFNETLITE2_METRICS if arguments.lite2 else ()
    return {name: load_metric_network(name, job.run.data.resolution, device) for name in names}


def with_drawn_codes(model: DualCodebookVQModel, seed: int) -> DualCodebookVQModel:
    """A copy whose codebooks are plain tables: one draw of what their transformers give with dropout on.

    Such a codebook has learnt the distribution of its codes under dropout; without dropout they are other vectors.
    """
    fields = {key: getattr(model.config, key) for key in asdict(DualCodebookFields())}
    plain = {"global_transformer_layers": 0, "local_transformer_layers": 0, "scale_codes_to_latents": False}
    copy = DualCodebookVQModel(**fields | plain).to(model.device)
    state = {key: value for key, value in model.state_dict().items() if key in copy.state_dict()}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for attribute in model.quantize.codebook_names.values():
            codebook = getattr(model.quantize, attribute)
            if isinstance(codebook, TransformerCodebook):
                state[f"quantize.{attribute}.weight"] = codebook.train().codes()
    copy.load_state_dict(state)
    model.quantize.eval()
    return copy.eval()


def load_trained(job: Job) -> Tokenizer:
    """The model that a finished job left in its folder, in eval mode."""
    if job.row.name in CODECS:
        return PatchLinearCodec.load(job.folder / "codec.safetensors").eval()
    return DualCodebookVQModel.from_pretrained(job.folder / "final").eval()


def count_parameters(model: DualCodebookVQModel) -> dict[str, int]:
    """Numbers in the backbone, in the quantizer, and bytes of the codes as a decoder needs them (float32)."""
    quantizer = sum(tensor.numel() for tensor in model.quantize.state_dict().values())
    backbone = sum(weight.numel() for weight in model.parameters())
    backbone -= sum(weight.numel() for weight in model.quantize.parameters())
    codes = sum(4 * codebook.size * codebook.dim for codebook in model.quantize.codebooks.values())
    return {"backbone": backbone, "quantizer": quantizer, "codebook_bytes": codes}


def run_jobs(jobs: Iterable[Job], arguments: argparse.Namespace, stop: StopRequest) -> bool:
    """Trains and measures what is missing, the report after each.

    A job that another process has begun is left to it. False when one was, when it was asked to stop or time was up.
    """
    limit, complete = arguments.max_minutes * 60, True
    deadline = time.monotonic() + limit if limit else None
    for job in jobs:
        left = (deadline - time.monotonic()) / 60 if deadline else 0.0
        if stop.requested or left < 0:
            return False
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(job.folder / ".lock", blocking=False):
                done = _run_job(job, arguments, stop, left)
        except Timeout:
            print(f"{job.row.name}, seed {job.seed}: it is being trained by another process", file=sys.stderr)
            complete = False
            continue
        if not done:
            return False
        with _sole_writer(arguments):
            write_report(Path(arguments.output))
    return complete


def _run_job(job: Job, arguments: argparse.Namespace, stop: StopRequest, minutes: float) -> bool:
    lines = read_lines(Path(arguments.output) / "results.jsonl")
    if any(line["key"] == job.key and "failed" in line for line in lines):
        return True
    print(f"{job.row.name}, seed {job.seed}", file=sys.stderr)
    try:
        return train(job, stop, minutes) and evaluate(job, arguments.eval_datasets, arguments, stop)
    except NonFiniteError as error:
        return _append_failure(job, str(error), arguments)  # to diverge is a result, too


def main(argv: Sequence[str] | None = None) -> int:
    """0: all rows are done, or it was asked to stop and the same command goes on; 2: bad input."""
    arguments = _parser().parse_args(argv)
    arguments.eval_datasets = arguments.eval_datasets or [arguments.dataset]
    with StopRequest().watching() as stop:
        try:
            rows = [read_row(name) for name in arguments.rows]
            jobs = [build_job(row, seed, arguments) for seed in arguments.seeds for row in rows]
            _check(jobs, arguments)
            finished = run_jobs(jobs, arguments, stop)
        except ValueError as error:
            print(f"quality.py: error: {error}", file=sys.stderr)
            return 2
    output = Path(arguments.output)
    with _sole_writer(arguments):
        write_report(output)
    if (output / "table.md").is_file():
        print((output / "table.md").read_text())
    if not finished:
        print(f"stopped; the same command goes on ({output})")
    return 0


def _check(jobs: list[Job], arguments: argparse.Namespace) -> None:
    """Opens every data set and compares the conditions with those in `--output`, before anything is written."""
    if len({job.folder for job in jobs}) < len(jobs):
        raise ValueError(f"`--rows` and `--seeds` must name every run once, got {' '.join(arguments.rows)}")
    names = [public_name(dataset) for dataset in arguments.eval_datasets]
    if len(set(names)) < len(names):
        raise ValueError(f"`--eval-datasets` must have names of their own, got {' '.join(names)}")
    load_images(arguments.dataset, split=jobs[0].run.data.train_split)
    for dataset in arguments.eval_datasets:
        load_images(dataset, split=arguments.eval_split)
    _load_networks(arguments, jobs[0], torch.device("cpu"))
    for job in jobs:
        if job.row.name not in CODECS:
            with torch.device("meta"):
                DualCodebookVQModel(**asdict(job.run.model))
    output = Path(arguments.output)
    path, here = output / "conditions.json", conditions(jobs[0], arguments)
    output.mkdir(parents=True, exist_ok=True)
    with _sole_writer(arguments):
        there = read_json(path) or here
        different = [key for key in here if here[key] != there.get(key)]
        if different:
            raise ValueError(f"`--output` {output} has results of another {', '.join(different)}: name another folder")
        write_json(path, here)


def _sole_writer(arguments: argparse.Namespace) -> FileLock:
    """Held by whoever writes what several processes share: conditions, results and the report."""
    return FileLock(Path(arguments.output) / ".lock")


def _fit_codec(job: Job) -> bool:
    """The linear codec: patches as large as a position of the rows, fitted to the first crops that they see."""
    started = time.perf_counter()
    images = TrainingImages(job.run.data, job.seed).first(CODEC_IMAGES)
    sizes, factor = CODECS[job.row.name], job.run.model.downsample_factor
    codec = PatchLinearCodec(sizes, min(CODEC_COMPONENTS, 3 * factor**2), factor)
    codec.fit(images, seed=job.seed)
    job.folder.mkdir(parents=True, exist_ok=True)
    codec.save(job.folder / "codec.safetensors")
    numbers = {"backbone": codec.basis.numel() + codec.mean.numel(), "quantizer": sum(sizes) * codec.components}
    record = {"steps": 0, "pictures": len(images), "seconds": round(time.perf_counter() - started, 1)}
    numbers["codebook_bytes"] = 4 * numbers["quantizer"]
    write_json(job.record, {**record, **_machine(torch.device("cpu")), "parameters": numbers})
    return True


def _append_failure(job: Job, message: str, arguments: argparse.Namespace) -> bool:
    line = {"row": job.row.name, "seed": job.seed, "evaluated_on": None, "key": job.key, "failed": message}
    with _sole_writer(arguments):
        _append(Path(arguments.output) / "results.jsonl", line)
    print(f"{job.row.name}, seed {job.seed}: {message}", file=sys.stderr)
    return True


def _flags(settings: dict[str, Any]) -> list[str]:
    """Through the trainer's own parser, so that types are checked in one place."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _conditions(run: RunConfig) -> dict[str, Any]:
    """What decides the numbers beside model, recipe and seed. Defaults are left out: a later field changes nothing."""
    sections, result = _public_run(run), {}
    for section, kind in (("data", DataArguments), ("training", TrainArguments)):
        defaults, values = {**asdict(kind()), "mixed_precision": "no"}, sections[section]
        kept = [key for key in values if key not in ("seed", *RECIPE_FIELDS) and values[key] != defaults[key]]
        result[section] = {key: values[key] for key in kept}
    return result


def _recipe(training: dict[str, Any]) -> dict[str, Any]:
    """The fields of the recipe; token noise only where there is some: rows without it keep their keys."""
    noise = training.get("token_noise", 0)
    return {
        key: value
        for key, value in training.items()
        if key in RECIPE_FIELDS and (noise or not key.startswith("token_noise"))
    }


def _public_run(run: RunConfig) -> dict[str, Any]:
    """The run without this machine's folders."""
    sections = run.to_dict()
    sections["data"]["dataset"] = public_name(sections["data"]["dataset"])
    sections["training"] = {key: value for key, value in sections["training"].items() if key not in INCIDENTAL}
    return sections


def _machine(device: torch.device) -> dict[str, Any]:
    versions = {}
    for library in ("torch", "diffusers", "accelerate", "datasets", "vector-quantize-pytorch"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {"hardware": hardware(device), "versions": versions}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def _append(path: Path, line: dict[str, Any]) -> None:
    """One JSON line; what a killed run left of its last one keeps a line of its own."""
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Quantizers side by side, at equal conditions.", allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", required=True, help="trained on: Hub id or folder")
    add("--eval-datasets", nargs="+", help="measured on (default: the same)")
    add("--rows", nargs="+", default=DEFAULT_ROWS, help=f"default: {' '.join(DEFAULT_ROWS)}")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--backbone", default=HERE / "small-f8.yaml", help="YAML file: network, data, losses, schedule")
    add("--steps", type=int, default=0, help="0: the backbone file's; a longer warm-up is cut to a tenth of them")
    add("--size", type=int, default=0, help="side of crops and of the evaluation in pixels; 0: the backbone file's")
    add("--batch-size", type=int, default=0, help="0: the backbone file's")
    add("--output", default="runs/quality", help="folder of results, table, figures and models")
    add("--eval-split", default="test")
    add("--eval-limit", type=int, default=0, help="measure the first N images only; 0: all")
    add("--eval-batch-size", type=int, default=16)
    add("--lite2", action="store_true", help="measure KD, FD and PD in EfficientNet-Lite2's features too")
    add("--max-minutes", type=float, default=0.0, help="stop in time; the same command goes on")
    add("--checkpoint-every", type=int, default=250, help="steps between checkpoints")
    add("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
