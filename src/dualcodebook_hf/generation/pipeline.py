"""diffusers' pipeline of the generator: class -> tokens -> image, and the same from an image that is partly hidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import AmusedScheduler, DiffusionPipeline, ImagePipelineOutput

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..configuration_dualcodebook import config_hash
from ..flags import did_you_mean
from ..image_processing_dualcodebook import to_image
from ..weights import encoder_hash, made_tokens
from .choices import CHOICE_TEMPERATURE, GUIDANCE_SCALE, GUIDANCE_SCHEDULES, STEPS, TEMPERATURE
from .inputs import Start, read_start
from .masking import hidden_tokens, mask_tokens
from .schedulers import Generator, MaskedTokenScheduler, lowest, random_like
from .transformer import DualCodebookTransformer

OUTPUT_TYPES = ("pil", "np", "pt", "tokens")
RAMP_POWER = 2.5  # MaskBit's
Labels = int | str | Sequence[int | str] | torch.Tensor | None


class DualCodebookMaskGenerationPipeline(DiffusionPipeline):
    """Generates images by filling in hidden tokens, step by step (MaskGIT), with DiTPipeline's conventions.

    Without `image` and `tokens` everything is hidden at the start. With them a part is: a share of the positions
    (image-to-image), those under a mask (inpainting), or the tokens that are hidden already.

    Args:
        vqvae: the tokenizer whose tokens the transformer was trained on.
        transformer: predicts the hidden tokens.
        scheduler: `MaskedTokenScheduler`, or diffusers' `AmusedScheduler` where codebooks are of one size.
        id2label: {class id: its name, or several with commas between them}; saved in model_index.json.

    Raises ValueError when the parts do not belong together: codebooks of other sizes, another configuration or other
    weights than the transformer's config names. Weights are compared where they are in float32: rounded ones, of a
    pipeline loaded in half precision, have another hash.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    _callback_tensor_inputs = ["tokens", "predicted_tokens"]

    def __init__(
        self,
        vqvae: DualCodebookVQModel,
        transformer: DualCodebookTransformer,
        scheduler: MaskedTokenScheduler | AmusedScheduler,
        id2label: dict | None = None,
    ) -> None:
        super().__init__()
        check_tokenizer(vqvae, transformer)
        check_scheduler(scheduler, transformer)
        names = {int(key): name for key, name in (id2label or {}).items()}
        self.labels = label_ids(names, transformer.config.num_classes)
        self.register_modules(vqvae=vqvae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=names or None)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """diffusers' method; codebooks in float32 stay so: no token changes for the rounding of a code."""
        quantizer = self.vqvae.quantize
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        super().to(*args, **kwargs)
        if any(value.dtype != before[name].dtype for name, value in quantizer.state_dict().items()):
            quantizer.float().load_state_dict(before)
        return self

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Ids of classes by their names. Raises ValueError, with the nearest known name, for another one."""
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                known = ", ".join(self.labels) or "none: there is no `id2label`"
                hint = did_you_mean(str(name), self.labels)
                raise ValueError(f"`class_labels` must be among the names {known}; got {name!r}{hint}")
        return [self.labels[name] for name in names]

    @property
    def guidance_scale(self) -> float:
        """Of the call that runs."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`: what was predicted last is then decoded."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        guidance_scale: float = GUIDANCE_SCALE,
        generator: Generator = None,
        num_inference_steps: int = STEPS,
        output_type: str = "pil",
        return_dict: bool = True,
        num_images: int = 1,
        guidance_schedule: str = GUIDANCE_SCHEDULES[0],
        sampling_temperature: float = TEMPERATURE,
        choice_temperature: float | Sequence[float] = CHOICE_TEMPERATURE,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        mask_image: Any = None,
        tokens: torch.Tensor | None = None,
        strength: float | None = None,
        overlay: bool = True,
        callback_on_step_end: Callable[..., dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> Any:  # of a union, type checkers would let nobody take `.images`
        """Draws images.

        Args:
            class_labels: one class or several, by id or name; None: no class in particular.
            guidance_scale: s >= 0 of classifier-free guidance: logits u + s (c - u) of those with (c) and without (u)
                class. 1 is none and takes half the time; it has no effect without `class_labels`.
            generator: of all draws; or one for each image, which is then the same in every batch
                (`MaskedTokenScheduler` only).
            num_inference_steps: passes through the transformer; time grows with it.
            output_type: "pil"; "np", float32 (B, H, W, 3) in [0, 1]; "pt", (B, 3, H, W) in [0, 1]; "tokens", int64 (B,
                codebooks, h, w).
            return_dict: False: a tuple with the images alone.
            num_images: for each class, or for each image or grid of tokens that is given.
            guidance_schedule: "constant", or "cosine": from 1 to `guidance_scale` along
                (1 - cos(pi (i/n)^2.5)) / 2 in step i of n (MaskBit).
            sampling_temperature: above 0, divides the logits. 1: as learned; below it likelier tokens, less variety.
            choice_temperature: (first, last) of the noise on the confidences by which tokens are revealed.
            height: of the images, in pixels; None: as trained, or as given. What is given is resized to it.
            width: likewise.
            image: to begin from: what `DualCodebookImageProcessor` takes, or a list of it; floating arrays (B, H, W, 3)
                and tensors (B, 3, H, W) lie in [0, 1].
            mask_image: white is painted anew, one mask for all images or one for each, of the images' size. A position
                is hidden when any of its pixels is white (at least .5); the tokens of all others stay.
            tokens: to begin from, instead of `image`: int64 (B, codebooks, h, w). Mask tokens in it are hidden.
            strength: share in (0, 1] of the positions, or of those under the mask, that are hidden, drawn by chance.
                None: 1 with a mask; without one .5, or nothing more where `tokens` holds hidden ones.
            overlay: with `image` and `mask_image`, black pixels of the mask are the image's own in what is returned;
                the edge is hard. False: everything is decoded from tokens.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; what it returns under
                "tokens" replaces them. `pipeline._interrupt = True` in it ends the steps.
            callback_on_step_end_tensor_inputs: of "tokens", the grid with hidden ones, and "predicted_tokens", all of
                them as drawn in this step.

        Raises ValueError that names the argument, before any work.
        """
        check_scheduler(self.scheduler, self.transformer)
        settings = Sampling(
            num_inference_steps, guidance_scale, guidance_schedule, sampling_temperature, choice_temperature, generator
        )
        settings.check(output_type, num_images)
        self._check_callback(callback_on_step_end_tensor_inputs)
        labels = self._label_list(class_labels)
        start = self._start(image, mask_image, tokens, (height, width), strength)
        batch = common_count(labels, len(start)) * num_images
        settings.check_generators(batch, isinstance(self.scheduler, AmusedScheduler))

        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, num_inference_steps, False
        tokens = self._starting_tokens(start, batch, num_images, generator)
        if labels is not None:
            labels = spread(torch.tensor(labels, device=tokens.device), batch, num_images)
        tokens = self._fill(tokens, labels, settings, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images = tokens if output_type == "tokens" else self._decode(tokens, start, num_images, overlay, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_callback(self, names: Sequence[str]) -> None:
        known = self._callback_tensor_inputs
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {', '.join(known)}, got {', '.join(unknown)}"
            )

    def _label_list(self, class_labels: Labels) -> list[int] | None:
        """Ids of the classes. Raises ValueError for one that the transformer does not have."""
        if class_labels is None:
            return None
        count = self.transformer.config.num_classes
        if count is None:
            raise ValueError("`class_labels` must be None: this generator was trained without classes")
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        given = [class_labels] if isinstance(class_labels, (int, str)) else list(class_labels)
        ids = [self.get_label_ids(label)[0] if isinstance(label, str) else int(label) for label in given]
        if not ids or not all(0 <= label < count for label in ids):
            raise ValueError(f"`class_labels` must be names, or ids in [0, {count}), got {class_labels!r}")
        return ids

    def _start(self, *given: Any) -> Start:
        """What is known at the beginning, by the call's arguments."""
        factor = self.vqvae.downsample_factor
        height, width = (factor * side for side in self.transformer.config.sample_size)
        return read_start(self.transformer.mask_token_ids, factor, (height, width), *given)

    def _starting_tokens(self, start: Start, batch: int, num_images: int, generator: Generator) -> torch.Tensor:
        """The tokens (B, codebooks, h, w) of an image or those given, with a part of them hidden; or nothing known."""
        device = self._execution_device
        masks = mask_tokens(self.transformer.mask_token_ids, device)
        if start.is_empty:
            return masks.expand(batch, -1, *start.grid).clone()
        tokens = self.vqvae.tokenize(start.pixels.to(device)) if start.tokens is None else start.tokens.to(device)
        tokens, positions = spread(tokens, batch, num_images), spread(start.positions.to(device), batch, num_images)
        if start.strength < 1:
            chances = random_like(torch.empty(positions.shape), generator, torch.Tensor.uniform_).to(device)
            counts = spread(start.hidden_counts().to(device), batch, num_images)
            positions = lowest(chances.flatten(1), positions.flatten(1), counts).view_as(positions)
        return torch.where(positions[:, None], masks, tokens)

    def _fill(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None,
        settings: Sampling,
        callback: Callable[..., dict | None] | None,
        callback_inputs: Sequence[str],
    ) -> torch.Tensor:
        """Reveals all hidden tokens."""
        steps, predicted = settings.num_inference_steps, tokens
        starting = hidden_tokens(tokens, self.transformer.mask_token_ids)
        self.scheduler.set_timesteps(steps, settings.choice_temperature, device=tokens.device)
        with self.progress_bar(total=steps) as bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                logits = self._logits(tokens, labels, settings.guidance(step), settings.sampling_temperature)
                tokens, predicted = self._step(logits, timestep, tokens, starting, settings.generator)
                if callback is not None:
                    values = {"tokens": tokens, "predicted_tokens": predicted}
                    answer = callback(self, step, timestep, {name: values[name] for name in callback_inputs})
                    tokens = (answer or {}).get("tokens", tokens)
                bar.update()
                if self.interrupt:
                    return predicted
        return tokens

    def _logits(
        self, tokens: torch.Tensor, labels: torch.Tensor | None, scale: float, temperature: float
    ) -> list[torch.Tensor]:
        """Logits of each codebook, float32, guided; with and without class in one pass."""
        if labels is None or scale == 1:
            logits = [part.float() for part in self.transformer(tokens, labels).logits]
        else:
            nothing = torch.full_like(labels, self.transformer.config.num_classes)
            both = self.transformer(torch.cat([tokens, tokens]), torch.cat([labels, nothing])).logits
            halves = [part.float().chunk(2) for part in both]
            logits = [without + scale * (with_class - without) for with_class, without in halves]
        return [part / temperature for part in logits]

    def _step(
        self,
        logits: Sequence[torch.Tensor],
        timestep: torch.Tensor,
        tokens: torch.Tensor,
        starting: torch.Tensor,
        generator: Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens with more of them revealed, and all as drawn."""
        if not isinstance(self.scheduler, AmusedScheduler):
            return self.scheduler.step(logits, timestep, tokens, starting, generator, return_dict=False)
        ratio = starting.flatten(1).float().mean(1, keepdim=True)
        # It knows one grid: those of all codebooks below each other.
        found = self.scheduler.step(torch.cat(list(logits), 2), timestep, tokens.flatten(1, 2), ratio, generator)
        return found.prev_sample.view_as(tokens), found.pred_original_sample.view_as(tokens)

    def _decode(self, tokens: torch.Tensor, start: Start, num_images: int, overlay: bool, output_type: str) -> Any:
        pixels = self.vqvae.detokenize(tokens, size=start.size).float().clamp(-1, 1)
        if overlay and start.pixels is not None and start.mask is not None:
            original, mask = (
                spread(part.to(pixels.device), len(tokens), num_images) for part in (start.pixels, start.mask)
            )
            pixels = torch.where(mask[:, None], pixels, original)
        if output_type == "pil":
            return [to_image(each) for each in pixels]
        pixels = pixels / 2 + 0.5
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: arguments of the pipeline's call."""

    num_inference_steps: int
    guidance_scale: float
    guidance_schedule: str
    sampling_temperature: float
    choice_temperature: float | Sequence[float]
    generator: Generator

    def check(self, output_type: str, num_images: int) -> None:
        """Raises ValueError for an argument that is wrong."""
        for name, value in (("num_inference_steps", self.num_inference_steps), ("num_images", num_images)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
        if not (self.guidance_scale >= 0 and math.isfinite(self.guidance_scale)):
            raise ValueError(f"`guidance_scale` must be at least 0, got {self.guidance_scale}")
        if not self.sampling_temperature > 0:
            raise ValueError(f"`sampling_temperature` must be above 0, got {self.sampling_temperature}")
        noise = self.choice_temperature
        pair = [noise, 0] if isinstance(noise, (int, float)) else list(noise)
        if len(pair) != 2 or not all(value >= 0 for value in pair):
            raise ValueError(f"`choice_temperature` must be a number of at least 0, or two, got {noise!r}")
        for name, value, known in (
            ("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES),
            ("output_type", output_type, OUTPUT_TYPES),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}")

    def check_generators(self, batch: int, one: bool) -> None:
        """Raises ValueError unless there is one generator for each of `batch` images, or one for all, or none."""
        if isinstance(self.generator, Sequence):
            if one:
                raise ValueError("`generator` must be one for all images with AmusedScheduler, got a list")
            if len(self.generator) != batch:
                raise ValueError(
                    f"`generator` must be one, or one for each of {batch} images, got {len(self.generator)}"
                )

    def guidance(self, step: int) -> float:
        """The scale in a step."""
        if self.guidance_schedule == "constant":
            return self.guidance_scale
        ramp = (1 - math.cos(math.pi * (step / self.num_inference_steps) ** RAMP_POWER)) / 2
        return 1 + (self.guidance_scale - 1) * ramp


def common_count(labels: Sequence[int] | None, given: int) -> int:
    """How many different beginnings there are. Raises ValueError where several classes meet several images."""
    classes = 1 if labels is None else len(labels)
    if classes != given and 1 not in (classes, given):
        raise ValueError(f"`class_labels` must be one, or one for each of the {given} images, got {classes}")
    return max(classes, given)


def spread(values: torch.Tensor, batch: int, num_images: int) -> torch.Tensor:
    """One value, or one for each beginning, (n, ...) -> (batch, ...), `num_images` in a row for each beginning."""
    return values.expand(batch // num_images, *values.shape[1:]).repeat_interleave(num_images, 0)


def label_ids(names: dict[int, str], num_classes: int | None) -> dict[str, int]:
    """{name: class id}, sorted; an id may have several names, with commas between them, as in ImageNet.

    Raises ValueError for an id that is no class, and for a name of two classes.
    """
    found: dict[str, int] = {}
    for key, text in names.items():
        if not 0 <= key < (num_classes or 0):
            raise ValueError(f"`id2label` must have ids in [0, {num_classes or 0}), the transformer's, got {key}")
        for name in (part.strip() for part in text.split(",")):
            if found.setdefault(name, key) != key:
                raise ValueError(
                    f"`id2label` must give each name to one class, got {name!r} for {found[name]} and {key}"
                )
    return dict(sorted(found.items()))


def check_scheduler(scheduler: Any, transformer: DualCodebookTransformer) -> None:
    """Raises ValueError unless a scheduler draws tokens of the transformer's codebooks."""
    sizes = tuple(transformer.config.codebook_sizes)
    if isinstance(scheduler, AmusedScheduler):
        if {scheduler.config.mask_token_id} != set(sizes):
            raise ValueError(
                f"`scheduler`: an AmusedScheduler must have the mask_token_id of every codebook, and they are {sizes}; "
                f"got {scheduler.config.mask_token_id}"
            )
    elif tuple(getattr(scheduler.config, "codebook_sizes", ())) != sizes:
        raise ValueError(
            f"`scheduler` must be a MaskedTokenScheduler of the transformer's codebook_sizes {sizes}, or an "
            f"AmusedScheduler; got {type(scheduler).__name__} with {dict(scheduler.config)}"
        )


def check_tokenizer(vqvae: DualCodebookVQModel, transformer: DualCodebookTransformer) -> None:
    """Raises ValueError unless the tokenizer is the one whose tokens the transformer was trained on."""
    config, sizes = transformer.config, tuple(vqvae.codebook_sizes.values())
    if tuple(config.codebook_sizes) != sizes:
        raise ValueError(
            f"`vqvae` must have the codebooks of the transformer, {tuple(config.codebook_sizes)}, got {sizes}"
        )
    expected, found = config.tokenizer_config_hash, config_hash(vqvae.config)
    if expected not in (None, found):
        raise ValueError(f"`vqvae` must be the transformer's tokenizer, with config hash {expected}, got {found}")
    weights, exact = config.tokenizer_weights_sha256, all(v.dtype == torch.float32 for v in vqvae.parameters())
    if weights is not None and exact and not made_tokens(vqvae, weights):
        raise ValueError(
            f"`vqvae` must be the transformer's tokenizer, with an encoder and codebooks of SHA-256 {weights}, "
            f"got {encoder_hash(vqvae)}"
        )
