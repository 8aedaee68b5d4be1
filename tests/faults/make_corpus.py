"""Writes corpus/: for each reader a few valid inputs, and inputs that once failed, all of them small.

    python tests/faults/make_corpus.py

An input that `make test-faults` finds is added here, or to the folder by hand.
"""

import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

from PIL import Image

CORPUS = Path(__file__).parent / "corpus"
DEEP = "[" * 3000 + "]" * 3000
SMALL = {"block_out_channels": [4, 4], "layers_per_block": 1, "norm_num_groups": 4, "attention": False}
SMALL |= {"global_codebook_size": 32, "local_codebook_size": 16, "global_dim": 8, "local_dim": 4}
SMALL |= {"global_transformer_layers": 0, "transformer_heads": 2, "transformer_feed_forward": 16}


class Payload:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def png(width, height, extra=b""):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"\0" * ((width + 1) * min(height, 10**5)), 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def safetensors(header, data=b""):
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text)) + text.encode() + data


def token_file(changes=None, metadata=None, tensor=None, data=bytes(range(1, 13))):
    header = {"format_version": 1, "downsample_factor": 2, "books": [["global", 65536], ["local", 65536]]}
    header |= {"config_hash": "0", "pictures": [{"name": "a.png", "height": 2, "width": 6}], **(changes or {})}
    described = {"dtype": "U16", "shape": [2, 1, 3], "data_offsets": [0, 12], **(tensor or {})}
    text = json.dumps(header) if metadata is None else metadata
    return safetensors({"__metadata__": {"dualcodebook_tokens": text}, "0000.tokens": described}, data)


def images():
    noise = Image.effect_noise((9, 7), 60)
    colour = Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)])
    jpeg = encoded(colour, "JPEG", quality=20)
    yield "valid.png", encoded(colour, "PNG")
    yield "valid-16-bit.png", encoded(Image.new("I;16", (3, 2), 300), "PNG")
    yield "valid-palette.gif", encoded(noise.convert("P"), "GIF")
    yield "valid.jpg", jpeg
    yield "valid.webp", encoded(colour, "WEBP", quality=10)
    yield "valid-float.tif", encoded(Image.new("F", (3, 2), 0.5), "TIFF")
    yield "valid-cmyk.tif", encoded(colour.convert("CMYK"), "TIFF")
    yield "narrow-1x60000.png", png(1, 60000)
    yield "bomb-of-its-header.png", png(65535, 65535)[:60]
    yield "truncated.jpg", jpeg[: len(jpeg) * 2 // 3]
    yield "empty.png", b""
    yield "no-image.png", b"no image"
    yield "text-bomb.png", png(1, 1, struct.pack(">I", 30) + b"zTXt" + b"a\0\0" + zlib.compress(b"x" * 900))
    yield "broken-exif.jpg", jpeg[:2] + b"\xff\xe1\0\x10Exif\0\0II*\0\xff\xff\xff\xff" + jpeg[2:]
    yield "broken-profile.jpg", encoded(colour, "JPEG", quality=20, icc_profile=b"no profile")


def token_files():
    picture = {"name": "a.png", "height": 2, "width": 6}
    yield "valid.safetensors", token_file()
    yield "deep-metadata.safetensors", token_file(metadata=DEEP)
    yield "deep-header.safetensors", safetensors(DEEP)
    yield "name-of-a-parent.safetensors", token_file({"pictures": [{**picture, "name": "../a.png"}]})
    yield "long-name.safetensors", token_file({"pictures": [{**picture, "name": "a" * 300}]})
    yield "half-a-character.safetensors", token_file({"pictures": [{**picture, "name": "\ud800"}]})
    yield "infinite-height.safetensors", token_file({"pictures": [{**picture, "height": float("inf")}]})
    yield "huge-height.safetensors", token_file({"pictures": [{**picture, "height": 10**30}]})
    yield "unhashable-codebook.safetensors", token_file({"books": [[["global"], 2], ["local", 2]]})
    yield "huge-codebook.safetensors", token_file({"books": [["global", 10**30], ["local", 2]]})
    yield "empty-grid.safetensors", token_file(tensor={"shape": [2, 0, 3], "data_offsets": [0, 0]}, data=b"")
    yield "float-tokens.safetensors", token_file(tensor={"dtype": "F16"})
    yield "large-offset.safetensors", token_file(tensor={"data_offsets": [0, 2**62]})
    yield "long-number.safetensors", token_file(metadata='{"format_version": ' + "9" * 5000 + "}")
    yield "photo.safetensors", encoded(Image.new("RGB", (4, 4)), "JPEG")


def configurations():
    wrong = [
        {"layers_per_block": 10**6},
        {"backbone": "dcae", "layers_per_level": [10**6, 1]},
        {"global_transformer_layers": 10**6},
        {"quantizer": "lfq", "global_dim": 10**6, "local_dim": 10**6},
        {"global_codebook_size": 10**9},
        {"global_codebook_size": 10**30},
        {"block_out_channels": [True, True]},
        {"scaling_factor": float("nan")},
        {"scaling_factor": float("inf")},
        {"in_channels": 0},
        {"block_out_channels": [8] * 11},
        {"global_dim": "8"},
        {"num_labels": 10**9},
    ]
    yield "valid.json", SMALL
    for change in wrong:
        name, value = list(change.items())[-1]
        text = "".join(letter if letter.isalnum() else "-" for letter in f"{name}-{value}")[:50]
        yield f"{text}.json", {**SMALL, **change}
    yield "deep.json", DEEP
    yield "number.json", "-1"


def weights():
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for name, config in configurations():
        if "valid" not in name:
            config = config if isinstance(config, str) else {"_class_name": "DualCodebookVQModel", **config}
            yield name, config
    yield "other-quantizer.json", {"_class_name": "DualCodebookVQModel", **SMALL, "quantizer": "residual"}
    yield "foreign-tensor.safetensors", safetensors({"a": tensor}, bytes(8))
    yield "nan.safetensors", safetensors({"a": tensor}, b"\xff" * 8)
    yield "deep.safetensors", safetensors(DEEP)
    yield "long-header.safetensors", struct.pack("<Q", 2**62) + b"{}"
    yield "large-shape.safetensors", safetensors({"a": {**tensor, "shape": [2**40, 2**40]}}, bytes(8))
    yield "empty.safetensors", b""
    yield "pickle.bin", pickle.dumps({"a": Payload()})
    yield "pickle.safetensors", pickle.dumps({"a": Payload()})
    files = {"a": "diffusion_pytorch_model-00001-of-00003.safetensors"}
    yield "no-metadata.index", {"weight_map": files}
    yield "no-map.index", {"metadata": {"total_size": 8}}
    yield "list-of-files.index", {"metadata": {"total_size": 8}, "weight_map": list(files.values())}
    yield "one-shard-alone.index", {"metadata": {"total_size": 8}, "weight_map": files}
    yield "another-folder.index", {"metadata": {}, "weight_map": {"a": "../valid/config.json"}}
    yield "number.index", "-1"


def run_files():
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(12))
    yield (
        "valid.yaml",
        "include: tiny\ntraining:\n  max_train_steps: 1e5\n  learning_rate: 1e-3\n",
    )
    yield "valid-lists.yaml", "model:\n  block_out_channels: [32, 64]\ntraining:\n  report_to: [tensorboard]\n"
    yield "twice.yaml", "model: {in_channels: 3}\nmodel: {in_channels: 4}\n"
    yield "empty-list.yaml", "data:\n  horizontal_flip: []\n"
    yield "no.yaml", "training:\n  mixed_precision: no\n"
    yield "itself.yaml", "include: itself.yaml\n"
    yield "include-a-folder.yaml", "include: /\n"
    yield "deep.yaml", DEEP
    yield "deep-value.yaml", f"model: {{block_out_channels: {DEEP}}}"
    yield "aliases.yaml", bomb
    yield "aliases-in-a-value.yaml", f"{bomb}model: {{attention: *a11, fsq_levels: *a11}}\n"
    yield (
        "aliases-in-a-section.yaml",
        bomb.replace("a0:", "model: {attention: 1}\ntraining:\n  a0:").replace("\na", "\n  a"),
    )
    yield "aliases-as-text.yaml", "training: {horizontal_flip: &a [&b [x, x], *b], report_to: [*a, *a]}\n"
    yield "include-a-list.yaml", "include: [tiny]\n"
    yield "include-long.yaml", f"include: {'a' * 5000}\n"
    yield "include-a-home.yaml", "include: ~nobody-of-this-name/a.yaml\n"
    yield "alias-of-itself.yaml", "model: &a\n  fsq_levels: [*a]\n"
    yield "timestamp.yaml", "model: {in_channels: !!timestamp x}\n"
    yield "boolean.yaml", "model: {attention: !!bool perhaps}\n"
    yield "python.yaml", "model: !!python/object/apply:os.mkdir [executed]\n"
    yield "infinite.yaml", "training: {max_train_steps: .inf, learning_rate: .nan}\n"
    yield "long-number.yaml", f"training: {{max_train_steps: {'9' * 5000}}}\n"
    yield "long-choice.yaml", f"training: {{report_to: [{'9' * 4200}a]}}\n"
    yield "null-character.yaml", b"include: 'a\\0b'\n"
    yield "latin-1.yaml", "data: {dataset: é}\n".encode("latin-1")


def records():
    model = {"name": "a", "parameters": 1, "codebook_sizes": {"global": 512}}
    yield "valid-metrics.json", {"results": [], "x": model}
    yield "valid-train.json", {"data": {"dataset": "some/data"}, "training": {"output_dir": "runs/a"}}
    yield "section-is-a-list.json", {"data": [1], "training": "x"}
    yield "results-of-nothing.json", {"results": [{"model": None, "protocol": None, "metrics": None}]}
    yield "results-is-text.json", {"results": "x"}
    yield "list.json", "[]"
    yield "deep.json", DEEP
    yield "long-number.json", '{"results": ' + "9" * 5000 + "}"
    yield "latin-1.json", '{"é": 1}'.encode("latin-1")


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files:
        text = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(text.encode("utf-8") if isinstance(text, str) else text)


if __name__ == "__main__":
    write(CORPUS / "image", images())
    write(CORPUS / "tokens", token_files())
    write(CORPUS / "configuration", configurations())
    write(CORPUS / "weights", weights())
    write(CORPUS / "run_file", run_files())
    write(CORPUS / "records", records())
