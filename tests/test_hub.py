"""Publishing, against a Hub on 127.0.0.1: what arrives loads everywhere, and what goes wrong is said."""

import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from hub_rule import shown_libraries, transformers_snippets
from loopback_hub import LoopbackHub
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file, save_file

from dualcodebook_hf import DualCodebookImageProcessor
from dualcodebook_hf.cli import main
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.evaluator import evaluate
from dualcodebook_hf.files import write_json
from dualcodebook_hf.hub import check_access, export, push_model, push_pipeline, push_space, space
from dualcodebook_hf.hub.export import code_files, export_pipeline, prepare_folder

ROOT = Path(__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
# A process in which this package is not installed.
WITHOUT_PACKAGE = """
import importlib.util, sys
from pathlib import Path
sys.path[:] = [path for path in sys.path if not Path(path, "dualcodebook_hf").is_dir()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert importlib.util.find_spec("dualcodebook_hf") is None
"""


@pytest.fixture(autouse=True)
def small_sheet(monkeypatch):
    """The card's sheet of reconstructions, which almost every test makes, of small squares."""
    monkeypatch.setattr(export, "SHEET_SIZE", 32)


@pytest.fixture
def hub(monkeypatch):
    with LoopbackHub() as server:
        server.connect(monkeypatch)
        yield server


@pytest.fixture
def run(tmp_path, tiny_model):
    """A finished run as training leaves it, in a folder whose name must not be published."""
    folder = tmp_path / "somebodys-secret" / "shoes"
    tiny_model.save_pretrained(folder / "final")
    (folder / "samples").mkdir()
    for step in (500, 1000):
        Image.new("RGB", (8, 8), (0, 0, step // 4)).save(folder / "samples" / f"step-{step:07d}.png")
    train = json.loads((space.PACKAGE / "checkpoints" / "tiny" / "train_config.json").read_text())
    train["data"]["dataset"] = str(tmp_path / "somebodys-secret" / "pictures")
    train["training"]["output_dir"] = str(folder)
    (folder / "final" / "train_config.json").write_text(json.dumps(train))
    return folder


def call(hub, code, *arguments, cache, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = hub.environment(cache, OMP_NUM_THREADS="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, **options)
    assert result.returncode == 0, result.stderr


# --- what is published


def test_a_run_is_published_by_one_commit_without_a_path_of_this_machine(hub, run):
    assert push_model(run, "me/tok", private=True) == f"{hub.url}/me/tok"
    files = hub.files("me/tok")
    code = {path.name for path in code_files()}
    json_files = {"config.json", "preprocessor_config.json", "train_config.json"}
    pictures = {"reconstructions.png", "samples.png"}
    assert set(files) == {".gitattributes", "README.md", WEIGHTS} | pictures | json_files | code
    assert len(hub.repos["model", "me/tok"]["commits"]) == hub.named("commit") == 1
    assert hub.repos["model", "me/tok"]["private"]
    assert files[WEIGHTS] == (run / "final" / WEIGHTS).read_bytes()
    assert files["samples.png"] == (run / "samples" / "step-0001000.png").read_bytes()
    assert b'DualCodebookVQModel.from_pretrained("me/tok")' in files["README.md"]
    assert b"(samples.png)" in files["README.md"]
    assert not [name for name, data in files.items() if b"somebodys-secret" in data]


def test_the_code_files_import_nothing_of_the_package_but_each_other():
    names = {path.stem for path in code_files()}
    assert {"modeling_dualcodebook", "core", "codebooks", "image_processing_dualcodebook"} <= names
    for path in code_files():
        relative = re.findall(r"^\s*from (\.[\w.]*) import", path.read_text(), re.M)
        assert {name[1:] for name in relative} <= names, path
        assert "dualcodebook_hf" not in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)


CARD = """
import re
from huggingface_hub import hf_hub_download
ways = re.findall(r"```python\\n(.*?)```", open(hf_hub_download("me/tok", "README.md")).read(), re.S)
"""
READ_WITHOUT = (
    WITHOUT_PACKAGE
    + CARD
    + """
exec(ways[2])
import json, torch
from PIL import Image
pixels = processor(Image.open("photo.jpg"), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    out = model(pixels)
torch.save([pixels, out.image_tokens, out.decoded_pixel_values], sys.argv[1])
"""
)
READ_WITH = (
    CARD
    + """
import sys, torch
exec(ways[0])
of_diffusers = type(model)
with torch.no_grad():
    exec(ways[1])
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("lab/ldm", trust_remote_code=True)
assert type(pipeline.vqvae) is of_diffusers is DualCodebookVQModel
pipeline.set_progress_bar_config(disable=True)
options = {"generator": torch.manual_seed(0), "num_inference_steps": 2, "output_type": "np"}
torch.save([pixels, tokens, out.image_tokens, torch.from_numpy(pipeline(**options).images)], sys.argv[1])
"""
)


@pytest.fixture
def photo(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    Image.effect_mandelbrot((21, 14), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(folder / "photo.jpg")
    return folder / "photo.jpg"


# What the Hub shows for the folder, and what diffusers offers for it, each in turn.
READ_AS_SHOWN = """
image, results = Image.open("photo.jpg"), []
for snippets in json.loads(sys.argv[3]):
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    if "processor" in names:
        pixels = names["processor"](image, return_tensors="pt")["pixel_values"]
    results.append(names["model"].tokenize(pixels))
    results.append(torch.tensor(names["pipe"](image)))
from diffusers import AutoModel
model = AutoModel.from_pretrained(sys.argv[4], trust_remote_code=True)
latents = model.encode(pixels).latents
torch.save([pixels, *results, model.tokenize(pixels), model.decode(latents).sample.detach()], sys.argv[2])
assert "dualcodebook_hf" not in sys.modules
"""


def test_a_process_without_the_package_loads_it_by_the_card_by_what_the_hub_shows_and_by_diffusers_automodel(
    hub, run, tmp_path, tiny_model, photo
):
    folder = tmp_path / "published"
    prepare_folder(run, folder, "me/shown")
    assert shown_libraries(folder) == ["transformers"]  # diffusers' DiffusionPipeline would fail
    processors = ("AutoImageProcessor", "AutoProcessor", None)
    snippets = [transformers_snippets(folder, str(folder), processor) for processor in processors]
    assert all(len(shown) == 2 and "trust_remote_code=True" in "".join(shown) for shown in snippets)
    processor = DualCodebookImageProcessor(do_center_crop=True, crop_size={"height": 12, "width": 16})
    processor.save_pretrained(run / "final")
    push_model(run, "me/tok")
    arguments = (tmp_path / "card.pt", tmp_path / "shown.pt", json.dumps(snippets), folder)
    call(hub, READ_WITHOUT + READ_AS_SHOWN, *arguments, cache=tmp_path / "cache", cwd=photo.parent)

    pixels, tokens, decoded = torch.load(tmp_path / "card.pt")
    assert torch.equal(pixels, processor(Image.open(photo), return_tensors="pt")["pixel_values"])
    assert pixels.shape[-2:] == (12, 16)
    with torch.no_grad():
        out = tiny_model(pixels)
    assert torch.equal(tokens, out.tokens) and torch.equal(decoded, out.sample)

    pixels, *tokens, sample = torch.load(tmp_path / "shown.pt")
    assert len(tokens) == 2 * len(processors) + 1
    assert all(torch.equal(found, tiny_model.tokenize(pixels)) for found in tokens)
    with torch.no_grad():
        assert torch.equal(sample, tiny_model.decode(tiny_model.encode(pixels).latents).sample)


def test_the_cards_sheet_shows_images_that_may_be_published(run, tmp_path, tiny_model, photo):
    names = prepare_folder(run, tmp_path / "own", images=[photo, photo])
    assert "reconstructions.png" in names
    sheet = Image.open(tmp_path / "own" / "reconstructions.png")
    size = export.SHEET_SIZE
    assert sheet.size == (2 * size + 2, 2 * size + 2)
    assert sheet.crop((0, 0, size, size)).tobytes() == sheet.crop((size + 2, 0, 2 * size + 2, size)).tobytes()
    card = (tmp_path / "own" / "README.md").read_text()
    assert "(reconstructions.png)" in card and str(tmp_path) not in card and "scikit-image" not in card
    assert "reconstructions.png" not in prepare_folder(run, tmp_path / "none", images=[])
    prepare_folder(run, tmp_path / "default")
    assert "scikit-image" in (tmp_path / "default" / "README.md").read_text()
    absent = tmp_path / "absent.png"
    for wrong, message in (([absent], "absent.png"), ([photo] * 9, "`images` must be at most 8, got 9")):
        with pytest.raises(ValueError, match=message):
            prepare_folder(run, tmp_path / "wrong", images=wrong)
    assert not (tmp_path / "wrong").exists()


@pytest.fixture
def pipeline(tiny_model):
    """LDMPipeline, unmodified, over a tiny random UNet."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 12, 12, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    made = LDMPipeline(vqvae=tiny_model, unet=unet.eval(), scheduler=DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def test_both_faces_and_a_pipeline_load_as_the_cards_say(hub, run, tmp_path, tiny_model, photo, pipeline):
    push_model(run, "me/tok")
    assert push_pipeline(pipeline, "lab/ldm") == f"{hub.url}/lab/ldm"
    assert push_pipeline(pipeline, "lab/ldm") == f"{hub.url}/lab/ldm"  # an update
    code = '"lab/ldm", trust_remote_code=True'
    assert code in READ_WITH and code in hub.files("lab/ldm")["README.md"].decode()
    call(hub, READ_WITH, tmp_path / "out.pt", cache=tmp_path / "cache", cwd=photo.parent)
    pixels, ours, transformers, images = torch.load(tmp_path / "out.pt")
    assert torch.equal(ours, tiny_model.tokenize(pixels)) and torch.equal(transformers, ours)
    assert Image.open(photo.parent / "restored.png").size == (21, 14)
    expected = pipeline(generator=torch.manual_seed(0), num_inference_steps=2, output_type="np").images
    assert torch.equal(images, torch.from_numpy(expected))


def test_a_pipeline_without_our_component_is_refused(pipeline, tmp_path):
    pipeline.register_modules(vqvae=pipeline.unet)
    with pytest.raises(ValueError, match=r"`pipeline` must hold a component of dualcodebook_hf, got vqvae, unet"):
        export_pipeline(pipeline, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_update_replaces_the_records_and_keeps_what_somebody_added(hub, run, tiny_model):
    push_model(run, "me/tok")
    hub.files("me/tok")["notes.txt"] = b"mine"
    shutil.rmtree(run / "samples")
    (run / "final" / "train_config.json").unlink()
    with torch.no_grad():
        tiny_model.quant_conv.bias.add_(1)
    tiny_model.save_pretrained(run / "final")
    push_model(run, "me/tok")
    files = hub.files("me/tok")
    assert files["notes.txt"] == b"mine"
    assert files[WEIGHTS] == (run / "final" / WEIGHTS).read_bytes()
    assert "samples.png" not in files and "train_config.json" not in files
    assert len(hub.repos["model", "me/tok"]["commits"]) == 2


def test_a_checkpoint_is_published_with_its_own_samples(run, tmp_path):
    shutil.move(run / "final", run / "checkpoint-500" / "model")
    names = prepare_folder(run / "checkpoint-500", tmp_path / "new" / "out", samples=True)
    assert names == sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    published = (tmp_path / "new" / "out" / "samples.png").read_bytes()
    assert published == (run / "samples" / "step-0000500.png").read_bytes()
    assert "samples.png" not in prepare_folder(run / "checkpoint-500", tmp_path / "other", samples=False)
    with pytest.raises(
        ValueError, match=r"no config.json in '.*', nor .*; name one of its checkpoints: checkpoint-500"
    ):
        prepare_folder(run, tmp_path / "third")


# --- what goes wrong


def test_weights_that_do_not_fit_are_refused_before_anything_is_written_or_asked(hub, run, tmp_path):
    weights = load_file(run / "final" / WEIGHTS)
    weights.pop("quant_conv.bias")
    save_file(weights, run / "final" / WEIGHTS)
    with pytest.raises(ValueError, match=r"quant_conv\.bias"):
        push_model(run, "me/tok")
    (run / "final" / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot load"):
        prepare_folder(run, tmp_path / "out")
    assert not hub.requests and not (tmp_path / "out").exists()


def test_measurements_of_other_weights_are_refused(run, tmp_path, tiny_model):
    """A model trained on, beside the metrics of what it was: its shape is the same."""
    (tmp_path / "images").mkdir()
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "images" / "a.png")
    data = EvaluationData(dataset=str(tmp_path / "images"), split="train", size=16).open()
    write_json(run / "final" / "metrics.json", {"results": [evaluate(tiny_model, data, name="me/tok")]})
    prepare_folder(run, tmp_path / "fits", images=[])
    with torch.no_grad():
        tiny_model.quant_conv.bias.add_(1)
    tiny_model.save_pretrained(run / "final")
    with pytest.raises(ValueError, match=r"`metrics` are of other weights, SHA-256 \w{64}; this model's are \w{64}"):
        prepare_folder(run, tmp_path / "out", images=[])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "samples/step-0001000.png",
        "samples",
        "final/train_config.json",
        "final/preprocessor_config.json",
        f"final/{WEIGHTS}",
    ],
)
def test_links_out_of_the_run_are_not_followed(hub, run, tmp_path, name):
    place, outside = run / name, tmp_path / "outside"
    DualCodebookImageProcessor().save_pretrained(run / "final")
    shutil.move(place, outside)
    place.symlink_to(outside)
    with pytest.raises(ValueError, match=f"leads out of .* to '{outside}"):
        push_model(run, "me/tok")
    with pytest.raises(ValueError, match=f"leads out of .* to '{outside}"):
        prepare_folder(run, tmp_path / "out")
    assert "me/tok" not in {repo for _, repo in hub.repos} and not (tmp_path / "out").exists()


def test_links_within_the_run_are_followed(run, tmp_path):
    sample = run / "samples" / "step-0001000.png"
    sample.unlink()
    sample.symlink_to(run / "samples" / "step-0000500.png")
    assert "samples.png" in prepare_folder(run, tmp_path / "out")


@pytest.mark.parametrize("repo_id", ["tok", "a/b/c", "me/", "me/..", "me/with space", "datasets/me/tok"])
def test_a_bad_id_is_refused_before_anything_is_asked(hub, run, repo_id):
    with pytest.raises(ValueError, match="`repo_id` must be owner/name"):
        push_model(run, repo_id)
    with pytest.raises(ValueError, match="`repo_id` must be owner/name"):
        push_space(repo_id)
    assert not hub.requests


def test_without_a_token_nothing_is_asked(hub, run, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="there is no token for the Hub: run `hf auth login`, or set HF_TOKEN"):
        push_model(run, "me/tok")
    assert not hub.requests
    push_model(run, "me/tok", token="hf_loopback")
    with pytest.raises(ValueError, match=r"does not know the token \(401\)"):
        push_model(run, "me/tok", token="hf_wrong")
    assert hub.named("commit") == 1


def test_the_rights_of_the_token_are_asked_before_training(hub):
    check_access("me/tok")
    check_access("Lab/tok")
    with pytest.raises(ValueError, match="the token is of me, lab, and cannot write to stranger"):
        check_access("stranger/tok")
    with pytest.raises(ValueError, match=r"\(401\)"):
        check_access("me/tok", token="hf_wrong")
    hub.user = {**hub.user, "auth": {"accessToken": {"role": "read"}}}
    with pytest.raises(ValueError, match="may only read"):
        check_access("me/tok")
    hub.fail = {"whoami": 404}
    check_access("me/tok")
    hub.fail = {"whoami": 500}
    with pytest.raises(OSError, match="answered 500"):
        check_access("me/tok")
    assert hub.requests and {name for name, _ in hub.requests} == {"whoami"}


def test_no_right_in_the_namespace(hub, run):
    with pytest.raises(ValueError, match=r"no right to write to 'stranger/tok' \(403\): You don't have the rights"):
        push_model(run, "stranger/tok")
    assert not hub.repos and not hub.named("preupload", "commit")


def test_no_right_to_write_to_a_repository_that_exists(hub, run):
    hub.add("stranger/tok")
    hub.fail = {"preupload": 403}
    with pytest.raises(ValueError, match=r"\(403\).*Nothing was published; \S+/stranger/tok is as it was"):
        push_model(run, "stranger/tok")
    assert set(hub.files("stranger/tok")) == {".gitattributes"}


@pytest.mark.parametrize("files", [{"config.json": b'{"model_type": "bert"}'}, {"README.md": b"by hand"}])
def test_somebodys_other_work_is_not_mixed_with(hub, run, files):
    hub.add("me/tok", files)
    with pytest.raises(ValueError, match=r"exists and holds something else .*`overwrite`"):
        push_model(run, "me/tok")
    assert set(hub.files("me/tok")) == {".gitattributes", *files} and not hub.named("preupload", "commit")
    hub.add("me/demo", {"app.py": b""}, kind="space")
    with pytest.raises(ValueError, match=r"spaces/me/demo exists and holds something else \(app.py\)"):
        push_space("me/demo")
    push_model(run, "me/tok", overwrite=True)
    assert b"dualcodebook" in hub.files("me/tok")["config.json"]


def test_private_is_not_published_into_a_public_repository(hub, run):
    push_model(run, "me/tok")
    with pytest.raises(ValueError, match=r"`private`: .* is public"):
        push_model(run, "me/tok", private=True)
    assert hub.named("commit") == 1


def test_a_repository_that_appears_meanwhile(hub, run):
    hub.fail = {"create": 409}
    with pytest.raises(ValueError, match="is taken by a repository that this token may not see"):
        push_model(run, "me/tok")
    assert not hub.named("preupload", "commit")


@pytest.mark.parametrize("existed", [False, True])
def test_a_connection_cut_in_mid_upload_says_what_is_there(hub, run, existed):
    if existed:
        push_model(run, "me/tok")
    before = dict(hub.repos).get(("model", "me/tok"), {"files": {".gitattributes": b""}})["files"]
    hub.cut = "commit"
    left = r"\S+/me/tok is as it was" if existed else r"an empty repository was left behind at http\S+/me/tok"
    with pytest.raises(OSError, match=rf"the connection to \S+ failed.*Nothing was published; {left}"):
        push_model(run, "me/tok")
    assert hub.files("me/tok") == before
    hub.cut = None
    push_model(run, "me/tok")
    assert WEIGHTS in hub.files("me/tok")


def test_a_connection_cut_while_a_large_file_is_uploaded(hub, run, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits 23 s in all between its attempts
    hub.large, hub.cut = (".safetensors",), "lfs"
    with pytest.raises(OSError, match="Nothing was published; an empty repository was left behind"):
        push_model(run, "me/tok")
    hub.cut = None
    push_model(run, "me/tok")
    assert hub.files("me/tok")[WEIGHTS] == (run / "final" / WEIGHTS).read_bytes()


def test_an_answer_that_is_lost_after_the_commit(hub, run):
    hub.cut = "reply"
    with pytest.raises(OSError, match=r"has a new commit all the same: look at \S+/me/tok, everything is in it"):
        push_model(run, "me/tok")
    assert WEIGHTS in hub.files("me/tok")


def test_a_hub_that_goes_away_in_mid_upload(hub, run):
    class Gone(dict):
        def get(self, name):
            return 503 if name == "info" and hub.named("commit") else None

    hub.cut, hub.fail = "commit", Gone()
    with pytest.raises(
        OSError, match=r"Whether the commit arrived is not known.* was created just now, and may be empty"
    ):
        push_model(run, "me/tok")


def test_no_hub_at_all_and_offline(hub, run, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"the connection to http://127\.0\.0\.1:9 failed"):
        push_model(run, "me/tok")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        push_model(run, "me/tok")


# --- the Space


def test_the_spaces_files_in_the_repository_are_those_that_are_published():
    texts = {"app.py": space.app_source(), "README.md": space.readme(), "requirements.txt": space.requirements()}
    for name, text in texts.items():
        assert (ROOT / "spaces" / name).read_text(encoding="utf-8") == text, name


def test_the_space_needs_what_pyproject_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, extra = project["dependencies"], project["optional-dependencies"][space.EXTRA]
    gradio = [text for text in extra if text.startswith("gradio")]
    wanted = [Requirement(text) for text in base + extra if text not in gradio]
    assert list(map(Requirement, (ROOT / "spaces" / "requirements.txt").read_text().splitlines())) == wanted
    assert len(gradio) == 1 and Requirement(gradio[0]).specifier.contains(space.SDK_VERSION)


def test_the_space_is_published_with_the_whole_package(hub):
    assert push_space("me/demo", models=["me/a", "lab/b"]) == f"{hub.url}/spaces/me/demo"
    hub.files("me/demo", "space")["dualcodebook_hf/gone.py"] = b""
    hub.files("me/demo", "space")["example.png"] = b"mine"
    push_space("me/demo", models=["me/a", "lab/b"])
    files = hub.files("me/demo", "space")
    package = {
        f"dualcodebook_hf/{path.relative_to(space.PACKAGE).as_posix()}": path.read_bytes()
        for path in space.PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert package.items() <= files.items()
    assert {f"dualcodebook_hf/checkpoints/{name}/{WEIGHTS}" for name in ("tiny", "faithful")} <= files.keys()
    assert set(files) - set(package) == {".gitattributes", "app.py", "README.md", "requirements.txt", "example.png"}
    assert b'"DUALCODEBOOK_MODELS", "me/a lab/b"' in files["app.py"]
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", ["me/a", "lab/b"])


@pytest.fixture
def built(tmp_path):
    """What `make static-space` writes, as far as publishing looks at it."""
    folder = tmp_path / "static-space"
    contents = {"index.html": "<!doctype html>", "build.json": '{"dualcodebook_hf": "0"}', "ort/a.wasm": "binary"}
    contents |= {"onnx/tokenizer.json": "{}", "README.md": space.static_readme(), ".cache/x": "mine"}
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_page_that_runs_in_the_browser_is_published(hub, built, capsys):
    command = ["push", "--space", "me/browser", "--static", str(built)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"published: {hub.url}/spaces/me/browser\n"
    files = hub.files("me/browser", "space")
    published = {"index.html", "build.json", "README.md", "ort/a.wasm", "onnx/tokenizer.json"}
    assert set(files) == {".gitattributes", *published}
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("static", "index.html")
    assert front["custom_headers"]["cross-origin-opener-policy"] == "same-origin"
    files |= {"ort/old.wasm": b"", "mine.txt": b""}
    assert main(command) == 0
    assert set(hub.files("me/browser", "space")) == {".gitattributes", "mine.txt", *published}


def test_a_folder_that_is_no_page_is_refused_before_anything_is_asked(hub, built, capsys):
    (built / "onnx" / "tokenizer.json").unlink()
    assert main(["push", "--space", "me/browser", "--static", str(built)]) == 2
    assert "`--static` must be the folder that `make static-space` writes" in capsys.readouterr().err
    assert not hub.repos


RUN_SPACE = (
    WITHOUT_PACKAGE
    + """
sys.path.insert(0, sys.argv[1])
import app, gradio
assert Path(sys.modules["dualcodebook_hf"].__file__).parent.parent == Path(sys.argv[1])
assert isinstance(app.demo, gradio.Blocks)
"""
)


def test_the_space_runs_where_the_package_is_not_installed(hub, tmp_path):
    pytest.importorskip("gradio")
    space.write_space(tmp_path / "space")
    call(hub, RUN_SPACE, tmp_path / "space", cache=tmp_path / "cache", cwd=tmp_path / "space")


# --- the command line


def test_push_and_card_from_the_command_line(hub, run, tmp_path, capsys):
    assert main(["push", str(run), "--repo-id", "me/tok", "--no-samples", "--license", "mit"]) == 0
    assert capsys.readouterr().out.endswith(f"published: {hub.url}/me/tok\n")
    assert "samples.png" not in hub.files("me/tok") and b"license: mit" in hub.files("me/tok")["README.md"]
    card = tmp_path / "cards" / "card.md"
    for _ in range(2):  # a card of ours is replaced
        assert main(["card", str(run), "--repo-id", "me/tok", "--license", "mit", "--output", str(card)]) == 0
        published = hub.files("me/tok")["README.md"]
        assert b"reconstructions.png" in published  # the picture is what `card` cannot show
        assert card.read_bytes() == re.sub(rb"\n!\[[^\n]*\n\n\*[^\n]*\*\n", b"", published)
    card.write_text("by hand")
    capsys.readouterr()
    assert main(["card", str(run), "--output", str(card)]) == 2
    assert "exists and is not a card" in capsys.readouterr().err and card.read_text() == "by hand"
    assert main(["card"]) == 0
    assert capsys.readouterr().out == (ROOT / "model_card.md").read_text()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["push"], "`push` needs RUN and --repo-id, or --space; RUN and --repo-id missing"),
        (["push", "{run}"], "--repo-id missing"),
        (["push", "{run}", "--space", "me/demo"], "`--space` publishes the Space alone; it does not go with RUN"),
        (["push", "{run}", "--repo-id", "me/tok", "--model-id", "me/a"], "`--model-id` goes with `--space`"),
        (["push", "{run}", "--repo-id", "me/tok", "--static"], "`--static` goes with `--space`"),
        (["push", "--space", "me/demo", "--onnx"], "it does not go with --onnx"),
        (["push", "{run}/samples", "--repo-id", "me/tok"], "there is no config.json in"),
        (["push", "{run}/nothing", "--repo-id", "me/tok"], "`RUN` must be the folder of a run"),
        (
            ["push", "{run}", "--repo-id", "me/tok", "--metrics", "{run}/none.json"],
            "`--metrics` must be a file written by",
        ),
        (["push", "--space", "me/demo", "--model-id", "nothing"], "`models` must be owner/name, got 'nothing'"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(hub, run, capsys, arguments, expected):
    assert main([argument.format(run=run) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not hub.requests


def test_a_failing_network_ends_with_1(hub, run, capsys):
    hub.cut = "commit"
    assert main(["push", str(run), "--repo-id", "me/tok"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dualcodebook: error: the connection to") and "an empty repository was left behind" in error
