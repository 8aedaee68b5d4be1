"""The generator's training: masks, bits per position by hand, data by position, exact resume, what a run leaves."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from assertions import assert_equal_checkpoints
from conftest import TINY, forget_accelerate, spread_codes
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.generation.arguments import parse_generator_config
from dualcodebook_hf.generation.choices import UNITS
from dualcodebook_hf.generation.data import TokenDatasetSource
from dualcodebook_hf.generation.masking import (
    cross_entropies,
    draw_hidden,
    hidden_share,
    hidden_tokens,
    mask_tokens,
    scored_masks,
)
from dualcodebook_hf.generation.pipeline import DualCodebookMaskGenerationPipeline
from dualcodebook_hf.generation.task import GeneratorTask, build_optimizer
from dualcodebook_hf.generation.transformer import DualCodebookTransformer
from dualcodebook_hf.pil_images import read_image
from dualcodebook_hf.tokens.augment import Augmentation
from dualcodebook_hf.tokens.dataset import TokenDataset
from dualcodebook_hf.tokens.source import TokenSource
from dualcodebook_hf.tokens.tokenizing import TokenizeJob
from dualcodebook_hf.training.ends import BadDataError
from dualcodebook_hf.training.run import Trainer

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
COUNT, SIZE = 10, 8  # images of four classes, 8 x 8 pixels: grids of 4 x 4
SMALL = ["--hidden-size", "16", "--num-layers", "1", "--num-attention-heads", "2", "--dropout", "0.1"]


# --- masks and measures


def test_the_hidden_share_falls_from_all_to_none():
    progress = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(hidden_share(progress, "arccos"), torch.tensor([1.0, 2 / 3, 0.0]), atol=1e-6)
    assert torch.allclose(hidden_share(progress, "cosine"), torch.tensor([1.0, 0.5**0.5, 0.0]), atol=1e-6)
    assert hidden_share(progress, "linear").tolist() == [1.0, 0.5, 0.0]


def test_of_every_codebook_as_many_tokens_are_hidden_each_at_places_of_its_own():
    torch.manual_seed(0)
    hidden = draw_hidden(torch.zeros(64, 2, 5, 4, dtype=torch.long), "tokens", "linear")
    counts = hidden.flatten(2).sum(2)
    assert torch.equal(counts[:, 0], counts[:, 1]) and counts.min() >= 1
    assert len(counts[:, 0].unique()) > 10  # a share of its own for every sample
    partly = (counts[:, 0] > 3) & (counts[:, 0] < 17)
    assert (hidden[partly, 0] != hidden[partly, 1]).flatten(1).any(1).all()


def test_a_position_is_hidden_in_all_codebooks_or_in_none():
    hidden = draw_hidden(torch.zeros(16, 3, 4, 4, dtype=torch.long), "positions", "arccos")
    assert torch.equal(hidden[:, 0], hidden[:, 1]) and torch.equal(hidden[:, 0], hidden[:, 2])
    assert 0 < hidden.float().mean() < 1


def test_books_are_known_before_the_one_that_is_hidden_in_part_and_hidden_behind_it():
    torch.manual_seed(0)
    hidden = draw_hidden(torch.zeros(90, 3, 4, 4, dtype=torch.long), "books", "cosine").flatten(2)
    chosen = hidden.any(2).long().argmax(1)
    for sample, book in zip(hidden, chosen, strict=True):
        assert not sample[:book].any() and sample[book + 1 :].all()
    assert torch.bincount(chosen, minlength=3).min() > 15


def test_a_hidden_token_is_the_mask_token_of_its_codebook():
    tokens = torch.tensor([[[[1, 2]], [[3, 9]]]])
    masked = torch.where(torch.tensor([[[[True, False]], [[False, True]]]]), mask_tokens((7, 9)), tokens)
    assert masked.tolist() == [[[[7, 2]], [[3, 9]]]]
    assert hidden_tokens(masked, (7, 9)).tolist() == [[[[True, False]], [[False, True]]]]


def test_cross_entropy_and_its_label_smoothing_by_hand():
    logits = (torch.tensor([0.0, math.log(3)])[None, :, None, None], torch.zeros(1, 4, 1, 1))
    tokens = torch.tensor([[[[1]], [[2]]]])
    assert torch.allclose(cross_entropies(logits, tokens).flatten(), torch.tensor([math.log(4 / 3), math.log(4)]))
    smooth = cross_entropies(logits, tokens, 0.1).flatten()[0]
    assert float(smooth) == pytest.approx(0.95 * math.log(4 / 3) + 0.05 * math.log(4))


@pytest.mark.parametrize("masking", UNITS)
@pytest.mark.parametrize("place", [0.0, 0.37, 0.99])
def test_who_knows_nothing_needs_the_bits_of_all_codes(masking, place):
    masks = scored_masks((2, 3, 4), masking, place, np.random.default_rng(0))
    assert sum(float(mask.weight.sum()) for mask in masks) == pytest.approx(2)
    for mask in masks:
        assert not mask.weight[~mask.hidden].any()


@pytest.mark.parametrize("masking", UNITS)
def test_bits_per_position_are_the_entropy_where_the_tokens_do_not_depend_on_each_other(masking):
    """Every token counts on average 1 / positions, whatever is hidden: the bound is tight for independent tokens."""
    shape, total = (2, 2, 3), np.zeros((2, 2, 3))
    rng, rounds = np.random.default_rng(0), 4000
    for number in range(rounds):
        total += sum(mask.weight for mask in scored_masks(shape, masking, (number + 0.5) / rounds, rng))
    assert np.abs(total / rounds - 1 / 6).max() < 0.02


# --- data


def picture(number: int) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((SIZE + 2, SIZE + 1))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = spread_codes(DualCodebookVQModel(**{**TINY, "global_transformer_layers": 0}))
    model.save_pretrained(folder := tmp_path_factory.mktemp("tokenizer"))
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for split, number in itertools.product(("train", "validation"), range(COUNT)):
        place = root / split / f"class-{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number:02}.png")
    return root


def tokenized(photos: Path, checkpoint: str, output: Path, augmentation: Augmentation, split: str = "train") -> Path:
    source = TokenSource(dataset=str(photos), split=split, columns=("label",))
    job = TokenizeJob(
        source=source, output=str(output), model=checkpoint, device="cpu", augmentation=augmentation, num_shards=2
    )
    shards = job.prepare()
    for shard in range(2):
        shards.write(shard)
    return output


@pytest.fixture(scope="module")
def tokens(photos, checkpoint, tmp_path_factory) -> Path:
    """Two crops of each image: itself and its mirror image."""
    augmentation = Augmentation(kind="center-flip", size=SIZE)
    return tokenized(photos, checkpoint, tmp_path_factory.mktemp("tokens") / "train", augmentation)


@pytest.fixture(scope="module")
def validation(photos, checkpoint, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("tokens") / "validation"
    return tokenized(photos, checkpoint, output, Augmentation(size=SIZE), "validation")


def config_of(tokens, checkpoint, output, *flags, validation=None):
    arguments = ["--tokens", tokens, "--tokenizer", checkpoint, "--output-dir", output, *SMALL]
    arguments += ["--validation-tokens", validation] if validation else []
    arguments += ["--train-batch-size", 3, "--max-train-steps", 4, "--validation-steps", 0, "--checkpointing-steps", 0]
    arguments += [
        "--report-to",
        "none",
        "--num-threads",
        1,
        "--patience",
        0,
        "--sample-steps",
        2,
        "--lr-warmup-steps",
        0,
        *flags,
    ]
    return parse_generator_config([str(argument) for argument in arguments])


def trainer_of(*args, **more):
    config = config_of(*args, **more)
    return Trainer(GeneratorTask(config), config.training)


def source_of(tokens, checkpoint, output="unused", **more):
    config = config_of(tokens, checkpoint, output, **more)
    return TokenDatasetSource(config.data, config.training.seed)


def taken(batches, count):
    return [(index, tuple(row.flatten().tolist())) for batch in itertools.islice(batches, count)
            for index, row in zip(batch["index"].tolist(), batch["tokens"], strict=True)]  # fmt: skip


def test_batches_are_crops_of_the_rows_with_their_labels(tokens, checkpoint):
    rows = list(TokenDataset(tokens).rows())
    crops = [{tuple(crop.flatten().tolist()) for crop in row["tokens"]} for row in rows]
    for batch in itertools.islice(source_of(tokens, checkpoint).training(4, 0, 0, 1), 20):
        assert batch["tokens"].dtype == torch.int64 and batch["tokens"].shape == (4, 2, 4, 4)
        for index, crop, label in zip(batch["index"].tolist(), batch["tokens"], batch["class_labels"], strict=True):
            assert tuple(crop.flatten().tolist()) in crops[index]
            assert label == rows[index]["label"]


def test_every_epoch_shows_every_image_once_and_both_of_its_crops_come(tokens, checkpoint):
    samples = taken(source_of(tokens, checkpoint).training(5, 0, 0, 1), 24)
    epochs = [samples[start : start + COUNT] for start in range(0, len(samples), COUNT)]
    orders = [tuple(index for index, _ in epoch) for epoch in epochs]
    assert all(sorted(order) == list(range(COUNT)) for order in orders) and len(set(orders)) == len(orders)
    assert all(len({crop for index, crop in samples if index == number}) == 2 for number in range(COUNT))


def test_what_comes_depends_on_the_position_alone(tokens, checkpoint):
    """From any sample on, and for two processes together."""
    source = source_of(tokens, checkpoint)
    whole = taken(source.training(4, 0, 0, 1), 12)
    assert taken(source.training(4, 12, 0, 1), 9) == whole[12:]
    halves = [source.training(2, 4, rank, 2) for rank in range(2)]
    together = [sample for _ in range(11) for half in halves for sample in taken(half, 1)]
    assert together == whole[4:]


def test_images_become_the_tokens_that_a_token_data_set_holds(photos, tokens, checkpoint, tmp_path):
    arguments = ["--dataset", photos, "--tokenizer", checkpoint, "--output-dir", tmp_path, "--resolution", SIZE]
    arguments += ["--crop", "center", "--horizontal-flip", "false", "--resize", SIZE, "--resample", "lanczos"]
    task = GeneratorTask(parse_generator_config([*map(str, arguments), *SMALL, "--num-workers", "0"]))
    rows = list(TokenDataset(tokens).rows())
    for batch in itertools.islice(task.source.training(3, 0, 0, 1), 4):
        found = task.tokenizer.tokenize(batch["pixel_values"])
        for index, row, label in zip(batch["index"].tolist(), found, batch["class_labels"], strict=True):
            assert row.tolist() == rows[index]["tokens"][0].tolist()
            assert label == rows[index]["label"]


# --- runs


def test_it_learns_ten_images_by_heart(tokens, validation, checkpoint, tmp_path):
    flags = ["--max-train-steps", 150, "--train-batch-size", 10, "--learning-rate", 0.01, "--dropout", 0]
    flags += ["--hidden-size", 32, "--validation-steps", 75, "--label-smoothing", 0, "--class-dropout", 0]
    flags += ["--sample-count", 4]
    trainer = trainer_of(tokens, checkpoint, tmp_path, *flags, validation=validation)
    trainer.network.eval()
    before, _ = trainer.task.validate()
    assert before["bits_per_position"] == pytest.approx(9, abs=0.5)  # of 32 and 16 codes, of which it knows nothing
    trainer.train()
    trainer.network.eval()
    after, sheet = trainer.task.validate()
    assert after["bits_per_position"] < 0.5 * before["bits_per_position"]
    assert after["bits_per_position"] == pytest.approx(after["bits_global"] + after["bits_local"])
    assert sheet.size == (4 * SIZE, SIZE)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0000075.png", "step-0000150.png"]


def test_the_loss_is_the_mean_over_hidden_tokens(tokens, checkpoint, tmp_path):
    trainer = trainer_of(tokens, checkpoint, tmp_path, "--dropout", 0, "--label-smoothing", 0)
    batch = next(trainer.task.batches(0))
    trainer.network.eval()  # without dropout
    state = torch.get_rng_state()
    terms = trainer.task.forward_backward(batch, 0)
    torch.set_rng_state(state)
    labels = torch.where(torch.rand(3) < 0.1, 4, batch["class_labels"])
    hidden = draw_hidden(batch["tokens"], "tokens", "arccos")
    logits = trainer.network(torch.where(hidden, trainer.task.masks, batch["tokens"]), labels).logits
    expected = cross_entropies(logits, batch["tokens"])
    assert torch.allclose(terms["cross_entropy_global"], expected[:, 0][hidden[:, 0]].mean())
    gradient = torch.autograd.grad(expected[hidden].mean(), trainer.network.positions)[0]
    assert torch.allclose(trainer.network.positions.grad, gradient, atol=1e-7)


@pytest.mark.parametrize("masking", UNITS)
def test_four_updates_equal_two_and_two(tokens, validation, checkpoint, tmp_path, masking):
    flags = ["--masking", masking, "--ema-decay", 0.9, "--checkpointing-steps", 2, "--validation-steps", 2]
    flags += ["--checkpoints-total-limit", 0, "--patience", 5]
    trainer_of(tokens, checkpoint, tmp_path / "whole", *flags, validation=validation).train()
    forget_accelerate()
    resume = ["--resume-from-checkpoint", tmp_path / "whole" / "checkpoint-2"]
    torch.manual_seed(5)
    trainer_of(tokens, checkpoint, tmp_path / "cut", *flags, *resume, validation=validation).train()
    assert_equal_checkpoints(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")


def test_a_run_leaves_a_pipeline_that_names_classes_and_tokenizer(tokens, checkpoint, tmp_path):
    trainer = trainer_of(tokens, checkpoint, tmp_path, "--ema-decay", 0.5, "--weights-dtype", "bfloat16")
    trainer.train()
    pipeline = DualCodebookMaskGenerationPipeline.from_pretrained(tmp_path / "final")
    assert pipeline.get_label_ids(["class-2"]) == [2]
    assert pipeline.transformer.config.tokenizer_weights_sha256 == trainer.task.source.info.weights_sha256
    with trainer.averaged_weights() as network:
        expected = {name: value.bfloat16().float() for name, value in network.state_dict().items()}
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value.float(), expected[name]), name
    rows = torch.from_numpy(next(TokenDataset(tokens).rows())["tokens"].astype(np.int64))
    assert torch.equal(
        pipeline.vqvae.detokenize(rows), DualCodebookVQModel.from_pretrained(checkpoint).detokenize(rows)
    )
    assert json.loads((tmp_path / "final" / "train_config.json").read_text()) == trainer.settings


def test_a_generator_goes_on_from_one_of_another_grid(photos, tokens, checkpoint, tmp_path):
    trainer_of(tokens, checkpoint, tmp_path / "first").train()
    forget_accelerate()
    larger = tokenized(photos, checkpoint, tmp_path / "larger", Augmentation(size=2 * SIZE))
    started = trainer_of(larger, checkpoint, tmp_path / "second", "--init-from", tmp_path / "first")
    first = DualCodebookTransformer.from_pretrained(tmp_path / "first" / "final", subfolder="transformer")
    assert started.network.positions.shape == (1, 16, 8, 8)
    labels, grid = torch.tensor([1]), torch.randint(16, (1, 2, 8, 8))
    mine, theirs = (network.eval()(grid, labels).logits for network in (started.network, first))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs, strict=True))
    with pytest.raises(ValueError, match=r"`init_from` .* does not fit"):
        trainer_of(tokens, checkpoint, tmp_path / "third", "--init-from", tmp_path / "first", "--hidden-size", 32)


def test_only_matrices_decay(tokens, checkpoint, tmp_path):
    config = config_of(tokens, checkpoint, tmp_path)
    network = DualCodebookTransformer((32, 16), hidden_size=16, num_layers=1, num_attention_heads=2)
    decayed, others = build_optimizer(network, config.training).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.045, 0)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    embeddings = {id(embedding.weight) for embedding in network.token_embeddings}
    assert embeddings <= {id(parameter) for parameter in others["params"]}
    assert len(decayed["params"]) + len(others["params"]) == len(list(network.parameters()))


# --- what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of `tokens` .* and `dataset` .* must be named, got neither"),
        (["--tokens", "a", "--dataset", "b"], "got both 'a' and 'b'"),
        (["--dataset", "b", "--validation-tokens", "c"], "`validation_tokens` goes with `tokens`"),
        (
            ["--tokens", "a", "--resolution", "128"],
            "`resolution` is of images and changes nothing of `tokens`",
        ),
        (["--tokens", "a"], "`patience` 6 needs `validation_tokens` to validate on; or give 0"),
        (["--dataset", "b", "--validation-split", "null"], "`patience` 6 needs `validation_split` to validate on"),
        (["--tokens", "a", "--sample-temperature", "0"], "`sample_temperature` must be above 0, got 0"),
        (["--dataset", "b", "--streaming", "true"], "`class_column` must be null for a streamed"),
        (["--tokens", "a", "--masking", "token"], "`masking` must be one of tokens, positions, books"),
        (["--tokens", "a", "--num-attention-heads", "3"], "`num_attention_heads` must divide hidden_size=256, got 3"),
        (["--tokens", "a", "--class-dropout", "1"], r"`class_dropout` must lie in \[0, 1\)"),
        (["--tokens", "a", "--config", "paper"], "`config` must be one of maskbit, small, tiny"),
    ],
)
def test_wrong_settings_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_generator_config(flags)


def test_tokens_of_another_tokenizer_and_columns_without_classes_are_refused(
    photos, tokens, validation, checkpoint, tmp_path
):
    torch.manual_seed(1)
    spread_codes(DualCodebookVQModel(**{**TINY, "global_transformer_layers": 0})).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`tokenizer` must be the model that made the tokens"):
        GeneratorTask(config_of(tokens, tmp_path / "other", tmp_path / "run"))
    other = tokenized(photos, str(tmp_path / "other"), tmp_path / "tokens", Augmentation(size=SIZE))
    with pytest.raises(ValueError, match=r"`validation_tokens` .* must be made by the tokenizer of `tokens`"):
        source_of(tokens, checkpoint, validation=other)
    with pytest.raises(ValueError, match=r"`class_column` must be one of \['id', 'tokens', .*, got 'colour'"):
        GeneratorTask(config_of(tokens, checkpoint, tmp_path / "run", "--class-column", "colour"))
    with pytest.raises(ValueError, match=r"`class_column` 'height' .* must be of the type ClassLabel"):
        GeneratorTask(config_of(tokens, checkpoint, tmp_path / "run", "--class-column", "height"))
    with pytest.raises(ValueError, match=r"`validation_tokens`: '.*nowhere' is no token data set"):
        GeneratorTask(config_of(tokens, checkpoint, tmp_path / "run", validation=tmp_path / "nowhere"))
    whole = tokenized(photos, checkpoint, tmp_path / "whole", Augmentation(kind="none"))
    with pytest.raises(ValueError, match=r"`tokens`: .* must hold crops of one size"):
        GeneratorTask(config_of(whole, checkpoint, tmp_path / "run"))


def test_a_generator_without_classes(tokens, validation, checkpoint, tmp_path):
    flags = ["--class-column", "null", "--validation-steps", 2, "--max-train-steps", 2]
    trainer = trainer_of(tokens, checkpoint, tmp_path, *flags, validation=validation)
    trainer.train()
    pipeline = DualCodebookMaskGenerationPipeline.from_pretrained(tmp_path / "final")
    assert pipeline.transformer.config.num_classes is None
    assert read_image(tmp_path / "samples" / "step-0000002.png").size == (8 * SIZE, SIZE)


def test_a_validation_that_cannot_be_read_leaves_nothing_half_read(tokens, validation, checkpoint, tmp_path):
    """The next one measures all images, as if it had not been there."""
    task = trainer_of(tokens, checkpoint, tmp_path, "--validation-batch-size", 4, validation=validation).task
    task.network.eval()
    expected, _ = task.validate()
    task._scored, whole = None, task.source.validation

    def broken(batch_size):
        yield next(whole(batch_size))
        raise ValueError("an image of it cannot be read")

    task.source.validation = broken
    with pytest.raises(BadDataError, match="cannot be read"):
        task.validate()
    task.source.validation = whole
    assert task.validate()[0] == expected


def test_images_that_were_left_out_are_counted_at_the_end(photos, checkpoint, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    next((tmp_path / "photos" / "train").rglob("*.png")).write_bytes(b"no picture")
    arguments = ["--dataset", tmp_path / "photos", "--tokenizer", checkpoint, "--output-dir", tmp_path / "run"]
    arguments += ["--resolution", SIZE, "--on-bad-image", "skip", "--num-workers", 0, "--validation-steps", 0]
    arguments += ["--patience", 0, "--lr-warmup-steps", 0, "--max-train-steps", 4, "--train-batch-size", 5]
    config = parse_generator_config([*map(str, arguments), *SMALL, "--report-to", "none"])
    trainer = Trainer(GeneratorTask(config), config.training)
    trainer.train()
    assert trainer.task.remarks() == ["1 images that cannot be read were left out (`on_bad_image: skip`)"]
