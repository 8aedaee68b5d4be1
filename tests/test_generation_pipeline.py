"""The pipeline draws what its scheduler reveals, keeps what is known, and comes back from the disk as it was."""

import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import TINY, spread_codes
from diffusers import AmusedScheduler, DiffusionPipeline
from PIL import Image

from dualcodebook_hf import (
    DualCodebookMaskGenerationPipeline,
    DualCodebookTransformer,
    DualCodebookVQModel,
    MaskedTokenScheduler,
)
from dualcodebook_hf.configuration_dualcodebook import config_hash
from dualcodebook_hf.hub import export_pipeline
from dualcodebook_hf.image_processing_dualcodebook import to_pixels
from dualcodebook_hf.weights import encoder_hash

NAMES = {0: "dog", 1: "cat, kitten", 2: "hat"}
F = 2  # of the tiny tokenizer


def tokenizer(**changes):
    torch.manual_seed(0)
    return spread_codes(DualCodebookVQModel(**{**TINY, **changes})).eval()


def build(vqvae=None, num_classes=3, id2label=NAMES, scheduler=None, **changes):
    vqvae = vqvae or tokenizer()
    sizes = tuple(vqvae.codebook_sizes.values())
    torch.manual_seed(1)
    made_by = {"tokenizer_config_hash": config_hash(vqvae.config), "tokenizer_weights_sha256": encoder_hash(vqvae)}
    options = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, **made_by, **changes}
    transformer = DualCodebookTransformer(sizes, num_classes=num_classes, sample_size=(6, 8), **options).eval()
    for parameter in transformer.parameters():  # so that the class and the known tokens matter
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    scheduler = scheduler or MaskedTokenScheduler(codebook_sizes=sizes)
    pipe = DualCodebookMaskGenerationPipeline(vqvae, transformer, scheduler, id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def amused():
    return build(tokenizer(local_codebook_size=32), scheduler=AmusedScheduler(mask_token_id=32))


def photograph(width=14, height=10):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def white(box, width=14, height=10):
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def draw(pipe, output_type="tokens", seed=0, **options):
    options = {"num_inference_steps": 4, "generator": seeded(seed), **options}
    return pipe(output_type=output_type, **options).images


@pytest.fixture(scope="module")
def pipe():
    return build()


def test_images_are_the_decoded_tokens_in_every_output_type(pipe):
    tokens = draw(pipe, class_labels=["dog", 2], num_images=2)
    assert tokens.shape == (4, 2, 6, 8) and tokens.dtype == torch.int64
    assert not pipe.scheduler.hidden(tokens).any()
    pixels = pipe.vqvae.detokenize(tokens).clamp(-1, 1)
    shown = {kind: draw(pipe, kind, class_labels=["dog", 2], num_images=2) for kind in ("pil", "np", "pt")}
    torch.testing.assert_close(shown["pt"], pixels / 2 + 0.5)
    np.testing.assert_allclose(shown["np"], shown["pt"].permute(0, 2, 3, 1).numpy())
    assert [image.size for image in shown["pil"]] == [(16, 12)] * 4
    assert np.abs(np.asarray(shown["pil"][0]) / 255 - shown["np"][0]).max() <= 0.5 / 255 + 1e-6
    assert isinstance(pipe(num_inference_steps=1, return_dict=False), tuple)


@pytest.mark.parametrize("builder", [build, amused])
def test_a_seed_draws_the_same_tokens_and_another_one_others(builder):
    pipe = builder()
    assert torch.equal(draw(pipe, class_labels=1), draw(pipe, class_labels="kitten"))
    assert not torch.equal(draw(pipe, class_labels=1), draw(pipe, class_labels=1, seed=1))
    assert not torch.equal(draw(pipe, class_labels=1), draw(pipe, class_labels=0))


def test_an_image_with_a_generator_of_its_own_is_the_same_in_every_batch(pipe):
    several = draw(pipe, class_labels=[0, 2], num_images=2, generator=[seeded(seed) for seed in range(4)])
    assert torch.equal(several[3:], draw(pipe, class_labels="hat", generator=seeded(3)))
    assert torch.equal(several[:1], draw(pipe, class_labels="dog", generator=[seeded(0)]))


def test_the_scheduler_gets_the_guided_logits_of_one_pass(pipe):
    calls, step, forward = [], pipe.scheduler.step, pipe.transformer.forward

    def counted(*args, **kwargs):
        calls.append(len(args[0]))
        return forward(*args, **kwargs)

    given = []
    pipe.transformer.forward = counted
    pipe.scheduler.step = lambda logits, t, tokens, *rest, **options: (
        given.append((logits, tokens)) or step(logits, t, tokens, *rest, **options)
    )
    try:
        for scale, schedule in ((1.0, "constant"), (3.0, "constant"), (3.0, "cosine")):
            calls.clear(), given.clear()
            options = {"guidance_scale": scale, "guidance_schedule": schedule, "sampling_temperature": 0.5}
            draw(pipe, class_labels=[0, 2], **options)
            scales = [scale] * 4
            if schedule == "cosine":
                scales = [1 + 2 * (1 - math.cos(math.pi * (step / 4) ** 2.5)) / 2 for step in range(4)]
            assert calls == [2 if scale == 1 else 4 for scale in scales]
            for (logits, tokens), scale in zip(given, scales, strict=True):
                with_class = forward(tokens, torch.tensor([0, 2])).logits
                without = forward(tokens, torch.tensor([3, 3])).logits
                for part, c, u in zip(logits, with_class, without, strict=True):
                    torch.testing.assert_close(part, (u + scale * (c - u)) / 0.5, atol=1e-4, rtol=1e-4)
    finally:
        del pipe.scheduler.step, pipe.transformer.forward


@pytest.mark.parametrize("size", [(20, 7), (12, 16), (1, 1)])
def test_images_of_another_size_have_their_own_grid(pipe, size):
    assert draw(pipe, height=size[0], width=size[1]).shape == (1, 2, -(-size[0] // F), -(-size[1] // F))
    (image,) = draw(pipe, "pil", height=size[0], width=size[1])
    assert image.size == size[::-1]


@pytest.mark.parametrize("builder", [build, amused])
def test_inpainting_keeps_tokens_and_pixels_outside_of_the_mask(builder):
    pipe, image = builder(), photograph()
    original = pipe.vqvae.tokenize(to_pixels(image)[None])
    hidden = torch.zeros(5, 7, dtype=torch.bool)
    hidden[1:4, 2:4] = True  # pixels 3...6 and 4...7: a position with one white pixel is hidden
    call = {"image": image, "mask_image": white((5, 3, 8, 7)), "class_labels": "dog", "num_images": 3}
    tokens = draw(pipe, **call)
    assert torch.equal(tokens[:, :, ~hidden], original[:, :, ~hidden].expand(3, -1, -1))
    assert (tokens[:, :, hidden] != original[:, :, hidden]).float().mean() > 0.5
    painted = np.zeros((10, 14), dtype=bool)
    painted[3:7, 5:8] = True
    decoded = draw(pipe, "pil", overlay=False, **call)
    for laid, plain in zip(draw(pipe, "pil", **call), decoded, strict=True):
        assert np.array_equal(np.asarray(laid)[~painted], np.asarray(image)[~painted])
        assert np.array_equal(np.asarray(laid)[painted], np.asarray(plain)[painted])
        assert not np.array_equal(np.asarray(plain)[~painted], np.asarray(image)[~painted])


@pytest.mark.parametrize("builder", [build, amused])
@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_image_to_image_keeps_a_share_of_the_positions_and_starts_from_the_image(builder, strength):
    pipe, image, started = builder(), photograph(), []
    original = pipe.vqvae.tokenize(to_pixels(image)[None])
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda tokens, *rest: started.append(tokens) or forward(tokens, *rest)
    tokens = draw(pipe, image=image, strength=strength, num_images=2)
    hidden = started[0] == torch.tensor(pipe.transformer.mask_token_ids)[:, None, None]
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert hidden[:, 0].sum((1, 2)).tolist() == [round(35 * strength)] * 2
    assert torch.equal(hidden[0], hidden[1]) == (strength == 1)
    assert torch.equal(tokens[~hidden], original.expand_as(tokens)[~hidden])


def test_strength_hides_a_share_of_what_is_under_the_mask(pipe):
    image = photograph()
    original = pipe.vqvae.tokenize(to_pixels(image)[None])
    tokens = draw(pipe, image=image, mask_image=white((0, 0, 8, 10)), strength=0.5)
    changed = (tokens != original).any(1)[0]
    assert not changed[:, 4:].any() and 0 < changed.sum() <= 10


def test_it_begins_from_tokens_as_from_an_image(pipe):
    image = photograph()
    tokens = pipe.vqvae.tokenize(to_pixels(image)[None])
    call = {"mask_image": white((0, 0, 6, 10)), "class_labels": 2}
    expected = draw(pipe, image=image, **call)
    assert torch.equal(draw(pipe, tokens=tokens, **call), expected)
    hidden = tokens.clone()
    hidden[..., :3] = torch.tensor(pipe.transformer.mask_token_ids)[:, None, None]
    assert torch.equal(draw(pipe, tokens=hidden, class_labels=2), expected)
    halves = draw(pipe, tokens=hidden.int(), strength=0.4)
    assert 0 < (halves[..., 3:] != tokens[..., 3:]).any(1).sum() <= 14


@pytest.mark.parametrize(
    "given",
    [
        lambda pixels: pixels.permute(1, 2, 0).numpy(),
        lambda pixels: pixels,
        lambda pixels: pixels[None],
        lambda pixels: [pixels],
        lambda pixels: (pixels * 255).round().byte().permute(1, 2, 0).numpy(),
    ],
)
def test_images_and_masks_in_every_shape_are_the_same(pipe, given):
    image, mask = photograph(), white((0, 0, 6, 10))
    expected = draw(pipe, image=image, mask_image=mask)
    pixels, binary = to_pixels(image) / 2 + 0.5, torch.from_numpy(np.array(mask)) > 0
    assert torch.equal(draw(pipe, image=given(pixels), mask_image=binary), expected)
    for form in (binary[None, None].float(), binary[..., None].numpy(), [mask.convert("RGB")], np.array(mask)):
        assert torch.equal(draw(pipe, image=image, mask_image=form), expected)


def test_one_class_for_several_images_and_several_classes_for_one_image(pipe):
    images = [photograph(), photograph().rotate(180)]
    both = draw(pipe, "pil", image=images, mask_image=white((0, 0, 6, 10)), class_labels=1, num_images=2)
    assert len(both) == 4
    for result, image in zip(both, (images[0], images[0], images[1], images[1]), strict=True):
        assert np.array_equal(np.asarray(result)[:, 6:], np.asarray(image)[:, 6:])
    assert len(draw(pipe, image=images[0], class_labels=[0, 1, 2], strength=0.5)) == 3
    with pytest.raises(ValueError, match="`class_labels` must be one, or one for each of the 2 images, got 3"):
        pipe(image=images, class_labels=[0, 1, 2])


def test_what_is_given_is_resized_on_demand(pipe):
    call = {"image": photograph(28, 20), "mask_image": white((0, 0, 3, 20), 28, 20), "height": 10, "width": 14}
    result = np.asarray(draw(pipe, "pil", **call)[0])
    small = np.asarray(photograph(28, 20).resize((14, 10), Image.Resampling.LANCZOS))
    assert np.abs(result[:, 2:].astype(int) - small[:, 2:]).max() <= 1  # 3 of 28 columns are 2 of 14, not 1


def test_the_callback_sees_tokens_fill_in_may_change_them_and_may_end_it(pipe):
    seen = []

    def watch(pipeline, step, timestep, values):
        assert pipeline is pipe and set(values) == {"tokens", "predicted_tokens"}
        seen.append((step, int(timestep), values))

    names = ["tokens", "predicted_tokens"]
    final = draw(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert [(step, timestep) for step, timestep, _ in seen] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    counts = [int(pipe.scheduler.hidden(values["tokens"]).sum()) for *_, values in seen]
    assert counts == sorted(counts, reverse=True) and counts[0] > 0 and counts[-1] == 0
    assert not any(pipe.scheduler.hidden(values["predicted_tokens"]).any() for *_, values in seen)
    assert torch.equal(final, seen[-1][2]["tokens"])
    assert (pipe.num_timesteps, pipe.guidance_scale) == (4, 2.0)

    def first_row(pipeline, step, timestep, values):
        values["tokens"][:, :, 0] = 5
        return values

    assert (draw(pipe, callback_on_step_end=first_row)[:, :, 0] == 5).all()

    def end(pipeline, step, timestep, values):
        pipeline._interrupt = step == 1
        seen.append(values["predicted_tokens"])

    ended = draw(pipe, callback_on_step_end=end, callback_on_step_end_tensor_inputs=["predicted_tokens"])
    assert len(seen) == 6 and torch.equal(ended, seen[-1])


def test_without_classes_it_draws_and_there_is_nothing_to_guide():
    pipe = build(num_classes=None, id2label=None)
    assert torch.equal(draw(pipe), draw(pipe, guidance_scale=7.0))
    with pytest.raises(ValueError, match="`class_labels` must be None"):
        pipe(class_labels=0)


def test_labels_by_name(pipe):
    assert pipe.get_label_ids(["kitten", "hat"]) == [1, 2] and pipe.get_label_ids("cat") == [1]
    assert list(pipe.labels) == ["cat", "dog", "hat", "kitten"]
    assert torch.equal(draw(pipe, class_labels=torch.tensor([1, 2])), draw(pipe, class_labels=["cat", 2]))


@pytest.mark.parametrize("builder", [build, amused])
def test_saved_and_loaded_it_draws_the_same(builder, tmp_path):
    pipe = builder()
    expected = draw(pipe, class_labels="hat")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["id2label"] == {"0": "dog", "1": "cat, kitten", "2": "hat"}
    for kind in (DualCodebookMaskGenerationPipeline, DiffusionPipeline):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is DualCodebookMaskGenerationPipeline and loaded.config.id2label == NAMES
        assert type(loaded.scheduler) is type(pipe.scheduler)
        assert torch.equal(draw(loaded, class_labels="hat"), expected)


def test_what_is_exported_for_the_hub_loads_by_remote_code(pipe, tmp_path):
    export_pipeline(pipe, tmp_path / "out", "you/generator")
    for kind in (DiffusionPipeline, DualCodebookMaskGenerationPipeline):
        loaded = kind.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert type(loaded) is DualCodebookMaskGenerationPipeline
        assert torch.equal(draw(loaded, class_labels="hat"), draw(pipe, class_labels="hat"))
    assert 'from_pretrained("you/generator", trust_remote_code=True)' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_fresh_process_loads_it_by_diffusers_own_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    torch.save(draw(pipe, class_labels="hat"), tmp_path / "expected.pt")
    code = """
        import dualcodebook_hf
        import torch
        from diffusers import DiffusionPipeline
        torch.set_num_threads(1)
        pipe = DiffusionPipeline.from_pretrained("saved")
        assert type(pipe) is dualcodebook_hf.DualCodebookMaskGenerationPipeline
        options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
        tokens = pipe(class_labels="hat", output_type="tokens", **options).images
        assert torch.equal(tokens, torch.load("expected.pt"))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("way", ["to", "to with a device", "from_pretrained"])
def test_in_bfloat16_the_codebooks_stay_exact(way, tmp_path):
    pipe = build()
    codes = [codebook.codes().clone() for codebook in pipe.vqvae.quantize.codebooks.values()]
    if way == "from_pretrained":
        pipe.save_pretrained(tmp_path)
        pipe = DualCodebookMaskGenerationPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        pipe = pipe.to(torch.bfloat16) if way == "to" else pipe.to("cpu", torch.bfloat16)
    assert pipe.vqvae.dtype == pipe.transformer.dtype == torch.bfloat16
    for codebook, before in zip(pipe.vqvae.quantize.codebooks.values(), codes, strict=True):
        assert torch.equal(codebook.codes(), before)
    images = draw(pipe, "np", class_labels=0, image=photograph(), strength=0.5)
    assert images.dtype == np.float32 and images.std() > 0.01


def test_parts_that_do_not_belong_together_are_refused():
    vqvae = tokenizer()
    other = tokenizer()
    with torch.no_grad():
        other.quantize.local_codebook.weight[0, 0] += 1
    good = build(vqvae)
    parts = {"vqvae": vqvae, "transformer": good.transformer, "scheduler": good.scheduler, "id2label": NAMES}
    for changed, message in [
        ({"vqvae": tokenizer(local_codebook_size=8)}, r"`vqvae` must have the codebooks .*\(32, 16\), got \(32, 8\)"),
        ({"vqvae": tokenizer(local_dim=8)}, "`vqvae` must be the transformer's tokenizer, with config hash"),
        ({"vqvae": other}, "`vqvae` must be the transformer's tokenizer, with an encoder and codebooks of SHA-256"),
        ({"scheduler": MaskedTokenScheduler(codebook_sizes=(32, 8))}, "`scheduler` must be"),
        ({"scheduler": AmusedScheduler(32)}, "`scheduler`: an AmusedScheduler must"),
        ({"id2label": {3: "bird"}}, r"`id2label` must have ids in \[0, 3\)"),
        ({"id2label": {0: "dog", 1: "cat,dog"}}, "`id2label` must give each name to one class, got 'dog'"),
    ]:
        with pytest.raises(ValueError, match=message):
            DualCodebookMaskGenerationPipeline(**{**parts, **changed})
    unknown = build(tokenizer_config_hash=None, tokenizer_weights_sha256=None).transformer
    DualCodebookMaskGenerationPipeline(**{**parts, "vqvae": other, "transformer": unknown})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": "hut"}, "`class_labels` must be among the names .*'hut'; did you mean hat"),
        ({"class_labels": 3}, r"`class_labels` must be names, or ids in \[0, 3\)"),
        ({"class_labels": []}, "`class_labels`"),
        ({"guidance_scale": -1}, "`guidance_scale`"),
        ({"guidance_schedule": "linear"}, "`guidance_schedule` must be one of constant, cosine"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"num_images": 0}, "`num_images`"),
        ({"output_type": "latent"}, "`output_type` must be one of pil, np, pt, tokens"),
        ({"sampling_temperature": 0}, "`sampling_temperature`"),
        ({"choice_temperature": (1, -1)}, "`choice_temperature`"),
        ({"height": 32}, "`height` and `width` must be given together"),
        ({"height": 0, "width": 4}, "`height` must be a whole number"),
        ({"mask_image": white((0, 0, 2, 2))}, "`mask_image` must come with an `image` or `tokens`"),
        ({"strength": 0.5}, "`strength` must come with an `image` or `tokens`"),
        ({"image": photograph(), "strength": 0.0}, r"`strength` must lie in \(0, 1\]"),
        ({"image": photograph(), "strength": 0.001}, "`strength` must leave something"),
        ({"image": photograph(), "mask_image": white((0, 0, 0, 0))}, "`mask_image` must leave something"),
        ({"image": photograph(), "mask_image": Image.new("L", (4, 4))}, "`mask_image` must have the size"),
        ({"image": photograph(), "mask_image": [white((0, 0, 2, 2))] * 2}, "`mask_image` must be one, or one for"),
        ({"image": "nowhere.png"}, "`image`: cannot read image 'nowhere.png'"),
        ({"image": torch.full((3, 4, 4), 2.0)}, "`image`: images must hold values"),
        ({"image": photograph(), "tokens": torch.zeros(1, 2, 4, 4, dtype=torch.long)}, "`tokens` must be None"),
        ({"tokens": torch.zeros(1, 2, 4, 4)}, "`tokens` must be a tensor of integers"),
        ({"tokens": torch.zeros(1, 3, 4, 4, dtype=torch.long)}, "`tokens` must be of shape"),
        ({"tokens": torch.full((1, 2, 4, 4), 17)}, r"`tokens` of codebook 1 must lie in \[0, 16\)"),
        (
            {"tokens": torch.zeros(1, 2, 4, 4, dtype=torch.long), "height": 3, "width": 3},
            "`height` and `width` must be",
        ),
        ({"generator": [seeded()]}, "`generator` must be one, or one for each of 2 images, got 1"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "`callback_on_step_end_tensor_inputs`"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(pipe, call, message):
    def work(*_, **__):
        raise AssertionError("it worked")

    pipe.transformer.forward = pipe.vqvae.tokenize = work
    try:
        with pytest.raises(ValueError, match=message):
            pipe(**{"num_images": 2, **call})
    finally:
        del pipe.transformer.forward, pipe.vqvae.tokenize
