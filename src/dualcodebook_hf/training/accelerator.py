"""accelerate's Accelerator for a run, and whether it does what the arguments say."""

from __future__ import annotations

import os
from typing import Any

import psutil
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, parse_flag_from_env

from .run_arguments import PRECISIONS, RunArguments

SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # ACCELERATE_USE_... says so, even where one process ignores it
ON_A_CPU = "several processes on a CPU are started by `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`"


def build_accelerator(arguments: RunArguments) -> Accelerator:
    """accelerate's Accelerator for these arguments; a task keeps its buffers equal between processes, not DDP.

    accelerate's launcher speaks through the environment, which fills in some arguments and overrules others.

    Raises ValueError where it would not run what the arguments say.
    """
    _check_sharding()
    accelerator = Accelerator(
        mixed_precision=_precision(arguments),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=arguments.trackers or None,
        project_dir=arguments.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    _check_processes(arguments, accelerator)
    precision = accelerator.mixed_precision
    if precision != "no" and not accelerator.native_amp:  # it would be float32
        raise ValueError(f"`mixed_precision` {precision!r} is not possible on this device ({accelerator.device.type})")
    accumulated = accelerator.gradient_accumulation_steps
    if accumulated != arguments.gradient_accumulation_steps:
        raise ValueError(
            f"`gradient_accumulation_steps` is {arguments.gradient_accumulation_steps}, but accelerate was started "
            f"with {accumulated}"
        )
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ValueError(f"`compile` is the argument that compiles, but accelerate was started with {backend.value}")
    return accelerator


def what_ran(accelerator: Accelerator) -> dict[str, Any]:
    """The arguments that were left to the launcher, as it resolved them."""
    return {"mixed_precision": accelerator.mixed_precision, "num_processes": accelerator.num_processes}


def _precision(arguments: RunArguments) -> str:
    """The argument, or what the launcher says where there is none."""
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if said not in PRECISIONS:
        names = ", ".join(PRECISIONS)
        raise ValueError(f"`mixed_precision` must be one of {names}, but accelerate was started with {said!r}")
    wanted = arguments.mixed_precision
    if wanted is not None and said not in ("no", wanted):  # "no" is also what it says where nobody asked
        raise ValueError(f"`mixed_precision` is {wanted!r}, but accelerate was started with {said!r}")
    return wanted or said


def _check_sharding() -> None:
    """Before accelerate is built: it would load the library, or silently do without."""
    for kind in SHARDED:
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise ValueError(f"`distributed_type` must be MULTI_GPU or NO, accelerate was started with {kind}")


def _check_processes(arguments: RunArguments, accelerator: Accelerator) -> None:
    count, started = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if count != started:
        raise ValueError(f"WORLD_SIZE is {started}, but accelerate trains with {count} process(es): {ON_A_CPU}")
    if count == 1 and _launcher_wanted_several():
        raise ValueError(f"`--num_processes`: accelerate's launcher was asked for several and started one: {ON_A_CPU}")
    if arguments.num_processes not in (None, count):
        raise ValueError(
            f"`num_processes` is {arguments.num_processes}, but {count} were started; null takes what is started"
        )


def _launcher_wanted_several() -> bool:
    """For several processes it names a master to the first one, even on a CPU, where it starts no other."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "MASTER_ADDR" not in os.environ:
        return False
    try:
        return "MASTER_ADDR" not in psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return False
