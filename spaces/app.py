"""The Space: the checkpoints inside the package, or those that DUALCODEBOOK_MODELS names (Hub ids)."""

import os

from dualcodebook_hf.demo import build_demo, launch_options

models = os.environ.get("DUALCODEBOOK_MODELS", "").split()
demo = build_demo(models or None)

if __name__ == "__main__":
    demo.launch(**launch_options())
