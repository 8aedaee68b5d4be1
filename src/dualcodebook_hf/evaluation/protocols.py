"""Named protocols: the public data sets of the paper and its rivals, and exactly what is measured on each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# What a name stands for; a flag that says otherwise would make it another protocol.
FIXED = ("dataset", "config", "split", "image_column", "size", "resample")


@dataclass(frozen=True)
class Protocol:
    """What is measured under a name. Pictures are streamed, so that nothing but the measured split is downloaded.

    dataset, config, split, image_column: of the Hub, see `load_pictures`. train_dataset, train_split: what a model, and
    the linear codec, is trained on. pictures: of the whole split. size, resample: the shorter side is resized to `size`
    by that filter, then the centre is cut. origin: where the data comes from, and how its copy on the Hub differs.
    """

    name: str
    dataset: str
    split: str
    images: int
    train_dataset: str
    train_split: str
    origin: str
    config: str | None = None
    image_column: str = "image"
    size: int = 256
    resample: str = "lanczos"

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options of `evaluate_model` (`FIXED`), where `given` are those that a user named, None = not named.

        Raises ValueError where one of them contradicts the protocol.
        """
        fixed = {key: value for key, value in asdict(self).items() if key in FIXED}
        for key, value in given.items():
            if key in FIXED and value is not None and value != fixed[key]:
                raise ValueError(
                    f"`{key}` of the protocol {self.name} is {fixed[key]!r}, got {value!r}; without the protocol any "
                    "value can be measured"
                )
        return fixed

    def record(self, images: int) -> dict[str, Any]:
        """For the JSON: the name, and whether all of the split was measured, without which numbers do not compare."""
        return {"name": self.name, "expected_pictures": self.images, "complete": images == self.images}


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "ade20k",
            "merve/scene_parse_150",
            "validation",
            2000,
            "merve/scene_parse_150",
            "train",
            "ADE20K's SceneParse150 (Zhou et al. 2017), train 20,210 and validation 2,000, about 683 x 512 pixels: a "
            "parquet copy of the Hub's zhoubolei/scene_parse_150, whose loading script today's `datasets` refuses",
        ),
        Protocol(
            "celebahq",
            "korexyz/celeba-hq-256x256",
            "validation",
            2000,
            "korexyz/celeba-hq-256x256",
            "train",
            "CelebA-HQ (Karras et al. 2018) as PNG of 256 x 256, so that nothing is resized; train 28,000 and "
            "validation 2,000; taming's lists have 25,000 and 5,000. How it was reduced from 1024 is not documented",
        ),
        Protocol(
            "coco2017",
            "lmms-lab/COCO-Caption2017",
            "val",
            5000,
            "detection-datasets/coco",
            "train",
            "MS-COCO val2017 (Lin et al. 2014), all 5,000 pictures. That copy has no training pictures; those of "
            "detection-datasets/coco are the part of train2017 that has boxes (117,266 of 118,287)",
        ),
        Protocol(
            "imagenet",
            "ILSVRC/imagenet-1k",
            "validation",
            50_000,
            "ILSVRC/imagenet-1k",
            "train",
            "ImageNet-1k, ILSVRC 2012 (Russakovsky et al. 2015), the validation split that most tokenizers publish "
            "on; gated: accept its terms on the Hub and log in",
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises ValueError that lists the names for another one."""
    if name not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]
