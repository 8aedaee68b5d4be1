import dataclasses
import inspect
import pydoc
import re
from pathlib import Path

import pytest
import torch

from dualcodebook_hf import DualCodebookConfig, DualCodebookImageProcessor, DualCodebookModel, DualCodebookVQModel
from dualcodebook_hf.configuration_dualcodebook import DualCodebookFields, config_hash
from dualcodebook_hf.configuration_fields import BOUNDS, FIELD_TYPES
from dualcodebook_hf.presets import load_preset, preset_names
from dualcodebook_hf.reconstruction_pipeline import ImageReconstructionPipeline


def test_defaults_are_the_papers():
    config = DualCodebookConfig()
    assert config.downsample_factor == 16
    assert (config.vq_embed_dim, config.latent_channels) == (256, 256)
    assert load_preset("paper")["model"].items() <= config.to_dict().items()


def test_the_papers_model_has_its_parameters():
    """71.7 M without the quantizer, 3.56 M in the transformer (paper)."""
    with torch.device("meta"):
        model = DualCodebookVQModel.from_preset("paper")
    count = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        count[name.startswith("quantize.")] += parameter.numel()
    assert round(count[False] / 1e6, 1) in (71.7, 71.9)  # the 1x1 convolutions around the quantizer are 0.13 M
    transformer = sum(parameter.numel() for parameter in model.quantize.global_codebook.transformer.parameters())
    assert round(transformer / 1e6, 2) == 3.56
    assert count[True] - transformer == 2 * 512 * 128


def test_diffusers_signature_equals_the_fields():
    signature = inspect.signature(DualCodebookVQModel.__init__).parameters
    defaults = {name: parameter.default for name, parameter in signature.items() if name != "self"}
    fields = {field.name: field.default for field in dataclasses.fields(DualCodebookFields)}
    fields["block_out_channels"] = tuple(DualCodebookConfig().block_out_channels)
    assert defaults == fields


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"global_dim": "8"}, "`global_dim` must be of type int, got '8'"),
        ({"attention": 1}, "`attention` must be of type bool, got 1"),
        ({"backbone": "vgg"}, "`backbone` must be one of vqgan, dcae, got 'vgg'"),
        ({"vq_embed_dim": 100}, r"`vq_embed_dim` must equal global_dim \+ local_dim = 128 \+ 128 = 256, got 100"),
        ({"global_dim": 12}, "`global_dim` must be a multiple of transformer_heads=8, got 12"),
        (
            {"global_update": "ema"},
            "`global_update: ema` needs a plain table; set global_transformer_layers to 0, got 6",
        ),
        ({"quantizer": "single"}, "`quantizer: single` has one codebook, .* got 512 and 128"),
        ({"block_out_channels": [48]}, r"`block_out_channels` must be multiples of norm_num_groups=32, got \[48\]"),
        ({"layers_per_level": [1]}, "`layers_per_level` is for `backbone: dcae`"),
        ({"decoder_layers_per_level": [1]}, "`decoder_layers_per_level` is for `backbone: dcae`"),
        (
            {"decoder_block_out_channels": [32]},
            r"`decoder_block_out_channels` must have one number for each of the 5 levels .*, got \[32\]",
        ),
        ({"decoder_block_out_channels": [48] * 5}, "`decoder_block_out_channels` must be multiples of norm_num_groups"),
        (
            {"backbone": "dcae", "decoder_block_out_channels": [8, 20, 16, 16, 16]},
            "`decoder_block_out_channels` with `backbone: dcae` .* got 8 and then 20",
        ),
        ({"overlapping_shortcut": True}, "`overlapping_shortcut` needs `linear_shortcut: true`"),
        (
            {"overlapping_shortcut": True, "linear_shortcut": True, "block_out_channels": [32]},
            "`overlapping_shortcut` needs two levels",
        ),
        ({"local_codebook_size": 0}, r"`local_codebook_size` must lie in \[1, 4194304\], got 0"),
        ({"local_update": "matrix"}, "`local_update` must be one of gradient, ema, linear, got 'matrix'"),
        (
            {"global_update": "linear"},
            "`global_update: linear` needs a plain table; set global_transformer_layers to 0, got 6",
        ),
        ({"quantizer": "vq"}, "`quantizer` must be one of dual, single, residual, fsq, lfq, got 'vq'"),
        (
            {"quantizer": "residual", "global_codebook_size": 0},
            r"`global_codebook_size` must lie in \[1, 4194304\], got 0",
        ),
        ({"fsq_levels": [8, 8]}, r"`fsq_levels` is for `quantizer: fsq`, got \[8, 8\] with 'dual'"),
        (
            {"quantizer": "fsq", "fsq_levels": [8, 8, 8], "global_dim": 2, "local_dim": 2},
            r"`fsq_levels` must be one number in \[3, 4194304\] for each of .* = 4 channels, got \[8, 8, 8\]",
        ),
        (
            {"quantizer": "fsq", "fsq_levels": [8, 8, 8, 5], "global_dim": 3, "local_dim": 1},
            "`local_codebook_size` must be 5 = 5, .* with `quantizer: fsq`, got 512",
        ),
        (
            {"quantizer": "lfq", "global_dim": 9, "local_dim": 8},
            "`local_codebook_size` must be 256 = 2 x 2 x .* with `quantizer: lfq`, got 512",
        ),
        ({"layers_per_block": 10**6}, r"`layers_per_block` must lie in \[1, 32\], got 1000000"),
        ({"global_transformer_layers": 10**6}, r"`global_transformer_layers` must lie in \[0, 64\], got 1000000"),
        (
            {"backbone": "dcae", "layers_per_level": [1, 10**6, 1, 1, 1]},
            r"`layers_per_level` must lie in \[1, 32\] .*, got \[1, 1000000, 1, 1, 1\]",
        ),
        ({"backbone": "dcae", "block_out_channels": [8, 20]}, r"each a divisor of 4 times .*, got 8 and then 20"),
        ({"backbone": "dcae", "block_out_channels": [8, 6]}, "must be multiples of 4 after the first"),
        ({"backbone": "dcae", "block_out_channels": [8], "layers_per_level": [0]}, r"`layers_per_level` .* got \[0\]"),
        ({"block_out_channels": [True, True]}, r"`block_out_channels` must be of type list\[int\], got \[True, True\]"),
        ({"block_out_channels": [[128]]}, r"`block_out_channels` must be of type list\[int\], got \[\[128\]\]"),
        ({"block_out_channels": []}, r"`block_out_channels` must be 1 to 10 widths in \[1, 8192\], got \[\]"),
        ({"block_out_channels": [32] * 11}, r"`block_out_channels` must be 1 to 10 widths"),
        ({"block_out_channels": [8192] * 5}, "must make at most 2147483648 parameters, got about"),
        ({"linear_shortcut": True, "in_channels": 1024, "block_out_channels": [32] * 10}, "must make at most"),
        ({"global_codebook_size": 10**9}, r"`global_codebook_size` must lie in \[0, 4194304\], got 1000000000"),
        ({"global_codebook_size": 10**30}, r"`global_codebook_size` .*, got 1000000000000000000000000000000"),
        ({"global_codebook_size": 10**5000}, r"`global_codebook_size` .*, got an integer of 16610 bits"),
        ({"global_codebook_size": 2**17}, r"`global_codebook_size` must be at most 65536 with a transformer"),
        ({"local_codebook_size": 2**22}, r"`local_codebook_size` times its width must be at most 268435456, got"),
        (
            {"quantizer": "residual", "local_codebook_size": 2**21},
            r"`local_codebook_size` times its width must be at most 268435456, got 536870912",
        ),
        (
            {"quantizer": "lfq", "local_dim": 4096},
            r"`global_dim` must lie in \[1, 22\] with `quantizer: lfq`, got 128",
        ),
        ({"quantizer": "fsq", "global_dim": 1, "local_dim": 1, "fsq_levels": [3, 10**9]}, "`fsq_levels` must be one"),
        ({"scaling_factor": float("nan")}, "`scaling_factor` must lie in .*, got nan"),
        ({"scaling_factor": float("inf")}, "`scaling_factor` must lie in .*, got inf"),
        ({"scaling_factor": 0}, "`scaling_factor` must lie in .*, got 0"),
        ({"commitment_cost": float("nan")}, "`commitment_cost` must lie in .*, got nan"),
        ({"commitment_cost": 10**400}, "`commitment_cost` must lie in .*, got an integer of 1329 bits"),
        ({"transformer_dropout": float("nan")}, r"`transformer_dropout` must lie in \[0, 1\), got nan"),
        ({"transformer_dropout": 1.0}, r"`transformer_dropout` must lie in \[0, 1\), got 1.0"),
    ],
)
@pytest.mark.parametrize("face", [DualCodebookConfig, DualCodebookVQModel])
def test_wrong_fields_are_named_by_both_faces(face, wrong, message):
    with pytest.raises(ValueError, match=message):
        face(**wrong)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds(name):
    with torch.device("meta"):
        DualCodebookVQModel.from_preset(name)


def test_the_config_survives_a_round_trip(tmp_path):
    config = DualCodebookConfig(global_dim=64, block_out_channels=[32, 64])
    config.save_pretrained(tmp_path)
    assert DualCodebookConfig.from_pretrained(tmp_path).fields_dict() == config.fields_dict()


def test_the_hash_tells_architectures_apart_and_is_the_same_for_both_faces(tiny_config):
    config, model = DualCodebookConfig(**tiny_config), DualCodebookVQModel(**tiny_config)
    assert config_hash(config) == config_hash(model.config)
    assert config_hash(config) != config_hash(DualCodebookConfig(**{**tiny_config, "local_dim": 8}))


def test_presets_include_one_another_and_name_mistakes(tmp_path):
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("include: paper\nmodel: {global_dim: 64, local_dim: 64}\n")
    top.write_text("include: base.yaml\nmodel: {local_dim: 32}\n")
    # a preset's name wins over a file of the same stem only without its ending
    model = load_preset(str(top))["model"]
    assert (model["global_dim"], model["local_dim"], model["global_codebook_size"]) == (64, 32, 512)
    for text, message in (
        ("include: top.yaml", "circle"),
        ("modle: {}", "unknown section 'modle'; did you mean model"),
        ("- 1", "must be a mapping"),
        ("model: [1]", "section 'model' must be a mapping"),
        ("include: nothing.yaml", "must be one of"),
    ):
        top.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_preset(str(top))


RUNS = sorted(str(path) for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", [*preset_names(), *RUNS], ids=lambda name: Path(name).stem)
def test_the_estimated_number_of_parameters_is_that_of_the_model(name):
    fields = load_preset(name)["model"]
    with torch.device("meta"):
        model = DualCodebookVQModel(**fields)
    held = sum(value.numel() for value in model.state_dict().values())
    assert 0.9 < DualCodebookConfig(**fields).estimate_parameters() / held < 1.1


def test_large_models_of_use_are_accepted():
    large = {"block_out_channels": [256, 256, 512, 512, 1024, 2048, 2048, 2048], "layers_per_block": 2}
    single = {"quantizer": "single", "global_codebook_size": 0, "global_dim": 0}
    for fields in (large, {**single, "local_codebook_size": 2**18, "local_dim": 256}):
        with torch.device("meta"):
            DualCodebookVQModel(**fields)


def test_fields_that_transformers_sets_afterwards_are_checked(tmp_path, tiny_config):
    DualCodebookVQModel(**tiny_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`global_codebook_size` must lie in \[0, 4194304\], got 1000000000"):
        DualCodebookModel.from_pretrained(tmp_path, global_codebook_size=10**9)
    with pytest.raises(ValueError, match=r"`num_labels` must be a whole number in \[0, 65536\], got 1000000000"):
        DualCodebookConfig(num_labels=10**9)


@pytest.mark.parametrize("kind", [DualCodebookConfig, DualCodebookVQModel, DualCodebookModel])
def test_help_shows_every_field_with_type_default_and_meaning(kind):
    shown = pydoc.render_doc(kind, renderer=pydoc.plaintext)
    text = " ".join(re.sub(r"^ \|", "", shown, flags=re.M).split())
    for spec in dataclasses.fields(DualCodebookFields):
        default = getattr(DualCodebookFields(), spec.name)
        meaning = " ".join(spec.metadata["help"].split())
        assert f" {spec.name} ({FIELD_TYPES[spec.name]}, default {default!r}): {meaning}" in text
        if spec.name in BOUNDS:
            assert f"{meaning}; in [{BOUNDS[spec.name][0]}, {BOUNDS[spec.name][1]}]." in text


def test_help_shows_every_option_of_the_image_processor_and_of_the_pipeline():
    kind, text = DualCodebookImageProcessor, inspect.getdoc(DualCodebookImageProcessor)
    names = ("do_resize", "size", "max_pixels", "do_center_crop", "crop_size", "do_rescale", "do_normalize")
    for name in (*names, "image_mean", "image_std", "do_convert_rgb"):
        default = re.escape(repr(getattr(kind, name)))
        assert re.search(rf"^    {name} \([^:]+, default {default}\): \w+", text, re.M), name
    assert f"default {kind.resample.name})" in text
    options = re.findall(r"^    (\w+)(?: \([^)]*\))?: ", inspect.getdoc(ImageReconstructionPipeline), re.M)
    assert options == ["model", "image_processor", "batch_size", "image_processor_kwargs", "kwargs"]
