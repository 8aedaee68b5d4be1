"""transformers' face: the same model as diffusers', at home in Auto classes, pipelines, Trainer and loading options."""

import dataclasses
import inspect
import json

import pytest
import torch
from conftest import spread_codes
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, Trainer, TrainingArguments, pipeline

from dualcodebook_hf import (
    DualCodebookConfig,
    DualCodebookImageProcessor,
    DualCodebookModel,
    DualCodebookVQModel,
    default_checkpoint,
)
from dualcodebook_hf.modeling_dualcodebook import DualCodebookEncoderOutput

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A folder as diffusers' face saves it, with the image processor beside it."""
    tiny_model.save_pretrained(tmp_path / "model")
    DualCodebookImageProcessor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def image():
    return Image.effect_mandelbrot((21, 14), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def build(fields, seed=0):
    torch.manual_seed(seed)
    return DualCodebookModel(DualCodebookConfig(**fields))


@pytest.mark.parametrize("backbone", ["vqgan", "dcae"])
def test_both_faces_start_from_the_same_weights_under_the_same_names(tiny_config, backbone):
    fields = {**tiny_config, "backbone": backbone, "linear_shortcut": True}
    ours = build(fields).state_dict()
    torch.manual_seed(0)
    theirs = DualCodebookVQModel(**fields).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_folder_serves_both_libraries_bit_for_bit(folder, tiny_model, images):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS, "preprocessor_config.json"]
    model = AutoModel.from_pretrained(folder)
    assert type(model) is DualCodebookModel and not model.training
    config = AutoConfig.from_pretrained(folder)
    assert config.fields_dict() == DualCodebookConfig(**{
        name: tiny_model.config[name] for name in config.fields_dict()
    }).fields_dict()  # fmt: skip
    with torch.no_grad():
        ours, theirs = model(images), tiny_model(images)
    assert torch.equal(ours.decoded_pixel_values, theirs.sample)
    assert torch.equal(ours.image_tokens, theirs.tokens)
    assert torch.equal(ours.last_hidden_state, theirs.latents)
    assert torch.equal(ours.quantized_last_hidden_state, theirs.quantized)
    assert torch.equal(model.tokenize(images), theirs.tokens)
    restored = model.detokenize(theirs.tokens, size=images.shape[-2:], only="local")
    assert torch.equal(restored, tiny_model.detokenize(theirs.tokens, size=images.shape[-2:], only="local"))


def test_the_embedded_checkpoint_loads_by_the_auto_classes(image):
    model = AutoModel.from_pretrained(default_checkpoint(), dtype=torch.float32)
    reference = DualCodebookVQModel.from_pretrained(default_checkpoint())
    pixels = AutoImageProcessor.from_pretrained(default_checkpoint())(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(model.tokenize(pixels), reference.tokenize(pixels))


def test_a_folder_of_transformers_own_loads_again(folder, images, tmp_path):
    model = AutoModel.from_pretrained(folder)
    for place in (tmp_path / "again", folder):  # the second: beside the weights that diffusers' face saved
        model.save_pretrained(place)
        again = AutoModel.from_pretrained(place)
        with torch.no_grad():
            assert torch.equal(again(images).decoded_pixel_values, model(images).decoded_pixel_values)
        with torch.no_grad():
            theirs = DualCodebookVQModel.from_pretrained(place)(images)
        assert torch.equal(theirs.sample, model(images).decoded_pixel_values)


def test_the_loss_is_l1_and_the_codebooks_and_only_on_demand(tiny_config, images):
    model = build(tiny_config).eval()
    out = model(images, return_loss=True)
    assert torch.isclose(out.embedding_loss, model.quantize(out.last_hidden_state)[1])
    difference = (out.decoded_pixel_values - images).abs().sum() / images.numel()
    assert torch.isclose(out.loss, difference + out.embedding_loss)
    plain = model(images)
    assert plain.loss is None and plain.embedding_loss is None
    values = model(images, return_dict=False)
    assert len(values) == 4
    assert torch.equal(values[0], plain.image_tokens) and torch.equal(values[1], plain.decoded_pixel_values)


def test_trainer_trains_and_evaluates_it(tiny_config, tmp_path):
    data = [{"pixel_values": torch.rand(3, 16, 16) * 2 - 1} for _ in range(16)]

    def collate(rows):
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "return_loss": True}

    options = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
    options |= {"remove_unused_columns": False, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    model = build(tiny_config)
    arguments = TrainingArguments(str(tmp_path), save_strategy="no", **options)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


def test_feature_extraction_pipeline_gives_the_tokens(folder, tiny_model, image):
    extract = pipeline("image-feature-extraction", model=str(folder))
    pixels = DualCodebookImageProcessor()(image, return_tensors="pt")["pixel_values"]
    expected = tiny_model.tokenize(pixels)
    assert extract(image) == expected.tolist()
    batched = extract([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image], batch_size=2)
    assert batched[0] == batched[2] == expected.tolist() and batched[1] != batched[0]


def test_reconstruction_pipeline_gives_image_and_tokens(folder, tiny_model, image, tmp_path):
    image.save(tmp_path / "a.png")
    reconstruct = pipeline("image-reconstruction", model=str(folder))
    processor = DualCodebookImageProcessor()
    tokens = tiny_model.tokenize(processor(image, return_tensors="pt")["pixel_values"])
    expected = processor.postprocess(tiny_model.detokenize(tokens, size=(14, 21)))[0]
    single = reconstruct(str(tmp_path / "a.png"))
    for result in (single, *reconstruct([image, str(tmp_path / "a.png"), image], batch_size=2)):
        assert result["image"].tobytes() == expected.tobytes() and result["image"].size == (21, 14)
        assert torch.equal(result["image_tokens"], tokens[0])
    with pytest.raises(ValueError, match="image_processor_kwargs"):
        reconstruct(image, size=8)
    with pytest.raises(ValueError, match=r"one size \(H, W\), got \(14, 21\), \(21, 14\): set `batch_size` to 1"):
        reconstruct([image, image.transpose(Image.Transpose.ROTATE_90)], batch_size=2)
    assert len(reconstruct([image, image.transpose(Image.Transpose.ROTATE_90)])) == 2
    reconstruct.save_pretrained(tmp_path / "saved")
    again = pipeline("image-reconstruction", model=str(tmp_path / "saved"))
    assert torch.equal(again(image)["image_tokens"], tokens[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_codebooks_stay_in_float32_under_any_dtype(folder, dtype):
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith("quantize.") else dtype), name
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 8, 8))
    assert (out.decoded_pixel_values.dtype, out.quantized_last_hidden_state.dtype) == (dtype, dtype)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "offloaded"])
def test_device_map_does_not_change_the_result(folder, tiny_model, images, tmp_path, device_map):
    options = {"device_map": device_map}
    if device_map == "offloaded":
        places = {"encoder": "disk", "quant_conv": "cpu", "quantize": "disk", "post_quant_conv": "cpu"}
        options = {"device_map": {**places, "decoder": "disk"}, "offload_folder": str(tmp_path / "offload")}
    model = AutoModel.from_pretrained(folder, **options)
    with torch.no_grad():
        out = model(images)
    assert torch.equal(out.decoded_pixel_values, tiny_model(images).sample)
    restored = model.detokenize(out.image_tokens, size=images.shape[-2:])
    assert torch.equal(restored, tiny_model.detokenize(out.image_tokens, size=images.shape[-2:]))
    if device_map == "auto":
        theirs = DualCodebookVQModel.from_pretrained(folder, device_map=device_map)
        assert torch.equal(theirs.tokenize(images), out.image_tokens)


def test_built_on_the_meta_device_it_takes_no_memory(tiny_config):
    with torch.device("meta"):
        model = build(tiny_config)
    assert all(parameter.is_meta for parameter in model.parameters())


FACES = {"diffusers": lambda fields: DualCodebookVQModel(**fields), "transformers": build}
ENABLE_CHECKPOINTING = {"diffusers": "enable_gradient_checkpointing", "transformers": "gradient_checkpointing_enable"}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("backbone", ["vqgan", "dcae"])
def test_gradient_checkpointing_computes_each_level_twice_for_the_same_gradients(tiny_config, images, face, backbone):
    gradients, runs = [], {False: [], True: []}
    for checkpointing, seen in runs.items():
        torch.manual_seed(0)
        model = FACES[face]({**tiny_config, "backbone": backbone}).train()
        if checkpointing:
            getattr(model, ENABLE_CHECKPOINTING[face])()
        for level in (*model.encoder.down_blocks, *model.decoder.up_blocks):
            convolution = next(module for module in level.modules() if isinstance(module, torch.nn.Conv2d))
            convolution.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        out = model.autoencode(images)
        ((out.sample - images).abs().mean() + sum(out.losses.values())).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert len(runs[True]) == 2 * len(runs[False]) > 0
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.slow
def test_compiled_it_gives_the_same(folder, images):
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected, out = model(images), torch.compile(model)(images)
    assert torch.equal(out.image_tokens, expected.image_tokens)
    assert torch.allclose(out.decoded_pixel_values, expected.decoded_pixel_values, atol=1e-5)


def test_config_json_names_the_code_that_serves_remote_loading(folder):
    config = json.loads((folder / "config.json").read_text())
    for key, name in {"AutoConfig": "DualCodebookConfig", "AutoModel": "DualCodebookModel"}.items():
        module, attribute = config["auto_map"][key].split(".")
        assert attribute == name and getattr(__import__(f"dualcodebook_hf.{module}", fromlist=[name]), name)
    assert config["transformers_weights"] == WEIGHTS


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_the_two_canonical_lines_work_in_every_dtype(image, dtype):
    """Floating pixels are cast to the model's dtype, the checkpoint's own (bfloat16) where nothing is said."""
    model = AutoModel.from_pretrained(default_checkpoint(), dtype=dtype)
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    inputs = AutoImageProcessor.from_pretrained(default_checkpoint())(image, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    assert inputs["pixel_values"].dtype == torch.float32 and out.decoded_pixel_values.dtype == model.dtype
    assert torch.equal(out.image_tokens, model.tokenize(inputs["pixel_values"].to(model.dtype)))
    vq_model = DualCodebookVQModel.from_pretrained(default_checkpoint(), dtype=model.dtype)
    assert torch.equal(out.image_tokens, vq_model.tokenize(inputs["pixel_values"].double()))
    with pytest.raises(ValueError, match=r"`pixel_values` must be floating point in \[-1, 1\], got torch.uint8"):
        model(pixel_values=(inputs["pixel_values"] * 100).byte())


def test_pixels_that_fill_0_to_1_are_told_from_minus_1_to_1(tiny_model, images, recwarn):
    tiny_model.tokenize(images)
    tiny_model.tokenize(images.clamp(0.2, 0.8))  # a pale image of [-1, 1]
    assert not [warning for warning in recwarn if "pixel_values" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"the model takes \[-1, 1\], so for values in \[0, 1\] pass"):
        tiny_model.tokenize((images + 1) / 2)


# --- the interface of transformers' own image tokenizers


@pytest.mark.parametrize("quantizer", [{}, {"quantizer": "single", "global_codebook_size": 0, "global_dim": 0}])
def test_image_tokens_decode_to_what_the_forward_pass_gives(tiny_config, images, quantizer):
    model = spread_codes(build({**tiny_config, **quantizer})).eval()
    size = images.shape[-2:]
    with torch.no_grad():
        out = model(images)
        encoded = model.encode(pixel_values=images)
        whole = model.decode(encoded.image_tokens)
    assert isinstance(whole, torch.Tensor)
    torch.testing.assert_close(whole[..., : size[0], : size[1]], out.decoded_pixel_values)
    assert torch.equal(model.decode(image_tokens=encoded.image_tokens), whole)
    assert torch.equal(model.decode(model.quantize.to_product_ids(encoded.image_tokens)), whole)
    assert torch.equal(model.get_image_tokens(images), out.image_tokens)
    for name in ("image_tokens", "last_hidden_state", "quantized_last_hidden_state"):
        assert torch.equal(encoded[name], out[name])
    assert torch.equal(encoded.embedding_loss, model(images, return_loss=True).embedding_loss)
    assert model.codebook_size == model.config.codebook_size == max(model.codebook_sizes.values())
    assert out.image_tokens.max() < model.codebook_size


def test_the_names_are_those_of_transformers_own_image_tokenizers():
    """Of `encode` and `decode`, and of the fields that `encode` returns; VQModel's stand beside them."""
    from transformers.models.janus.modeling_janus import JanusVQVAE, JanusVQVAEModelOutput

    for method, name in (("encode", "pixel_values"), ("decode", "image_tokens")):
        assert name in inspect.signature(getattr(JanusVQVAE, method)).parameters
        assert name in inspect.signature(getattr(DualCodebookModel, method)).parameters
    theirs = [field.name for field in dataclasses.fields(JanusVQVAEModelOutput)]
    ours = [field.name for field in dataclasses.fields(DualCodebookEncoderOutput)]
    assert ours == [name for name in theirs if name in ours] and len(ours) == 4


def test_vqmodels_contract_holds_beside_them(tiny_config, images, tiny_model):
    model = build(tiny_config).eval()
    model.load_state_dict(tiny_model.state_dict())
    with torch.no_grad():
        latents = model.encode(images).latents
        assert torch.equal(latents, tiny_model.encode(images).latents)
        assert torch.equal(model.encode(images, return_dict=False)[0], latents)
        for options in ({}, {"force_not_quantize": True}):
            assert torch.equal(model.decode(latents, **options).sample, tiny_model.decode(latents, **options).sample)
        ids, (b, c, h, w) = model.quantize(latents)[2][2], latents.shape
        shape = {"shape": (b, h, w, c)}
        assert torch.equal(model.decode(ids, **shape).sample, tiny_model.decode(ids, **shape).sample)
        assert torch.equal(model.decode(ids.view(b, h, w)), tiny_model.decode(ids, **shape).sample)


def test_the_decoder_learns_from_image_tokens(tiny_config, images):
    model = build(tiny_config).eval()
    model.decode(model.get_image_tokens(images)).square().mean().backward()
    assert model.decoder.conv_out.weight.grad.abs().sum() > 0
    assert model.encoder.conv_in.weight.grad is None


def test_wrong_image_tokens_are_refused_by_name(tiny_config, images):
    model = build(tiny_config).eval()
    tokens = model.get_image_tokens(images)
    for wrong, message in (
        (tokens.flatten(1), r"`tokens` must be of shape \(B, 2, h, w\)"),
        (tokens + model.codebook_size, r"`tokens` of the global codebook must lie in"),
        (model.quantize.to_product_ids(tokens) + 10**6, r"`tokens` of the global codebook must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode(wrong)
    with pytest.raises(ValueError, match="`tokens` must be integers"):
        model.decode(image_tokens=tokens.float())
    for call in (model.decode, model.encode):
        with pytest.raises(ValueError, match="exactly one of"):
            call()
    with pytest.raises(ValueError, match="exactly one of `x` and `pixel_values`"):
        model.encode(images, pixel_values=images)
