"""The model card says what the files beside the weights say, is up to date, and its examples run."""

import json
import re
import shutil
import tomllib
from importlib import resources
from pathlib import Path

import jinja2.meta
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.evaluation.table import results_table
from dualcodebook_hf.hub.card import PIPELINE_TEMPLATE, TEMPLATE, card_facts, model_card
from dualcodebook_hf.hub.records import Records, public_record
from dualcodebook_hf.metrics import IMAGE_METRICS

ROOT = Path(__file__).parents[1]
EMBEDDED = Path(default_checkpoint())


@pytest.fixture
def folder(tmp_path):
    """The embedded checkpoint's JSON files, to be changed."""
    for path in EMBEDDED.glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def change(path, section, **values):
    content = json.loads(path.read_text())
    content[section].update(values)
    path.write_text(json.dumps(content))


def test_the_templates_are_files_of_the_package():
    for name in (TEMPLATE, PIPELINE_TEMPLATE):
        assert resources.files("dualcodebook_hf.hub").joinpath(name).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["dualcodebook_hf"]
    package = Path(str(resources.files("dualcodebook_hf")))
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others <= shipped, "the wheel would lack files"


@pytest.mark.parametrize("repo_id", [None, "me/tok"])
def test_the_template_asks_for_facts_that_there_are_and_for_no_others(repo_id):
    template = resources.files("dualcodebook_hf.hub").joinpath(TEMPLATE).read_text()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    facts = card_facts(Records.read(EMBEDDED), repo_id)
    facts |= dict.fromkeys(("card_data", "license", "mark"), "") | {"figures": {}, "onnx": True}
    environment.from_string(template).render(facts)  # UndefinedError names what is missing
    asked = jinja2.meta.find_undeclared_variables(environment.parse(template))
    assert asked == facts.keys() - {"name"}


def test_the_card_in_the_repository_is_that_of_the_embedded_checkpoint():
    text = model_card(Records.read(EMBEDDED))
    for path in (ROOT / "model_card.md", EMBEDDED / "README.md"):
        assert path.read_text() == text, f"stale: dualcodebook card --output {path.relative_to(ROOT)}"


def test_the_front_matter_holds_every_measurement_of_the_model_and_none_of_its_baseline():
    data = ModelCard(model_card(Records.read(EMBEDDED), "me/tok")).data
    results = json.loads((EMBEDDED / "metrics.json").read_text())["results"]
    own = [result for result in results if result["model"]["class"] == "DualCodebookVQModel"]
    wanted = {
        (result["protocol"]["dataset"], result["protocol"]["split"], key): round(result["metrics"][key], spec.digits)
        for result in own
        for key, spec in IMAGE_METRICS.items()
        if key in result["metrics"]
    }
    published = {(item.dataset_type, item.dataset_split, item.metric_type): item for item in data.eval_results}
    assert {key: item.metric_value for key, item in published.items()} == wanted
    assert all("256 x 256" in item.metric_args["protocol"] for item in published.values())
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-feature-extraction",
    )
    assert data.model_name == "tok"


def test_table_and_facts_are_those_of_the_files():
    text = model_card(Records.read(EMBEDDED), "me/tok")
    results = json.loads((EMBEDDED / "metrics.json").read_text())["results"]
    names = ["tok" if "fitted_to" not in result["model"] else result["model"]["name"] for result in results]
    assert results_table(zip(names, results, strict=True)) in text
    model = DualCodebookVQModel.from_pretrained(EMBEDDED)
    bits, factor = model.quantize.bits_per_position, model.downsample_factor
    assert f"{bits:g} bits per position, {bits / factor**2:.4f} bits per pixel" in text
    assert f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M" in text
    assert 'a subset of A. Grigorev\'s "Clothing dataset", free for any purpose' in text


@pytest.mark.parametrize(
    "path", ["/home/someone/secret/clothing-256", "../data/clothing-256", "C:\\data\\clothing-256"]
)
def test_no_local_path_gets_into_the_card(folder, path):
    change(folder / "train_config.json", "data", dataset=path)
    change(folder / "train_config.json", "training", init_from=path.replace("clothing-256", "weights"), output_dir=path)
    text = model_card(Records.read(folder), "me/tok")
    assert "`clothing-256`" in text and "the weights of `weights`" in text
    assert path not in text and "someone" not in text
    assert "3,068" in text  # the data set is known by its name


def test_hub_ids_stay_and_paths_lose_their_folders():
    train = {
        "data": {"dataset": "lab/photos"},
        "training": {"output_dir": "/data/runs/a/", "vgg_weights": "timm/vgg16.tv"},
    }
    expected = {"data": {"dataset": "lab/photos"}, "training": {"output_dir": "a", "vgg_weights": "timm/vgg16.tv"}}
    assert public_record(train) == expected


def test_names_of_decoders_are_those_of_weights_alone():
    train = {"data": {"dataset": "sharp", "tokenizer": "faithful"}, "training": {"init_from": "/data/sharp"}}
    expected = {"dataset": "sharp", "tokenizer": "embedded checkpoint, faithful"}
    assert public_record(train) == {"data": expected, "training": {"init_from": "./sharp"}}
    assert public_record(public_record(train)) == public_record(train)
    elsewhere = {"training": {"init_from": r"C:\lib\dualcodebook_hf\checkpoints\faithful"}}
    assert public_record(elsewhere)["training"]["init_from"] == "embedded checkpoint, faithful"
    other = {"training": {"init_from": "/a/mydualcodebook_hf/checkpoints/faithful"}}
    assert public_record(other)["training"]["init_from"] == "./faithful"


def test_several_data_sets_are_all_named_without_their_folders(folder):
    paths = ["/home/someone/secret/birds", "lab/photos", "/data/clothing-256"]
    change(folder / "train_config.json", "data", dataset=paths, train_split=["train", "test", "train"])
    text = model_card(Records.read(folder), "me/tok")
    assert "split `train`, `test`, `train` of `birds`, `lab/photos`, `clothing-256` (3,068" in text
    assert "someone" not in text


def test_training_settings_are_told_as_they_are(folder):
    settings = {"perceptual": "lpips", "perceptual_weight": 1.25, "adversarial_weight": 0.8, "l1_weight": 1.0}
    settings |= {"adversarial_start": 10_000, "discriminator": "patch"}
    settings |= dict.fromkeys(("grid_weight", "seam_weight", "feature_matching_weight"), 0.0)
    change(
        folder / "train_config.json", "training", **settings, log_l2_weight=0.0, init_from=None, data_initialization=0
    )
    text = model_card(Records.read(folder))
    assert "**Loss:** 1 L1 + 1.25 LPIPS + 5 codebooks + 0.8 PatchGAN from update 10,000 on." in text
    assert "**Start:** random weights." in text and "Images unlike those of `clothing-256`" in text
    assert "for pixels alone" not in text
    others = {"grid_weight": 1000.0, "seam_weight": 100.0, "feature_matching_weight": 0.6, "adversarial_weight": 0.0}
    change(folder / "train_config.json", "training", **others, perceptual="none")
    text = model_card(Records.read(folder))
    assert "**Loss:** 1 L1 + 1000 grid + 100 seams + 0.6 feature matching + 5 codebooks." in text
    assert "for pixels alone" not in text
    assert "for pixels alone" in model_card(Records.read(default_checkpoint("faithful")))


@pytest.mark.parametrize(
    ("resize", "told"),
    [
        (0, "; random crops"),
        (288, "; resized to 288 (shorter), random crops"),
        ([0, 0], "; random crops"),
        ([0, 178], "; each at random as it is or resized to 178 (shorter); random crops"),
    ],
)
def test_the_resize_before_the_crop_is_told(folder, resize, told):
    change(folder / "train_config.json", "data", resize=resize)
    assert told in model_card(Records.read(folder))


def test_converted_weights_name_their_source_and_claim_no_licence(folder):
    record = {"kind": "taming", "source": "vqgan.ckpt", "files": {"vqgan.ckpt": "00"}}
    (folder / "conversion.json").write_text(json.dumps(record))
    text = model_card(Records.read(folder), "me/tok")
    assert "converted from `vqgan.ckpt` (taming)" in text
    assert ModelCard(text).data.license == "other"
    assert ModelCard(model_card(Records.read(folder), "me/tok", license="mit")).data.license == "mit"


@pytest.mark.parametrize(
    "source, license, told",
    [
        ("embedded", "apache-2.0", "embedded checkpoint"),
        ("sharp", "apache-2.0", "embedded checkpoint"),
        ("faithful", "apache-2.0", "embedded checkpoint, faithful"),
        ("licensed", "cc-by-nc-4.0", "mine"),
        ("own run", "apache-2.0", "mine"),
        ("converted", "other", "mine"),
        ("lab/other", "other", "lab/other"),
    ],
)
def test_weights_that_started_from_others_say_so_and_keep_their_licence(folder, tmp_path, source, license, told):
    origin = tmp_path / "origins" / "mine"
    origin.mkdir(parents=True)
    shutil.copyfile(EMBEDDED / "config.json", origin / "config.json")
    shutil.copyfile(EMBEDDED / "train_config.json", origin / "train_config.json")
    if source == "licensed":
        (origin / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# mine\n")
    if source == "converted":
        (origin / "conversion.json").write_text(json.dumps({"kind": "taming", "source": "a.ckpt", "files": {}}))
    names = {"embedded": str(EMBEDDED), **{name: name for name in ("lab/other", "sharp", "faithful")}}
    init_from = names.get(source, str(origin))
    start = {"init_from": init_from, "data_initialization": 0}
    change(folder / "train_config.json", "training", **start, train="decoder")
    text = model_card(Records.read(folder), "me/tok")
    data = ModelCard(text).data
    assert data.license == license
    assert f"the weights of `{told}`, of which only the decoder was trained" in text and str(tmp_path) not in text
    base = ("lab/other", "finetune") if "/" in source else (None, None)
    assert (data.base_model, data.get("base_model_relation")) == base
    change(folder / "train_config.json", "training", train="all")
    assert "only the decoder" not in model_card(Records.read(folder), "me/tok")


def test_data_sets_are_named_by_hub_ids_alone(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "photos").mkdir(parents=True)
    for dataset, listed in (("lab/photos", ["lab/photos"]), ("data/photos", None), ("/data/photos", None)):
        change(folder / "train_config.json", "data", dataset=dataset)
        text = model_card(Records.read(folder), "me/tok")
        assert ModelCard(text).data.datasets == listed
        assert f"split `train` of `{'lab/photos' if listed else 'photos'}`" in text


def test_weights_alone_have_a_card_that_claims_nothing(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    text = model_card(Records.read(tmp_path), "me/tok")
    assert "model-index" not in yaml.safe_load(text.split("---")[1])
    assert "No record of it lies beside the weights." in text
    assert "global codebook | 32 codes of 8, the outputs of a transformer of depth 1" in text


@pytest.mark.parametrize("training", [None, {"init_from": "lab/other"}, {"init_from": None, "data_initialization": 0}])
@pytest.mark.parametrize("record", ["train_config.json", "metrics.json", "conversion.json"])
def test_every_card_is_tidy_markdown(folder, record, training):
    """The template's conditions leave no gaps: one blank line between blocks, none at a line's end."""
    (folder / "conversion.json").write_text(json.dumps({"kind": "taming", "source": "a.ckpt", "files": {}}))
    if training is not None:
        change(folder / "train_config.json", "training", **training)
    (folder / record).unlink()
    text = model_card(Records.read(folder), "me/tok", figures={"samples.png": "Originals above reconstructions"})
    body = text.split("---\n", 2)[2]
    assert "\n\n\n" not in body and not re.search(r"[ \t]$", body, re.M) and body.endswith("-->\n")
    assert "None" not in body.replace("None lie beside the weights;", "")
    for heading in re.findall(r"^#.*$", re.sub(r"```.*?```", "", body, flags=re.S), re.M):
        assert f"\n\n{heading}\n\n" in f"\n{body}"
    assert "\n\n![Originals above reconstructions](samples.png)\n\n" in body


def test_a_single_codebook_is_called_one(tmp_path, tiny_config):
    single = {"quantizer": "single", "global_codebook_size": 0, "global_dim": 0}
    DualCodebookVQModel(**{**tiny_config, **single}).save_pretrained(tmp_path)
    text = model_card(Records.read(tmp_path), "me/tok")
    assert "with one codebook" in text and "Ids lie in [0, 16)." in text
    assert "global" not in text.split("## Limits")[0]


def test_measurements_of_another_model_are_refused(folder, tiny_model):
    tiny_model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"`metrics` are of another model: it has \d+ parameters"):
        Records.read(folder)


def test_measurements_of_two_models_are_refused(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["results"][0]["model"]["name"] = "other"
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(
        ValueError, match="`metrics` must hold the results of one model, got embedded checkpoint, other"
    ):
        Records.read(folder)


def test_further_measurements_and_named_protocols_are_published(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["results"] = metrics["results"][:2]
    for measured in metrics["results"]:
        for name in ("fd_effnetlite2", "pd_effnetlite2"):
            del measured["metrics"][name]
    result = metrics["results"][0]
    result["metrics"] |= {"rfid": 3.456, "lpips": 0.12345, "kd_effnetlite2": -0.24, "kd_effnetlite2_interval": [-1, 1]}
    result["protocol"]["name"] = "a-protocol"
    result["protocol"]["definitions"] |= {"rfid": "by these features", "lpips": "by that network"}
    result["protocol"]["definitions"] |= {"kd_effnetlite2": "not comparable with FID"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    text = model_card(Records.read(folder), "me/tok")
    measured = [item for item in ModelCard(text).data.eval_results if item.dataset_type == "clothing-256"]
    published = {item.metric_type: item for item in measured}
    assert (published["rfid"].metric_value, published["lpips"].metric_value) == (3.46, 0.1235)
    assert published["rfid"].metric_args["protocol"].startswith("dualcodebook_hf evaluate a-protocol: 256 x 256")
    assert published["kd_effnetlite2"].metric_value == -0.2
    assert "- rfid: by these features" in text and "- kd_effnetlite2: not comparable with FID" in text
    assert "Not measured: FD lite2, PD lite2." in text
    assert "Not measured: LPIPS, rFID." in model_card(Records.read(EMBEDDED))


@pytest.mark.parametrize("content", ["{", "[]", '{"results": 1}'])
def test_a_broken_record_is_named(folder, content):
    (folder / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match="metrics"):
        Records.read(folder)


def test_the_examples_with_the_package_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((40, 33)).convert("RGB").save("photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", model_card(Records.read(EMBEDDED)), re.S)
    assert len(blocks) == 3
    scope = {}
    for block in blocks[:2]:
        exec(compile(block, "model_card.md", "exec"), scope)
    assert Image.open("restored.png").size == (40, 33)
    assert scope["tokens"].shape == scope["out"].image_tokens.shape == (1, 2, 3, 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", {"results": [{}]}),
        ("metrics.json", {"results": [1]}),
        ("train_config.json", {"data": 3}),
        ("train_config.json", {"data": {}, "training": {}, "model": {}}),
    ],
    ids=str,
)
def test_incomplete_records_are_named(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`metrics`: every result|metrics\.json or conversion\.json is incomplete"):
        model_card(Records.read(folder))


def test_weights_that_started_from_others_are_not_called_apache_licensed(folder):
    change(folder / "train_config.json", "training", init_from="lab/converted")
    text = model_card(Records.read(folder), "me/tok")
    assert ModelCard(text).data.license == "other" and "`lab/converted`: its licence holds" in text
