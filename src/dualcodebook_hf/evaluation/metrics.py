"""Quality of reconstructions and health of codebooks, in plain torch.

The protocol: values clamped to [0, 1], never rounded to 8 bits, one number a picture, then the mean over pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def l1(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of each picture: (B, C, H, W) in [0, 1], clamped -> (B,) float32."""
    reconstruction, original = checked_pictures(reconstruction, original)
    return (reconstruction - original).abs().mean(dim=(1, 2, 3))


def psnr(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB: (B, C, H, W) in [0, 1], clamped -> (B,) float32.

    -10 log10(MSE over channels and pixels); the MSE is at least 1e-10, so equal pictures have 100 dB.
    """
    reconstruction, original = checked_pictures(reconstruction, original)
    mse = (reconstruction - original).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(MSE_FLOOR))


def ssim(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture: (B, C, H, W) in [0, 1], clamped -> (B,) float32.

    Gaussian window of 11 x 11, sigma 1.5, population covariance, data_range 1, mean over channels. Borders: only
    windows that lie inside the picture count, as in the original and in scikit-image (torchmetrics 1.9 counts windows
    over a reflected border too, about .002 of difference at 256 x 256). Along a side below 11 pixels the window is cut
    to the largest odd number that fits and normalised again.
    """
    similarity, _ = _ssim_terms(*checked_pictures(reconstruction, original))
    return similarity


def ms_ssim(reconstruction: torch.Tensor, original: torch.Tensor, clamp: bool = True) -> torch.Tensor:
    """Multi-scale SSIM of each picture: (B, C, H, W) in [0, 1] -> (B,) float32; 1 - ms_ssim serves as a loss.

    The product of the contrast-structure term of each scale but the coarsest, and of the coarsest's SSIM, to the powers
    of the 5 standard weights; a scale is a 2 x 2 mean of the last one. A picture whose shorter side is below 176 pixels
    has fewer scales (as many as leave 11 pixels: 4 from 88, 3 from 44, 2 from 22, else 1), their weights divided by
    their sum. Terms below 1e-4 count as 1e-4, which keeps the gradient finite everywhere. `clamp=False`: values outside
    [0, 1] stay, and so does their gradient.
    """
    reconstruction, original = checked_pictures(reconstruction, original, clamp)
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


def picture_quality(reconstruction: torch.Tensor, original: torch.Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of one picture: (1, 3, H, W) in [-1, 1], any floating type and device."""
    x, y = ((pixels.cpu().float() + 1) / 2 for pixels in (reconstruction, original))
    return psnr(x, y).item(), ssim(x, y).item()


def bits_per_pixel(positions: int, bits_per_position: float, height: int, width: int) -> float:
    """Bits of the `positions` (h x w) of a token grid over the pixels of the original H x W picture."""
    return positions * bits_per_position / (height * width)


class TokenStatistics:
    """How a tokenizer uses its codes, over all tokens of a split.

    Args:
        sizes: number of codes of each book by name, in the order of the tokens' second dimension.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        if not sizes or min(sizes.values()) < 1:
            raise ValueError(f"`sizes` must name at least one book of at least one code, got {dict(sizes)}")
        if math.prod(sizes.values()) >= 2**63:
            raise ValueError(f"`sizes`: the combinations of codes must be below 2**63, got {dict(sizes)}")
        self.sizes = dict(sizes)
        self.histograms = {name: torch.zeros(size, dtype=torch.int64) for name, size in self.sizes.items()}
        # Counts of the combinations that occurred: the full table has K1 x K2 entries and is almost empty.
        self._joint_ids = torch.zeros(0, dtype=torch.int64)
        self._joint_counts = torch.zeros(0, dtype=torch.int64)

    def update(self, tokens: torch.Tensor) -> None:
        """Adds tokens (B, books, h, w). Raises ValueError when their shape, type or range is wrong."""
        self._check(tokens)
        columns = tokens.detach().movedim(1, -1).reshape(-1, len(self.sizes)).cpu().long()
        joint = torch.zeros(len(columns), dtype=torch.int64)
        for column, (name, size) in zip(columns.unbind(1), self.sizes.items(), strict=True):
            self.histograms[name] += torch.bincount(column, minlength=size)
            joint = joint * size + column
        ids, counts = torch.unique(joint, return_counts=True)
        self._joint_ids, place = torch.unique(torch.cat([self._joint_ids, ids]), return_inverse=True)
        counts = torch.cat([self._joint_counts, counts])
        self._joint_counts = torch.zeros_like(self._joint_ids).index_add_(0, place, counts)

    def _check(self, tokens: torch.Tensor) -> None:
        if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.is_complex():
            raise ValueError(f"`tokens` must be integers, got {tokens.dtype}")
        if tokens.ndim != 4 or tokens.shape[1] != len(self.sizes) or 0 in tokens.shape:
            raise ValueError(f"`tokens` must be of shape (B, {len(self.sizes)}, h, w), got {tuple(tokens.shape)}")
        for index, (name, size) in enumerate(self.sizes.items()):
            low, high = tokens[:, index].aminmax()
            if low < 0 or high >= size:
                raise ValueError(f"`tokens` of the {name} book must lie in [0, {size}), got [{low}, {high}]")

    @property
    def positions(self) -> int:
        """Token positions seen so far."""
        return int(self._joint_counts.sum())

    @property
    def pair_entropy(self) -> float:
        """Entropy in bits of the combination of all books' tokens, exact over their joint counts.

        At most the smaller of the books' bits together and log2 of `positions`: a small sample bounds it.
        """
        return entropy_bits(self._joint_counts)

    def codebooks(self) -> dict[str, dict[str, float]]:
        """For each book: size, usage, perplexity and normalized_entropy.

        usage: share of codes that occurred; perplexity: 2 to the entropy; normalized_entropy: entropy / log2 size.
        """
        result = {}
        for name, counts in self.histograms.items():
            bits, size = entropy_bits(counts), self.sizes[name]
            result[name] = {
                "size": size,
                "usage": (counts > 0).sum().item() / size,
                "perplexity": 2.0**bits,
                "normalized_entropy": bits / math.log2(size) if size > 1 else 1.0,
            }
        return result


class QuantizationError:
    """E|z - z_q|^2 / Var z over a split, of the whole latent and of each book's slice.

    Both are sums over the channels c of population moments over all pictures and positions:
    sum_c mean (z_c - zq_c)^2 / sum_c mean (z_c - mean z_c)^2. 0 = nothing lost, 1 = as bad as one constant vector.

    Args:
        dims: channels of each book's slice by name, in the order of the channels.
    """

    def __init__(self, dims: Mapping[str, int]) -> None:
        if not dims or min(dims.values()) < 1:
            raise ValueError(f"`dims` must name at least one book of at least one channel, got {dict(dims)}")
        self.dims = dict(dims)
        channels = sum(self.dims.values())
        self._count = 0
        self._mean, self._spread, self._error = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))

    def update(self, latents: torch.Tensor, quantized: torch.Tensor) -> None:
        """Adds latents and quantized latents, both (B, C, h, w). Raises ValueError when a shape is wrong."""
        channels = len(self._mean)
        if latents.ndim != 4 or latents.shape[1] != channels or latents.shape != quantized.shape or 0 in latents.shape:
            shapes = f"{tuple(latents.shape)} and {tuple(quantized.shape)}"
            raise ValueError(f"`latents` and `quantized` must both be (B, {channels}, h, w), got {shapes}")
        z, z_q = (x.detach().movedim(1, -1).reshape(-1, channels).cpu().double() for x in (latents, quantized))
        # Moments of two samples joined (Chan et al.): exact where the mean is large against the spread.
        count, mean = len(z), z.mean(0)
        total, shift = self._count + count, mean - self._mean
        self._spread += (z - mean).square().sum(0) + shift.square() * (self._count * count / total)
        self._mean += shift * (count / total)
        self._error += (z - z_q).square().sum(0)
        self._count = total

    def compute(self) -> dict[str, float]:
        """{"all": the ratio over all channels, and <book's name>: the ratio over its own}. NaN before any update."""
        names = list(self.dims)
        errors = [part.sum().item() for part in self._error.split(list(self.dims.values()))]
        spreads = [part.sum().item() for part in self._spread.split(list(self.dims.values()))]
        parts = {"all": (sum(errors), sum(spreads)), **dict(zip(names, zip(errors, spreads, strict=True), strict=True))}
        return {name: self._ratio(*part) for name, part in parts.items()}

    def _ratio(self, error: float, spread: float) -> float:
        if self._count == 0:
            return math.nan
        if spread == 0:
            return 0.0 if error == 0 else math.inf
        return error / spread


def entropy_bits(counts: torch.Tensor) -> float:
    """Entropy in bits of a histogram (N,); 0 of an empty one."""
    counts = counts[counts > 0].double()
    share = counts / counts.sum()
    return abs(-(share * share.log2()).sum().item())


def checked_pictures(
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
        # One channel a plane: on a CPU ten times as fast as one plane a picture of a batch.
        kernel = (window / window.sum()).view(1, 1, *shape[2:]).expand(shape)
        planes = F.conv2d(planes, kernel, groups=count)
    return planes[0]
