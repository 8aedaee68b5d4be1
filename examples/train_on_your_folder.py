"""Train a tokenizer on a folder of your own images, then measure it on the images that were held out.

    python examples/train_on_your_folder.py photos runs/mine
    python examples/train_on_your_folder.py photos runs/mine --max_train_minutes 60 --train_batch_size 12

The folder holds a folder for each split; images of any format and size, at any depth (docs/data.md):

    photos/
      train/        IMG_0001.jpg  IMG_0002.png  holiday/a.webp ...
      validation/   IMG_0901.jpg ...

runs/mine then holds final/ for `from_pretrained`, checkpoints, samples/ and TensorBoard's logs. On the command line:
dualcodebook train --config tiny --dataset photos --output_dir runs/mine
"""

import argparse

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.evaluator import evaluate
from dualcodebook_hf.evaluation.table import results_table
from dualcodebook_hf.training.arguments import parse_run_config
from dualcodebook_hf.training.run import StopRequest, Trainer
from dualcodebook_hf.training.tokenizer_task import TokenizerTask

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", help="folder of images, or a Hub id")
parser.add_argument("output", help="the run's folder; started again, the run continues from its newest checkpoint")
parser.add_argument("--config", default="tiny", help="preset or YAML file; every field of it is a flag too")
arguments, flags = parser.parse_known_args()

flags = ["--dataset", arguments.folder, "--output_dir", arguments.output, *flags]
run = parse_run_config(["--config", arguments.config, "--resume_from_checkpoint", "latest", *flags])
trainer = Trainer(TokenizerTask(run), run.training, StopRequest())
with trainer.stop.watching():  # Ctrl-C saves and ends
    trainer.train()

model = DualCodebookVQModel.from_pretrained(trainer.folder.final)
split = run.data.validation_split or run.data.train_split
images = EvaluationData(dataset=arguments.folder, split=split, size=run.data.resolution).open()
print(results_table([(arguments.output, evaluate(model, images))]))
