"""Fine-tune a trained tokenizer on your own images, and measure what it gained.

    python examples/fine_tune.py photos runs/fine-tuned --steps 2000
    python examples/fine_tune.py photos runs/fine-tuned --model runs/mine/final

`photos` needs the splits train and validation (docs/data.md). The codebooks move too: tokens from before do not mean
the same after. Start: the embedded checkpoint with its faithful decoder, as the loss here is that which made it. On the
command line: dualcodebook train --config tiny --init_from faithful --data_initialization 0 ...
"""

import argparse

from dualcodebook_hf import DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.configuration_dualcodebook import DualCodebookFields
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.evaluator import evaluate
from dualcodebook_hf.evaluation.table import results_table
from dualcodebook_hf.training.arguments import DataArguments, RunConfig, TrainArguments
from dualcodebook_hf.training.run import Trainer
from dualcodebook_hf.training.tokenizer_task import TokenizerTask

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", help="folder of images, or a Hub id")
parser.add_argument("output", help="the run's folder")
parser.add_argument("--model", default=default_checkpoint("faithful"), help="folder or Hub id; default: embedded")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--resolution", type=int, default=160, help="side of the crops in pixels")
parser.add_argument("--learning_rate", type=float, default=1e-4, help="a fifth of what training from scratch takes")
arguments = parser.parse_args()

before = DualCodebookVQModel.from_pretrained(arguments.model)
run = RunConfig(
    model=DualCodebookFields(**{name: before.config[name] for name in DualCodebookFields().fields_dict()}),
    data=DataArguments(dataset=arguments.folder, resolution=arguments.resolution, num_workers=0, cache_images=True),
    training=TrainArguments(
        output_dir=arguments.output,
        init_from=arguments.model,
        max_train_steps=arguments.steps,
        train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_schedule="cosine",
        adam_beta1=0.9,
        adam_beta2=0.99,
        max_grad_norm=5.0,
        # The loss of the preset `tiny`: pixels alone, in a form that follows PSNR. No pretrained network is needed.
        l1_weight=0.0,
        log_l2_weight=1.0,
        codebook_weight=5.0,
        perceptual="none",
        adversarial_weight=0.0,
        report_to="none",
    ),
)
trainer = Trainer(TokenizerTask(run), run.training)
trainer.train()

after = DualCodebookVQModel.from_pretrained(trainer.folder.final)
data = EvaluationData(dataset=arguments.folder, split="validation", size=arguments.resolution)
print(results_table((name, evaluate(model, data.open())) for name, model in (("before", before), ("after", after))))
