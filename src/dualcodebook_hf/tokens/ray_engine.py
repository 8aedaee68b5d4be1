"""The shards of a token data set on a Ray cluster: Ray Data hands their numbers to `RayShardTokenizer`.

An actor that dies is started again by Ray, and its shard with it: a shard depends on its number alone, and has its name
once it is whole.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from ..malloc import keep_freed_memory
from .tokenizing import Shard, TokenizeJob


class RayShardTokenizer:
    """For `ray.data.Dataset.map_batches`: batches of {"shard": numbers} become {"shard": numbers, "done": pickles}.

    A pickle holds the `Shard`, or the ValueError that says why there is none: Ray would bury it in tracebacks.

    Args:
        job: the same on every worker; the paths in it must be there on all machines.
    """

    def __init__(self, job: TokenizeJob) -> None:
        keep_freed_memory()  # an actor is a process of its own
        self.tokenizer = job.prepare()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        """Writes the shards of a batch."""
        return {"shard": list(batch["shard"]), "done": [self._write(int(number)) for number in batch["shard"]]}

    def _write(self, shard: int) -> bytes:
        try:
            return pickle.dumps(self.tokenizer.write(shard))
        except ValueError as error:
            return pickle.dumps(error)


def tokenize_on_ray(
    job: TokenizeJob, shards: Sequence[int], workers: int, gpus: float = 0, address: str | None = None
) -> Iterator[Shard]:
    """Writes shards on a Ray cluster; yields each once it is there.

    Args:
        job: prepared before, so that its folder exists.
        shards: their numbers.
        workers: actors, each with the model.
        gpus: of each actor.
        address: of a running cluster, "auto" for that of this machine; None: a cluster of this process.

    Raises ValueError as `ShardTokenizer.write` does.
    """
    own = not ray.is_initialized()
    if own:
        ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        numbers = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        resources = {"num_gpus": gpus} if gpus else {"num_cpus": 1}
        done = numbers.map_batches(
            RayShardTokenizer, fn_constructor_args=(job,), batch_size=1, concurrency=workers, **resources
        )
        for row in done.iter_rows():
            shard = pickle.loads(row["done"])
            if isinstance(shard, ValueError):
                raise shard
            yield shard
    finally:
        if own:
            ray.shutdown()
