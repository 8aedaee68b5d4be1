"""Puts a trained generator into the package as its default, with its measurements.

    python scripts/embed_generator.py runs/generator/best --measured measured/metrics.json

Saves the pipeline in bfloat16 (codebooks in float32) with the embedded tokenizer (its faithful decoder), its
training settings without this machine's paths, results and protocol of `dualcodebook evaluate-generator --output`, and
the card.
"""

import argparse
from pathlib import Path

import torch

from dualcodebook_hf import DualCodebookMaskGenerationPipeline
from dualcodebook_hf.files import atomic_folder, read_json, write_json
from dualcodebook_hf.generation.loading import load_generator
from dualcodebook_hf.hub.card import generator_card
from dualcodebook_hf.hub.records import public_record
from dualcodebook_hf.loading import FAITHFUL, load_tokenizer
from dualcodebook_hf.weights import encoder_hash

FOLDER = Path(__file__).parents[1] / "src" / "dualcodebook_hf" / "checkpoints" / "generator"
LARGEST = 25_000_000


def take_embedded_tokenizer(pipeline: DualCodebookMaskGenerationPipeline) -> None:
    """Puts it in the place of the tokenizer that made the tokens. Raises ValueError unless both make the same ones."""
    tokenizer = load_tokenizer(FAITHFUL, device="cpu")
    if encoder_hash(tokenizer) != encoder_hash(pipeline.vqvae):
        raise ValueError("the generator must be of the embedded tokenizer's tokens")
    pipeline.transformer.register_to_config(tokenizer_weights_sha256=encoder_hash(tokenizer))
    pipeline.register_modules(vqvae=tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generator", type=Path, help="folder of a pipeline that train-generator wrote")
    parser.add_argument("--measured", type=Path, help="metrics.json of evaluate-generator")
    parser.add_argument("--trained-on", help="what its card calls the tokens")
    parser.add_argument("--started-from", help="what its card calls the generator that the training started from")
    arguments = parser.parse_args()
    pipeline = load_generator(str(arguments.generator), device="cpu")
    take_embedded_tokenizer(pipeline)
    train = public_record(read_json(arguments.generator / "train_config.json"))
    train["data"]["tokens"] = arguments.trained_on or train["data"]["tokens"]
    train["training"]["init_from"] = arguments.started_from or train["training"]["init_from"]
    measured = read_json(arguments.measured) if arguments.measured else None
    if measured:
        del measured["neighbours"]  # of each sample; the sheet shows some
    pipeline.vqvae.cast_backbone(torch.bfloat16)
    torch.nn.Module.to(pipeline.transformer, torch.bfloat16)
    with atomic_folder(FOLDER, replace=True) as partial:
        pipeline.save_pretrained(partial)
        for path in partial.rglob("*.json"):
            content = read_json(path)
            if content.pop("_name_or_path", None) is not None:
                write_json(path, content)
        write_json(partial / "train_config.json", train)
        if measured:
            write_json(partial / "metrics.json", measured)
        card = generator_card(pipeline, train=train, measured=measured)
        (partial / "README.md").write_text(card, encoding="utf-8")
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        if size > LARGEST:
            raise SystemExit(f"the generator has {size} bytes, more than {LARGEST}")
    print(f"{FOLDER}: {size:,} bytes")


if __name__ == "__main__":
    main()
