"""Other people's weights -> ours: the paper authors' checkpoints, taming-transformers' VQGAN, diffusers' VQModel.

Strict: every tensor of the source is mapped or dropped for a named reason, every tensor of the target is filled.
Nothing that a file holds is executed: pickles are read as weights alone, with empty stubs for bookkeeping classes.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import VQModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from .autoencoder_dualcodebook import DualCodebookVQModel
from .configuration_dualcodebook import DualCodebookConfig
from .files import atomic_folder, is_free_folder, read_json, write_json
from .image_processing_dualcodebook import DualCodebookImageProcessor
from .run_folder import CONFIG, CONVERSION
from .version import __version__
from .weights import check_size, is_finite, same_kind, some

KINDS = ("authors", "taming", "vqmodel")
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".th", ".safetensors")

# What training leaves in a state dict and no tokenizer needs.
DROPS = {
    r"loss\.": "training loss (discriminator, perceptual network)",
    r"model_ema\.": "moving averages of the weights",
    r"quantize\.embedding\.(cluster_size|embed_avg)$": "moving averages of the codebook",
    r"colorize$": "colours of segmentation maps",
    r".*num_batches_tracked$": "BatchNorm bookkeeping",
}

# taming-transformers' names -> diffusers', once the decoder's levels count from the lowest resolution (`_rename`).
TAMING = {
    r"(encoder|decoder)\.(conv_in|conv_out)\.(weight|bias)": r"\1.\2.\3",
    r"(encoder|decoder)\.norm_out\.(weight|bias)": r"\1.conv_norm_out.\2",
    r"(encoder|decoder)\.mid\.block_1\.(.+)": r"\1.mid_block.resnets.0.\2",
    r"(encoder|decoder)\.mid\.block_2\.(.+)": r"\1.mid_block.resnets.1.\2",
    r"(encoder|decoder)\.mid\.attn_1\.(.+)": r"\1.mid_block.attentions.0.\2",
    r"encoder\.down\.(\d+)\.block\.(\d+)\.(.+)": r"encoder.down_blocks.\1.resnets.\2.\3",
    r"encoder\.down\.(\d+)\.attn\.(\d+)\.(.+)": r"encoder.down_blocks.\1.attentions.\2.\3",
    r"encoder\.down\.(\d+)\.downsample\.conv\.(.+)": r"encoder.down_blocks.\1.downsamplers.0.conv.\2",
    r"decoder\.up\.(\d+)\.block\.(\d+)\.(.+)": r"decoder.up_blocks.\1.resnets.\2.\3",
    r"decoder\.up\.(\d+)\.attn\.(\d+)\.(.+)": r"decoder.up_blocks.\1.attentions.\2.\3",
    r"decoder\.up\.(\d+)\.upsample\.conv\.(.+)": r"decoder.up_blocks.\1.upsamplers.0.conv.\2",
    r"(quant_conv|post_quant_conv)\.(weight|bias)": r"\1.\2",
}
# Inside a block, after the rules above.
PARTS = {
    r"(\.resnets\.\d+)\.nin_shortcut\.": r"\1.conv_shortcut.",
    r"(\.attentions\.\d+)\.norm\.": r"\1.group_norm.",
    r"(\.attentions\.\d+)\.([qkv])\.": r"\1.to_\2.",
    r"(\.attentions\.\d+)\.proj_out\.": r"\1.to_out.0.",
    # as diffusers wrote them before version 0.13
    r"(\.attentions\.\d+)\.query\.": r"\1.to_q.",
    r"(\.attentions\.\d+)\.key\.": r"\1.to_k.",
    r"(\.attentions\.\d+)\.value\.": r"\1.to_v.",
    r"(\.attentions\.\d+)\.proj_attn\.": r"\1.to_out.0.",
}
SINGLE_CODEBOOK = {r"quantize\.embedding\.weight": "quantize.codebook.weight"}
AUTHORS_CODEBOOKS = {
    r"quantize\.global_codebook": "quantize.global_codebook.weight",
    r"quantize\.local_codebook\.weight": "quantize.local_codebook.weight",
    r"quantize\.transformer\.(.+)": r"quantize.global_codebook.transformer.\1",
}
BACKBONE_AS_IT_IS = {r"((encoder|decoder|quant_conv|post_quant_conv)\..+)": r"\1"}
RULES = {
    "authors": {**TAMING, **AUTHORS_CODEBOOKS},
    "taming": {**TAMING, **SINGLE_CODEBOOK},
    "vqmodel": {**BACKBONE_AS_IT_IS, **SINGLE_CODEBOOK},
}
TAMING_GROUPS = 32  # of every GroupNorm there; fixed in its code
AUTHORS_HEADS = 8  # of the codebook's transformer; fixed in the authors' code, and in no tensor's shape

# Modules whose objects Lightning and its users leave in checkpoints beside the weights.
BOOKKEEPING = (
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "omegaconf",
    "argparse",
    "typing",
    "pathlib",
    "numpy",
)
BOOKKEEPING_NAMES = {"collections.defaultdict"} | {
    f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")
}


@dataclass
class Conversion:
    """What was converted; `conversion.json` in the folder holds the same.

    Attributes:
        kind: one of `KINDS`.
        source: name of a file or a folder, or a Hub id; never a path.
        files: {name: SHA-256} of the weights.
        mapped: number of tensors.
        dropped: {reason: names of the tensors}.
        converter: this package and its version.
        folder: what was written.
        config: of the new model.
    """

    kind: str
    source: str
    files: dict[str, str]
    mapped: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    converter: str = f"dualcodebook_hf {__version__}"
    folder: Path | None = None
    config: dict = field(default_factory=dict)

    def record(self) -> dict:
        """What `conversion.json` says; the configuration lies beside it."""
        return {name: value for name, value in asdict(self).items() if name not in ("folder", "config")}

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"{self.kind}: {self.source} -> {self.folder}", f"  {self.mapped} tensors mapped"]
        lines += [f"  {len(names)} dropped: {reason}" for reason, names in self.dropped.items()]
        keys = ("quantizer", "block_out_channels", "layers_per_block", "attention", "mid_attention", "vq_embed_dim")
        keys += ("global_codebook_size", "local_codebook_size")
        return "\n".join([*lines, "  " + ", ".join(f"{key} {self.config[key]}" for key in keys)])


class _Stub:
    """Stands for an object of a checkpoint that is not needed: takes anything, does nothing."""

    def __init__(self, *args) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


class _DictStub:
    """The same for kinds of dictionaries, which torch fills after it made them."""

    def __new__(cls, *args) -> dict:
        return {}


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    kind: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
) -> Conversion:
    """Converts `source` and writes the folder `output` for `from_pretrained`, whole or not at all.

    Args:
        source: a Lightning checkpoint or a state dict (.ckpt, .pt, .pth, .bin, .safetensors) of the authors' code or of
            taming-transformers; or a folder or a Hub id of diffusers' VQModel.
        output: a folder that does not exist or is empty.
        kind: "authors", "taming" or "vqmodel"; None: told from the tensors' names.
        subfolder: where in the folder or the Hub's repository the VQModel lies.
        revision: branch, tag or commit of a Hub id.

    A VQGAN becomes a model with `quantizer: single`. Raises ValueError when the source cannot be read, holds other
    things than weights, is of another kind, cannot be expressed by `DualCodebookConfig`, or lacks, adds or reshapes a
    tensor; and when `output` holds something.
    """
    output = Path(output).expanduser()
    if not is_free_folder(output):
        raise ValueError(f"`output` must be a new or empty folder, got '{output}'")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}")
    path = Path(source).expanduser()
    if path.is_file():
        if subfolder or revision:
            raise ValueError(
                f"`subfolder` and `revision` are for a folder or a Hub id, `source` {path.name!r} is a file"
            )
        state, config, conversion = _read_file(path, kind)
    else:
        if kind not in (None, "vqmodel"):
            raise ValueError(f"`source` of kind {kind!r} must be a file, got {str(source)!r}")
        state, config, conversion = _read_vqmodel(*_find_folder(str(source), subfolder, revision))
    with torch.device("meta"):
        target = DualCodebookVQModel(**config).state_dict()
    mapped = _map_state(state, target, conversion)
    model = DualCodebookVQModel(**config)
    model.load_state_dict(mapped)
    conversion.config, conversion.folder = dict(model.config), output
    with atomic_folder(output) as partial:
        model.save_pretrained(partial)
        DualCodebookImageProcessor().save_pretrained(partial)
        write_json(partial / CONVERSION, conversion.record())
    return conversion


# --- names and shapes


def _map_state(
    state: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], conversion: Conversion
) -> dict[str, torch.Tensor]:
    """The source's tensors under our names. Raises ValueError unless both sides come out even, with finite numbers."""
    levels = len({key.split(".")[2] for key in state if key.startswith("decoder.up.")})
    mapped, unknown, reshaped, retyped = {}, [], [], []
    for key, tensor in state.items():
        reason = next((reason for pattern, reason in DROPS.items() if re.match(pattern, key)), None)
        if reason:
            conversion.dropped.setdefault(reason, []).append(key)
            continue
        name = _rename(key, RULES[conversion.kind], levels)
        if name not in target:
            unknown.append(key)
            continue
        if re.search(r"\.attentions\.\d+\.to_\w+(\.0)?\.weight$", name) and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # a 1x1 convolution is a linear layer at each position
        if tensor.shape != target[name].shape:
            reshaped.append(f"{key} {tuple(tensor.shape)} (expected {tuple(target[name].shape)})")
        if not same_kind(tensor, target[name]):
            retyped.append(f"{key} {tensor.dtype}")
        mapped[name] = tensor
    missing = [name for name in target if name not in mapped]
    problems = {"unknown": unknown, "missing": missing, "of another shape": reshaped, "of another type": retyped}
    if not any(problems.values()):
        problems = {"with NaN or infinity": [name for name, tensor in mapped.items() if not is_finite(tensor)]}
    told = [f"{len(keys)} tensors {what}: {some(keys)}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(f"`source` {conversion.source!r} does not fit as {conversion.kind}: {'; '.join(told)}")
    conversion.mapped = len(mapped)
    return mapped


def _rename(key: str, rules: Mapping[str, str], levels: int) -> str | None:
    """Our name of a tensor; None when no rule knows it."""
    key = re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", key)
    for pattern, replacement in rules.items():
        if match := re.fullmatch(pattern, key):
            name = match.expand(replacement)
            for part, new in PARTS.items():
                name = re.sub(part, new, name)
            return name
    return None


# --- files of the authors' code and of taming-transformers


def _read_file(path: Path, kind: str | None) -> tuple[dict[str, torch.Tensor], dict, Conversion]:
    """State dict, our configuration, and what is known of the conversion so far."""
    state = _read_state(path)
    conversion = Conversion(_check_kind(state, kind, path.name), path.name, {path.name: _sha256(path)})
    try:
        config = _taming_config(state, conversion.kind, path.name)
    except (IndexError, TypeError) as error:
        raise ValueError(f"`source` {path.name!r} has tensors of unexpected shapes: {error}") from error
    _check_bounds(config, state, [path], path.name)
    return state, config, conversion


def _check_bounds(config: dict, state: Mapping[str, torch.Tensor], files: list[Path], name: str) -> None:
    """Raises ValueError, before anything is allocated, for a model of impossible size."""
    try:
        DualCodebookConfig(**config)
        check_size((value for key, value in state.items() if not any(re.match(drop, key) for drop in DROPS)), files)
    except ValueError as error:
        raise ValueError(f"`source` {name!r} cannot be expressed: {error}") from error


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, on the CPU. Raises ValueError when there is none, or more than weights."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"`source` {path.name!r} cannot be read as safetensors: {error}") from error
    content = _read_pickle(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    tensors = isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
    if not state or not tensors:
        raise ValueError(
            f"`source` {path.name!r} must hold a state dict (name -> tensor), got {type(content).__name__}"
        )
    return dict(state)


def _read_pickle(path: Path) -> object:
    """torch.load, weights only. Unknown classes are stubs where they are bookkeeping, and an error anywhere else."""
    zipped = zipfile.is_zipfile(path)
    stubs, refused = [], []
    try:
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else ():
            if name.split(".")[0] in BOOKKEEPING or name in BOOKKEEPING_NAMES:
                stubs.append((_DictStub if name.endswith(("AttributeDict", ".defaultdict")) else _Stub, name))
            else:
                refused.append(name)
        if not refused:
            with torch.serialization.safe_globals(stubs):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    # Broken files make the unpickler raise nearly anything: EOFError, KeyError, UnicodeDecodeError, RuntimeError, ...
    except Exception as error:
        raise ValueError(
            f"`source` {path.name!r} cannot be read as weights alone, and nothing in it was executed: {_reason(error)}"
        ) from error
    raise ValueError(
        f"`source` {path.name!r} holds objects that belong to no weights: {some(sorted(refused))}; "
        "refused, nothing in it was executed"
    )


def _reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong; the others recommend to execute the file."""
    lines = re.findall(r"(?im)^(?!.*weights.only).*\S.*$", str(error))
    return lines[0].partition(" was not an allowed")[0].strip() if lines else type(error).__name__


def _check_kind(state: Mapping[str, torch.Tensor], kind: str | None, name: str) -> str:
    """The kind that the tensors' names show. Raises ValueError when it is none, or another than `kind`."""
    if "quantize.global_codebook" in state:
        found = "authors"
    elif "quantize.embedding.weight" in state and "encoder.down.0.block.0.conv1.weight" in state:
        found = "taming"
    elif any(key.startswith("encoder.down_blocks.") for key in state):
        raise ValueError(f"`source` {name!r} has diffusers' names: give its folder, where {CONFIG} is")
    elif "quantize.embed.weight" in state:
        raise ValueError(f"`source` {name!r} has a Gumbel quantizer, which this model cannot express")
    else:
        raise ValueError(
            f"`source` {name!r} must hold tensors such as encoder.down.0.block.0.conv1.weight and "
            f"quantize.embedding.weight, got {some(state)}"
        )
    if kind not in (None, found):
        raise ValueError(f"`kind` must be {found!r} for {name!r}, whose tensors are named so, got {kind!r}")
    return found


def _taming_config(state: Mapping[str, torch.Tensor], kind: str, name: str) -> dict:
    """Our configuration, from the shapes. What it does not show, the mapping finds out."""

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ValueError(f"`source` {name!r} does not fit as {kind}: it lacks the tensor {key}")
        return state[key].shape

    def count(pattern: str) -> int:
        return len({match[1] for match in (re.match(pattern, key) for key in state) if match})

    levels = count(r"encoder\.down\.(\d+)\.block\.")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if shape("encoder.conv_in.weight")[0] != widths[0]:
        raise ValueError(
            f"`source` {name!r} cannot be expressed: its first convolution gives {shape('encoder.conv_in.weight')[0]} "
            f"channels (ch) and its first level {widths[0]} (ch_mult); here both are block_out_channels[0]"
        )
    attended = {
        side: {int(match[1]) for match in (re.match(rf"{side}\.(\d+)\.attn\.", key) for key in state) if match}
        for side in (r"encoder\.down", r"decoder\.up")
    }
    middle = "encoder.mid.attn_1.q.weight" in state
    latents, width = shape("quant_conv.weight")[1], shape("quant_conv.weight")[0]
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": count(r"encoder\.down\.0\.block\.(\d+)\."),
        "norm_num_groups": TAMING_GROUPS,
        **_attention(*attended.values(), lowest=levels - 1, middle=middle, name=name),
        **_widths(latents, width, name),
        **(
            _authors_codebooks(shape, count)
            if kind == "authors"
            else _single_codebook(*shape("quantize.embedding.weight"))
        ),
    }


def _authors_codebooks(shape, count) -> dict:
    (global_size, global_dim), (local_size, local_dim) = (
        shape("quantize.global_codebook"),
        shape("quantize.local_codebook.weight"),
    )
    return {
        "quantizer": "dual",
        "global_codebook_size": global_size,
        "global_dim": global_dim,
        "local_codebook_size": local_size,
        "local_dim": local_dim,
        "global_transformer_layers": count(r"quantize\.transformer\.layers\.(\d+)\."),
        "transformer_heads": AUTHORS_HEADS,
        "transformer_feed_forward": shape("quantize.transformer.layers.0.linear1.weight")[0],
    }


# --- what both kinds of source share


def _single_codebook(size: int, dim: int) -> dict:
    return {
        "quantizer": "single",
        "global_codebook_size": 0,
        "global_dim": 0,
        "local_codebook_size": size,
        "local_dim": dim,
    }


def _attention(encoder: set[int], decoder: set[int], *, lowest: int, middle: bool, name: str) -> dict:
    """Where self-attention is, as our configuration says it.

    Args:
        encoder: its levels with self-attention, 0 the highest resolution.
        decoder: the same.
        lowest: the last level.
        middle: whether the middle has it.
        name: of the source, for the message.
    """
    if encoder == decoder and encoder in (set(), {lowest}):
        return {"attention": bool(encoder), "mid_attention": None if middle == bool(encoder) else middle}
    raise ValueError(
        f"`source` {name!r} cannot be expressed: it has self-attention at the levels {sorted(encoder)} of the encoder "
        f"and {sorted(decoder)} of the decoder; this model has it at the lowest resolution (level {lowest}) of both or "
        "nowhere but in the middle"
    )


def _widths(latents: int, width: int, name: str) -> dict:
    if latents != width:
        raise ValueError(
            f"`source` {name!r} cannot be expressed: its latents have {latents} channels and its codes {width}; here "
            "both are vq_embed_dim"
        )
    return {"latent_channels": latents, "vq_embed_dim": width}


# --- diffusers' VQModel


def _find_folder(source: str, subfolder: str | None, revision: str | None) -> tuple[Path, str]:
    """The folder that holds config.json and weights, and its public name; a Hub id is downloaded."""
    path, inside = Path(source).expanduser(), f"{subfolder}/" if subfolder else ""
    if path.is_dir():
        if revision:
            raise ValueError(f"`revision` is for a Hub id, `source` {source!r} is a folder")
        folder, name = path / inside, (path / inside).resolve().name
    elif path.suffix in SUFFIXES or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ValueError(f"`source` must be a file, a folder or a Hub id (owner/name), got {source!r}, which is none")
    else:
        for suffix in ("safetensors", "bin"):
            patterns = [f"{inside}{file}" for file in (CONFIG, *_weight_patterns(suffix))]
            try:
                root = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
            except (OSError, ValueError) as error:
                raise ValueError(f"`source` {source!r} cannot be loaded from the Hub: {error}") from error
            folder, name = root / inside, f"{source}{'/' + subfolder if subfolder else ''} @ {root.name}"
            if folder.is_dir() and _weight_files(folder):
                break
    if not (folder / CONFIG).is_file() or not _weight_files(folder):
        raise ValueError(f"`source` {name!r} must hold {CONFIG} and diffusion_pytorch_model.safetensors (or .bin)")
    return folder, name


def _weight_patterns(suffix: str) -> list[str]:
    stem = "diffusion_pytorch_model"
    return [f"{stem}.{suffix}", f"{stem}.{suffix}.index.json", f"{stem}-*-of-*.{suffix}"]


def _weight_files(folder: Path) -> list[Path]:
    """The files that diffusers reads: safetensors where there are any."""
    for suffix in ("safetensors", "bin"):
        whole, _, shards = _weight_patterns(suffix)
        files = [folder / whole] if (folder / whole).is_file() else sorted(folder.glob(shards))
        if files:
            return files
    return []


def _read_vqmodel(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict, Conversion]:
    """State dict, our configuration, and what is known of the conversion so far."""
    content = read_json(folder / CONFIG)
    kind = content.get("_class_name")
    if kind != "VQModel":
        raise ValueError(f"`source` {name!r} must be a diffusers VQModel (`_class_name` in {CONFIG}), got {kind!r}")
    parameters = inspect.signature(VQModel.__init__).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    try:
        config = _vqmodel_config({**defaults, **content}, name)
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"`source` {name!r} has a {CONFIG} of other types than VQModel's: {error}") from error
    files = _weight_files(folder)
    state = {key: tensor for file in files for key, tensor in _read_state(file).items()}
    _check_bounds(config, state, files, name)
    return state, config, Conversion("vqmodel", name, {file.name: _sha256(file) for file in files})


def _vqmodel_config(config: Mapping, name: str) -> dict:
    levels = len(config["block_out_channels"])
    known = {"norm_type": ("group",), "act_fn": ("silu", "swish")}
    for key, values in known.items():
        if config[key] not in values:
            raise ValueError(f"`source` {name!r} cannot be expressed: `{key}` must be {values[0]}, got {config[key]!r}")
    down, up = list(config["down_block_types"]), list(config["up_block_types"])[::-1]
    other = {*down, *up} - {"DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"}
    if other:
        raise ValueError(f"`source` {name!r} cannot be expressed: it has blocks {', '.join(sorted(other))}")
    encoder, decoder = ({level for level, block in enumerate(side) if block.startswith("Attn")} for side in (down, up))
    middle = config["mid_block_add_attention"]
    copied = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "scaling_factor", "force_upcast")
    width = config["vq_embed_dim"] or config["latent_channels"]
    return {
        **{key: config[key] for key in copied},
        "block_out_channels": list(config["block_out_channels"]),
        **_attention(encoder, decoder, lowest=levels - 1, middle=middle, name=name),
        **_widths(config["latent_channels"], width, name),
        **_single_codebook(config["num_vq_embeddings"], width),
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
