"""The demo's tests' models: real ones of four pixels per token's side."""

import torch

from dualcodebook_hf import DualCodebookVQModel

FACTOR = 4
TINY = {
    "block_out_channels": [4, 4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention": False,
    "global_dim": 4,
    "local_dim": 4,
    "global_codebook_size": 32,
    "local_codebook_size": 20,
    "global_transformer_layers": 0,
    "global_update": "ema",
    "local_update": "ema",
}
SINGLE = {"quantizer": "single", "global_codebook_size": 0, "global_dim": 0, "local_dim": 8}


def make_model(seed: int, **changes) -> DualCodebookVQModel:
    """A random model whose codes are spread, so that pictures use many of them."""
    torch.manual_seed(seed)
    model = DualCodebookVQModel(**{**TINY, **changes}).eval()
    for codebook in model.quantize.codebooks.values():
        torch.nn.init.normal_(codebook.weight, std=0.5)
    return model
