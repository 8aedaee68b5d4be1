import dataclasses
import inspect

import pytest
import torch

from dualcodebook_hf import DualCodebookConfig, DualCodebookVQModel
from dualcodebook_hf.configuration_dualcodebook import DualCodebookFields, config_hash
from dualcodebook_hf.presets import load_preset, preset_names


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
        ({"local_codebook_size": 0}, "`local_codebook_size` must be at least 1, got 0"),
        ({"local_update": "matrix"}, "`local_update` must be one of gradient, ema, linear, got 'matrix'"),
        (
            {"global_update": "linear"},
            "`global_update: linear` needs a plain table; set global_transformer_layers to 0, got 6",
        ),
        ({"quantizer": "vq"}, "`quantizer` must be one of dual, single, residual, fsq, lfq, got 'vq'"),
        ({"quantizer": "residual", "global_codebook_size": 0}, "`global_codebook_size` must be at least 1, got 0"),
        ({"fsq_levels": [8, 8]}, r"`fsq_levels` is for `quantizer: fsq`, got \[8, 8\] with 'dual'"),
        (
            {"quantizer": "fsq", "fsq_levels": [8, 8, 8], "global_dim": 2, "local_dim": 2},
            r"`fsq_levels` must be one number of at least 3 for each of .* = 4 channels, got \[8, 8, 8\]",
        ),
        (
            {"quantizer": "fsq", "fsq_levels": [8, 8, 8, 5], "global_dim": 3, "local_dim": 1},
            "`local_codebook_size` must be 5 = 5, .* with `quantizer: fsq`, got 512",
        ),
        (
            {"quantizer": "lfq", "global_dim": 9, "local_dim": 8},
            "`local_codebook_size` must be 256 = 2 x 2 x .* with `quantizer: lfq`, got 512",
        ),
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
