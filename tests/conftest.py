"""Fixtures: real classes at tiny size and images that need no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One arithmetic in commands, pages and tests on all machines. With AVX-512 bf16 commands and the demo compute in
# bfloat16 when they measure that to be faster, which other work may decide, and then a few tokens are others.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"

import pytest
import torch

from dualcodebook_hf import DualCodebookVQModel

# Two processes that each want all cores are several times slower than two that want one.
torch.set_num_threads(1)

TINY = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention": False,
    "global_codebook_size": 32,
    "local_codebook_size": 16,
    "global_dim": 8,
    "local_dim": 4,
    "global_transformer_layers": 1,
    "transformer_heads": 2,
    "transformer_feed_forward": 16,
    "transformer_dropout": 0.0,
}

# f = 16, as the embedded checkpoint's, and codebooks of other sizes.
TINY_F16 = {
    "block_out_channels": [4, 4, 4, 4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention": False,
    "global_dim": 4,
    "local_dim": 4,
    "global_codebook_size": 32,
    "local_codebook_size": 40,
    "global_transformer_layers": 1,
    "transformer_heads": 2,
    "transformer_feed_forward": 8,
}


def spread_codes(model):
    """Puts the codes where the latents are, so that a random model uses many of them."""
    generator = torch.Generator().manual_seed(1)
    for codebook in model.quantize.codebooks.values():
        if codebook.is_table:
            codebook.set_codes(torch.randn(codebook.size, codebook.dim, generator=generator))
    return model


def forget_accelerate():
    """accelerate keeps its state for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def fresh_accelerate():
    """Leaves no state of accelerate to the next test."""
    yield
    forget_accelerate()


@pytest.fixture
def tiny_config():
    return dict(TINY)


@pytest.fixture
def tiny_model():
    """A random model with f = 2 and codebooks of 32 and 16 codes, in eval mode."""
    torch.manual_seed(0)
    return spread_codes(DualCodebookVQModel(**TINY)).eval()


@pytest.fixture
def images():
    """Two random images of an odd size, (2, 3, 13, 18) in [-1, 1]."""
    return torch.rand(2, 3, 13, 18, generator=torch.Generator().manual_seed(0)) * 2 - 1
