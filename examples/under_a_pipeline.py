"""Latent diffusion over the tokenizer: a small UNet learns its latents, and diffusers' LDMPipeline draws images.

    python examples/under_a_pipeline.py my-ldm --steps 5000
    python examples/under_a_pipeline.py my-ldm --images photos/*.jpg --size 128

The pipeline is diffusers' own, unmodified: it takes the tokenizer as its `vqvae`. Other pipelines: docs/diffusers.md.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel
from skimage import data_dir
from torch.nn import functional as F

from dualcodebook_hf import DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.image_processing_dualcodebook import read_image, to_pixels

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("output", type=Path, help="folder for the pipeline; a sample is beside it, as PNG")
parser.add_argument("--images", nargs="+", default=[f"{data_dir}/{name}" for name in ("astronaut.png", "coffee.png")])
parser.add_argument("--size", type=int, default=64, help="side of the crops in pixels; a multiple of 16")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--width", type=int, default=64)
arguments = parser.parse_args()

torch.manual_seed(0)
cut, tokenizer = (arguments.size, arguments.size // 2), DualCodebookVQModel.from_pretrained(default_checkpoint())
crops = [to_pixels(read_image(path)).unfold(1, *cut).unfold(2, *cut).flatten(1, 2) for path in arguments.images]
with torch.no_grad():
    latents = torch.cat([tokenizer.encode(part).latents for part in torch.cat(crops, dim=1).movedim(0, 1).split(16)])
# Diffusion wants a standard deviation of 1; the pipeline divides by the factor before it decodes.
tokenizer.register_to_config(scaling_factor=1 / latents.std().item())
latents = latents * tokenizer.config.scaling_factor

channels, side = latents.shape[1:3]
unet = UNet2DModel(
    sample_size=side,
    in_channels=channels,
    out_channels=channels,
    block_out_channels=(arguments.width, 2 * arguments.width),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
scheduler = DDIMScheduler(clip_sample=False)  # latents are not limited to [-1, 1], as pixels are
optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-4)
for step in range(arguments.steps):
    clean = latents[torch.randint(len(latents), (32,))]
    noise, times = torch.randn_like(clean), torch.randint(scheduler.config.num_train_timesteps, (len(clean),))
    loss = F.mse_loss(unet(scheduler.add_noise(clean, noise, times), times).sample, noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: {loss.item():.3f} of the noise's variance left")

pipeline = LDMPipeline(vqvae=tokenizer, unet=unet.eval(), scheduler=scheduler)
pipeline.save_pretrained(arguments.output)
image = pipeline(num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images[0]
image.save(arguments.output.with_suffix(".png"))
