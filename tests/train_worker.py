"""Run by test_training.py in processes of its own: trains a run given as JSON.

`kill N`: SIGKILL to itself when N updates were taken. `dump FOLDER`: writes every rank's weights of G and D at the end.
"""

import json
import os
import signal
import sys

import torch

from dualcodebook_hf.training.arguments import CLASSES, RunConfig
from dualcodebook_hf.training.run import Trainer
from dualcodebook_hf.training.tokenizer_task import TokenizerTask


class KilledTrainer(Trainer):
    """Dies without warning in the middle of training."""

    def _update(self, group):
        result = super()._update(group)
        if self.progress.step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return result


if __name__ == "__main__":
    sections = json.loads(sys.argv[1])
    run = RunConfig(**{name: kind(**sections[name]) for name, kind in CLASSES.items()})
    kind = KilledTrainer if sys.argv[2] == "kill" else Trainer
    trainer = kind(TokenizerTask(run), run.training)
    trainer.train()
    state = {f"G/{name}": value for name, value in trainer.network.state_dict().items()}
    discriminator = trainer.accelerator.unwrap_model(trainer.task.adversary.discriminator)
    state |= {f"D/{name}": value for name, value in discriminator.state_dict().items()}
    torch.save(state, os.path.join(sys.argv[3], f"rank-{trainer.accelerator.process_index}.pt"))
