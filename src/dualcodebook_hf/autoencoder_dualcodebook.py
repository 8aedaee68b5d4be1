"""diffusers' face of the tokenizer."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, is_accelerate_available
from transformers.utils import SAFE_WEIGHTS_NAME

from .configuration_dualcodebook import DualCodebookConfig
from .configuration_fields import documents_fields
from .core import NO_SPLIT_MODULES, DualCodebookCore, DualCodebookOutput, Method
from .presets import load_preset
from .weights import (
    LOCATION_ARGUMENTS,
    StrictWeights,
    find_shards,
    find_weights,
    missing_weights,
    readable,
)

# Keys that transformers writes into the shared config.json; they are not arguments of ours.
TRANSFORMERS_KEYS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version", "transformers_weights"}
# Where transformers finds the classes when the code files lie in the folder (`trust_remote_code=True`).
AUTO_MAP = {
    "AutoConfig": "configuration_dualcodebook.DualCodebookConfig",
    "AutoModel": "modeling_dualcodebook.DualCodebookModel",
}


registered: Callable[[Method], Method] = register_to_config  # which keeps no signature


@documents_fields("Args")
class DualCodebookVQModel(StrictWeights, ModelMixin, DualCodebookCore, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    """Dual Codebook VQ tokenizer (arXiv 2503.10832) with the interface of diffusers' VQModel.

    The defaults are the paper's. Raises ValueError for a field that is wrong.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False
    _no_split_modules = NO_SPLIT_MODULES  # type: ignore[assignment]
    _skip_layerwise_casting_patterns = ["quantize"]  # type: ignore[assignment]
    # Through accelerate, which the base install lacks; see `from_pretrained`.
    _keep_in_fp32_modules = ["quantize"] if is_accelerate_available() else None  # type: ignore[assignment]

    if TYPE_CHECKING:  # diffusers' own: a wrapped method, which mypy does not bind to the model, and a plain dict

        @property
        def config(self) -> Any: ...
        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]

    @registered
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        backbone: str = "vqgan",
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        layers_per_level: tuple[int, ...] | None = None,
        decoder_block_out_channels: tuple[int, ...] | None = None,
        decoder_layers_per_level: tuple[int, ...] | None = None,
        norm_num_groups: int = 32,
        attention: bool = True,
        mid_attention: bool | None = None,
        linear_shortcut: bool = False,
        overlapping_shortcut: bool = False,
        latent_channels: int | None = None,
        vq_embed_dim: int | None = None,
        quantizer: str = "dual",
        global_codebook_size: int = 512,
        local_codebook_size: int = 512,
        global_dim: int = 128,
        local_dim: int = 128,
        fsq_levels: tuple[int, ...] | None = None,
        global_transformer_layers: int = 6,
        local_transformer_layers: int = 0,
        transformer_heads: int = 8,
        transformer_feed_forward: int = 2048,
        transformer_dropout: float = 0.1,
        scale_codes_to_latents: bool = False,
        global_update: str = "gradient",
        local_update: str = "gradient",
        codebook_ema_decay: float = 0.99,
        revival_threshold: float = 0.1,
        commitment_cost: float = 0.25,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        names = [spec.name for spec in dataclasses.fields(DualCodebookConfig) if spec.name in self.config]
        config = DualCodebookConfig(**{name: self.config[name] for name in names})
        # Derived widths and the keys by which transformers finds the same weights file.
        self.register_to_config(
            vq_embed_dim=config.vq_embed_dim,
            latent_channels=config.latent_channels,
            model_type=config.model_type,
            architectures=["DualCodebookModel"],
            transformers_weights=SAFETENSORS_WEIGHTS_NAME,
            auto_map=AUTO_MAP,
        )
        self.build_layers(config)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """Hides transformers' own keys from diffusers' loader."""
        config_dict = {key: value for key, value in config_dict.items() if key not in TRANSFORMERS_KEYS}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self:
        """diffusers' method (folder or Hub id, eval mode), strict; the codebooks stay in float32 under any `dtype`.

        A folder that transformers saved is loaded too. Raises ValueError, naming the file and the tensors, for weights
        that do not fit config.json, whole, or are not finite; OSError where there are none.
        """
        source = pretrained_model_name_or_path
        location = {key: kwargs[key] for key in LOCATION_ARGUMENTS if key in kwargs}
        with readable(source, kwargs):
            config: Any = cls.load_config(source, **location)
            if not is_saved_by_transformers(config):
                return cls._load(source, **kwargs)
            with _as_diffusers_saves(source, config, kwargs.get("variant"), location) as folder:
                options = {key: value for key, value in kwargs.items() if key not in LOCATION_ARGUMENTS}
                loaded = cls._load(folder, **options, local_files_only=True)
        (loaded[0] if isinstance(loaded, tuple) else loaded).register_to_config(_name_or_path=str(source))
        return loaded

    @classmethod
    def _load(cls, source: str | os.PathLike, **kwargs: Any) -> Any:
        if cls._keep_in_fp32_modules is not None:
            return super().from_pretrained(source, **kwargs)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        loaded = super().from_pretrained(source, **{"low_cpu_mem_usage": False, **kwargs})
        if dtype is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).cast_backbone(dtype)
        return loaded

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A model with fresh weights.

        Args:
            name: a preset, `paper`, `base` or `tiny`, or a YAML file.
            **overrides: replace single fields.
        """
        return cls(**{**load_preset(name)["model"], **overrides})

    def half(self) -> Self:
        """float16 but for the codebooks: a pipeline that upcasts would come back to rounded ones (`force_upcast`)."""
        self.cast_backbone(torch.float16)
        return self

    @overload
    def forward(self, sample: torch.Tensor, return_dict: Literal[True] = True) -> DualCodebookOutput: ...
    @overload
    def forward(self, sample: torch.Tensor, return_dict: Literal[False]) -> tuple: ...
    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DualCodebookOutput | tuple:
        """Images (B, C, H, W) in [-1, 1] -> DualCodebookOutput with a `.sample` of the same size.

        Raises ValueError when the shape or the type of `sample` is wrong. `return_dict=False`: the same as a tuple.
        """
        output = self.autoencode(sample)
        return output if return_dict else output.to_tuple()


def is_saved_by_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to weights under transformers' names; what diffusers' face saved may lie beside."""
    return "transformers_version" in config and "transformers_weights" not in config


@contextmanager
def _as_diffusers_saves(
    source: str | os.PathLike, config: Mapping[str, Any], variant: str | None, location: Mapping[str, Any]
) -> Iterator[Path]:
    """Yields a folder of links to what transformers saved in `source`, under the names that diffusers looks for."""
    weights = find_weights(source, SAFE_WEIGHTS_NAME, variant, **location)
    if weights is None:
        raise OSError(missing_weights(source, location.get("subfolder"), variant))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shards = [] if weights.suffix == ".safetensors" else find_shards(weights, source, **location)
        name = weights.name.replace(Path(SAFE_WEIGHTS_NAME).stem, Path(SAFETENSORS_WEIGHTS_NAME).stem, 1)
        for link, file in {name: weights, **{shard.name: shard for shard in shards}}.items():
            (folder / link).symlink_to(file.resolve())
        (folder / DualCodebookVQModel.config_name).write_text(json.dumps(config), encoding="utf-8")
        yield folder
