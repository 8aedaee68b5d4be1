"""Measures generated images against real ones: how near their distribution is, and whether they are copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..metrics import memorisation, precision_recall
from ..metrics.efficientnet import EfficientNetFeatures
from ..metrics.frechet import FeatureMoments, frechet_distance
from ..metrics.kernel import NORMAL_95, kernel_distance
from ..metrics.memorisation import CopyingTest, mann_whitney_z, nearest_tokens
from ..metrics.neighbours import nearest
from ..metrics.precision_recall import DENSITY_K
from ..tokenizer import Tokenizer

FEWEST_IMAGES = DENSITY_K + 1  # of each set
RECONSTRUCTED = "_reconstructed"  # of what is measured against reconstructions instead of images
# Key of a result: (title, digits, factor of what is shown).
COLUMNS = {
    "kd_effnetlite2": ("KD lite2", 1, 1),
    "fd_effnetlite2": ("FD lite2", 1, 1),
    "precision": ("precision", 3, 1),
    "recall": ("recall", 3, 1),
    "density": ("density", 3, 1),
    "coverage": ("coverage", 3, 1),
    "c_t": ("C_T", 1, 1),
    "c_t_global": ("C_T, one cell", 1, 1),
    f"c_t{RECONSTRUCTED}": ("C_T, reconstructions", 1, 1),
    f"c_t_global{RECONSTRUCTED}": ("the same, one cell", 1, 1),
    "c_t_tokens": ("C_T, tokens", 1, 1),
    "equal_tokens_median": ("equal tokens, median", 1, 100),
    "equal_tokens_max": ("equal tokens, most", 1, 100),
}


def definitions(features: EfficientNetFeatures) -> dict[str, str]:
    """What each number is, for the record."""
    return {
        "features": f"1280 pooled of {features.protocol}; not comparable with FID",
        "kd_effnetlite2": "kernel distance of features to those of the test images, x 1000: unbiased squared MMD, "
        "kernel (x.y / D + 1)^3, all images once; interval: 95%, by a jackknife of each set",
        "fd_effnetlite2": "squared Frechet distance of features to those of the test images; biased upwards by about "
        "1/N, singular for N <= 1280: compare at equal N only",
        "precision, recall, density, coverage": precision_recall.DEFINITION,
        "c_t, c_t_global": memorisation.DEFINITION,
        f"c_t{RECONSTRUCTED}, c_t_global{RECONSTRUCTED}": "the same where training and test images too have been "
        "through the tokenizer, whose losses would hide copies otherwise",
        "equal_tokens, c_t_tokens": memorisation.TOKENS_DEFINITION,
    }


@dataclass(frozen=True)
class MeasuredSet:
    """What is kept of a set of images.

    Attributes:
        features: (N, D).
        tokens: int32 (N, codebooks, h, w); None without a tokenizer.
        reconstructed: features of what the tokens decode to (N, D); None where nothing was decoded.
    """

    features: torch.Tensor
    tokens: torch.Tensor | None = None
    reconstructed: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def select(self, rows: torch.Tensor) -> MeasuredSet:
        """The set of these rows."""
        parts = (self.features, self.tokens, self.reconstructed)
        return MeasuredSet(*(None if part is None else part[rows] for part in parts))

    def of_reconstructions(self) -> MeasuredSet:
        """What the tokenizer made of the images, as a set of its own."""
        return MeasuredSet(self.reconstructed, self.tokens)


@torch.no_grad()
def measure_images(
    batches: Iterable[torch.Tensor],
    features: Callable[[torch.Tensor], torch.Tensor],
    device: str | torch.device = "cpu",
    tokenizer: Tokenizer | None = None,
    decode: bool = True,
) -> MeasuredSet:
    """Features of images, and with a tokenizer their tokens and the features of what these decode to.

    Args:
        batches: images (B, 3, H, W) float32 in [-1, 1].
        features: images (B, 3, H, W) in [0, 1], on `device` -> (B, D).
        device: of `features` and of the tokenizer.
        tokenizer: in eval mode.
        decode: with a tokenizer, decode the tokens too.

    Raises ValueError for no images.
    """
    parts: list[list[torch.Tensor]] = []
    for batch in batches:
        batch = batch.to(device)
        part = [features((batch + 1) / 2)]
        if tokenizer is not None and decode:
            output = tokenizer.autoencode(batch.to(tokenizer.dtype))
            part += [output.tokens.int(), features(((output.sample.float() + 1) / 2).clamp(0, 1))]
        elif tokenizer is not None:
            part.append(tokenizer.tokenize(batch.to(tokenizer.dtype)).int())
        parts.append([tensor.cpu() for tensor in part])
    if not parts:
        raise ValueError("there is nothing to measure: no image came")
    return MeasuredSet(*(torch.cat(column) for column in zip(*parts, strict=True)))


class GeneratorEvaluator:
    """Compares sets of images with one test and one training set.

    Args:
        test: at least 6 images.
        train: with tokens and reconstructions where `test` has them.
        train_tokens: (M, codebooks, h, w) and the number of the training image that each is of (M,): the crops that
            the generator was trained on; None: those in `train`.
        cells: of C_T's k-means; None: one for each 50 test images.
        seed: of the k-means.

    Raises ValueError for fewer images, and for a number of cells that does not fit.
    """

    def __init__(
        self,
        test: MeasuredSet,
        train: MeasuredSet,
        train_tokens: tuple[torch.Tensor, torch.Tensor] | None = None,
        cells: int | None = None,
        seed: int = 0,
    ) -> None:
        if len(test) < FEWEST_IMAGES:
            raise ValueError(f"`test` must hold at least {FEWEST_IMAGES} images, got {len(test)}")
        self.test, self.train = test, train
        self.train_tokens = train_tokens
        if train_tokens is None and train.tokens is not None:
            self.train_tokens = train.tokens, torch.arange(len(train))
        self.copying = {"": CopyingTest(train.features, test.features, cells, seed)}
        if test.reconstructed is not None:
            self.copying[RECONSTRUCTED] = CopyingTest(train.reconstructed, test.reconstructed, cells, seed)
        self._test_shares = None
        if self.train_tokens is not None:
            self._test_shares = nearest_tokens(test.tokens, *self.train_tokens)[0]
        moments = FeatureMoments()
        moments.update(test.features)
        self._moments = moments.mean, moments.covariance

    def __call__(self, samples: MeasuredSet, decoded: bool = True) -> dict[str, Any]:
        """The metrics of a set, JSON-ready; those that need a tokenizer are absent without one.

        Args:
            samples: at least 6 images.
            decoded: the images come out of the tokenizer's decoder, and so may be compared with reconstructions.
        """
        distance, error = kernel_distance(samples.features, self.test.features, paired=False)
        moments = FeatureMoments()
        moments.update(samples.features)
        result = {
            "kd_effnetlite2": 1000 * distance,
            "kd_effnetlite2_interval": [1000 * (distance + sign * NORMAL_95 * error) for sign in (-1, 1)],
            "fd_effnetlite2": frechet_distance(moments.mean, moments.covariance, *self._moments),
            **precision_recall.precision_recall(samples.features, self.test.features),
        }
        for name, test in self.copying.items():
            if decoded or not name:
                result |= {f"{key}{name}": value for key, value in test(samples.features).items()}
        if self.train_tokens is not None and samples.tokens is not None:
            result |= self._tokens(samples.tokens)
        return result

    def _tokens(self, tokens: torch.Tensor) -> dict[str, float]:
        shares = nearest_tokens(tokens, *self.train_tokens)[0]
        return {
            "equal_tokens_median": shares.median().item(),
            "equal_tokens_max": shares.max().item(),
            "equal_tokens_median_of_test": self._test_shares.median().item(),
            "equal_tokens_max_of_test": self._test_shares.max().item(),
            "c_t_tokens": mann_whitney_z(1 - shares, 1 - self._test_shares),
        }

    def neighbours(self, samples: MeasuredSet) -> list[dict[str, Any]]:
        """Of each sample its nearest training image, by features and, where there are tokens, by these.

        Returns dicts of "features": {"train_image": its number from 0, "distance", "test_share": share of test images
        that are nearer to a training image} and "tokens": {"train_image", "equal": share of equal tokens, "test_share":
        share of test images that share more with a training image}.
        """
        # A sample is compared with what the tokenizer makes of the training images, where it is known.
        name, train = ("", self.train.features)
        if RECONSTRUCTED in self.copying:
            name, train = RECONSTRUCTED, self.train.reconstructed
        others = self.copying[name].test_distances
        found = [
            {"features": {"train_image": image, "distance": distance, "test_share": _share(others < distance)}}
            for distance, image in zip(*(part.tolist() for part in nearest(samples.features, train)), strict=True)
        ]
        if self.train_tokens is not None and samples.tokens is not None:
            shares, images = nearest_tokens(samples.tokens, *self.train_tokens)
            for entry, share, image in zip(found, shares.tolist(), images.tolist(), strict=True):
                of_test = _share(self._test_shares > share)
                entry["tokens"] = {"train_image": image, "equal": share, "test_share": of_test}
        return found


def _share(which: torch.Tensor) -> float:
    return which.double().mean().item()


def generator_cells(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of results {"name", "pictures", "metrics"}; what no result has is no column."""
    columns = [key for key in COLUMNS if any(result["metrics"].get(key) is not None for result in results)]
    header = ["set", "N"]
    for key in columns:
        header += [COLUMNS[key][0], "95%"] if key == "kd_effnetlite2" else [COLUMNS[key][0]]
    rows = []
    for result in results:
        row = [result["name"], str(result["pictures"])]
        for key in columns:
            row.append(_cell(result["metrics"].get(key), key))
            if key == "kd_effnetlite2":
                row.append(" .. ".join(f"{end:.1f}" for end in result["metrics"]["kd_effnetlite2_interval"]))
        rows.append(row)
    return header, rows


def _cell(value: float | None, key: str) -> str:
    _, digits, factor = COLUMNS[key]
    return "-" if value is None else f"{value * factor:.{digits}f}" + ("%" if factor == 100 else "")
