"""Unmodified diffusers pipelines hold the tokenizer: what they show is what it decodes, before and after saving."""

import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY, spread_codes
from diffusers import (
    AmusedImg2ImgPipeline,
    AmusedInpaintPipeline,
    AmusedPipeline,
    AmusedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22Pipeline,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UVit2DModel,
)
from packaging.version import Version
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from dualcodebook_hf import DualCodebookImageProcessor, DualCodebookVQModel

ROOT = Path(__file__).parents[1]
CHANNELS = TINY["global_dim"] + TINY["local_dim"]
PRODUCT = TINY["global_codebook_size"] * TINY["local_codebook_size"]
HALF = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}


def tokenizer_model(**changes):
    torch.manual_seed(0)
    return spread_codes(DualCodebookVQModel(**{**TINY, **changes})).eval()


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def aligned(pipeline):
    """Loaded weights lie where the file has them; convolutions round differently at odd addresses."""
    for part in pipeline.components.values():
        for tensor in part.parameters() if isinstance(part, torch.nn.Module) else ():
            tensor.data = tensor.data.clone()
    return pipeline


def plain_unet(channels, out_channels):
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(sample_size=4, in_channels=channels, out_channels=out_channels, **blocks, **HALF).eval()


def ldm():
    return quiet(LDMPipeline(tokenizer_model(scaling_factor=0.5), plain_unet(CHANNELS, CHANNELS), DDIMScheduler()))


def super_resolution():
    model = tokenizer_model(global_dim=2, local_dim=1)
    return quiet(LDMSuperResolutionPipeline(model, plain_unet(6, 3), DDIMScheduler()))


def kandinsky(kind=KandinskyV22Pipeline):
    # Of another number of latent channels than four the image-to-image pipeline thinks that they are an image.
    model = tokenizer_model(**({} if kind is KandinskyV22Pipeline else {"global_dim": 2, "local_dim": 2}))
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        in_channels=model.config.latent_channels,
        out_channels=2 * model.config.latent_channels,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=8,
        resnet_time_scale_shift="scale_shift",
        **HALF,
    )
    return quiet(kind(unet=unet.eval(), scheduler=DDPMScheduler(num_train_timesteps=20), movq=model))


def amused(kind=AmusedPipeline, **changes):
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextConfig(vocab_size=len(words), projection_dim=8, max_position_embeddings=8, **sizes, **marks)
    transformer = UVit2DModel(
        hidden_size=8,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=8,
        vocab_size=PRODUCT + 1,
        codebook_size=PRODUCT,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    pipeline = kind(
        vqvae=tokenizer_model(**changes),
        tokenizer=CLIPTokenizer({word: index for index, word in enumerate(words)}, [], model_max_length=8),
        text_encoder=CLIPTextModelWithProjection(text).eval(),
        transformer=transformer.eval(),
        scheduler=AmusedScheduler(mask_token_id=PRODUCT),
    )
    return quiet(pipeline)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def photograph():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8))


def paint(pipeline, output_type="np", **options):
    """The same call of every pipeline in the same state of chance."""
    calls = {
        LDMPipeline: {"batch_size": 2},
        LDMSuperResolutionPipeline: {"image": photograph().resize((32, 32))},
        KandinskyV22Pipeline: {"height": 16, "width": 24},
        KandinskyV22Img2ImgPipeline: {"image": photograph(), "height": 16, "width": 16, "strength": 0.5},
        AmusedPipeline: {"prompt": ["a dog", "hat"], "height": 16, "width": 20},
        AmusedImg2ImgPipeline: {"prompt": "a dog", "image": photograph(), "strength": 0.5},
        AmusedInpaintPipeline: {"prompt": "a dog", "image": photograph(), "mask_image": left_half()},
    }
    call = {"num_inference_steps": 4, **calls[type(pipeline)]}
    if "Kandinsky" in type(pipeline).__name__:
        embeds = torch.randn(2, 1, 8, generator=seeded(3)).to(pipeline.dtype)
        call |= {"image_embeds": embeds[0], "negative_image_embeds": embeds[1]}
    return pipeline(**{**call, **options}, output_type=output_type, generator=seeded()).images


def left_half():
    """White, to be painted anew, over the left half of `photograph()`."""
    mask = Image.new("L", (20, 16))
    mask.paste(255, (0, 0, 10, 16))
    return mask


def shown(sample):
    """(B, 3, H, W) in [-1, 1] -> what pipelines give as numpy."""
    return (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()


@torch.no_grad()
def denoise(unet, latents, steps, condition=None):
    """DDIM, as both latent diffusion pipelines call it."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    for step in scheduler.timesteps:
        given = latents if condition is None else torch.cat([latents, condition], dim=1)
        latents = scheduler.step(unet(given, step).sample, step, latents).prev_sample
    return latents


BUILDERS = {
    "ldm": ldm,
    "super resolution": super_resolution,
    "kandinsky": kandinsky,
    "kandinsky img2img": lambda: kandinsky(KandinskyV22Img2ImgPipeline),
    "amused": amused,
    "amused img2img": lambda: amused(AmusedImg2ImgPipeline),
    "amused inpaint": lambda: amused(AmusedInpaintPipeline),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_saved_and_loaded_it_paints_the_same_images_and_with_other_codes_others(name, tmp_path):
    pipeline = BUILDERS[name]()
    expected = paint(pipeline)
    assert expected.std() > 0.01
    pipeline.save_pretrained(tmp_path)
    part = "movq" if "kandinsky" in name else "vqvae"
    library, class_name = json.loads((tmp_path / "model_index.json").read_text())[part]
    assert library.split(".")[0] == "dualcodebook_hf" and class_name == "DualCodebookVQModel"
    for loader in (type(pipeline), DiffusionPipeline):
        loaded = aligned(quiet(loader.from_pretrained(tmp_path)))
        assert type(loaded) is type(pipeline) and type(getattr(loaded, part)) is DualCodebookVQModel
        assert np.array_equal(paint(loaded), expected)
    with torch.no_grad():
        for codebook in getattr(loaded, part).quantize.codebooks.values():
            codebook.weight.copy_(codebook.weight.flip(0) + 0.5)
    # Kandinsky decodes its latents without quantizing them: the codes must not matter there.
    assert np.array_equal(paint(loaded), expected) == ("kandinsky" in name)


def test_ldm_decodes_the_quantized_latents_divided_by_the_scaling_factor():
    pipeline = ldm()
    model = pipeline.vqvae
    noise = torch.randn(2, CHANNELS, 4, 4, generator=seeded())
    latents = denoise(pipeline.unet, noise, 4) / 0.5
    tokens = model.quantize(latents, return_dict=True).tokens
    assert len(tokens[:, 0].unique()) > 4 and len(tokens[:, 1].unique()) > 4
    assert np.array_equal(paint(pipeline), shown(model.detokenize(tokens)))


def test_super_resolution_decodes_three_latent_channels_onto_the_larger_grid():
    pipeline = super_resolution()
    model, image = pipeline.vqvae, photograph().resize((32, 32))
    condition = DualCodebookImageProcessor()(image, return_tensors="pt")["pixel_values"]
    latents = denoise(pipeline.unet, torch.randn(1, 3, 32, 32, generator=seeded()), 4, condition)
    tokens = model.quantize(latents, return_dict=True).tokens
    expected = shown(model.detokenize(tokens))
    assert expected.shape == (1, 64, 64, 3)
    np.testing.assert_allclose(paint(pipeline), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [KandinskyV22Pipeline, KandinskyV22Img2ImgPipeline])
@torch.no_grad()
def test_kandinsky_decodes_its_latents_unquantized(kind):
    pipeline = kandinsky(kind)
    painted = paint(pipeline)
    latents = paint(pipeline, "latent")
    assert latents.shape == (1, pipeline.movq.config.latent_channels, *(side // 2 for side in painted.shape[1:3]))
    assert np.array_equal(painted, shown(pipeline.movq.decode(latents, force_not_quantize=True).sample))
    assert not np.array_equal(painted, shown(pipeline.movq.decode(latents).sample))


def test_kandinsky_img2img_starts_from_the_encoded_image():
    pipeline = kandinsky(KandinskyV22Img2ImgPipeline)
    started, model_input = [], pipeline.scheduler.add_noise
    pipeline.scheduler.add_noise = lambda latents, *rest: started.append(latents) or model_input(latents, *rest)
    image = photograph().resize((16, 16))
    pixels = DualCodebookImageProcessor()(image, return_tensors="pt")["pixel_values"]
    paint(pipeline, image=image)
    with torch.no_grad():
        torch.testing.assert_close(started[0], pipeline.movq.encode(pixels).latents, atol=1e-6, rtol=0)


def test_amused_ids_are_products_of_both_codebooks_and_decode_to_the_image():
    pipeline = amused()
    model, ids = pipeline.vqvae, paint(pipeline, "latent")
    assert ids.shape == (2, 8, 10) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < PRODUCT and len(ids.unique()) > 20
    tokens = model.quantize.from_product_ids(ids)
    assert torch.equal(tokens[:, 0] * TINY["local_codebook_size"] + tokens[:, 1], ids)
    expected = model.detokenize(tokens).clip(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(paint(pipeline), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_amused_img2img_keeps_exactly_the_tokens_that_it_does_not_mask(signed):
    pipeline = amused(AmusedImg2ImgPipeline)
    model = pipeline.vqvae
    pixels = DualCodebookImageProcessor()(photograph(), return_tensors="pt")["pixel_values"]
    # An image reaches the tokenizer in [0, 1]; a tensor of its own range passes as it is.
    given, seen = (pixels, pixels) if signed else (photograph(), pixels / 2 + 0.5)
    tokens = model.quantize.to_product_ids(model.tokenize(seen))
    scheduler = AmusedScheduler(PRODUCT)
    scheduler.set_timesteps(10)
    for strength in (0.2, 0.7):
        ids = paint(pipeline, "latent", image=given, strength=strength, num_inference_steps=10)
        masked = scheduler.add_noise(tokens, scheduler.timesteps[9 - int(10 * strength)], seeded()) == PRODUCT
        assert 0 < masked.sum() < masked.numel()
        assert torch.equal(ids[~masked], tokens[~masked]) and not torch.equal(ids[masked], tokens[masked])
        assert ids.max() < PRODUCT
        assert masked.float().mean() == pytest.approx(np.cos((1 - strength) * np.pi / 2), abs=0.2)


def test_amused_inpainting_keeps_the_tokens_outside_the_mask():
    pipeline = amused(AmusedInpaintPipeline)
    model = pipeline.vqvae
    pixels = DualCodebookImageProcessor()(photograph(), return_tensors="pt")["pixel_values"]
    tokens = model.quantize.to_product_ids(model.tokenize(pixels))
    ids = paint(pipeline, "latent", image=pixels)
    assert torch.equal(ids[..., 5:], tokens[..., 5:]) and ids.max() < PRODUCT
    assert (ids[..., :5] == tokens[..., :5]).float().mean() < 0.1


@pytest.mark.parametrize("name", ["super resolution", "kandinsky", "amused", "amused img2img", "amused inpaint"])
def test_in_bfloat16_the_codebooks_stay_exact_and_images_repeat(name, tmp_path):
    pipeline = BUILDERS[name]()
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(type(pipeline).from_pretrained(tmp_path, dtype=torch.bfloat16))
    part = "movq" if "kandinsky" in name else "vqvae"
    model, original = getattr(loaded, part), getattr(pipeline, part)
    assert model.dtype == torch.bfloat16
    for codebook, other in zip(model.quantize.codebooks.values(), original.quantize.codebooks.values(), strict=True):
        assert codebook.weight.dtype == torch.float32 and torch.equal(codebook.codes(), other.codes())
    if name == "super resolution" and Version(diffusers.__version__) < Version("0.42"):
        pytest.skip("numpy knows no bfloat16, and before 0.42 this pipeline returns arrays alone, unconverted")
    output_type = "pt" if name == "super resolution" else "np"
    first, second = (torch.as_tensor(paint(loaded, output_type)).float() for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all() and first.std() > 0.01
    if "amused" in name:
        tokens = model.quantize.from_product_ids(paint(loaded, "latent"))
        assert torch.equal(model.detokenize(tokens).clip(0, 1).permute(0, 2, 3, 1).float(), first)


def test_a_pipeline_that_upcasts_from_float16_repeats_its_images(tmp_path):
    amused(force_upcast=True).save_pretrained(tmp_path)
    loaded = quiet(AmusedPipeline.from_pretrained(tmp_path, dtype=torch.float16))
    first = paint(loaded)
    assert loaded.vqvae.dtype == torch.float16
    assert np.array_equal(paint(loaded), first)


@pytest.mark.parametrize("index", range(len(re.findall("```python", (ROOT / "docs" / "diffusers.md").read_text()))))
def test_the_documents_examples_run(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(), re.S)[index]
    exec(compile(code, "docs/diffusers.md", "exec"), {})
