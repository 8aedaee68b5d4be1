"""What a generator's settings may be, known without torch: command lines tell it in their help."""

from __future__ import annotations

ORDERS = ("confidence", "halton")
UNITS = ("tokens", "positions", "books")  # hidden together in training, revealed together in sampling
MASKING_SCHEDULES = ("arccos", "cosine", "linear")
GUIDANCE_SCHEDULES = ("constant", "cosine")
# How is sampled unless told; docs/generator.md measures others.
STEPS, GUIDANCE_SCALE, TEMPERATURE = 32, 2.0, 0.8
CHOICE_TEMPERATURE = (4.5, 0.0)


def check_network(
    hidden_size: int, num_layers: int, num_attention_heads: int, mlp_ratio: float, dropout: float
) -> None:
    """Raises ValueError, by name, for a size of `DualCodebookTransformer` that is wrong."""
    for name, value in (
        ("hidden_size", hidden_size),
        ("num_layers", num_layers),
        ("num_attention_heads", num_attention_heads),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if hidden_size % num_attention_heads:
        raise ValueError(f"`num_attention_heads` must divide hidden_size={hidden_size}, got {num_attention_heads}")
    if not mlp_ratio > 0:
        raise ValueError(f"`mlp_ratio` must be above 0, got {mlp_ratio}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must lie in [0, 1), got {dropout}")
