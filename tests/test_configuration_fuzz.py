"""Configurations from anywhere: mutations of real ones, each a model that works or a ValueError."""

import contextlib
import dataclasses
import json
import random
import resource
import signal

import pytest
import torch
from conftest import TINY

from dualcodebook_hf import DualCodebookConfig, DualCodebookModel, DualCodebookVQModel
from dualcodebook_hf.configuration_fields import (
    BACKBONES,
    MOST_PARAMETERS,
    QUANTIZERS,
    UPDATES,
    DualCodebookFields,
)

CASES = 400
SECONDS = 120  # of CPU time, for all of them: little for one that hangs
EXTRA_MEMORY = 3 * 2**30  # of addresses, not of memory in use

SMALL = {name: value for name, value in TINY.items() if name != "transformer_dropout"}
SCALARS = {"global_dim": 2, "local_dim": 2, "global_transformer_layers": 0}
STARTS = [
    SMALL,
    {**SMALL, "backbone": "dcae", "layers_per_level": [0, 1], "linear_shortcut": True},
    {
        **SMALL,
        "backbone": "dcae",
        "decoder_block_out_channels": [8, 16],
        "decoder_layers_per_level": [1, 2],
        "linear_shortcut": True,
        "overlapping_shortcut": True,
    },
    {**SMALL, "quantizer": "single", "global_codebook_size": 0, "global_dim": 0},
    {**SMALL, "quantizer": "residual"},
    {**SMALL, **SCALARS, "quantizer": "lfq", "global_codebook_size": 4, "local_codebook_size": 4},
    {
        **SMALL,
        **SCALARS,
        "quantizer": "fsq",
        "fsq_levels": [3, 4, 5, 6],
        "global_codebook_size": 12,
        "local_codebook_size": 30,
    },
    {**SMALL, "global_transformer_layers": 0, "global_update": "ema", "local_update": "linear"},
]
NUMBERS = [-1, 0, 1, 2, 3, 4, 7, 12, 64, 4096, 10**4, 10**6, 2**22, 10**9, 2**31, 2**63, 10**30, 10**400]
NUMBERS += [0.5, -0.0, 1.0, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")]
LISTS = [
    [],
    [0],
    [8],
    [8, 16],
    [16, 8],
    [5, 7],
    [8] * 11,
    [8] * 10**5,
    [4096, 8192],
    [8192] * 10,
    [10**6] * 2,
    [10**30],
]
LISTS += [[True, True], [-4, 8], [[8], [16]], [8.0, 16.0], ["8"], [None, 8], [float("nan")], [1, 1], [0, 1], [1, 32]]
MILD_NUMBERS, MILD_LISTS = [0.25, 0.5, 1, 2, 4, 8, 16], [[8], [16, 8], [8, 8, 16], [4, 4], [1, 1], [0, 2], None]
ODDITIES = [None, True, False, "", "8", "x" * 10**5, {}, {"size": 8}, *BACKBONES, *QUANTIZERS, *UPDATES]
NAMES = [field.name for field in dataclasses.fields(DualCodebookFields)]
LISTED = {field.name for field in dataclasses.fields(DualCodebookFields) if "list" in str(field.type)}
OTHERS = {  # transformers' own fields, which a config.json may set too
    "num_labels": [3, -1, 10**9, 10**30, "3", True],
    "dtype": ["float32", "no_type", "Tensor", 3],
    "id2label": [{"0": "a"}, 3, "x", {"x": 1}],
}


def mutated(random_numbers):
    """Fields of one of the models that work, with some of them replaced."""
    fields = dict(random_numbers.choice(STARTS))
    for _ in range(random_numbers.choice([1, 1, 1, 2, 4])):
        name, kind = random_numbers.choice(NAMES), random_numbers.random()
        listed = name in LISTED
        choices = LISTS if listed else NUMBERS
        if kind < 0.5:
            choices = MILD_LISTS if listed else MILD_NUMBERS
        elif kind > 0.8:
            choices = random_numbers.choice([NUMBERS, LISTS, ODDITIES])
        fields[name] = random_numbers.choice(choices)
    if random_numbers.random() < 0.1:
        name = random_numbers.choice(sorted(OTHERS))
        fields[name] = random_numbers.choice(OTHERS[name])
    return fields


def own(fields):
    return {name: value for name, value in fields.items() if name not in OTHERS}


def by_configuration(fields, folder):
    return DualCodebookModel(DualCodebookConfig(**fields))


def by_attributes(fields, folder):
    """As transformers applies the keywords of its `from_pretrained`: after the configuration was made."""
    config = DualCodebookConfig(**SMALL)
    for name, value in own(fields).items():
        setattr(config, name, value)
    return DualCodebookModel(config)


def by_diffusers(fields, folder):
    return DualCodebookVQModel(**own(fields))


def by_files(fields, folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "dualcodebook", **fields}))
    return DualCodebookModel(DualCodebookConfig.from_pretrained(folder))


def by_diffusers_files(fields, folder):
    (folder / "config.json").write_text(json.dumps({"_class_name": "DualCodebookVQModel", **own(fields)}))
    return DualCodebookVQModel.from_config(DualCodebookVQModel.load_config(folder))


DOORS = [by_configuration, by_attributes, by_diffusers, by_files, by_diffusers_files]


@contextlib.contextmanager
def limited(seconds, extra_memory):
    """An endless computation is a TimeoutError, and a large allocation a MemoryError or torch's RuntimeError."""

    def expire(*_):
        raise TimeoutError(f"no answer within {seconds} seconds of CPU time")

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, expire)
    resource.setrlimit(resource.RLIMIT_AS, (size + extra_memory, before[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def works(model):
    """An image through the network, without storage."""
    factor, config = model.downsample_factor, model.config
    pixels = torch.empty(1, config.in_channels, 2 * factor, 2 * factor)
    latents = model._latents(pixels)  # `encode` of transformers' face quantizes too, which needs values
    assert latents.shape == (1, config.vq_embed_dim, 2, 2)
    sample = model.decode(latents, force_not_quantize=True).sample
    assert sample.shape == (1, config.out_channels, 2 * factor, 2 * factor)


@pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="needs a POSIX system")
def test_every_configuration_is_a_model_that_works_or_a_value_error(tmp_path):
    random_numbers, answers = random.Random(0), {"accepted": 0, "refused": 0}
    with limited(SECONDS, EXTRA_MEMORY), torch.device("meta"):
        for case in range(CASES):
            fields, door = mutated(random_numbers), DOORS[case % len(DOORS)]
            try:
                model = door(fields, tmp_path)
            except ValueError as error:
                answers["refused"] += 1
                assert len(str(error)) < 600, (fields, str(error)[:700])
                continue
            except Exception as error:
                raise AssertionError(f"case {case}, {door.__name__}: {str(fields)[:1000]}") from error
            answers["accepted"] += 1
            try:
                works(model)
            except Exception as error:
                raise AssertionError(f"case {case}, {door.__name__}, accepted: {str(fields)[:1000]}") from error
            assert sum(parameter.numel() for parameter in model.parameters()) < 1.5 * MOST_PARAMETERS
    assert min(answers.values()) > CASES / 10, answers
