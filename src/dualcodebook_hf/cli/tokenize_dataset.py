"""`dualcodebook tokenize-dataset`: a whole data set to parquet shards of tokens."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..flags import Parser, Switch, refuse_given
from ..loading import check_tokenizer_name
from ..packages import require_package
from .inputs import (
    add_batch_size,
    add_model,
    add_on_bad_image,
    add_output,
    check_folder,
    not_negative,
    positive,
    set_command,
)

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..tokens.tokenizing import Shard, ShardTokenizer, TokenizeJob


def add_tokenize_dataset(command: Parser) -> None:
    """Adds the command's flags to its parser."""
    set_command(command, _tokenize_dataset, "DATASET")
    text = "Hub id, folder of images, parquet files or webdataset tars, or such a file"
    command.add_argument("dataset", metavar="DATASET", help=text)
    _add_source(command.add_argument_group("what is read"))
    _add_crops(command.add_argument_group("crops"))
    output = command.add_argument_group("what is written")
    add_output(output, "the token data set; one that is there is continued", "token-dataset")
    add_shards(output)
    _add_processes(command.add_argument_group("processes"))
    add_model(command.add_argument_group("the tokenizer"))


def _add_source(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--config", help="configuration of a Hub data set that has several")
    group.add_argument("--split", default="train", help="split that is tokenized (default: %(default)s)")
    group.add_argument("--image-column", default="image", help="column of the images (default: %(default)s)")
    group.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME", help="other columns that are kept (default: none)"
    )
    text = "read the data set as it arrives, without storing it (default: false)"
    group.add_argument("--streaming", action=Switch, nargs=0, default=False, help=text)
    add_on_bad_image(group, "name it, record it in its shard, and go on (more than 10 and 1%% of a shard are an error)")


def _add_crops(group: argparse._ArgumentGroup) -> None:
    # Names and defaults are those of `tokens.augment.Augmentation`, which is not imported for a `--help`.
    group.add_argument(
        "--augmentation",
        choices=("center", "center-flip", "ten-crop", "random-crop", "none"),
        default="center",
        help="crops of each image; none: the whole image (default: %(default)s)",
    )
    group.add_argument(
        "--size", type=positive, default=256, metavar="PIXELS", help="side of a crop (default: %(default)s)"
    )
    group.add_argument(
        "--resample",
        choices=("bilinear", "bicubic", "lanczos"),
        default="lanczos",
        help="filter that resizes the shorter side (default: %(default)s)",
    )
    group.add_argument(
        "--crop-ranges",
        type=float,
        nargs="+",
        default=[1.1],
        metavar="X",
        help="ten-crop: ten for each, from a square X times the size; random-crop: at most so large (default: 1.1)",
    )
    group.add_argument("--crops", type=positive, default=10, metavar="N", help="of random-crop (default: %(default)s)")
    group.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="of random-crop (default: %(default)s)"
    )


def _add_processes(group: argparse._ArgumentGroup) -> None:
    add_batch_size(group, 32, "N crops in one forward pass")
    group.add_argument(
        "--workers", type=positive, metavar="N", help="threads that decode images (default: one for each core)"
    )
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: this process, or those of `accelerate launch`, torchrun or Slurm; ray: Ray Data (default: local)",
    )
    group.add_argument("--ray-workers", type=positive, default=1, metavar="N", help="ray: actors (default: 1)")
    group.add_argument("--ray-address", metavar="A", help="ray: a running cluster, such as auto (default: one here)")


def add_shards(group: argparse._ArgumentGroup) -> None:
    """Adds `--num-shards` and `--shard`."""
    group.add_argument(
        "--num-shards",
        type=positive,
        metavar="N",
        help="number of files (default: one for each 10,000 images; with --streaming one for each file)",
    )
    add_shard(group)


def add_shard(group: argparse._ActionsContainer) -> None:
    """Adds `--shard`."""
    group.add_argument(
        "--shard",
        type=not_negative,
        nargs="+",
        metavar="I",
        help="write these only, from 0 on, such as $SLURM_ARRAY_TASK_ID (default: all that are not there yet)",
    )


def own_shards(named: list[int] | None, count: int, missing: list[int]) -> list[int]:
    """What this process writes: of the shards that are missing those named or, of several processes, its share.

    Args:
        named: by `--shard`; None: all.
        count: number of shards.
        missing: those that are not there.

    Raises ValueError for a named one out of range.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for shard in named or ():
        if not 0 <= shard < count:
            raise ValueError(f"`--shard` must lie in [0, {count}), the number of shards, got {shard}")
    wanted = set(range(count) if named is None else named)
    return [shard for shard in missing if shard in wanted and shard % processes == rank]


def _tokenize_dataset(arguments: argparse.Namespace) -> int:
    require_package("datasets", "tokens")
    check_tokenizer_name(arguments.model, "--model")
    check_folder(arguments.output, "--output")
    _check_flags(arguments)
    if arguments.engine == "ray":
        require_package("ray", "ray", "--engine ray")
    tokenizer = _job(arguments).prepare()
    shards = own_shards(arguments.shard, tokenizer.info.num_shards, tokenizer.info.missing(tokenizer.output))
    started, images = time.monotonic(), _write(arguments, tokenizer, shards)
    return _report(tokenizer, images, time.monotonic() - started)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises ValueError for one that the crops, or the engine, make no use of."""
    kind = arguments.augmentation
    if kind == "none":
        refuse_given(arguments, ("size", "resample"), "is of crops: `--augmentation none` takes whole images")
    if kind not in ("ten-crop", "random-crop"):
        refuse_given(arguments, ("crop_ranges",), f"is of ten-crop and random-crop, `--augmentation` is {kind}")
    if kind != "random-crop":
        refuse_given(arguments, ("crops", "seed"), f"is of random-crop, `--augmentation` is {kind}")
    if arguments.engine != "ray":
        refuse_given(arguments, ("ray_workers", "ray_address"), "goes with `--engine ray`")


def _job(arguments: argparse.Namespace) -> TokenizeJob:
    from ..tokens.augment import Augmentation
    from ..tokens.source import TokenSource
    from ..tokens.tokenizing import TokenizeJob

    source = TokenSource(
        dataset=arguments.dataset,
        config=arguments.config,
        split=arguments.split,
        image_column=arguments.image_column,
        columns=tuple(arguments.columns),
        streaming=arguments.streaming,
    )
    augmentation = Augmentation(
        kind=arguments.augmentation,
        size=arguments.size,
        resample=arguments.resample,
        crop_ranges=tuple(arguments.crop_ranges),
        crops=arguments.crops,
        seed=arguments.seed,
    )
    shared = {name: getattr(arguments, name) for name in ("num_shards", "model", "device", "dtype", "batch_size")}
    shared |= {name: getattr(arguments, name) for name in ("workers", "on_bad_image")}
    return TokenizeJob(source=source, augmentation=augmentation, output=str(arguments.output), **shared)


def _write(arguments: argparse.Namespace, tokenizer: ShardTokenizer, shards: list[int]) -> int:
    """Writes shards with a bar on a terminal; returns the number of images."""
    from tqdm import tqdm

    counts = [tokenizer.source.count(shard, tokenizer.info.num_shards) for shard in shards]
    total = None if None in counts else sum(counts)
    images = 0
    with tqdm(total=total, desc="images", unit=" images", disable=not sys.stderr.isatty()) as bar:
        on_ray = arguments.engine == "ray"
        written = _on_ray(arguments, tokenizer, shards, bar) if on_ray else _here(tokenizer, shards, bar)
        for done in written:
            images += done.rows
            for error in done.skipped:
                tqdm.write(f"left out: {error}", file=sys.stderr)
            bar.update(len(done.skipped))
    return images


def _here(tokenizer: ShardTokenizer, shards: list[int], bar: tqdm) -> Iterator[Shard]:
    for shard in shards:
        yield tokenizer.write(shard, bar.update)


def _on_ray(arguments: argparse.Namespace, tokenizer: ShardTokenizer, shards: list[int], bar: tqdm) -> Iterator[Shard]:
    from ..tokens.ray_engine import tokenize_on_ray

    gpus = 1 if shards and tokenizer.model.device.type == "cuda" else 0
    job = tokenizer.job.at_absolute_paths()
    for done in tokenize_on_ray(job, shards, arguments.ray_workers, gpus, arguments.ray_address) if shards else ():
        bar.update(done.rows)
        yield done


def _report(tokenizer: ShardTokenizer, images: int, seconds: float) -> int:
    from ..tokens.dataset import read_summary

    info, folder = tokenizer.info, tokenizer.output
    crops = f" of {tokenizer.job.augmentation.count} crops each" if tokenizer.job.augmentation.count > 1 else ""
    if images:
        print(f"{images} images{crops} in {seconds:.1f} s: {images / seconds:.1f} images per second")
    missing = info.missing(folder)
    if missing:
        print(f"{info.num_shards - len(missing)} of {info.num_shards} shards are in {folder}")
        return 0
    info.clear_leftovers(folder)
    shards = [read_summary(info.shard_path(folder, shard)) for shard in range(info.num_shards)]
    skipped = sum(len(shard.skipped) for shard in shards)
    left_out = f"; {skipped} images that cannot be read were left out" if skipped else ""
    print(f"{folder} is complete: {info.num_shards} shards, {sum(shard.rows for shard in shards)} images{left_out}")
    return 0
