"""What users write, for mypy alone (`make types`); nothing runs it.

A wrong use that mypy overlooked would be an unused `type: ignore`, which is an error too.
"""

import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from dualcodebook_hf import (
    DualCodebookConfig,
    DualCodebookImageProcessor,
    DualCodebookMaskGenerationPipeline,
    DualCodebookModel,
    DualCodebookVQModel,
    default_checkpoint,
    default_generator,
)
from dualcodebook_hf.tokenizer import Tokenizer

pixels = torch.zeros(1, 3, 32, 32)


def diffusers_face() -> torch.Tensor:
    model = DualCodebookVQModel.from_pretrained(default_checkpoint(), dtype=torch.float32).to("cpu").eval()
    latents: torch.Tensor = model.encode(pixels).latents
    sample: torch.Tensor = model.decode(latents, force_not_quantize=True).sample
    (same,) = model.encode(pixels, return_dict=False)
    restored, loss = model.decode(same, return_dict=False)
    tokens = model.tokenize(pixels)
    several = [tokens]
    several.append(model.tokenize(pixels))
    joined: torch.Tensor = torch.cat(several)
    print(joined)
    sizes: dict[str, int] = model.codebook_sizes
    codes: torch.Tensor = model.quantize.global_codebook.codes()
    entries: torch.Tensor = model.quantize.get_codebook_entry(model.quantize.to_product_ids(tokens), (1, 2, 2, 48))
    images: torch.Tensor = model.detokenize(tokens, size=(32, 32), only="global")
    cropped: torch.Tensor = model.detokenize(tokens, size=pixels.shape[-2:])
    tokenizers: list[Tokenizer] = [model]
    channels: int = model.config.latent_channels
    output = model.forward(pixels)
    print(
        tokenizers,
        channels,
        cropped,
        sample.shape,
        restored + loss,
        sizes["global"],
        codes,
        entries,
        images,
        output.sample.shape,
    )
    model.enable_slicing()
    return DualCodebookVQModel.from_preset("tiny", local_codebook_size=16).half().tokenize(pixels)


def generator() -> list[Image.Image]:
    pipeline = DualCodebookMaskGenerationPipeline.from_pretrained(default_generator())
    images: list[Image.Image] = pipeline(class_labels=["dress"], num_inference_steps=4).images
    return images


def wrong_uses_of_diffusers_face(model: DualCodebookVQModel) -> None:
    model.tokenize("wrong")  # type: ignore[arg-type]
    model.tokenize(pixel_values=pixels, size=3)  # type: ignore[call-arg]
    model.encode(pixels).sample  # type: ignore[attr-defined]
    model.encode(pixels, return_dict=False).latents  # type: ignore[attr-defined]
    model.detokenize(model.tokenize(pixels), size=32)  # type: ignore[arg-type]
    model.decode(pixels, return_dict=False).sample  # type: ignore[attr-defined]
    model.forward(pixels).image_tokens  # type: ignore[attr-defined]
    number: int = model.codebook_sizes  # type: ignore[assignment]
    model.to("cpu").tokenize(pixels).tokenize()  # type: ignore[attr-defined]
    DualCodebookVQModel.from_preset(3)  # type: ignore[arg-type]
    DualCodebookVQModel(local_codebook_size="512")  # type: ignore[arg-type]
    print(number)


def transformers_face() -> torch.Tensor:
    config = DualCodebookConfig(global_codebook_size=16, block_out_channels=[32, 32])
    model = DualCodebookModel(config).to("cpu").eval()
    encoded = model.encode(pixel_values=pixels)
    latents: torch.Tensor = encoded.latents
    pixel_values: torch.Tensor = model.decode(image_tokens=model.get_image_tokens(pixels))
    also: torch.Tensor = model.decode(model.get_image_tokens(pixels))
    sample: torch.Tensor = model.decode(latents).sample
    size: int = model.codebook_size + config.codebook_size
    output = model.forward(pixels, return_loss=True)
    first = model.forward(pixels, return_dict=False)[0]
    loaded: DualCodebookModel = DualCodebookModel.from_pretrained(default_checkpoint(), dtype=torch.float32)
    Trainer(model=loaded, args=TrainingArguments(output_dir="runs"))
    if output.image_tokens is not None:
        print(output.image_tokens.shape, first.shape, also, sample, size)
    return pixel_values


def wrong_uses_of_transformers_face(model: DualCodebookModel) -> None:
    model.get_image_tokens([1, 2])  # type: ignore[arg-type]
    model.encode(pixels).sample  # type: ignore[attr-defined]
    model.decode(model.get_image_tokens(pixels)).sample  # type: ignore[attr-defined]
    model.decode(image_tokens="wrong")  # type: ignore[call-overload]
    model.forward("wrong")  # type: ignore[call-overload]
    DualCodebookConfig(quantizer=3)  # type: ignore[arg-type]


def images() -> None:
    processor = DualCodebookImageProcessor.from_pretrained(default_checkpoint())
    made = processor.postprocess(pixels)[0]
    made.save("restored.png")
    made.sieze  # type: ignore[attr-defined]
    processor.postprocess("wrong")  # type: ignore[arg-type]
    default_checkpoint(3)  # type: ignore[arg-type]
