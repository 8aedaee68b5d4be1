"""diffusers' face of the tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, is_accelerate_available

from .configuration_dualcodebook import DualCodebookConfig
from .core import NO_SPLIT_MODULES, DualCodebookCore, DualCodebookOutput
from .presets import load_preset

# Keys that transformers writes into the shared config.json; they are not arguments of ours.
TRANSFORMERS_KEYS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version", "transformers_weights"}
# What finds a config.json; the other arguments of `from_pretrained` are for the weights.
CONFIG_LOADING_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# Where transformers finds the classes when the code files lie in the folder (`trust_remote_code=True`).
AUTO_MAP = {
    "AutoConfig": "configuration_dualcodebook.DualCodebookConfig",
    "AutoModel": "modeling_dualcodebook.DualCodebookModel",
}


class DualCodebookVQModel(ModelMixin, AutoencoderMixin, ConfigMixin, DualCodebookCore):
    """Dual Codebook VQ tokenizer (arXiv 2503.10832) with the interface of diffusers' VQModel.

    The arguments are the fields of `DualCodebookConfig`, described there; the defaults are the paper's.
    Raises ValueError for a field that is wrong.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False
    _no_split_modules = NO_SPLIT_MODULES
    _skip_layerwise_casting_patterns = ["quantize"]
    # Through accelerate, which the base install lacks; see `from_pretrained`.
    _keep_in_fp32_modules = ["quantize"] if is_accelerate_available() else None

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        backbone: str = "vqgan",
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        layers_per_level: tuple[int, ...] | None = None,
        norm_num_groups: int = 32,
        attention: bool = True,
        mid_attention: bool | None = None,
        linear_shortcut: bool = False,
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
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> DualCodebookVQModel:
        """diffusers' method (folder or Hub id, eval mode); the codebooks stay in float32 under any `dtype`.

        Raises OSError for a folder that transformers saved last: its weights lie in another file, beside stale ones.
        """
        where = {key: kwargs[key] for key in CONFIG_LOADING_ARGUMENTS if key in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, **where)
        if "transformers_version" in config and "transformers_weights" not in config:
            raise OSError(
                f"'{pretrained_model_name_or_path}' was saved by transformers, as model.safetensors: load it by "
                "DualCodebookModel and give its state_dict() to DualCodebookVQModel(**config.fields_dict())"
            )
        if cls._keep_in_fp32_modules is not None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        loaded = super().from_pretrained(pretrained_model_name_or_path, **{"low_cpu_mem_usage": False, **kwargs})
        if dtype is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).cast_backbone(dtype)
        return loaded

    @classmethod
    def from_preset(cls, name: str, **overrides) -> DualCodebookVQModel:
        """A model with fresh weights.

        Args:
            name: a preset, `paper`, `base` or `tiny`, or a YAML file.
            **overrides: replace single fields.
        """
        return cls(**{**load_preset(name)["model"], **overrides})

    def half(self) -> DualCodebookVQModel:
        """float16 but for the codebooks: a pipeline that upcasts would come back to rounded ones (`force_upcast`)."""
        self.cast_backbone(torch.float16)
        return self

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DualCodebookOutput | tuple:
        """Images (B, C, H, W) in [-1, 1] -> DualCodebookOutput with a `.sample` of the same size.

        Raises ValueError when the shape or the type of `sample` is wrong. `return_dict=False`: the same as a tuple.
        """
        output = self.autoencode(sample)
        return output if return_dict else output.to_tuple()
