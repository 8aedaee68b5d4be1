"""transformers' pipeline task "image-reconstruction": an image -> its reconstruction and its tokens."""

from __future__ import annotations

from typing import Any

from transformers import Pipeline

TASK = "image-reconstruction"


class ImageReconstructionPipeline(Pipeline):
    """`pipeline("image-reconstruction", model=...)(picture)` -> {"image": ..., "image_tokens": ...}.

    "image" is a PIL image, "image_tokens" int64 (codebooks, h, w). Takes what `DualCodebookImageProcessor` takes, or
    a list of it. With `batch_size` above 1 the images of a batch must be of one size when they reach the model.

    Args:
        model: a `DualCodebookModel`, or its folder or Hub id.
        image_processor (default None): a `DualCodebookImageProcessor`; None: that beside the model.
        batch_size (int, default 1): images that pass the model together.
        image_processor_kwargs (dict, default None): options of `DualCodebookImageProcessor` for each image.
        kwargs: those of transformers' `Pipeline`, such as `device` and `dtype`.

    Raises ValueError for any other option, and for a batch of images of several sizes.
    """

    _load_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_image_processor = True  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    image_processor: Any

    def _sanitize_parameters(self, image_processor_kwargs: dict | None = None, **kwargs: Any) -> tuple:
        if kwargs:
            raise ValueError(f"`{TASK}` knows the option image_processor_kwargs only, got {', '.join(sorted(kwargs))}")
        return image_processor_kwargs or {}, {}, {}

    def preprocess(  # type: ignore[override]
        self, image: Any, **image_processor_kwargs: Any
    ) -> Any:
        inputs = self.image_processor(image, return_tensors="pt", **image_processor_kwargs)
        return inputs.to(self.dtype)

    def get_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' iterator; a batch of images of several sizes is a ValueError instead of torch's error."""
        iterator = super().get_iterator(*args, **kwargs)
        loader = iterator.loader.loader
        collate = loader.collate_fn

        def collate_one_size(items: list[Any]) -> Any:
            sizes = sorted({tuple(item["pixel_values"].shape[-2:]) for item in items})
            if len(sizes) > 1:
                raise ValueError(
                    f"the images of a batch must be of one size (H, W), got {', '.join(map(str, sizes))}: set "
                    "`batch_size` to 1, or resize them"
                )
            return collate(items)

        loader.collate_fn = collate_one_size
        return iterator

    def _forward(self, model_inputs: dict[str, Any], **_: Any) -> Any:  # type: ignore[override]
        output = self.model(**model_inputs)
        return {"pixels": output.decoded_pixel_values, "image_tokens": output.image_tokens}

    def postprocess(self, model_outputs: Any, **_: Any) -> dict[str, Any]:
        image = self.image_processor.postprocess(model_outputs["pixels"])[0]
        return {"image": image, "image_tokens": model_outputs["image_tokens"][0]}
