"""Every loader takes weights that fit and are finite, whole, and nothing else; each face loads what the other saved."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from diffusers import DDIMScheduler, DiffusionPipeline, LDMPipeline, ModelMixin, UNet2DModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from dualcodebook_hf import DualCodebookModel, DualCodebookVQModel
from dualcodebook_hf.cli.main import main
from dualcodebook_hf.configuration_dualcodebook import DualCodebookFields
from dualcodebook_hf.generation.transformer import DualCodebookTransformer
from dualcodebook_hf.hub import export_code, prepare_folder
from dualcodebook_hf.loading import load_tokenizer
from dualcodebook_hf.training.arguments import DataArguments, RunConfig, TrainArguments
from dualcodebook_hf.training.tokenizer_task import build_model
from dualcodebook_hf.weights import check_range, readable

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A folder as diffusers' face saves it."""
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def filled(value):
    def change(state):
        state["encoder.conv_in.bias"][3] = value

    return change


HARM = {
    "missing": (lambda state: state.pop("quantize.local_codebook.weight"), r"missing \(quantize\.local_codebook"),
    "unknown": (lambda state: state.update({"surplus.weight": torch.zeros(2)}), r"unknown \(surplus\.weight"),
    "another shape": (
        lambda state: state.update({"quant_conv.bias": torch.zeros(13)}),
        r"another shape \(quant_conv\.bias \(13,\) instead of \(12,\)",
    ),
    "integers": (
        lambda state: state.update({"quant_conv.bias": torch.ones(12, dtype=torch.int32)}),
        r"another type \(quant_conv\.bias torch\.int32",
    ),
    "not a number": (filled(float("nan")), r"NaN or infinity \(encoder\.conv_in\.bias"),
    "infinite": (filled(float("-inf")), r"NaN or infinity \(encoder\.conv_in\.bias"),
    "beyond float32": (
        lambda state: state.update({"quant_conv.bias": torch.full((12,), 1e300, dtype=torch.float64)}),
        r"NaN or infinity \(quant_conv\.bias",
    ),
    "another model's": (
        lambda state: [state.pop(name) for name in list(state) if name.startswith("quantize.global")],
        r"13 tensors missing \(quantize\.global_codebook\.weight, .* and 8 more\)",
    ),
}


def harm(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def through_init_from(folder):
    run = RunConfig(DualCodebookFields(**TINY), DataArguments(), TrainArguments(init_from=str(folder)))
    return build_model(run)


def through_a_pipeline(folder):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 12, 12, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    place = folder.parent / "pipeline"
    LDMPipeline(vqvae=DualCodebookVQModel(**TINY), unet=unet, scheduler=DDIMScheduler()).save_pretrained(place)
    (folder / WEIGHTS).replace(place / "vqvae" / WEIGHTS)
    DiffusionPipeline.from_pretrained(place)


LOADERS = {
    "diffusers' face": DualCodebookVQModel.from_pretrained,
    "diffusers' face in low precision": lambda folder: DualCodebookVQModel.from_pretrained(
        folder, dtype=torch.bfloat16
    ),
    "diffusers' face with a device map": lambda folder: DualCodebookVQModel.from_pretrained(folder, device_map="auto"),
    "diffusers' face by its subfolder": lambda folder: DualCodebookVQModel.from_pretrained(
        folder.parent, subfolder=folder.name
    ),
    "transformers' face": AutoModel.from_pretrained,
    "transformers' face in low precision": lambda folder: AutoModel.from_pretrained(folder, dtype=torch.float16),
    "transformers' face with a device map": lambda folder: AutoModel.from_pretrained(folder, device_map="auto"),
    "load_tokenizer": lambda folder: load_tokenizer(str(folder)),
    "init_from": through_init_from,
    "push": lambda folder: prepare_folder(folder, folder.parent / "published"),
    "a pipeline": through_a_pipeline,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", HARM)
def test_weights_that_do_not_fit_are_refused_by_every_loader(folder, loader, kind):
    change, message = HARM[kind]
    harm(folder, change)
    with pytest.raises(
        ValueError, match=rf"(?s){WEIGHTS}.*(config\.json must come from|config\.json and|take an earlier).*{message}"
    ):
        LOADERS[loader](folder)
    assert not (folder.parent / "published").exists()


def test_every_loader_takes_weights_that_fit(folder):
    for name, loader in LOADERS.items():
        if name != "a pipeline":  # which moves them
            loader(folder)
    through_a_pipeline(folder)


def test_a_copy_of_the_code_is_as_strict(folder):
    harm(folder, HARM["missing"][0])
    export_code(folder)
    code = (
        "import sys; sys.modules['dualcodebook_hf'] = None\n"
        "from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    environment = {"HF_HOME": str(folder.parent / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 1
    assert "ValueError: the weights in" in result.stderr and "quantize.local_codebook.weight" in result.stderr


def test_the_command_line_refuses_codebooks_of_another_quantizer_in_one_line(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantizer": "residual"}))
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    output = tmp_path / "a.safetensors"
    arguments = ["tokenize", str(tmp_path / "a.png"), "--output", str(output), "--model", str(folder)]
    assert main(arguments) == 2 and not output.exists()
    error = capsys.readouterr().err.strip()
    assert "\n" not in error.splitlines()[-1] and "quantize.stages" in error and WEIGHTS in error


def test_tensors_of_another_shape_pass_where_transformers_is_told_so(folder):
    harm(folder, HARM["another shape"][0])
    model = AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.quant_conv.bias.shape == (12,) and model.quant_conv.bias.isfinite().all()


@pytest.mark.parametrize("face", [DualCodebookVQModel, DualCodebookModel])
@pytest.mark.parametrize("content", [b"broken", b"\xff" * 64, (300_000).to_bytes(8, "little") + b"{" * 64])
def test_a_damaged_file_is_named_by_both_faces(folder, face, content):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises((OSError, ValueError), match=str(folder)):
        face.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"cannot load the model '{folder}'"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("config", ["[1]", "3", "{", "[" * 100_000, '{"model_type": "dualcodebook", "dtype": 3}'])
def test_a_config_json_of_another_kind_is_a_value_error(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match="cannot load the model"):
        load_tokenizer(str(folder))


def test_few_numbers_that_claim_to_be_many_take_no_memory(tmp_path):
    fields = {**TINY, "block_out_channels": [1024, 2048]}
    with torch.device("meta"):
        model = DualCodebookVQModel(**fields)
    model.save_config(tmp_path)
    state = {name: torch.zeros(1).expand(value.shape) for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    assert (tmp_path / "diffusion_pytorch_model.bin").stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"must hold all numbers of its tensors: they take \d{10} bytes"):
        DualCodebookVQModel.from_pretrained(tmp_path)


# --- each face loads what the other one saved


SAVES = {
    "diffusers": lambda model, place: model.save_pretrained(place),
    "diffusers, a variant": lambda model, place: model.save_pretrained(place, variant="fp16"),
    "diffusers, shards": lambda model, place: model.save_pretrained(place, max_shard_size="10KB"),
    "transformers": lambda model, place: as_transformers(model).save_pretrained(place),
    "transformers, a variant": lambda model, place: as_transformers(model).save_pretrained(place, variant="fp16"),
    "transformers, shards": lambda model, place: as_transformers(model).save_pretrained(place, max_shard_size="10KB"),
}


def as_transformers(model):
    config = DualCodebookModel.config_class(**{name: model.config[name] for name in TINY})
    made = DualCodebookModel(config)
    made.load_state_dict(model.state_dict())
    return made


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("face", [DualCodebookVQModel, DualCodebookModel, AutoModel])
@pytest.mark.parametrize("kind", SAVES)
def test_both_faces_load_every_kind_of_save(tiny_model, tmp_path, kind, face):
    SAVES[kind](tiny_model, tmp_path / "pipeline" / "vqvae")
    options = {"variant": "fp16"} if "variant" in kind else {}
    assert equal(face.from_pretrained(tmp_path / "pipeline" / "vqvae", **options), tiny_model)
    assert equal(face.from_pretrained(tmp_path / "pipeline", subfolder="vqvae", **options), tiny_model)
    if options:
        with pytest.raises(OSError, match=r"fp16"):
            face.from_pretrained(tmp_path / "pipeline" / "vqvae")


@pytest.mark.parametrize("face", [DualCodebookVQModel, DualCodebookModel])
@pytest.mark.parametrize("kind", [kind for kind in SAVES if "variant" not in kind])
def test_both_faces_load_every_kind_of_save_by_its_hub_id(tiny_model, tmp_path, kind, face):
    repository, commit = tmp_path / "models--nobody--tok", "0123456789abcdef0123456789abcdef01234567"
    SAVES[kind](tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = face.from_pretrained("nobody/tok", cache_dir=tmp_path, local_files_only=True)
    assert equal(loaded, tiny_model)
    assert getattr(loaded.config, "_name_or_path", None) == "nobody/tok"


def test_what_transformers_saved_is_strict_and_keeps_its_options_in_diffusers_face(tiny_model, tmp_path):
    as_transformers(tiny_model).save_pretrained(tmp_path)
    model, report = DualCodebookVQModel.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert model.encoder.conv_in.weight.dtype == torch.bfloat16 and not any(report.values())
    assert model.quantize.local_codebook.weight.dtype == torch.float32 and not model.training
    state = load_file(tmp_path / "model.safetensors")
    state.pop("quant_conv.bias")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors missing \(quant_conv\.bias\)"):
        DualCodebookVQModel.from_pretrained(tmp_path)


def test_the_face_that_saved_last_counts(tiny_model, tmp_path):
    other = DualCodebookVQModel(**TINY)
    SAVES["diffusers"](tiny_model, tmp_path)
    SAVES["transformers"](other, tmp_path)
    assert equal(DualCodebookVQModel.from_pretrained(tmp_path), other)
    assert equal(DualCodebookModel.from_pretrained(tmp_path), other)
    SAVES["diffusers"](tiny_model, tmp_path)
    assert equal(DualCodebookVQModel.from_pretrained(tmp_path), tiny_model)
    assert equal(DualCodebookModel.from_pretrained(tmp_path), tiny_model)


def test_what_transformers_saved_is_published_as_diffusers_face_saves_it(tiny_model, tmp_path):
    as_transformers(tiny_model).save_pretrained(tmp_path / "model")
    names = prepare_folder(tmp_path / "model", tmp_path / "published")
    assert WEIGHTS in names and "model.safetensors" not in names
    for face in (DualCodebookVQModel, DualCodebookModel):
        assert equal(face.from_pretrained(tmp_path / "published"), tiny_model)
    assert equal(load_tokenizer(str(tmp_path / "model")), tiny_model)


def test_a_pickle_is_loaded_as_weights_alone_or_explained(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, safe_serialization=False)
    assert equal(DualCodebookVQModel.from_pretrained(tmp_path), tiny_model)
    with pytest.raises(OSError, match=r"there is diffusion_pytorch_model\.bin: .* save it again"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in SAVES if "shards" in kind])
def test_an_index_names_nothing_outside_its_folder(tiny_model, tmp_path, monkeypatch, kind):
    SAVES[kind](tiny_model, tmp_path / "model")
    (index,) = (tmp_path / "model").glob("*.index.json")
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"].values()))
    (tmp_path / "model" / name).rename(tmp_path / name)
    (tmp_path / "notes.json").write_text("{}")  # no weights, which transformers would unpickle
    for shard in (f"../{name}", str(tmp_path / name), "../notes.json", name):
        weight_map = {key: shard if value == name else value for key, value in content["weight_map"].items()}
        index.write_text(json.dumps({**content, "weight_map": weight_map}))
        with monkeypatch.context() as patch:
            if shard != name:  # refused before the libraries, which would open it
                patch.setattr(ModelMixin, "from_pretrained", lambda *args, **kwargs: None)
                patch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: None)
            for face in (DualCodebookVQModel, DualCodebookModel):
                with pytest.raises((ValueError, OSError), match=re.escape(shard)):
                    face.from_pretrained(tmp_path / "model")


DAMAGED_INDICES = {
    "cut": lambda content: json.dumps(content)[:-100],
    "no object": lambda content: "[]",
    "empty": lambda content: "",
    "no text": lambda content: "\xff",
    "deep": lambda content: "[" * 5000,
    "no map": lambda content: json.dumps({"metadata": {}}),
    "no metadata": lambda content: json.dumps({"weight_map": content["weight_map"]}),
    "an empty map": lambda content: json.dumps({**content, "weight_map": {}}),
    **{
        f"names like {name!r:.20}": lambda content, name=name: json.dumps(
            {**content, "weight_map": dict.fromkeys(content["weight_map"], name)}
        )
        for name in (1, [1], None, "", "..", "a\0b", "a" * 5000)
    },
}


@pytest.mark.parametrize("face", [DualCodebookVQModel, DualCodebookModel])
@pytest.mark.parametrize("kind", [kind for kind in SAVES if "shards" in kind])
@pytest.mark.parametrize("damage", DAMAGED_INDICES)
def test_a_damaged_index_is_named(tiny_model, tmp_path, kind, face, damage):
    SAVES[kind](tiny_model, tmp_path)
    (index,) = tmp_path.glob("*.index.json")
    index.write_text(DAMAGED_INDICES[damage](json.loads(index.read_text())), encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(str(index))) as refused:
        face.from_pretrained(tmp_path)
    assert len(str(refused.value)) < 1000


def test_a_damaged_index_is_named_whatever_lies_beside_it(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text("{}")  # diffusers takes it before the whole file
    with pytest.raises(ValueError, match=rf"{WEIGHTS}\.index\.json' must hold an object `metadata`"):
        DualCodebookVQModel.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    tiny_model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="10KB")
    (tmp_path / "diffusion_pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bin\.index\.json' must hold an object `metadata`"):
        DualCodebookVQModel.from_pretrained(tmp_path, use_safetensors=False)


def test_other_errors_stay_what_they_are_and_nothing_is_downloaded_for_them(tiny_model, tmp_path, monkeypatch):
    as_transformers(tiny_model).save_pretrained(tmp_path / "model")
    state = as_transformers(tiny_model).state_dict()
    del state["quant_conv.bias"]
    (tmp_path / "config.json").write_text("[]")  # of something else, in the folder of the process
    monkeypatch.chdir(tmp_path)
    config = DualCodebookModel.config_class.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"1 tensors missing \(quant_conv\.bias\)"):
        DualCodebookModel.from_pretrained(None, config=config, state_dict=state)
    with pytest.raises(OSError, match="is not the path to a directory containing"):
        DualCodebookVQModel.from_pretrained(str(tmp_path / "no" / "such" / "folder"))

    repository, commit = tmp_path / "models--nobody--tok", "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "model").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "config.json").write_text("[]")
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *a, **options: asked.append(options))
    with (
        pytest.raises(ValueError, match=r"config\.json' must hold a JSON object"),
        readable("nobody/tok", options := {}),
    ):
        options |= {"cache_dir": str(tmp_path), "force_download": True}
        raise AttributeError("'list' object has no attribute 'items'")
    assert asked and all(each["local_files_only"] and not each.get("force_download") for each in asked)


# --- the generator's transformer


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    grid = {"codebook_sizes": (4, 8), "num_classes": 3, "sample_size": (2, 2)}
    return DualCodebookTransformer(**grid, hidden_size=8, num_layers=1, num_attention_heads=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: {name: value for name, value in state.items() if name != "norm.bias"}, "1 tensors missing"),
        (lambda state: {**state, "more": torch.zeros(1)}, r"1 tensors unknown \(more\)"),
        (lambda state: {**state, "norm.bias": torch.zeros(9)}, r"norm\.bias \(9,\) instead of \(8,\)"),
        (lambda state: {**state, "norm.bias": torch.full((8,), torch.nan)}, r"NaN or infinity \(norm\.bias\)"),
    ],
)
def test_weights_of_a_transformer_fit_whole_or_are_refused(transformer, tmp_path, damage, message):
    transformer.save_pretrained(tmp_path)
    assert equal(DualCodebookTransformer.from_pretrained(tmp_path), transformer)
    save_file(damage(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / WEIGHTS))}.*{message}"):
        DualCodebookTransformer.from_pretrained(tmp_path)


def test_a_transformer_of_damaged_files_or_of_none_is_explained(transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="there are no weights"):
        DualCodebookTransformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json' must hold a JSON object"):
        DualCodebookTransformer.from_pretrained(tmp_path)


# --- names


def test_a_hub_id_that_cannot_be_reached_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"`--model`: 'nobody/tok' is not in the cache, and offline: run `hf download nobody/tok`.*HF_HUB_OFFLINE"
    with pytest.raises(ValueError, match=message):
        load_tokenizer("nobody/tok", argument="--model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(ValueError, match=r"`model`: there is no home folder .* set HF_HOME"):
        load_tokenizer("nobody/tok")


@pytest.mark.parametrize("name", ["~no-such-user-here/model", "a" * 5000, "a" * 300 + "/b", "a\0b"])
def test_a_name_that_no_path_can_have_is_a_value_error(name):
    with pytest.raises(ValueError, match=r"`model` must be a folder or a Hub id|cannot load"):
        load_tokenizer(name)


@pytest.mark.parametrize("content", ["-1", "[]", '"text"', "null"])
@pytest.mark.parametrize("face", [DualCodebookVQModel, DualCodebookModel])
def test_a_config_that_is_no_object_is_refused(folder, face, content):
    (folder / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        face.from_pretrained(folder)


@pytest.mark.parametrize("face", [DualCodebookVQModel, DualCodebookModel])
def test_weights_that_float16_cannot_hold_are_refused(face, tmp_path):
    model = face(face.config_class(**TINY)) if face is DualCodebookModel else face(**TINY)
    with torch.no_grad():
        model.encoder.conv_in.weight[0, 0, 0, 0] = 7e4
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`dtype`.*float16.*65504.*encoder\.conv_in\.weight"):
        face.from_pretrained(tmp_path, dtype=torch.float16)
    loaded = face.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.encoder.conv_in.weight.isfinite().all()
    with pytest.raises(ValueError, match=r"`dtype`.*encoder\.conv_in\.weight"):
        model.cast_backbone(torch.float16)


def test_weights_that_are_offloaded_are_not_looked_at(tiny_model):
    """Those on the meta device hold no values; the others are still checked."""
    tiny_model.cast_backbone(torch.float16)
    tiny_model.decoder.to("meta")
    check_range(tiny_model)
    with torch.no_grad():
        tiny_model.encoder.conv_in.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"1 tensors are infinite \(encoder\.conv_in\.weight\)"):
        check_range(tiny_model)
