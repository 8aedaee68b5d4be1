"""Named protocols: the public data sets of the paper and its baselines, and exactly what is measured on each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .data import EvaluationData

FIXED_FIELDS = ("dataset", "config", "split", "image_column", "size", "resample")


@dataclass(frozen=True, kw_only=True)
class Protocol(EvaluationData):
    """What is measured under a name. Images are streamed, so that nothing but the measured split is downloaded.

    Attributes:
        name: what `--protocol` takes.
        images: number of images in the split.
        train_dataset: what a model, and the linear codec, is trained on.
        train_split: its split.
        origin: where the data comes from, and how its copy on the Hub differs.
        streaming: True by default.
    """

    name: str
    images: int
    train_dataset: str
    train_split: str
    origin: str
    streaming: bool = True

    def with_options(self, **given: Any) -> Protocol:
        """The protocol with `streaming` and `limit` as given; None: as they are.

        Raises ValueError where an option contradicts the protocol: that would be another one.
        """
        for key, value in given.items():
            if key in FIXED_FIELDS and value not in (None, getattr(self, key)):
                raise ValueError(
                    f"`{key}` of the protocol {self.name} is {getattr(self, key)!r}, got {value!r}; without the "
                    "protocol any value can be measured"
                )
        return replace(self, **{key: value for key, value in given.items() if value is not None})

    def train_data(self) -> EvaluationData:
        """The training split, cropped in the same way."""
        config = self.config if self.train_dataset == self.dataset else None
        shared = {key: getattr(self, key) for key in ("image_column", "streaming", "size", "resample")}
        return EvaluationData(dataset=self.train_dataset, config=config, split=self.train_split, **shared)

    def record(self, count: int) -> dict[str, Any]:
        """For metrics.json: its name too, and whether all of the split was measured, without which nothing compares."""
        named = {"name": self.name, "expected_pictures": self.images, "complete": count == self.images}
        return named | super().record(count)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="ade20k",
            dataset="merve/scene_parse_150",
            split="validation",
            images=2000,
            train_dataset="merve/scene_parse_150",
            train_split="train",
            origin="ADE20K's SceneParse150 (Zhou et al. 2017), train 20,210 and validation 2,000, about 683 x 512 "
            "pixels: a parquet copy of the Hub's zhoubolei/scene_parse_150, whose loading script `datasets` refuses",
        ),
        Protocol(
            name="celebahq",
            dataset="korexyz/celeba-hq-256x256",
            split="validation",
            images=2000,
            train_dataset="korexyz/celeba-hq-256x256",
            train_split="train",
            origin="CelebA-HQ (Karras et al. 2018) as PNG of 256 x 256, so that nothing is resized; train 28,000 and "
            "validation 2,000; taming's lists have 25,000 and 5,000. How it was reduced from 1024 is not documented",
        ),
        Protocol(
            name="coco2017",
            dataset="lmms-lab/COCO-Caption2017",
            split="val",
            images=5000,
            train_dataset="detection-datasets/coco",
            train_split="train",
            origin="MS-COCO val2017 (Lin et al. 2014), all 5,000 images. That copy has no training images; those "
            "of detection-datasets/coco are the part of train2017 that has boxes (117,266 of 118,287)",
        ),
        Protocol(
            name="imagenet",
            dataset="ILSVRC/imagenet-1k",
            split="validation",
            images=50_000,
            train_dataset="ILSVRC/imagenet-1k",
            train_split="train",
            origin="ImageNet-1k, ILSVRC 2012 (Russakovsky et al. 2015), the validation split that most tokenizers "
            "publish on; gated: accept its terms on the Hub and log in",
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises ValueError that lists the names for another one."""
    if name not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]
