"""Token files keep every token, and refuse what cannot be decoded."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dualcodebook_hf import DualCodebookConfig, DualCodebookVQModel
from dualcodebook_hf.configuration_dualcodebook import config_hash
from dualcodebook_hf.tokens.file import (
    HEADER_PER_IMAGE,
    METADATA_KEY,
    TokenFile,
    TokenizedImage,
    check_names,
    load_tokens,
    save_tokens,
    token_bytes,
)
from dualcodebook_hf.weights import encoder_hash, weights_hash

CODEBOOKS = {"global": 512, "local": 300}


def image(
    name: str = "a.png", size: tuple[int, int] = (33, 50), codebooks: dict[str, int] = CODEBOOKS
) -> TokenizedImage:
    grid = [-(-side // 16) for side in size]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randint(0, n, grid, generator=generator) for n in codebooks.values()])
    return TokenizedImage(name, size, tokens)


def content(*images: TokenizedImage, **changes) -> TokenFile:
    return dataclasses.replace(TokenFile(images or (image(),), 16, dict(CODEBOOKS), "0123456789ab"), **changes)


def rewrite(path, tensors=None, **header) -> None:
    """Replaces parts of a token file behind the writer's back."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
    save_file(tensors or load_file(path), path, metadata={METADATA_KEY: json.dumps({**metadata, **header})})


@pytest.mark.parametrize("count", [0, 1, 3])
def test_everything_comes_back(tmp_path, count: int) -> None:
    sizes = [(1, 1), (33, 50), (16, 4096)]
    saved = content().images[:0] if count == 0 else [image(f"ü {i}.jpg", sizes[i]) for i in range(count)]
    save_tokens(tmp_path / "t.safetensors", content(images=saved))
    loaded = load_tokens(tmp_path / "t.safetensors")
    assert (loaded.downsample_factor, loaded.codebooks, loaded.config_hash) == (16, CODEBOOKS, "0123456789ab")
    assert list(loaded.codebooks) == ["global", "local"]
    assert [(p.name, p.size) for p in loaded.images] == [(p.name, p.size) for p in saved]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(loaded.images, saved, strict=True))
    assert all(p.tokens.dtype == torch.int64 for p in loaded.images)


def test_the_format_is_uint16_tensors_with_numbered_names(tmp_path) -> None:
    save_tokens(tmp_path / "t.safetensors", content(image(), image("b.png", (1, 1))))
    tensors = load_file(tmp_path / "t.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "0000.tokens": (torch.uint16, (2, 3, 4)),
        "0001.tokens": (torch.uint16, (2, 1, 1)),
    }


def test_the_largest_codebook_of_uint16_keeps_its_last_token_and_a_larger_one_is_refused(tmp_path) -> None:
    tokens = torch.tensor([[[65535]]])
    path = tmp_path / "t.safetensors"
    save_tokens(path, TokenFile([TokenizedImage("a", (1, 1), tokens)], 16, {"codebook": 65536}, ""))
    assert load_tokens(path).images[0].tokens.item() == 65535
    with pytest.raises(ValueError, match=r"`codebooks`.*'codebook'.*65536.*65537"):
        save_tokens(path, TokenFile([], 16, {"codebook": 65537}, ""))


def test_bytes_of_tokens_are_rounded_up() -> None:
    assert token_bytes((16, 16), 18.0) == 576
    assert token_bytes((1, 1), 18.0) == 3
    assert token_bytes((3, 1), 10.0) == 4


@pytest.mark.parametrize(
    "wrong, message",
    [
        (TokenizedImage("a.png", (33, 70), image().tokens), r"'a.png'.*\(2, 3, 5\).*70x33.*f=16.*\(2, 3, 4\)"),
        (TokenizedImage("a.png", (33, 50), image().tokens[:1]), r"'a.png'.*\(1, 3, 4\)"),
        (TokenizedImage("a.png", (33, 50), image().tokens.float()), r"integers.*float32"),
        (TokenizedImage("a.png", (33, 50), torch.full((2, 3, 4), 300)), r"codebook 'local'.*\[0, 300\).*\[300, 300\]"),
        (TokenizedImage("a.png", (33, 50), torch.full((2, 3, 4), -1)), r"codebook 'global'.*\[-1, -1\]"),
        (TokenizedImage("a.png", (0, 50), torch.zeros(2, 0, 4, dtype=int)), r"`size`.*\(0, 50\)"),
        (TokenizedImage("../a.png", (33, 50), image().tokens), r"`name`.*'\.\./a\.png'"),
        (TokenizedImage("..", (33, 50), image().tokens), r"`name`"),
    ],
)
def test_what_cannot_be_decoded_is_not_written(tmp_path, wrong: TokenizedImage, message: str) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match=message):
        save_tokens(path, content(wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "t.safetensors"
    save_tokens(path, content())
    before = path.read_bytes()
    with pytest.raises(ValueError):
        save_tokens(path, content(downsample_factor=8))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    save_tokens(path, content(config_hash="new"))
    assert load_tokens(path).config_hash == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "header, message",
    [
        ({"format_version": 2}, r"version 1, got 2"),
        ({"format_version": None}, r"version 1, got None"),
        ({"books": [["global", 512], ["local", 10]]}, r"codebook 'local'.*\[0, 10\)"),
        ({"books": [["global", 512]]}, r"shape \(1, 3, 4\)"),
        ({"books": ["global"]}, r"`books`"),
        ({"downsample_factor": 8}, r"f=8"),
        ({"downsample_factor": 0}, r"`downsample_factor`"),
        ({"downsample_factor": "16"}, r"`downsample_factor`"),
        ({"config_hash": None}, r"`config_hash`"),
        ({"pictures": []}, r"0 images, got 1"),
        ({"pictures": [{"name": "a.png"}]}, r"`pictures`"),
        ({"pictures": [{"name": "a.png", "height": 33, "width": 500}]}, r"500x33"),
        ({"pictures": [{"name": "a.png", "height": True, "width": 50}]}, r"`size`"),
        ({"pictures": [{"name": "/etc/a.png", "height": 33, "width": 50}]}, r"`name`"),
    ],
)
def test_a_file_that_contradicts_itself_is_a_value_error_that_names_it(tmp_path, header: dict, message: str) -> None:
    path = tmp_path / "t.safetensors"
    save_tokens(path, content())
    rewrite(path, **header)
    with pytest.raises(ValueError, match=message) as error:
        load_tokens(path)
    assert "t.safetensors" in str(error.value)


def test_tokens_of_another_type_are_refused(tmp_path) -> None:
    path = tmp_path / "t.safetensors"
    save_tokens(path, content())
    rewrite(path, tensors={"0000.tokens": image().tokens.int()})
    with pytest.raises(ValueError, match=r"uint16, got torch.int32"):
        load_tokens(path)


def test_missing_broken_and_foreign_files_are_value_errors_that_name_them(tmp_path) -> None:
    (tmp_path / "text").write_text("hello")
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights")
    save_tokens(tmp_path / "cut", content())
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-5])
    (tmp_path / "folder").mkdir()
    for name in ("text", "weights", "cut", "folder", "missing"):
        with pytest.raises(ValueError, match=rf"token file .*{name}'"):
            load_tokens(tmp_path / name)


def test_tokens_are_taken_by_the_model_that_made_them(tiny_model, tiny_config) -> None:
    made = TokenFile.of_model(tiny_model, [])
    assert (made.downsample_factor, made.codebooks) == (2, {"global": 32, "local": 16})
    made.check_model(tiny_model, "t.safetensors")
    other = DualCodebookVQModel(**{**tiny_config, "local_codebook_size": 17})
    with pytest.raises(ValueError, match=rf"`--model`.*'t.safetensors'.*{made.config_hash}.*'local': 16"):
        made.check_model(other, "t.safetensors", "--model")


def test_several_decoders_read_the_same_tokens(tiny_model) -> None:
    further = copy.deepcopy(tiny_model)
    for name in ("decoder.conv_out.bias", "post_quant_conv.weight"):
        further.get_parameter(name).data += 1
    made, there = TokenFile.of_model(tiny_model, []), TokenFile.of_model(further, [])
    assert (made.config_hash, made.weights_sha256) == (there.config_hash, there.weights_sha256)
    made.check_model(further, "t.safetensors")
    assert weights_hash(further) != weights_hash(tiny_model)
    wider = {"decoder_block_out_channels": [64, 64], "decoder_layers_per_level": [2, 2], "overlapping_shortcut": True}
    shape = {"backbone": "dcae", "block_out_channels": [32, 32], "linear_shortcut": True}
    assert config_hash(DualCodebookConfig(**shape, **wider)) == config_hash(DualCodebookConfig(**shape))
    for name in ("encoder.conv_in.bias", "quant_conv.weight", "quantize.global_codebook.weight"):
        other = copy.deepcopy(tiny_model)
        other.state_dict()[name].add_(1e-3)
        with pytest.raises(ValueError, match=f"{made.weights_sha256}; got one with SHA-256 {encoder_hash(other)}"):
            made.check_model(other, "t.safetensors")


def test_files_of_older_versions_name_all_weights(tiny_model) -> None:
    old = dataclasses.replace(TokenFile.of_model(tiny_model, []), weights_sha256=weights_hash(tiny_model))
    old.check_model(tiny_model, "t.safetensors")
    further = copy.deepcopy(tiny_model)
    further.decoder.conv_out.bias.data += 1
    with pytest.raises(ValueError, match="encoder and codebooks of SHA-256"):
        old.check_model(further, "t.safetensors")


def test_other_weights_are_refused_with_both_hashes_unless_asked_for(tiny_model, tiny_config, tmp_path) -> None:
    save_tokens(tmp_path / "t.safetensors", TokenFile.of_model(tiny_model, []))
    made, other = load_tokens(tmp_path / "t.safetensors"), DualCodebookVQModel(**tiny_config)
    assert made.weights_sha256 == encoder_hash(tiny_model)
    with pytest.raises(ValueError, match=f"SHA-256 {made.weights_sha256}; got one .* {encoder_hash(other)}"):
        made.check_model(other, "t.safetensors")
    made.check_model(other, "t.safetensors", other_weights=True)
    with pytest.raises(ValueError, match=r"`model` must have the codebooks {'global': 32, 'local': 16} .* got"):
        made.check_model(
            DualCodebookVQModel(**{**tiny_config, "local_codebook_size": 17}), "t.safetensors", other_weights=True
        )


def test_a_file_of_before_the_hash_is_read_with_a_warning(tiny_model, tmp_path) -> None:
    path = tmp_path / "t.safetensors"
    save_tokens(path, dataclasses.replace(TokenFile.of_model(tiny_model, [])))
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    del header["weights_sha256"]
    save_file({}, path, metadata={METADATA_KEY: json.dumps(header)})
    with pytest.warns(UserWarning, match=r"'old\.safetensors' was written before token files named the weights"):
        load_tokens(path).check_model(tiny_model, "old.safetensors")
    rewrite(path, weights_sha256=7)
    with pytest.raises(ValueError, match="`weights_sha256` must be text, got 7"):
        load_tokens(path)


def test_more_names_than_a_header_holds_are_refused_before_any_work():
    check_names([f"{index:06d}.jpg" for index in range(400_000)])
    with pytest.raises(ValueError, match=r"can hold about \d{6} images .*, got 660000: write several files"):
        check_names([f"{index:06d}.jpg" for index in range(660_000)])
    with pytest.raises(ValueError, match=r"can hold about \d+ images .*, got 200000"):
        check_names(["\u00e9" * 120] * 200_000)


def test_what_is_counted_for_an_image_is_no_less_than_its_part_of_the_header(tmp_path):
    names = [f'a "{index}" \u00e9.png' for index in range(3000)]
    tokens = torch.zeros(2, 1, 1, dtype=torch.int64)
    images = [TokenizedImage(name, (1, 1), tokens) for name in names]
    save_tokens(tmp_path / "a.safetensors", TokenFile(images, 99_999, {"a": 512, "b": 512}, "0" * 12))
    header = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    counted = sum(HEADER_PER_IMAGE + len(json.dumps(json.dumps(name))) for name in names)
    # sizes and offsets of real images have up to some 25 digits more
    assert header + 25 * len(names) < counted < 1.5 * header


@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_json_nested_deeply_is_a_value_error(tmp_path, depth):
    path = tmp_path / "a.safetensors"
    save_file({"0000.tokens": torch.zeros(1)}, path, metadata={METADATA_KEY: "[" * depth + "]" * depth})
    with pytest.raises(ValueError, match="cannot read token file"):
        load_tokens(path)


@pytest.mark.parametrize("name", ["a" * 256, "\u00e9" * 128, "a\ud800.png"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(ValueError, match="`name` must be"):
        check_names([name])


def test_an_image_is_told_to_be_no_token_file(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"cannot read token file '.*a\.jpg': it is not a token file"):
        load_tokens(tmp_path / "a.jpg")
