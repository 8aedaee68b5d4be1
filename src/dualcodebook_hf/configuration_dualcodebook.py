"""`DualCodebookConfig`: every hyper-parameter of the model, checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from transformers import PreTrainedConfig

from .configuration_fields import MOST_LABELS, DualCodebookFields, documents_fields, is_integer, shown

DECODER_FIELDS = ("decoder_block_out_channels", "decoder_layers_per_level", "overlapping_shortcut")


@documents_fields("Args")
class DualCodebookConfig(DualCodebookFields, PreTrainedConfig):
    """Configuration of the Dual Codebook VQ tokenizer (arXiv 2503.10832); the defaults are the paper's.

    Takes the arguments of transformers' `PreTrainedConfig` too. Raises ValueError for a field that is wrong.
    """

    model_type = "dualcodebook"

    def __post_init__(self, **kwargs) -> None:
        self.check()
        labels = kwargs.get("num_labels")
        if labels is not None and not (is_integer(labels) and 0 <= labels <= MOST_LABELS):
            raise ValueError(f"`num_labels` must be a whole number in [0, {MOST_LABELS}], got {shown(labels)}")
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, KeyError, TypeError) as error:  # of transformers' own fields, such as `dtype`
            raise ValueError(f"the configuration has a wrong field of transformers' own: {error}") from error


def config_hash(config) -> str:
    """Twelve hex digits that identify the architecture. Tokens of one hash do not fit a model of another.

    Fields at their default are left out, so that a field that a later version adds changes no hash; and so is the shape
    that a decoder has of its own, as decoders of other shapes read the same tokens.

    Args:
        config: anything with the fields as attributes (both faces' `model.config`).
    """
    plain = {}
    for name, default in dataclasses.asdict(DualCodebookFields()).items():
        value = getattr(config, name)
        value = list(value) if isinstance(value, (list, tuple)) else value
        if value != default and name not in DECODER_FIELDS:
            plain[name] = value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
