"""What a run looks at every `validation_steps`: a few numbers and one picture."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from PIL import Image

from ..autoencoder_dualcodebook import DualCodebookVQModel
from ..figures import grid
from ..metrics.images import psnr, ssim
from ..metrics.tokens import QuantizationError, TokenStatistics, bits_per_pixel

IMAGES_SHOWN = 8


@torch.no_grad()
def validate(model: DualCodebookVQModel, batches: Iterable[torch.Tensor]) -> tuple[dict[str, float], Image.Image]:
    """Reconstructs batches (B, 3, R, R) in [-1, 1] -> (metrics, originals above reconstructions).

    Metrics: psnr, ssim (means over pictures), quantization_error, bits_per_pixel, usage and perplexity of each book.
    """
    codebooks = model.quantize.codebooks
    tokens = TokenStatistics({name: codebook.size for name, codebook in codebooks.items()})
    error = QuantizationError(model.quantize.slices)
    values: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": []}
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in batches:
        batch = batch.to(model.device)
        out = model(batch)
        original, reconstruction = (batch + 1) / 2, (out.sample + 1) / 2
        values["psnr"].append(psnr(reconstruction, original).cpu())
        values["ssim"].append(ssim(reconstruction, original).cpu())
        tokens.update(out.tokens)
        error.update(out.latents, out.quantized)
        if sum(len(pair[0]) for pair in shown) < IMAGES_SHOWN:
            shown.append((batch.cpu(), out.sample.cpu()))
    metrics = {name: torch.cat(value).mean().item() for name, value in values.items()}
    metrics["quantization_error"] = error.compute()["all"]
    positions = out.tokens.shape[-2] * out.tokens.shape[-1]
    metrics["bits_per_pixel"] = bits_per_pixel(positions, model.quantize.bits_per_position, *batch.shape[-2:])
    for name, statistics in tokens.codebooks().items():
        metrics |= {f"usage_{name}": statistics["usage"], f"perplexity_{name}": statistics["perplexity"]}
    originals, reconstructions = (torch.cat(column)[:IMAGES_SHOWN] for column in zip(*shown, strict=True))
    return metrics, grid(originals, reconstructions)
