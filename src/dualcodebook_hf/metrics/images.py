"""Quality of reconstructed images, in plain torch.

The protocol: values clamped to [0, 1], never rounded to 8 bits, one number per image, then the mean over images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

MSE_FLOOR = 1e-10
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
# Wang, Simoncelli and Bovik 2003, from the finest scale to the coarsest.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# A power below 1 has an infinite slope at 0 and no real value under it: terms are held at this floor.
MS_SSIM_FLOOR = 1e-4
LARGEST_STRIP = 2**20  # pixels that `StripQuality` compares at a time


def l1(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of each image: (B, C, H, W) in [0, 1], clamped -> (B,) float32."""
    reconstruction, original = checked_images(reconstruction, original)
    return (reconstruction - original).abs().mean(dim=(1, 2, 3))


def psnr(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB: (B, C, H, W) in [0, 1], clamped -> (B,) float32.

    -10 log10(MSE over channels and pixels); the MSE is at least 1e-10, so equal images have 100 dB.
    """
    reconstruction, original = checked_images(reconstruction, original)
    mse = (reconstruction - original).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(MSE_FLOOR))


def ssim(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image: (B, C, H, W) in [0, 1], clamped -> (B,) float32.

    Gaussian window of 11 x 11, sigma 1.5, population covariance, data_range 1, mean over channels. Borders: only
    windows that lie inside the image count, as in the original and in scikit-image (torchmetrics 1.9 counts windows
    over a reflected border too, about .002 of difference at 256 x 256). Along a side below 11 pixels the window is cut
    to the largest odd number that fits and normalised again.
    """
    similarity, _ = _ssim_terms(*checked_images(reconstruction, original))
    return similarity


def ms_ssim(reconstruction: torch.Tensor, original: torch.Tensor, clamp: bool = True) -> torch.Tensor:
    """Multi-scale SSIM of each image: (B, C, H, W) in [0, 1] -> (B,) float32; 1 - ms_ssim serves as a loss.

    The product of the contrast-structure term of each scale but the coarsest, and of the coarsest's SSIM, to the powers
    of the 5 standard weights; a scale is a 2 x 2 mean of the last one. An image whose shorter side is below 176 pixels
    has fewer scales (as many as leave 11 pixels: 4 from 88, 3 from 44, 2 from 22, else 1), their weights divided by
    their sum. Terms below 1e-4 count as 1e-4, which keeps the gradient finite everywhere. `clamp=False`: values outside
    [0, 1] stay, and so does their gradient.
    """
    reconstruction, original = checked_images(reconstruction, original, clamp)
    side = min(original.shape[-2:])
    scales = sum(side // 2**scale >= SSIM_WINDOW for scale in range(1, len(MS_SSIM_WEIGHTS))) + 1
    weights = MS_SSIM_WEIGHTS[:scales]
    product = torch.ones((), device=original.device)
    for scale, weight in enumerate(weights):
        if scale:
            reconstruction, original = F.avg_pool2d(reconstruction, 2), F.avg_pool2d(original, 2)
        similarity, contrast = _ssim_terms(reconstruction, original)
        term = similarity if scale == scales - 1 else contrast
        product = product * term.clamp_min(MS_SSIM_FLOOR) ** (weight / sum(weights))
    return product


def image_quality(reconstruction: torch.Tensor, original: torch.Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of one image: (1, 3, H, W) in [-1, 1], any floating type and device."""
    x, y = ((pixels.cpu().float() + 1) / 2 for pixels in (reconstruction, original))
    return psnr(x, y).item(), ssim(x, y).item()


class StripQuality:
    """`image_quality` of one image that arrives a strip of rows at a time, from top to bottom."""

    def __init__(self) -> None:
        self._error = self._similarity = 0.0
        self._values = self._window_rows = 0
        self._rows: torch.Tensor | None = None  # (2, 1, 3, n, W): the last ones, whose windows are not complete

    def update(self, reconstruction: torch.Tensor, original: torch.Tensor) -> None:
        """The next rows of both: (1, 3, n, W) in [-1, 1], any floating type and device."""
        pair = [(pixels.cpu().float() + 1) / 2 for pixels in (reconstruction, original)]
        pair = checked_images(*pair)
        self._error += (pair[0] - pair[1]).square().sum(dtype=torch.float64).item()
        self._values += pair[0].numel()
        rows = torch.stack(pair)
        rows = rows if self._rows is None else torch.cat([self._rows, rows], dim=-2)
        step = max(LARGEST_STRIP // rows.shape[-1], 1)
        for top in range(0, rows.shape[-2] - SSIM_WINDOW + 1, step):
            part = rows[..., top : top + step + SSIM_WINDOW - 1, :]
            count = part.shape[-2] - SSIM_WINDOW + 1
            self._similarity += count * ssim(*part).item()
            self._window_rows += count
        self._rows = rows[..., -(SSIM_WINDOW - 1) :, :].clone()

    def compute(self) -> tuple[float, float]:
        """PSNR in dB and SSIM of all rows."""
        mse = max(self._error / self._values, MSE_FLOOR)
        if not self._window_rows:  # fewer rows than a window has
            return -10 * math.log10(mse), ssim(*self._rows).item()
        return -10 * math.log10(mse), self._similarity / self._window_rows


def checked_images(
    reconstruction: torch.Tensor, original: torch.Tensor, clamp: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """What every measure takes: two (B, C, H, W) floating point in [0, 1] -> float32, clamped.

    Raises ValueError when they differ in shape, are empty, or are not floating point.
    """
    if reconstruction.shape != original.shape or original.ndim != 4 or 0 in original.shape:
        shapes = f"{tuple(reconstruction.shape)} and {tuple(original.shape)}"
        raise ValueError(f"`reconstruction` and `original` must have one shape (B, C, H, W), got {shapes}")
    if not (reconstruction.is_floating_point() and original.is_floating_point()):
        types = f"{reconstruction.dtype} and {original.dtype}"
        raise ValueError(f"`reconstruction` and `original` must be floating point in [0, 1], got {types}")
    reconstruction, original = reconstruction.float(), original.float()
    return (reconstruction.clamp(0, 1), original.clamp(0, 1)) if clamp else (reconstruction, original)


def _ssim_terms(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM and its contrast-structure factor, (B,) each: means over channels and windows."""
    # Second moments do not depend on the origin; around grey they are smallest, and so is what their difference rounds.
    x, y = x - 0.5, y - 0.5
    with torch.autocast(x.device.type, enabled=False):
        moments = _blur(torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)).view(5, *x.shape[:2], -1)
    mean_x, mean_y, xx, yy, xy = moments
    # Rounding can leave a variance a little below 0 in flat regions.
    variances = (xx - mean_x**2).clamp_min(0) + (yy - mean_y**2).clamp_min(0)
    contrast = (2 * (xy - mean_x * mean_y) + SSIM_C2) / (variances + SSIM_C2)
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return (luminance * contrast).mean(dim=(1, 2)), contrast.mean(dim=(1, 2))


def _blur(planes: torch.Tensor) -> torch.Tensor:
    """Gaussian mean of planes (M, H, W) over the windows that lie inside them."""
    count = len(planes)
    planes = planes[None]
    for dim in (2, 3):
        side = min(SSIM_WINDOW, planes.shape[dim] - (planes.shape[dim] + 1) % 2)
        offsets = torch.arange(side, device=planes.device, dtype=torch.float32) - side // 2
        window = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
        shape = (count, 1, side, 1) if dim == 2 else (count, 1, 1, side)
        # One channel per plane: on a CPU ten times as fast as one plane per image of a batch.
        kernel = (window / window.sum()).view(1, 1, *shape[2:]).expand(shape)
        planes = F.conv2d(planes, kernel, groups=count)
    return planes[0]
