"""Converters: equal outputs to the source models, every tensor accounted for, nothing executed."""

import argparse
import hashlib
import json
import os
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from torch import nn

from dualcodebook_hf import DualCodebookImageProcessor, DualCodebookVQModel
from dualcodebook_hf.cli import convert as command
from dualcodebook_hf.convert import convert_checkpoint
from dualcodebook_hf.flags import Parser

WIDTHS = (32, 32, 64)


GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_numbers():
    GENERATOR.manual_seed(0)


def normal(*shape, scale=0.1):
    return torch.randn(shape, generator=GENERATOR) * scale


# --- taming-transformers, written down again: names and forward pass, independent of diffusers


def taming_state(widths=WIDTHS, blocks=1, attention=True, levels=True, latents=16):
    """Random tensors under the names of taming-transformers' VQGAN; its widths are ch x ch_mult, ch = widths[0]."""
    state = {}

    def conv(name, inputs, outputs, size):
        state[f"{name}.weight"], state[f"{name}.bias"] = normal(outputs, inputs, size, size), normal(outputs)

    def norm(name, channels):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + normal(channels), normal(channels)

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs), conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs), conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attend(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(side):
        block(f"{side}.mid.block_1", widths[-1], widths[-1])
        block(f"{side}.mid.block_2", widths[-1], widths[-1])
        if attention:
            attend(f"{side}.mid.attn_1", widths[-1])

    last = len(widths) - 1
    conv("encoder.conv_in", 3, widths[0], 3)
    for level, width in enumerate(widths):
        for index in range(blocks):
            before = width if index else widths[max(level - 1, 0)]
            block(f"encoder.down.{level}.block.{index}", before, width)
            if attention and levels and level == last:
                attend(f"encoder.down.{level}.attn.{index}", width)
        if level != last:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder"), norm("encoder.norm_out", widths[-1]), conv("encoder.conv_out", widths[-1], latents, 3)
    conv("quant_conv", latents, latents, 1), conv("post_quant_conv", latents, latents, 1)
    conv("decoder.conv_in", latents, widths[-1], 3), middle("decoder")
    for level, width in reversed(list(enumerate(widths))):
        for index in range(blocks + 1):
            before = width if index else widths[min(level + 1, last)]
            block(f"decoder.up.{level}.block.{index}", before, width)
            if attention and levels and level == last:
                attend(f"decoder.up.{level}.attn.{index}", width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", widths[0]), conv("decoder.conv_out", widths[0], 3, 3)
    return state


class Taming:
    """The forward pass of taming-transformers' encoder and decoder over such a state dict."""

    def __init__(self, state, levels=3, blocks=1):
        self.state, self.levels, self.blocks = state, levels, blocks

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attend(self, name, x):
        if f"{name}.q.weight" not in self.state:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5, dim=2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(x.shape))

    def middle(self, side, x):
        x = self.attend(f"{side}.mid.attn_1", self.block(f"{side}.mid.block_1", x))
        return self.block(f"{side}.mid.block_2", x)

    def encode(self, x):
        h = self.conv("encoder.conv_in", x, padding=1)
        for level in range(self.levels):
            for index in range(self.blocks):
                h = self.block(f"encoder.down.{level}.block.{index}", h)
                h = self.attend(f"encoder.down.{level}.attn.{index}", h)
            if level < self.levels - 1:
                h = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
        h = F.silu(self.norm("encoder.norm_out", self.middle("encoder", h)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", h, padding=1))

    def decode(self, z):
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1)
        h = self.middle("decoder", h)
        for level in reversed(range(self.levels)):
            for index in range(self.blocks + 1):
                h = self.block(f"decoder.up.{level}.block.{index}", h)
                h = self.attend(f"decoder.up.{level}.attn.{index}", h)
            if level:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = self.conv(f"decoder.up.{level}.upsample.conv", h, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h)), padding=1)


def vqgan_state(**options):
    """The same with one codebook, and what training leaves beside the tokenizer."""
    state = taming_state(**options)
    state["quantize.embedding.weight"] = normal(24, state["quant_conv.weight"].shape[0], scale=1.0)
    state["loss.discriminator.main.3.num_batches_tracked"] = torch.tensor(7)
    state["loss.perceptual_loss.lin0.model.1.weight"] = normal(1, 64, 1, 1)
    state["colorize"] = normal(3, 5, 1, 1)
    return state


def dropped_names(result):
    return [name for names in result.dropped.values() for name in names]


def nearest(vectors, codes):
    """By brute force, position by position: (B, C, h, w), (N, C) -> (B, h, w)."""
    return (vectors.movedim(1, -1)[..., None, :] - codes).square().sum(-1).argmin(-1)


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1


def near(latents, count):
    """Codes (count, C) close to latents (B, C, h, w), so that all of them are used."""
    vectors = latents.movedim(1, -1).flatten(0, 2)
    return vectors[torch.randperm(len(vectors), generator=GENERATOR)[:count]] + normal(
        count, vectors.shape[1], scale=1e-3
    )


def load(folder):
    return DualCodebookVQModel.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "options", [{"blocks": 2}, {"attention": False}, {"levels": False}, {"widths": (32, 64)}], ids=str
)
@torch.no_grad()
def test_a_taming_vqgan_gives_the_same_latents_indices_and_images(tmp_path, images, options):
    state = vqgan_state(**options)
    reference = Taming(state, len(options.get("widths", WIDTHS)), options.get("blocks", 1))
    codes = state["quantize.embedding.weight"] = near(reference.encode(images), 24)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    result = convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "ours")
    model = load(tmp_path / "ours")
    latents = model.encode(images).latents
    torch.testing.assert_close(latents, reference.encode(images), rtol=1e-4, atol=1e-4)
    ids = model.quantize(latents)[2][2].view(2, *latents.shape[2:])
    assert torch.equal(ids, nearest(latents, codes)) and len(ids.unique()) == 24
    quantized = codes[ids].movedim(-1, 1)
    torch.testing.assert_close(model.decode(ids).sample, reference.decode(quantized), rtol=1e-4, atol=1e-4)
    assert result.kind == "taming" and model.config.quantizer == "single"
    assert result.mapped == len(model.state_dict()) == len(state) - 3
    assert sorted(dropped_names(result)) == sorted(k for k in state if k.startswith(("loss.", "colorize")))


@torch.no_grad()
def test_the_authors_checkpoint_gives_the_same_tokens_and_images(tmp_path, images):
    state = taming_state()
    layer = nn.TransformerEncoderLayer(d_model=8, nhead=8, dim_feedforward=20, dropout=0.1)
    transformer = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
    for parameter in transformer.parameters():
        parameter.add_(normal(*parameter.shape))
    state["quantize.global_codebook"] = normal(12, 8, scale=1.0)
    reference = Taming(state)
    latents = reference.encode(images)
    state["quantize.local_codebook.weight"] = near(latents[:, 8:], 20)
    state |= {f"quantize.transformer.{name}": value for name, value in transformer.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "epoch.ckpt")
    result = convert_checkpoint(tmp_path / "epoch.ckpt", tmp_path / "ours", kind="authors")
    model = load(tmp_path / "ours")
    global_codes, local_codes = transformer(state["quantize.global_codebook"]), state["quantize.local_codebook.weight"]
    torch.testing.assert_close(model.quantize.global_codebook.codes(), global_codes, rtol=1e-5, atol=1e-5)
    tokens = model.tokenize(images)
    expected = torch.stack([nearest(latents[:, :8], global_codes), nearest(latents[:, 8:], local_codes)], 1)
    assert torch.equal(tokens, expected) and len(tokens[:, 0].unique()) > 1 and len(tokens[:, 1].unique()) == 20
    quantized = torch.cat([global_codes[expected[:, 0]], local_codes[expected[:, 1]]], -1).movedim(-1, 1)
    torch.testing.assert_close(model.detokenize(tokens), reference.decode(quantized), rtol=1e-4, atol=1e-4)
    assert result.mapped == len(state) and not result.dropped
    assert model.config.transformer_heads == 8 and model.config.global_transformer_layers == 2


# --- diffusers' VQModel

ATTENTION = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAIN = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "mid_block_add_attention": False,
}


def vqmodel(**options):
    torch.manual_seed(1)
    shared = {"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 20}
    return VQModel(**{**shared, **options}).eval()


@pytest.mark.parametrize(
    "options",
    [
        ATTENTION,
        {**PLAIN, "mid_block_add_attention": True},
        {**ATTENTION, "mid_block_add_attention": False},
        {**PLAIN, "layers_per_block": 2, "force_upcast": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_vqmodel_gives_the_same_outputs_bit_for_bit(tmp_path, images, options):
    source = vqmodel(**options)
    source.quantize.embedding.weight.copy_(near(source.encode(images).latents, 20))
    source.save_pretrained(tmp_path / "theirs")
    result = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    model = load(tmp_path / "ours")
    latents = source.encode(images).latents
    assert torch.equal(model.encode(images).latents, latents)
    (quantized, loss, (_, _, ids)), ours = source.quantize(latents), model.quantize(latents)
    assert torch.equal(ours[2][2], ids) and len(ids.unique()) == 20
    torch.testing.assert_close(ours[0], quantized)
    torch.testing.assert_close(ours[1], loss)
    assert torch.equal(
        model.decode(quantized, force_not_quantize=True).sample,
        source.decode(quantized, force_not_quantize=True).sample,
    )
    torch.testing.assert_close(model(images).sample, source(images).sample)
    assert (result.kind, result.source, result.dropped) == ("vqmodel", "theirs", {})
    assert (model.config.scaling_factor, model.config.force_upcast) == (0.18215, options.get("force_upcast", False))


@pytest.mark.parametrize(
    "options, message",
    [
        ({**PLAIN, "norm_type": "spatial", "block_out_channels": [32, 32]}, "`norm_type` must be group"),
        ({**PLAIN, "vq_embed_dim": 6}, "latents have 4 channels and its codes 6"),
        (
            {**PLAIN, "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]},
            "self-attention at the levels",
        ),
        ({**PLAIN, "act_fn": "relu"}, "`act_fn` must be silu"),
    ],
)
def test_a_vqmodel_that_cannot_be_expressed_is_refused(tmp_path, options, message):
    vqmodel(**options).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"cannot be expressed.*{message}"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_vqmodel_folder_is_checked_for_its_class_its_tensors_and_its_subfolder(tmp_path, tiny_model):
    vqmodel(**PLAIN).save_pretrained(tmp_path / "pipeline" / "vqvae")
    assert convert_checkpoint(tmp_path / "pipeline", tmp_path / "ours", subfolder="vqvae").source == "vqvae"
    with pytest.raises(ValueError, match=r"must hold config\.json"):
        convert_checkpoint(tmp_path / "pipeline", tmp_path / "out")
    weights = tmp_path / "pipeline" / "vqvae" / WEIGHTS
    state = load_file(weights)
    save_file({**state, "surplus.weight": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"1 tensors unknown: surplus\.weight"):
        convert_checkpoint(tmp_path / "pipeline" / "vqvae", tmp_path / "out")
    save_file({key: value for key, value in state.items() if key != "quant_conv.bias"}, weights)
    with pytest.raises(ValueError, match=r"1 tensors missing: quant_conv\.bias"):
        convert_checkpoint(tmp_path / "pipeline" / "vqvae", tmp_path / "out")
    tiny_model.save_pretrained(tmp_path / "already")
    with pytest.raises(ValueError, match=r"must be a diffusers VQModel.*'DualCodebookVQModel'"):
        convert_checkpoint(tmp_path / "already", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_found_and_named_with_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache" / "models--nobody--pipeline", "0123456789abcdef0123456789abcdef01234567"
    vqmodel(**PLAIN).save_pretrained(repository / "snapshots" / commit / "vqvae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    result = convert_checkpoint("nobody/pipeline", tmp_path / "ours", subfolder="vqvae")
    assert result.source == f"nobody/pipeline/vqvae @ {commit}" and list(result.files) == [WEIGHTS]
    with pytest.raises(ValueError, match=r"must hold config\.json"):
        convert_checkpoint("nobody/pipeline", tmp_path / "out", revision="main")


# --- strictness


def edited(change):
    state = vqgan_state()
    change(state)
    return state


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.pop("encoder.mid.block_1.norm1.bias"),
            r"1 tensors missing: encoder\.mid_block\.resnets\.0\.",
        ),
        (lambda s: s.update({"encoder.more": normal(1)}), r"1 tensors unknown: encoder\.more"),
        (lambda s: s.update({"decoder.up.0.block.9.conv1.bias": normal(1)}), r"1 tensors unknown: decoder\.up\.0"),
        (lambda s: s.update({"quantize.used": normal(3)}), r"1 tensors unknown: quantize\.used"),
        (
            lambda s: s.update({"decoder.up.2.attn.0.q.weight": normal(64, 64, 3, 3)}),
            r"1 tensors of another shape: decoder\.up\.2\.attn\.0\.q\.weight \(64, 64, 3, 3\) \(expected \(64, 64\)\)",
        ),
        (
            lambda s: s.update({"encoder.down.0.attn.0.q.weight": normal(1)}),
            r"levels \[0, 2\] of the encoder and \[2\]",
        ),
        (lambda s: s.update({"encoder.conv_in.weight": normal(64, 3, 3, 3)}), "first convolution gives 64"),
        (lambda s: s.update({"quant_conv.weight": normal(8, 16, 1, 1)}), "latents have 16 channels and its codes 8"),
        (lambda s: s.pop("quant_conv.weight"), r"lacks the tensor quant_conv\.weight"),
        (lambda s: s.update({"quantize.embed.weight": s.pop("quantize.embedding.weight")}), "Gumbel quantizer"),
        (lambda s: s.pop("quantize.embedding.weight"), "must hold tensors such as"),
        (lambda s: s.update({"epoch": 3}), "must hold a state dict"),
        (
            lambda s: s.update({"quant_conv.bias": torch.ones(8, dtype=torch.int64)}),
            r"1 tensors of another type: quant_conv\.bias torch\.int64",
        ),
        (
            lambda s: s["quant_conv.bias"].fill_(float("nan")),
            r"1 tensors with NaN or infinity: quant_conv\.bias",
        ),
    ],
)
def test_a_source_that_does_not_come_out_even_is_refused(tmp_path, change, message):
    torch.save(edited(change), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def expanded(state, **shapes):
    """A state dict of these shapes that holds one number for each tensor."""
    return {key: torch.zeros(()).expand(shapes.get(key.replace(".", "_"), value.shape)) for key, value in state.items()}


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({}, r"must hold all numbers of its tensors: they take \d+ bytes, the file \d+"),
        ({"quantize_embedding_weight": (10**9, 8)}, r"`local_codebook_size` must lie in .* got 1000000000"),
        ({"encoder_mid_block_1_conv1_weight": (2**20, 2**20, 3, 3)}, r"bytes, the file|of another shape"),
    ],
)
def test_few_numbers_that_claim_to_be_many_are_refused_before_they_are_made(tmp_path, shapes, message):
    torch.save(expanded(vqgan_state(), **shapes), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_vq_embeddings": 10**9}, r"`local_codebook_size` must lie in .* got 1000000000"),
        ({"block_out_channels": [2**20, 2**20]}, "`block_out_channels` must be"),
        ({"block_out_channels": 3}, "other types than VQModel's"),
        ({"latent_channels": None}, "cannot be expressed"),
        ({"scaling_factor": "x"}, "`scaling_factor` must be of type float"),
    ],
)
def test_a_vqmodels_configuration_is_bounded_too(tmp_path, change, message):
    vqmodel(**PLAIN).save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_broken_weights_of_a_vqmodel_are_named(tmp_path):
    vqmodel(**PLAIN).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(ValueError, match=f"`source` '{WEIGHTS}' cannot be read as safetensors"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_diffusers_old_names_of_attention_are_known(tmp_path, images):
    theirs = vqmodel(**{**PLAIN, "mid_block_add_attention": True})
    theirs.save_pretrained(tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, tmp_path / "theirs" / WEIGHTS)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    ours = DualCodebookVQModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours.encode(images).latents, theirs.encode(images).latents)


def test_every_tensor_of_the_folder_is_one_of_the_source(tmp_path):
    state = vqgan_state()
    save_file(state, tmp_path / "a.safetensors")
    result = convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "ours")
    written = load_file(tmp_path / "ours" / WEIGHTS)
    kept = [value for key, value in state.items() if key not in dropped_names(result)]
    assert sorted(value.sum().item() for value in kept) == pytest.approx(
        sorted(v.sum().item() for v in written.values())
    )
    assert all(value.dtype == torch.float32 for value in written.values())


def test_half_precision_is_widened(tmp_path):
    save_file({key: value.half() for key, value in vqgan_state().items()}, tmp_path / "a.safetensors")
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "ours")
    assert load(tmp_path / "ours").dtype == torch.float32


# --- pickles


def test_a_lightning_checkpoint_with_its_classes_is_read_without_them(tmp_path, monkeypatch):
    modules = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.utilities", "omegaconf")
    for name in modules:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def make(name, module, *bases):
        made = type(name, bases, {"__module__": module})
        monkeypatch.setattr(sys.modules[module], name, made, raising=False)
        return made

    callback = make("ModelCheckpoint", "pytorch_lightning.callbacks")
    parameters = make("AttributeDict", "pytorch_lightning.utilities", dict)(lr=1e-4)
    settings = make("DictConfig", "omegaconf")()
    settings.content = {"lr": 1}
    content = {
        "state_dict": vqgan_state(),
        "callbacks": {callback: {"best_model_score": torch.tensor(1.0), "best_model_path": "a"}},
        "hyper_parameters": parameters,
        "config": settings,
        "arguments": argparse.Namespace(seed=1),
        "optimizer_states": [{"state": {0: {"step": 3}}}],
    }
    torch.save(content, tmp_path / "last.ckpt")
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "ours").kind == "taming"
    assert not set(modules) & set(sys.modules)
    with pytest.raises(pickle.UnpicklingError):  # the stubs are gone again
        torch.load(tmp_path / "last.ckpt", weights_only=True)


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.mkdir, eval], ids=["os.mkdir", "eval"])
def test_a_pickle_that_would_run_something_is_refused(tmp_path, function, zipped):
    victim = tmp_path / "made"
    argument = str(victim) if function is os.mkdir else f"__import__('os').mkdir({str(victim)!r})"
    content = {"state_dict": vqgan_state(), "extra": Runs(function, argument)}
    torch.save(content, tmp_path / "bad.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"`source` 'bad.ckpt' .*nothing in it was executed") as refusal:
        convert_checkpoint(tmp_path / "bad.ckpt", tmp_path / "ours")
    assert function.__name__ in str(refusal.value) and "weights_only" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.ckpt"]
    torch.load(tmp_path / "bad.ckpt", weights_only=False)  # what it would have done
    assert victim.is_dir()


def test_the_old_format_of_torch_is_read_and_a_broken_file_is_not(tmp_path):
    torch.save(vqgan_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert convert_checkpoint(tmp_path / "old.pth", tmp_path / "ours").kind == "taming"
    whole = (tmp_path / "old.pth").read_bytes()
    for name, content in {
        "cut.pth": whole[:2000],
        "text.ckpt": b"hello",
        "empty.bin": b"",
        "a.safetensors": b"no",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"`source` '{name}' cannot be read"):
            convert_checkpoint(tmp_path / name, tmp_path / "other")


# --- the folder, its record, the command


def test_the_folder_says_where_it_comes_from_and_loads_with_its_processor(tmp_path):
    torch.save({"state_dict": vqgan_state()}, tmp_path / "last.ckpt")
    result = convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "deep" / "ours")
    record = json.loads((tmp_path / "deep" / "ours" / "conversion.json").read_text())
    assert record == result.record() and str(tmp_path) not in json.dumps(record)
    assert record["files"] == {"last.ckpt": hashlib.sha256((tmp_path / "last.ckpt").read_bytes()).hexdigest()}
    assert record["dropped"]["colours of segmentation maps"] == ["colorize"]
    assert DualCodebookImageProcessor.from_pretrained(tmp_path / "deep" / "ours")
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_nothing_is_overwritten_and_wrong_names_are_told_apart(tmp_path):
    torch.save(vqgan_state(), tmp_path / "a.ckpt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for wrong, message in {
        ("a.ckpt", "full", None): "`output` must be a new or empty folder",
        ("a.ckpt", "a.ckpt", None): "`output` must be a new or empty folder",
        ("a.ckpt", "new", "vqgan"): "`kind` must be one of authors, taming, vqmodel, got 'vqgan'",
        ("a.ckpt", "new", "authors"): "`kind` must be 'taming'",
        ("full", "new", None): r"must hold config\.json",
        ("full", "new", "taming"): "of kind 'taming' must be a file",
        ("none.ckpt", "new", None): "must be a file, a folder or a Hub id",
    }.items():
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / wrong[0], tmp_path / wrong[1], wrong[2])
    with pytest.raises(ValueError, match="must be a file, a folder or a Hub id"):
        convert_checkpoint("runs/none.ckpt", tmp_path / "new")
    with pytest.raises(ValueError, match="'nobody/vqvae' cannot be loaded from the Hub"):  # offline
        convert_checkpoint("nobody/vqvae", tmp_path / "new")
    with pytest.raises(ValueError, match="`subfolder` and `revision` are for"):
        convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "new", revision="main")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "empty", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "empty")
    assert load(tmp_path / "empty").config.quantizer == "single"


def test_the_command_converts_and_says_what_it_did(tmp_path, capsys):
    torch.save(vqgan_state(), tmp_path / "a.ckpt")
    parser = Parser()
    command.add_convert(parser)
    arguments = parser.parse_args([str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "ours")])
    assert arguments.run(arguments) == 0
    printed = capsys.readouterr().out
    assert "taming: a.ckpt" in printed and "2 dropped: training loss" in printed and "quantizer single" in printed
    assert load(tmp_path / "ours").config.local_codebook_size == 24
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        arguments.run(arguments)
