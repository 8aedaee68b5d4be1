"""Puts a trained model into the package as one of its two decoders, with its measurements.

    python scripts/embed_checkpoint.py runs/sharp/final --decoder sharp --datasets DATA/clothing-256 DATA/bsds500

Copies config, weights and training config, and writes metrics.json: the test split of each data set, the model beside
the patch-linear codec fitted to the training split of the first one. Then the model card, in the package and, of the
sharp one, as model_card.md. Encoder and codebooks must be those of the other decoder.
"""

import argparse
import shutil
from pathlib import Path

from dualcodebook_hf import DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.evaluator import evaluate
from dualcodebook_hf.evaluation.linear_codec import fit_linear_codec
from dualcodebook_hf.evaluation.table import results_table
from dualcodebook_hf.files import read_json, write_json
from dualcodebook_hf.hub import Records, model_card
from dualcodebook_hf.hub.records import public_record
from dualcodebook_hf.loading import EMBEDDED_LABELS, FAITHFUL, SHARP
from dualcodebook_hf.metrics import DEFAULT_METRICS, EFFNETLITE2_METRICS, image_metrics, load_metric_network
from dualcodebook_hf.weights import encoder_hash

FILES = ("config.json", "preprocessor_config.json", "diffusion_pytorch_model.safetensors", "train_config.json")
LARGEST = 12_000_000
SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--decoder", choices=EMBEDDED_LABELS, default=SHARP)
    parser.add_argument("--datasets", nargs="+", required=True)
    parser.add_argument("--trained-on", nargs="+", help="data sets of which the training's one file was made")
    parser.add_argument("--started-from", help="what its card calls the weights that the training started from")
    arguments = parser.parse_args()
    other = default_checkpoint(FAITHFUL if arguments.decoder == SHARP else SHARP)
    hashes = {encoder_hash(DualCodebookVQModel.from_pretrained(path)) for path in (arguments.model, other)}
    if len(hashes) != 1:
        raise SystemExit(f"'{arguments.model}' makes other tokens than '{other}'")
    folder = Path(default_checkpoint(arguments.decoder))
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if arguments.model.resolve() != folder.resolve():
            shutil.copyfile(arguments.model / name, folder / name)
    train = public_record(read_json(folder / "train_config.json"))
    train["data"]["dataset"] = arguments.trained_on or train["data"]["dataset"]
    train["training"]["init_from"] = arguments.started_from or train["training"]["init_from"]
    write_json(folder / "train_config.json", train)
    model = DualCodebookVQModel.from_pretrained(folder)
    codec, fitted = fit_linear_codec(EvaluationData(dataset=arguments.datasets[0], split="train").open())
    results, label = [], EMBEDDED_LABELS[arguments.decoder]
    networks = {name: load_metric_network(name, SIZE) for name in EFFNETLITE2_METRICS}
    for dataset in arguments.datasets:
        images = EvaluationData(dataset=dataset).open()
        for tokenizer, name, about in ((model, label, {}), (codec, "patch-linear codec", {"fitted_to": fitted})):
            metrics = image_metrics([*DEFAULT_METRICS, *networks], networks)
            results.append(evaluate(tokenizer, images, metrics, name=name, about=about))
    write_json(folder / "metrics.json", {"results": results})
    card = model_card(Records.read(folder))
    root = [Path(__file__).parents[1] / "model_card.md"] if arguments.decoder == SHARP else []
    for path in (folder / "README.md", *root):
        path.write_text(card, encoding="utf-8")
    print(results_table((result["model"]["name"], result) for result in results))
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LARGEST:
        raise SystemExit(f"the checkpoint has {size} bytes, more than {LARGEST}")


if __name__ == "__main__":
    main()
