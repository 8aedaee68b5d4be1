"""transformers' face of the tokenizer."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, overload

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownEncoderBlock2D,
    AttnUpDecoderBlock2D,
    DownEncoderBlock2D,
    UpDecoderBlock2D,
)
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_dualcodebook import DualCodebookConfig
from .configuration_fields import documents_fields
from .core import NO_SPLIT_MODULES, DualCodebookCore, hooked
from .quantizers import sum_losses
from .weights import LOCATION_ARGUMENTS, check_range, check_weights, find_weights, missing_weights, readable


@dataclass
class DualCodebookModelOutput(ModelOutput):
    """Result of a forward pass over images (B, C, H, W), named as transformers' own image tokenizers name theirs.

    Attributes:
        image_tokens: int64 (B, codebooks, h, w), [:, 0] global, [:, 1] local.
        loss: scalar, mean |x - x_hat| + embedding_loss; with `return_loss=True` only.
        decoded_pixel_values: (B, C, H, W) reconstruction, about [-1, 1], not clamped.
        last_hidden_state: (B, vq_embed_dim, h, w), the latents before the codebooks.
        quantized_last_hidden_state: (B, vq_embed_dim, h, w), the latents after them.
        embedding_loss: scalar, the paper's L_global + L_local; with `return_loss=True` only.
    """

    # The tokens come first: transformers' feature extraction pipeline returns the first field.
    image_tokens: torch.LongTensor | None = None
    loss: torch.Tensor | None = None
    decoded_pixel_values: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    quantized_last_hidden_state: torch.Tensor | None = None
    embedding_loss: torch.Tensor | None = None


@dataclass
class DualCodebookEncoderOutput(ModelOutput):
    """Result of `DualCodebookModel.encode`, with the fields of Janus's and Chameleon's, in their order.

    Attributes:
        last_hidden_state: (B, vq_embed_dim, h, w), the latents before the codebooks.
        quantized_last_hidden_state: (B, vq_embed_dim, h, w), the latents after them.
        image_tokens: int64 (B, codebooks, h, w), [:, 0] global, [:, 1] local.
        embedding_loss: scalar, the paper's L_global + L_local.
    """

    last_hidden_state: torch.Tensor
    quantized_last_hidden_state: torch.Tensor | None = None
    image_tokens: torch.LongTensor | None = None
    embedding_loss: torch.Tensor | None = None

    @property
    def latents(self) -> torch.Tensor:
        """`last_hidden_state`, by the name that diffusers' VQModel gives it."""
        return self.last_hidden_state


class CheckpointedDown(GradientCheckpointingLayer, DownEncoderBlock2D):
    """A level of the `vqgan` encoder."""


class CheckpointedAttnDown(GradientCheckpointingLayer, AttnDownEncoderBlock2D):
    """A level of the `vqgan` encoder with attention."""


class CheckpointedUp(GradientCheckpointingLayer, UpDecoderBlock2D):
    """A level of the `vqgan` decoder."""


class CheckpointedAttnUp(GradientCheckpointingLayer, AttnUpDecoderBlock2D):
    """A level of the `vqgan` decoder with attention."""


# diffusers' networks checkpoint their levels from outside. transformers wants levels that do it themselves: only these
# count for its `every_n_layers`, and its own test suite fails a model that has none.
CHECKPOINTED = {
    DownEncoderBlock2D: CheckpointedDown,
    AttnDownEncoderBlock2D: CheckpointedAttnDown,
    UpDecoderBlock2D: CheckpointedUp,
    AttnUpDecoderBlock2D: CheckpointedAttnUp,
}


@documents_fields("Fields of the configuration")
class DualCodebookModel(PreTrainedModel, DualCodebookCore):
    """Dual Codebook VQ tokenizer (arXiv 2503.10832) as a transformers model.

    Same weights, same names and same methods (`tokenize`, `detokenize`, `encode`, `decode`, `quantize`) as
    `DualCodebookVQModel`: a folder saved by that class loads here as it is. `encode`, `decode`, `get_image_tokens` and
    `codebook_size` are also those of transformers' own image tokenizers (Janus, Emu3, Chameleon). These have one
    codebook, this model two: its image tokens are (B, 2, h, w), one grid for each codebook, as the codes of
    transformers' audio codecs are, and no product ids (`quantize.to_product_ids` makes them).

    Args:
        config: a `DualCodebookConfig`; its fields stand below.
    """

    config_class = DualCodebookConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = NO_SPLIT_MODULES
    _keep_in_fp32_modules_strict = ["quantize"]
    config: DualCodebookConfig

    if TYPE_CHECKING:  # transformers' own are wrapped, and mypy does not bind them to the model

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]
        def cuda(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]
        def half(self) -> Self: ...
        def float(self) -> Self: ...

    def __init__(self, config: DualCodebookConfig) -> None:
        super().__init__(config)
        self.build_layers(config)
        if config.backbone == "vqgan":
            for level in (*self.encoder.down_blocks, *self.decoder.up_blocks):
                level.__class__ = CHECKPOINTED[type(level)]
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Self:
        """transformers' method (folder or Hub id, eval mode), strict; the codebooks stay in float32 under any `dtype`.

        A folder that diffusers' face saved is loaded too, shards and variants included. Raises ValueError, naming the
        file and the tensors, for weights that do not fit config.json, whole, or are not finite; OSError where there
        are none.
        """
        source = pretrained_model_name_or_path
        if kwargs.get("subfolder", "") is None:  # as diffusers' AutoModel says that there is none
            del kwargs["subfolder"]
        with readable(source, kwargs):
            if source is not None:
                location = {key: kwargs[key] for key in LOCATION_ARGUMENTS if key in kwargs}
                own = isinstance(config, PreTrainedConfig)
                content = config.to_dict() if own else cls.config_class.get_config_dict(config or source, **location)[0]
                if content.get("transformers_weights") == SAFETENSORS_WEIGHTS_NAME:
                    # What diffusers' face writes into config.json, whatever it then called the weights.
                    name = _diffusers_weights(source, kwargs.get("variant"), location)
                    if own:
                        config = copy.deepcopy(config)
                        config.transformers_weights = name
                    else:
                        kwargs["transformers_weights"] = name
            return super().from_pretrained(source, *args, config=config, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs) -> tuple:
        # The one place that every way of loading passes, with the files found and the model without its weights.
        for name in (load_config.sharded_metadata or {}).get("weight_map", {}).values():
            if Path(name).name != name:
                raise ValueError(f"the index of the weights names the file '{name}', which does not lie beside it")
        check_weights(
            model, state_dict, checkpoint_files or (), ignore_mismatched_sizes=load_config.ignore_mismatched_sizes
        )
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        check_range(model)
        return loaded

    def init_weights(self) -> None:
        """Leaves what the modules' constructors drew, so that both faces start from the same weights."""
        self.tie_weights(recompute_mapping=False)

    def _init_weights(self, module: nn.Module) -> None:
        # For parameters that a checkpoint lacks; transformers keeps this from touching those that it has.
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, name):
                return getattr(module, name)()

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for network in (self.encoder, self.decoder):  # its levels do it: not twice
            network._gradient_checkpointing_func = _call

    @property
    def codebook_size(self) -> int:
        """Every image token lies in [0, codebook_size): the codes of the largest codebook. See `codebook_sizes`."""
        return self.config.codebook_size

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """`tokenize` by transformers' name: images (B, C, H, W) in [-1, 1] -> int64 (B, codebooks, h, w)."""
        return cast(torch.LongTensor, self.tokenize(pixel_values))

    @overload  # type: ignore[override]
    def encode(
        self, x: torch.Tensor | None = None, return_dict: Literal[True] = True, *, pixel_values: torch.Tensor = ...
    ) -> DualCodebookEncoderOutput: ...
    @overload
    def encode(
        self, x: torch.Tensor | None = None, *, return_dict: Literal[False], pixel_values: torch.Tensor = ...
    ) -> tuple[torch.Tensor, ...]: ...
    @hooked
    def encode(
        self, x: torch.Tensor | None = None, return_dict: bool = True, *, pixel_values: torch.Tensor | None = None
    ) -> DualCodebookEncoderOutput | tuple[torch.Tensor, ...]:
        """Images to tokens, as Janus's and Chameleon's; `.latents` beside them, as diffusers' VQModel's.

        Like a forward pass, it teaches `ema` codebooks in training mode.

        Args:
            x: images (B, C, H, W) in [-1, 1].
            return_dict: False: a tuple, the latents (B, vq_embed_dim, h, w) first.
            pixel_values: the same as `x`, by transformers' name.

        Raises ValueError for another shape or type, and unless exactly one of `x` and `pixel_values` is given.
        """
        latents = self._latents(_exactly_one(x=x, pixel_values=pixel_values))
        output = self.quantize(latents, return_dict=True)
        result = DualCodebookEncoderOutput(latents, output.quantized, output.tokens, sum_losses(output.losses))
        return result if return_dict else result.to_tuple()

    @overload  # type: ignore[override]
    def decode(self, h: torch.LongTensor) -> torch.Tensor: ...
    @overload
    def decode(self, *, image_tokens: torch.Tensor) -> torch.Tensor: ...
    @overload  # what else comes back depends on the type of the numbers
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> Any: ...
    @hooked
    def decode(
        self,
        h: torch.Tensor | None = None,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
        *,
        image_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor | DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Image tokens to images as Janus's and Emu3's, or latents to images as diffusers' VQModel's; never crops.

        Args:
            h: image tokens (B, codebooks, h, w) or product ids (B, h, w), both integer: gives the images, a tensor
                (B, C, h*f, w*f), about [-1, 1]. Or what VQModel's takes: latents (B, vq_embed_dim, h, w), or product
                ids together with `shape`: gives a DecoderOutput with the images as `.sample`.
            force_not_quantize: decode latents as they are; otherwise they are quantized first.
            return_dict: of latents, or with `shape`; False: the tuple (sample, loss).
            shape: (B, h, w, C), of product ids only.
            image_tokens: the same as an integer `h`, by transformers' name.

        Raises ValueError for another shape, for tokens that are out of range, and unless exactly one of `h` and
        `image_tokens` is given.
        """
        value = _exactly_one(h=h, image_tokens=image_tokens)
        if shape is not None or (image_tokens is None and value.is_floating_point()):
            options: Any = {"return_dict": return_dict, "shape": shape}
            return super().decode(value, force_not_quantize, **options)
        tokens = self.quantize.from_product_ids(value) if value.ndim == 3 else value
        self._check_tokens(tokens, None, None)
        return self._decode(self.quantize.lookup(tokens.long()))

    @overload
    def forward(
        self,
        pixel_values: torch.Tensor,
        return_loss: bool | None = None,
        return_dict: Literal[True] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> DualCodebookModelOutput: ...
    @overload
    def forward(
        self,
        pixel_values: torch.Tensor,
        return_loss: bool | None = None,
        *,
        return_dict: Literal[False],
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[torch.Tensor, ...]: ...
    def forward(
        self,
        pixel_values: torch.Tensor,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> DualCodebookModelOutput | tuple[torch.Tensor, ...]:
        """Images to tokens and back.

        Args:
            pixel_values: (B, C, H, W) in [-1, 1].
            return_loss: compute the losses too.
            return_dict: False: a tuple of the fields that are not None.
            output_hidden_states: accepted, as by every transformers model; there are none.
            output_attentions: the same.

        Raises ValueError when the shape or the type of `pixel_values` is wrong.
        """
        output = self.autoencode(pixel_values)
        loss = embedding_loss = None
        if return_loss:
            embedding_loss = sum_losses(output.losses)
            loss = (output.sample - pixel_values).abs().mean() + embedding_loss
        result = DualCodebookModelOutput(
            image_tokens=cast(torch.LongTensor, output.tokens),
            loss=loss,
            decoded_pixel_values=output.sample,
            last_hidden_state=output.latents,
            quantized_last_hidden_state=output.quantized,
            embedding_loss=embedding_loss,
        )
        return result if return_dict is not False and self.config.return_dict else result.to_tuple()


def _exactly_one(**arguments: torch.Tensor | None) -> torch.Tensor:
    """The one argument that is given. Raises ValueError for none and for several."""
    given = [value for value in arguments.values() if value is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of {' and '.join(f'`{name}`' for name in arguments)} must be given")
    return given[0]


def _call(layer: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    return layer(*args)


def _diffusers_weights(source: str | os.PathLike, variant: str | None, location: dict[str, Any]) -> str:
    """The name of the weights that diffusers' face saved. Raises OSError unless transformers can read them."""
    found = find_weights(source, SAFETENSORS_WEIGHTS_NAME, variant, **location)
    if found is None and not Path(source).is_dir():
        return SAFETENSORS_WEIGHTS_NAME  # transformers says better what is wrong with a repository or the connection
    if found is None or not found.name.endswith((".safetensors", ".safetensors.index.json")):
        raise OSError(missing_weights(source, location.get("subfolder"), variant))
    return found.name
