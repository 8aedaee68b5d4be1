"""Arguments of a generator's training: generator, data and training, from a preset or a YAML file and from flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..presets import GENERATOR
from ..training.arguments import DTYPES, DataArguments
from ..training.parsing import parse_sections_and_flags
from ..training.run_arguments import Arguments, RunArguments, at_least, below_one, described, one_of
from .choices import GUIDANCE_SCALE, MASKING_SCHEDULES, STEPS, TEMPERATURE, UNITS, check_network


@dataclass(kw_only=True)
class GeneratorFields(Arguments):
    """The transformer's size; the tokenizer and the data tell the rest."""

    hidden_size: int = field(default=384, metadata=described("width", heading="the transformer"))
    num_layers: int = field(default=6, metadata=described("blocks"))
    num_attention_heads: int = field(default=6, metadata=described("of each block; they divide the width"))
    mlp_ratio: float = field(
        default=4.0, metadata=described("width of a block's hidden layer, as a multiple of hidden_size")
    )
    dropout: float = field(default=0.1, metadata=described("share of activations that training drops"))

    def check(self) -> None:
        """Raises ValueError for a field that is wrong, by name."""
        check_network(**dataclasses.asdict(self))


IMAGE_FIELDS = frozenset(spec.name for spec in dataclasses.fields(DataArguments))


@dataclass(kw_only=True)
class GeneratorDataArguments(DataArguments):
    """What is trained on: a token data set, or images that the tokenizer turns into tokens on their way."""

    tokens: str | None = field(
        default=None,
        metadata=described(
            "token data set, a folder that `tokenize-dataset` wrote; instead of `dataset`", path=True, heading="tokens"
        ),
    )
    validation_tokens: str | None = field(
        default=None, metadata=described("tokens: the token data set that is validated on; null: none", path=True)
    )
    tokenizer: str | None = field(
        default=None,
        metadata=described("folder, Hub id, `sharp` or `faithful`; null: sharp", path=True),
    )
    class_column: str | None = field(
        default="label", metadata=described("column of the classes; null: a generator without classes")
    )

    def check(self) -> None:
        """Raises ValueError for a field that is wrong, by name."""
        if bool(self.tokens) == bool(self.dataset):
            got = f"both {self.tokens!r} and {self.dataset!r}" if self.tokens else "neither"
            raise ValueError(f"one of `tokens` (a token data set) and `dataset` (images) must be named, got {got}")
        if self.dataset:
            super().check()
            if self.validation_tokens:
                raise ValueError("`validation_tokens` goes with `tokens`; for `dataset` name a `validation_split`")
            if self.streaming and self.class_column:
                raise ValueError("`class_column` must be null for a streamed `dataset`: its rows have no number")

    @property
    def validates(self) -> bool:
        """Whether there is something to validate on."""
        return bool(self.validation_tokens if self.tokens else self.validation_split)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON- and YAML-ready; with `tokens` without those of images, which take no part."""
        idle = IMAGE_FIELDS if self.tokens else ()
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in idle}


@dataclass(kw_only=True)
class GeneratorTrainArguments(RunArguments):
    """The loop's arguments, and a generator's loss and optimizer."""

    init_from: str | None = field(
        default=None,
        metadata=described(
            "start from the transformer of this generator (a folder that a run wrote); grids may differ",
            path=True,
            heading="start and computation",
        ),
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=described("recompute activations: less memory, slower")
    )
    compile: bool = field(default=False, metadata=described("torch.compile the transformer's blocks"))

    masking: str = field(
        default="tokens",
        metadata=described(
            "what is hidden together, one of "
            f"{', '.join(UNITS)}: every token by itself, with one share for all codebooks of an image; all tokens "
            "of a position; or one codebook in part, those before it not at all and those behind it wholly",
            heading="loss",
        ),
    )
    masking_schedule: str = field(
        default="arccos",
        metadata=described(f"how the hidden share is drawn, one of {', '.join(MASKING_SCHEDULES)}"),
    )
    label_smoothing: float = field(default=0.1, metadata=described("of the cross-entropy"))
    class_dropout: float = field(
        default=0.1, metadata=described("share of samples that are trained without their class, for guidance")
    )
    learning_rate: float = field(default=1e-4, metadata=described("of AdamW", heading="optimizer"))
    adam_beta1: float = field(default=0.9, metadata=described("Adam's beta1"))
    adam_beta2: float = field(default=0.96, metadata=described("Adam's beta2"))
    weight_decay: float = field(
        default=0.045, metadata=described("decoupled decay of the matrices; embeddings, norms and biases have none")
    )
    validation_samples: int = field(
        default=0,
        metadata=described("images that are validated on; 0: the whole split", heading="validation and export"),
    )
    validation_batch_size: int = field(default=16, metadata=described("images per forward pass in validation"))
    sample_count: int = field(default=8, metadata=described("images that every validation draws; 0: none"))
    sample_steps: int = field(default=STEPS, metadata=described("steps of their sampling"))
    sample_guidance: float = field(
        default=GUIDANCE_SCALE, metadata=described("guidance scale of their sampling; 1: none")
    )
    sample_temperature: float = field(
        default=TEMPERATURE, metadata=described("temperature of their sampling; 1: as learned")
    )
    weights_dtype: str = field(
        default="float32", metadata=described(f"of the exported transformer, one of {', '.join(DTYPES)}")
    )

    def check(self) -> None:
        """Raises ValueError for a field that is wrong, by name."""
        super().check()
        one_of("masking", self.masking, UNITS)
        one_of("masking_schedule", self.masking_schedule, MASKING_SCHEDULES)
        one_of("weights_dtype", self.weights_dtype, DTYPES)
        below_one(self, "label_smoothing", "class_dropout", "adam_beta1", "adam_beta2")
        at_least(self, 1, "validation_batch_size", "sample_steps")
        for name in ("learning_rate", "sample_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}")


@dataclass
class GeneratorConfig:
    """One run: what is saved as train_config.json and read back by a resumed run."""

    generator: GeneratorFields
    data: GeneratorDataArguments
    training: GeneratorTrainArguments

    def check(self) -> None:
        """Raises ValueError for a field that is wrong, before any data or weights are touched."""
        self.generator.check()
        self.data.check()
        self.training.check()
        if self.training.patience and not self.data.validates:
            missing = "validation_tokens" if self.data.tokens else "validation_split"
            raise ValueError(f"`patience` {self.training.patience} needs `{missing}` to validate on; or give 0")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The three sections, JSON- and YAML-ready."""
        training = dataclasses.asdict(self.training)
        return {"generator": dataclasses.asdict(self.generator), "data": self.data.to_dict(), "training": training}


CLASSES = {"generator": GeneratorFields, "data": GeneratorDataArguments, "training": GeneratorTrainArguments}
PROGRAM = "dualcodebook train-generator"


def parse_generator_config(argv: Sequence[str]) -> GeneratorConfig:
    """`--config NAME|FILE` (tiny where it is left out) and flags, which win over the file -> a checked GeneratorConfig.

    Ends the process with 0 for `--help`. Raises ValueError for every mistake.
    """
    sections, flags = parse_sections_and_flags(argv, CLASSES, PROGRAM, GENERATOR)
    run = GeneratorConfig(*sections)
    if run.data.tokens and (idle := sorted(IMAGE_FIELDS & flags - {"dataset"})):  # a file may be for both
        raise ValueError(f"`{idle[0]}` is of images and changes nothing of `tokens`")
    run.check()
    return run
