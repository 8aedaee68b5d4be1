"""Measure a tokenizer on your own images, beside a linear codec that spends the same bits.

    python examples/measure.py photos metrics.json
    python examples/measure.py photos metrics.json --model runs/mine/final --split validation

The linear codec (PCA of 16 x 16 patches and k-means, fitted in a minute) is the baseline: a network that does not beat
it needs more training. metrics.json holds the numbers with their whole protocol; where it lies beside the weights,
`dualcodebook card` puts them into the card. On the command line: dualcodebook evaluate --patch-linear ...
"""

import argparse

from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.evaluator import evaluate, evaluate_linear_codec
from dualcodebook_hf.evaluation.table import results_table
from dualcodebook_hf.files import write_json
from dualcodebook_hf.loading import load_tokenizer, tokenizer_label

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("dataset", help="folder of images, parquet files, or a Hub id")
parser.add_argument("output", help="JSON file to write")
parser.add_argument("--model", help="folder or Hub id; default: the embedded checkpoint")
parser.add_argument("--split", default="test", help="what is measured; the codec is fitted to the split `train`")
parser.add_argument("--size", type=int, default=256, help="side of the crops in pixels")
parser.add_argument("--fit", type=int, default=400, help="images that the codec is fitted to")
arguments = parser.parse_args()

model = load_tokenizer(arguments.model)
images = EvaluationData(dataset=arguments.dataset, split=arguments.split, size=arguments.size).open()
train_images = EvaluationData(dataset=arguments.dataset, split="train", size=arguments.size).open()

sizes = list(model.codebook_sizes.values())
results = [
    evaluate(model, images, name=tokenizer_label(arguments.model)),
    evaluate_linear_codec(train_images, images, count=arguments.fit, sizes=sizes),
]
write_json(arguments.output, {"results": results})
print(results_table((result["model"]["name"], result) for result in results))
