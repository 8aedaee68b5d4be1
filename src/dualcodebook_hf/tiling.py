"""Huge images in tiles: overlapping pieces are encoded and decoded one by one and put together without seams.

A tile sees more than it gives. Of the overlap of two tiles each gives its half, where the network sees no further than
that (backbone `dcae`): the result is that of the whole image, up to rounding. Where a network sees its whole input
(GroupNorm and attention of the backbone `vqgan`), the two are faded into each other around the middle. Latents are
joined before they are quantized: the tokens are one grid, as those of any image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d
from torch import nn

# Pixels of a tile's side. Where overlaps must be wide, larger tiles waste less; `vqgan` needs the most memory.
TILES = {"dcae": 2048, "vqgan": 512}


@dataclass(frozen=True)
class Span:
    """What a tile covers along one side, in latents.

    Attributes:
        start: of what the network is given.
        stop: its end.
        fade_in: (begin, end) of what it shares with the tile before it; what it gives begins here. Equal: a plain cut.
        fade_out: (begin, end) of what it shares with the tile behind it; what it gives ends here.
    """

    start: int
    stop: int
    fade_in: tuple[int, int]
    fade_out: tuple[int, int]

    def kept(self, scale: int) -> slice:
        """What the tile gives, counted from its start, where a latent is `scale` long."""
        return slice((self.fade_in[0] - self.start) * scale, (self.fade_out[1] - self.start) * scale)

    def place(self, scale: int) -> slice:
        """What the tile gives, counted from the image's start."""
        return slice(self.fade_in[0] * scale, self.fade_out[1] * scale)

    def weights(self, scale: int, like: torch.Tensor) -> torch.Tensor:
        """Of what the tile gives: rising over `fade_in`, falling over `fade_out`; those of two tiles add up to 1."""
        place = self.place(scale)
        positions = torch.arange(place.start, place.stop, device=like.device) + 0.5
        widths = [max((end - begin) * scale, 1e-3) for begin, end in (self.fade_in, self.fade_out)]
        rising, falling = (positions - place.start) / widths[0], (place.stop - positions) / widths[1]
        return torch.minimum(rising, falling).clamp_max(1).to(like.dtype)


def plan_side(length: int, tile: int, stride: int, fade: int) -> list[Span]:
    """Tiles along one side, of one size and evenly spread, so that the last ends where the side does.

    Args:
        length: of the side, in latents, as everything here.
        tile: the most that a tile is long; tiles are no longer than so many of them need. A shorter side has one tile.
        stride: the largest distance of two tiles, from tile / 2 to tile.
        fade: over which two tiles are faded into each other, at most tile / 4.
    """
    count = 1 if length <= tile else -(-(length - tile) // stride) + 1
    tile = -(-(length + (count - 1) * (tile - stride)) // count)
    starts = [round(number * (length - tile) / max(count - 1, 1)) for number in range(count)]
    stops = [start + tile for start in starts]
    begins = [(start + stop - fade) // 2 for start, stop in zip(starts[1:], stops[:-1], strict=True)]
    fades = [(0, 0), *((begin, begin + fade) for begin in begins), (length, length)]
    return [Span(*each) for each in zip(starts, stops, fades[:-1], fades[1:], strict=True)]


def joined_strips(
    run_tile: Callable[[Span, Span], torch.Tensor], rows: Sequence[Span], columns: Sequence[Span], scale: int
) -> Iterator[torch.Tensor]:
    """Runs all tiles and yields the whole, a strip of rows at a time, from top to bottom: one row of tiles in memory.

    Args:
        run_tile: rows and columns -> (B, C, rows * scale, columns * scale) of [start, stop).
        rows: see `plan_side`.
        columns: likewise.
        scale: what a latent is long in the result: 1 of latents, f of pixels.

    Yields (B, C, n, width).
    """
    shared = None
    for row in rows:
        strip = None
        for column in columns:
            part = run_tile(row, column)[..., row.kept(scale), column.kept(scale)]
            if strip is None:
                strip = part.new_zeros(*part.shape[:-1], columns[-1].stop * scale)
            strip[..., column.place(scale)] += part * column.weights(scale, part)
        strip = strip * row.weights(scale, strip)[:, None]
        if shared is not None:
            strip[..., : shared.shape[-2], :] += shared
        done = (row.fade_out[0] - row.fade_in[0]) * scale
        shared = strip[..., done:, :]
        yield strip[..., :done, :]


def receptive_radius(network: nn.Module, factor: int) -> int:
    """How many pixels away an encoder or decoder of the backbone `dcae` sees, at most.

    Args:
        network: its levels, finest first, are `down_blocks` or `up_blocks`.
        factor: f, pixels of a latent's side.
    """
    levels = network.down_blocks if hasattr(network, "down_blocks") else network.up_blocks
    radius = factor + 2  # conv_in and conv_out: one on latents, the other on pixels or on pairs of them
    for number, level in enumerate(levels):
        radius += 2**number * _reach(level)
        for part in level.modules():
            if isinstance(part, DCUpBlock2d):  # its convolution comes before it makes the image larger
                radius += 2**number * _reach(part)
    return radius


def _reach(module: nn.Module) -> int:
    return sum(part.kernel_size[0] // 2 for part in module.modules() if isinstance(part, nn.Conv2d))


class TilingMixin:
    """`enable_tiling`, `enable_slicing` and their knobs by diffusers' names (AutoencoderDC), for both faces.

    Attributes:
        use_slicing: images of a batch are encoded and decoded one by one.
        use_tiling: images larger than a tile are encoded and decoded in tiles.
        tile_sample_min_height: pixels of a tile at the most, as the three that follow.
        tile_sample_min_width: likewise.
        tile_sample_stride_height: between the starts of two tiles, at most.
        tile_sample_stride_width: likewise.
    """

    use_slicing = False
    use_tiling = False

    def enable_slicing(self) -> None:
        """Encodes and decodes the images of a batch one by one, for less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Back to whole batches."""
        self.use_slicing = False

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encodes and decodes images larger than a tile in overlapping tiles: memory no longer grows with the image.

        Args:
            tile_sample_min_height: the most pixels of a tile, a multiple of f (default: 2048, of backbone `vqgan` 512).
            tile_sample_min_width: likewise.
            tile_sample_stride_height: pixels from one tile's start to the next one's, a multiple of f, from half a tile
                to a whole one (default: what leaves the overlap that the network needs).
            tile_sample_stride_width: likewise.

        Raises ValueError for a number that is not such a multiple.
        """
        self._set_tiles(
            tile_sample_min_height, tile_sample_min_width, tile_sample_stride_height, tile_sample_stride_width
        )
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Back to whole images."""
        self.use_tiling = False

    def _set_tiles(
        self,
        height: int | None = None,
        width: int | None = None,
        stride_height: int | None = None,
        stride_width: int | None = None,
    ) -> None:
        """Sets the knobs and leaves `use_tiling` as it is."""
        for side, tile, stride in (("height", height, stride_height), ("width", width, stride_width)):
            tile, stride = self._checked_tile(side, tile, stride)
            setattr(self, f"tile_sample_min_{side}", tile)
            setattr(self, f"tile_sample_stride_{side}", stride)

    def _checked_tile(self, side: str, tile: int | None, stride: int | None) -> tuple[int, int]:
        factor, overlap = self.downsample_factor, 2 * self._tile_context * self.downsample_factor
        if tile is None:
            tile = -(-max(TILES[self.config.backbone], 4 * overlap) // factor) * factor
        names = f"tile_sample_min_{side}", f"tile_sample_stride_{side}"
        if not _is_multiple(tile, factor):
            raise ValueError(f"`{names[0]}` must be a positive multiple of f={factor}, got {tile!r}")
        if stride is None:
            stride = max(tile - overlap, -(-tile // (2 * factor)) * factor)
        if not (_is_multiple(stride, factor) and tile <= 2 * stride <= 2 * tile):
            raise ValueError(
                f"`{names[1]}` must be a multiple of f={factor} from half of `{names[0]}` ({tile}) to all of it, "
                f"got {stride!r}"
            )
        return tile, stride

    @property
    def _is_local(self) -> bool:
        """Whether a far part of the image cannot change a latent; GroupNorm and attention see everything."""
        return self.config.backbone == "dcae"

    @property
    def _tile_context(self) -> int:
        """Latents at a tile's edge that differ from those of the whole image; of a network that sees all, an eighth."""
        factor = self.downsample_factor
        if not self._is_local:
            return max(TILES[self.config.backbone] // factor // 8, 1)
        radius = max(receptive_radius(part, factor) for part in (self.encoder, self.decoder))
        return max(-(-radius // factor), 2)  # 2: the linear shortcut sees no further

    def _is_tiled(self, height: int, width: int) -> bool:
        """Whether an image of this size, in pixels, is to be done in tiles."""
        return self.use_tiling and (height > self.tile_sample_min_height or width > self.tile_sample_min_width)

    def plan_tiles(self, height: int, width: int) -> tuple[list[Span], list[Span]]:
        """Rows and columns of tiles of an image of so many latents, by the knobs of `enable_tiling`."""
        plans = []
        for side, length in (("height", height), ("width", width)):
            tile = getattr(self, f"tile_sample_min_{side}") // self.downsample_factor
            stride = getattr(self, f"tile_sample_stride_{side}") // self.downsample_factor
            exact = self._is_local and tile - stride >= 2 * self._tile_context
            plans.append(plan_side(length, tile, stride, 0 if exact else (tile - stride) // 2))
        return plans[0], plans[1]

    def encode_strips(
        self, read_tile: Callable[[slice, slice], torch.Tensor], height: int, width: int
    ) -> Iterator[torch.Tensor]:
        """The latents of an image in tiles, a strip (B, vq_embed_dim, n, w) at a time, from top to bottom.

        Args:
            read_tile: rows and columns of pixels -> (B, C, rows, columns) in [-1, 1], on the model's device.
            height: of the image in latents.
            width: likewise.
        """
        factor = self.downsample_factor

        def run_tile(row: Span, column: Span) -> torch.Tensor:
            return self._encode_whole(read_tile(*(slice(s.start * factor, s.stop * factor) for s in (row, column))))

        return joined_strips(run_tile, *self.plan_tiles(height, width), scale=1)

    def decode_strips(
        self, read_tile: Callable[[slice, slice], torch.Tensor], height: int, width: int
    ) -> Iterator[torch.Tensor]:
        """An image in tiles, a strip (B, C, n, w * f) of pixels at a time, from top to bottom.

        Args:
            read_tile: rows and columns of latents -> quantized latents (B, vq_embed_dim, rows, columns).
            height: of the image in latents.
            width: likewise.
        """

        def run_tile(row: Span, column: Span) -> torch.Tensor:
            return self._decode_whole(read_tile(slice(row.start, row.stop), slice(column.start, column.stop)))

        return joined_strips(run_tile, *self.plan_tiles(height, width), scale=self.downsample_factor)


def _is_multiple(value: Any, factor: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % factor == 0
