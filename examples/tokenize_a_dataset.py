"""Turn a data set of images into a parquet file of tokens, with its labels and other columns.

    python examples/tokenize_a_dataset.py photos tokens.parquet
    python examples/tokenize_a_dataset.py you/images tokens.parquet --split train --size 256 --model you/tokenizer

Each row keeps its columns; `image` is replaced by `tokens`, uint16 (2, h, w), global tokens first. Read it by

    datasets.Dataset.from_parquet("tokens.parquet").with_format("torch")["tokens"]

The whole of it is one file made in one process, which is fine for some 100,000 images. A command with shards, several
processes and resuming is being built; until then, this is the way.
"""

import argparse

import numpy as np
from datasets import Array3D, Features

from dualcodebook_hf.image_datasets import image_source, load_images
from dualcodebook_hf.image_processing_dualcodebook import DualCodebookImageProcessor, read_image
from dualcodebook_hf.loading import load_tokenizer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("dataset", help="folder of images, parquet files, or a Hub id")
parser.add_argument("output", help="parquet file to write")
parser.add_argument("--split", default="train")
parser.add_argument("--image_column", default="image")
parser.add_argument("--model", help="folder or Hub id; default: the embedded checkpoint")
parser.add_argument("--size", type=int, default=256, help="shorter side resized to it, then the centre square")
parser.add_argument("--batch_size", type=int, default=16)
arguments = parser.parse_args()

model = load_tokenizer(arguments.model)
square = {"height": arguments.size, "width": arguments.size}
crop = {"do_resize": True, "size": {"shortest_edge": arguments.size}, "do_center_crop": True, "crop_size": square}
processor = DualCodebookImageProcessor(**crop)


def tokenize(rows: dict[str, list]) -> dict[str, np.ndarray]:
    images = [read_image(image_source(value)) for value in rows[arguments.image_column]]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    tokens = model.tokenize(pixels.to(model.device, model.dtype))
    return {"tokens": tokens.cpu().numpy().astype(np.uint16)}


images = load_images(arguments.dataset, split=arguments.split, image_column=arguments.image_column)
side = -(-arguments.size // model.downsample_factor)
kept = {name: feature for name, feature in images.features.items() if name != arguments.image_column}
shape = (len(model.codebook_sizes), side, side)
tokens = images.map(
    tokenize,
    batched=True,
    batch_size=arguments.batch_size,
    remove_columns=[arguments.image_column],
    features=Features({**kept, "tokens": Array3D(shape, "uint16")}),
    cache_file_name=None,
    load_from_cache_file=False,  # the cache knows the function by its code, and not the weights
    keep_in_memory=True,
)
tokens.to_parquet(arguments.output)
bits = model.bits_per_position * side * side / arguments.size**2
print(f"{len(tokens)} images, tokens {shape} each, {bits:.4f} bits per pixel: {arguments.output}")
