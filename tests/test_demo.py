"""The Space's functions and its endpoints: gradio_client gets what the Python interface gives, whatever the picture."""

from __future__ import annotations

import gc
import importlib
import ipaddress
import os
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from assertions import assert_alike
from demo_models import SINGLE, make_model
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.cli import main
from dualcodebook_hf.configuration_dualcodebook import config_hash
from dualcodebook_hf.image_processing_dualcodebook import read_image, to_image, to_pixels
from dualcodebook_hf.inference import optimize_for_inference
from dualcodebook_hf.metrics.images import psnr, ssim
from dualcodebook_hf.reconstruction import reconstruct_image
from dualcodebook_hf.tokens.file import TokenFile, TokenizedImage, load_tokens, save_tokens
from dualcodebook_hf.weights import encoder_hash

pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
from dualcodebook_hf.demo.inspection import (  # noqa: E402
    FADED,
    TABLE_HEADERS,
    cell_patches,
    read_image_tokens,
    same_code,
    save_image_tokens,
    usage,
)
from dualcodebook_hf.demo.mixing import (  # noqa: E402
    first_region,
    fitted_tokens,
    read_region,
    region_text,
    replace_tokens,
    swap,
)
from dualcodebook_hf.demo.reading import LARGEST_SHOWN, Upload, UploadReader, read_upload  # noqa: E402


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    make_model(0).save_pretrained(folder / "dual")
    make_model(1, **SINGLE).save_pretrained(folder / "single")
    return [folder / "dual", folder / "single"]


@pytest.fixture(scope="module")
def models(folders) -> list[DualCodebookVQModel]:
    return [DualCodebookVQModel.from_pretrained(folder).eval() for folder in folders]


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """(address, every address that any socket of this process, server included, was asked to connect to)."""
    from dualcodebook_hf.demo import build_demo, launch_options

    contacted, connect = [], socket.socket.connect

    def record(self, address):
        contacted.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setattr(socket.socket, "connect", record)
        demo = build_demo([str(folder) for folder in folders])
        _, url, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
        yield url, contacted
        demo.close(verbose=False)


@pytest.fixture
def client(server, tmp_path):
    return gradio_client.Client(server[0], verbose=False, download_files=tmp_path / "answers")


def send(client, path, endpoint, *arguments):
    return client.predict(gradio_client.handle_file(str(path)), *arguments, api_name=endpoint)


def model_labels(client) -> list[str]:
    """What the dropdown offers."""
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/tokenize"]["parameters"]
    return parameters[1]["type"]["enum"]


def save_odd_images(folder: Path) -> dict[str, Path]:
    picture, paths = draw(90, 61), {}
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    translucent = picture.convert("RGBA")
    translucent.putalpha(Image.linear_gradient("L").resize(picture.size))
    for name, image, options in [
        ("one.png", Image.new("RGB", (1, 1), (200, 30, 30)), {}),
        ("line.webp", draw(1, 300), {"lossless": True}),
        ("grey.tif", Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), {}),
        ("clear.png", translucent, {}),
        ("turned.jpg", picture, {"exif": turned}),
        ("moving.gif", picture, {"save_all": True, "append_images": [draw(90, 61, 1)], "duration": 90}),
        ("cmyk.jpg", picture.convert("CMYK"), {}),
        ("<b> ${x} {{y}} ü.png", picture, {}),
    ]:
        paths[name] = folder / name
        image.save(paths[name], **options)
    return paths


def test_reconstruct_answers_with_what_the_model_gives_for_any_kind_of_image(client, models, tmp_path):
    for path in save_odd_images(tmp_path).values():
        picture = to_pixels(read_image(path))[None]
        height, width = picture.shape[-2:]
        tokens = models[0].tokenize(picture)
        expected = models[0].detokenize(tokens, size=(height, width))

        image, table = send(client, path, "/reconstruct")
        assert_alike(Image.open(image), to_image(expected[0]))
        assert table["headers"] == TABLE_HEADERS
        rows = table["data"]
        assert [row[0].split(",")[0] for row in rows] == ["Tokens", "JPEG", "WebP", "The file itself"]
        bits = tokens[0, 0].numel() * np.log2(32 * 20)
        x, y = (expected + 1) / 2, (picture + 1) / 2
        quality = [round(psnr(x, y).item(), 2), round(ssim(x, y).item(), 4)]
        assert rows[0][1:] == [int(np.ceil(bits / 8)), round(bits / (width * height), 4), *quality]
        assert rows[3][1] == path.stat().st_size
        assert rows[3][3:] == [None, None]


def test_tokens_alone_give_the_image_back(client, models, tmp_path):
    draw(50, 31).save(tmp_path / "a.png")
    file = send(client, tmp_path / "a.png", "/tokenize")
    content = load_tokens(file)
    assert [(picture.name, picture.size) for picture in content.images] == [("a.png", (31, 50))]
    assert torch.equal(content.images[0].tokens, models[0].tokenize(to_pixels(draw(50, 31))[None])[0])
    assert content.config_hash == config_hash(models[0].config)
    restored = send(client, file, "/detokenize")
    again, _ = send(client, tmp_path / "a.png", "/reconstruct")
    assert_alike(Image.open(restored), Image.open(again))


def test_another_model_can_be_named_and_its_tokens_fit_no_other(client, models, tmp_path):
    draw(50, 31).save(tmp_path / "a.png")
    label = model_labels(client)[1]
    file = send(client, tmp_path / "a.png", "/tokenize", label)
    assert load_tokens(file).codebooks == {"codebook": 20}
    assert Image.open(send(client, file, "/detokenize", label)).size == (50, 31)
    with pytest.raises(Exception, match="`model` must be the model that made the tokens in"):
        send(client, file, "/detokenize")
    with pytest.raises(Exception, match="`model` must be one of"):
        send(client, tmp_path / "a.png", "/tokenize", "/etc")


def test_a_file_of_several_images_gives_the_one_asked_for(client, models, tmp_path):
    tokens = [models[0].tokenize(to_pixels(draw(20, 12, seed))[None])[0] for seed in range(2)]
    pictures = [TokenizedImage(f"{index}.png", (12, 20), ids) for index, ids in enumerate(tokens)]
    codebooks = {"global": 32, "local": 20}
    save_tokens(tmp_path / "two.safetensors", TokenFile(pictures, 4, codebooks, config_hash(models[0].config)))
    label = model_labels(client)[0]
    for number in (1, 2):
        image = Image.open(send(client, tmp_path / "two.safetensors", "/detokenize", label, number))
        assert_alike(image, to_image(models[0].detokenize(tokens[number - 1][None], size=(12, 20))[0]))
    with pytest.raises(Exception, match="`picture` must be a whole number from 1 to 2, got 3"):
        send(client, tmp_path / "two.safetensors", "/detokenize", label, 3)


def test_clients_at_once_each_get_their_own_answer(server, models, tmp_path):
    def ask(seed: int) -> Image.Image:
        draw(40 + seed, 30, seed).save(tmp_path / f"{seed}.png")
        client = gradio_client.Client(server[0], verbose=False, download_files=tmp_path / f"answers-{seed}")
        return Image.open(send(client, tmp_path / f"{seed}.png", "/reconstruct")[0])

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    for seed, answer in enumerate(answers):
        pixels = to_pixels(draw(40 + seed, 30, seed))[None]
        expected = models[0].detokenize(models[0].tokenize(pixels), size=(30, 40 + seed))
        assert_alike(answer, to_image(expected[0]))


def test_what_cannot_be_read_is_named_without_the_servers_folders(client, tmp_path):
    draw(300, 200).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "note.png").write_text("<img src=x onerror=alert(1)>")
    Image.new("1", (11_000, 10_000)).save(tmp_path / "vast.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (300_000, 2)).save(tmp_path / "long.png")
    for name, endpoint, text in [
        ("cut.png", "/reconstruct", "^cannot read image 'cut.png': "),
        ("note.png", "/tokenize", "^cannot read image 'note.png': not in an image format that is known here$"),
        ("vast.png", "/reconstruct", "^'vast.png' is too large for this app, which reads at most 52,000,000 pixels$"),
        ("bomb.png", "/reconstruct", "^'bomb.png' is too large for this app"),
        ("long.png", "/reconstruct", "^'long.png' of 300000 x 2 pixels is too long for this app"),
        ("note.png", "/detokenize", "^cannot read token file 'note.png': "),
    ]:
        with pytest.raises(gradio_client.exceptions.AppError, match=text):
            send(client, tmp_path / name, endpoint)


def test_files_too_large_for_an_upload_are_refused_by_the_server(server):
    import httpx

    for count, status in [(1, 200), (41, 413)]:
        answer = httpx.post(f"{server[0]}gradio_api/upload", files={"files": ("a.png", bytes(count * 2**20))})
        assert answer.status_code == status


def test_only_the_public_endpoints_can_be_called(client, tmp_path):
    endpoints = client.view_api(return_format="dict")
    assert set(endpoints["named_endpoints"]) == {"/reconstruct", "/tokenize", "/detokenize", "/generate"}
    assert not endpoints["unnamed_endpoints"]
    for index in range(len(client.config["dependencies"])):
        if client.config["dependencies"][index]["api_visibility"] == "private":
            with pytest.raises(ValueError, match="Invalid function index"):
                client.predict(None, fn_index=index)


def test_pictures_of_a_class_can_be_asked_for(client):
    picture, tokens, line = client.predict("shoes", 1.0, 2, 7, api_name="/generate")
    assert Image.open(picture).size == Image.open(tokens).size == (512, 512)  # four of them
    assert "shoes, seed 7: step 2 of 2" in line
    picture, _, line = client.predict("socks", 1.0, 2, 7, api_name="/generate")
    assert picture is None and "`class` must be one of any, dress, hat" in line


def test_nothing_leaves_the_machine(client, server, tmp_path):
    draw(20, 20).save(tmp_path / "a.png")
    send(client, tmp_path / "a.png", "/tokenize")
    hosts = {address[0] for address in server[1] if isinstance(address, tuple)}
    assert hosts and all(ipaddress.ip_address(host).is_loopback for host in hosts)


def test_without_gradio_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dualcodebook_hf.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs gradio: pip install 'gradio<7,>=6\.31' .*'\.\[space\]'"):
        importlib.import_module("dualcodebook_hf.demo")


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    from dualcodebook_hf.demo import build_demo

    with pytest.raises(ValueError, match=r"`models` must be a folder or a Hub id .*nowhere'"):
        build_demo([str(tmp_path / "nowhere")])


def test_models_of_one_name_keep_their_own_labels_and_show_no_folder(folders):
    from dualcodebook_hf.demo.models import load_models

    labels = list(load_models([str(folders[0]), str(folders[0])]))
    assert labels == ["dual", "dual (2)"]
    assert list(load_models(None)) == ["embedded checkpoint", "embedded checkpoint, faithful"]


def test_large_images_are_shrunk_and_the_page_says_so(tmp_path):
    Image.new("RGB", (2000, 1500)).save(tmp_path / "a.png")
    upload = read_upload(tmp_path / "a.png")
    assert upload.image.width * upload.image.height <= LARGEST_SHOWN
    assert upload.file_size == (2000, 1500)
    assert upload.notes == [f"shrunk from 2000 x 1500 to {upload.image.width} x {upload.image.height} pixels, "
                            "this app's limit"]  # fmt: skip
    paths = save_odd_images(tmp_path)
    assert read_upload(paths["moving.gif"]).notes == ["the first frame alone"]
    assert read_upload(paths["clear.png"]).notes == ["transparency laid over white"]
    assert read_upload(paths["turned.jpg"]).notes == []


def test_the_process_that_reads_leaves_nothing_behind():
    reader = UploadReader()
    process = reader._process.pid
    os.kill(process, 0)
    del reader
    gc.collect()
    with pytest.raises(ProcessLookupError):  # a defunct one would still be there
        os.kill(process, 0)


@pytest.fixture
def result(models):
    return reconstruct_image(models[0], draw(301, 283))


def test_places_of_a_code_stay_bright_and_all_others_fade(models, result):
    cell = (5, 7)
    before = np.asarray(result.image).astype(float)
    for codebook in range(2):
        after = np.asarray(same_code(models[0], result, codebook, cell)).astype(float)
        same = result.tokens[codebook] == result.tokens[codebook, 5, 7]
        assert 1 < same.sum() < same.numel()
        for row, column in np.ndindex(*same.shape):
            if abs(row - 5) <= 1 and abs(column - 7) <= 1:
                continue  # the frame
            part = np.s_[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            expected = before[part] if same[row, column] else 128 + (before[part] - 128) * FADED
            assert np.abs(after[part] - expected).max() <= 0.5


def test_a_cell_shows_the_image_there_and_its_codes_alone(models, result):
    patches = cell_patches(models[0], result, (5, 7))
    assert list(patches) == ["original", "reconstruction", "global", "local", "all"]
    assert patches["original"].tobytes() == result.original.crop((28, 20, 32, 24)).tobytes()
    assert patches["reconstruction"].tobytes() == result.image.crop((28, 20, 32, 24)).tobytes()
    constant = result.tokens[None, :, 5:6, 7:8].expand(1, 2, 3, 3)
    for name, only in [("global", "global"), ("local", "local"), ("all", None)]:
        middle = models[0].detokenize(constant, only=only)[0, :, 4:8, 4:8]
        assert patches[name].tobytes() == to_image(middle).tobytes()
    # The last row and column reach over the picture's edge.
    assert cell_patches(models[0], result, (70, 75))["original"].size == (1, 3)


def test_swaps_and_usage_come_from_the_tokens(models, result):
    model, size = models[0], (283, 301)
    itself = swap(model, result, fitted_tokens(model, result, result.original))
    assert [image.tobytes() for image in itself] == [result.image.tobytes()] * 2
    other = reconstruct_image(model, draw(301, 283, 9))
    mixed = torch.stack([result.tokens[0], other.tokens[1]]), torch.stack([other.tokens[0], result.tokens[1]])
    for image, tokens in zip(swap(model, result, other.tokens), mixed, strict=True):
        assert image.tobytes() == to_image(model.detokenize(tokens[None], size=size)[0]).tobytes()
    counts = usage(model, result.tokens)
    for index, (codebook, count) in enumerate({"global": 32, "local": 20}.items()):
        assert counts[codebook][0] == torch.bincount(result.tokens[index].flatten(), minlength=count).tolist()
        assert 1 < counts[codebook][1] <= count


def test_a_region_is_told_in_runs_and_nothing_outside_the_grid_is_taken():
    region = torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    assert region_text(region) == "0+2 3+1 5+1"
    for shape in ((1, 1), (3, 17), (2, 3)):
        for region in (torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool), first_region(*shape)):
            assert torch.equal(read_region(region_text(region), *shape), region)
    assert 0.2 < first_region(40, 60).float().mean() < 0.5
    assert first_region(1, 1).all() and first_region(1, 60).any()
    for text in ("5+2", "-1+2", "1", "a+b", "0+0", "0+999999999999", "²+1"):
        with pytest.raises(ValueError, match="`region` must be runs of squares within 2 x 3"):
            read_region(text, 2, 3)


def test_other_tokens_come_into_the_region_and_the_chosen_codebooks_alone(result):
    tokens, region = result.tokens, first_region(*result.tokens.shape[1:])
    others = (tokens + 1) % 20
    for chosen in ([0], [1], [0, 1], []):
        mixed = replace_tokens(tokens, others, region, chosen)
        for index in range(2):
            expected = torch.where(region, others[index], tokens[index]) if index in chosen else tokens[index]
            assert torch.equal(mixed[index], expected)
    one = tokens[:, 3:4, 5:6]
    assert torch.equal(replace_tokens(tokens, one, region, [0, 1])[:, region], one[:, 0].expand(-1, int(region.sum())))


def test_the_page_says_what_a_models_tokens_take_and_shows_its_card(folders):
    from dualcodebook_hf.demo.models import ServedModel, load_models

    (folders[0] / "README.md").write_text("---\ntags: [a]\n---\n# Card\n![a](https://x.test/a.png)\nText\n## Part\n")
    dual, single = load_models([str(folder) for folder in folders]).values()
    assert dual.rate() == (
        "4 x 4 pixels become one of 32 global codes and one of 20 local codes: "
        "0.5826 bits per pixel, 4,773 bytes for 256 x 256 pixels."
    )
    assert single.rate().startswith("4 x 4 pixels become one of 20 codes: 0.2701 bits per pixel")
    assert dual.card().split() == ["##", "Card", "Text", "###", "Part"]
    assert single.card() == ""
    assert (
        ServedModel("owner/name", dual.tokenizer, dual.weights, dual.hash, None).card()
        == "[owner/name](https://huggingface.co/owner/name)"
    )


def test_token_files_beyond_the_limit_are_refused_before_decoding(models, tmp_path):
    tokens = torch.zeros(2, 550, 500, dtype=torch.int64)
    content = TokenFile([TokenizedImage("a.png", (2200, 2000), tokens)], 4, {"global": 32, "local": 20},
                        config_hash(models[0].config))  # fmt: skip
    save_tokens(tmp_path / "a.safetensors", content)
    with pytest.raises(ValueError, match="have 4,400,000 pixels together"):
        read_image_tokens(models[0], encoder_hash(models[0]), tmp_path / "a.safetensors")


def test_token_files_name_the_weights_of_the_models_file_whatever_makes_it_fast(folders, models, tmp_path):
    from dualcodebook_hf.demo.models import load_models

    (served,) = load_models([str(folders[0])]).values()
    assert served.weights == encoder_hash(models[0])
    fast = optimize_for_inference(served.tokenizer, torch.bfloat16)
    upload = Upload("a.png", Image.new("RGB", (4, 4)), (4, 4), 1, [])
    path = save_image_tokens(fast, served.weights, upload, torch.zeros(2, 1, 1, dtype=torch.long), tmp_path)
    assert load_tokens(path).weights_sha256 == served.weights
    assert len(read_image_tokens(fast, served.weights, path)) == 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--models", "no/such/model"], "`--model.?` must be a folder or a Hub id .* got 'no/such/model'"),
        (["--model", "no/such/model"], "`--model.?` must be a folder or a Hub id .* got 'no/such/model'"),
        (["--port", "0"], "`--port` must be a whole number of at least 1, got '0'"),
        (["--port", "70000"], "`--host` 127.0.0.1 and `--port` 70000 cannot be used"),
        (["--host", "256.1.1.1"], "`--host` 256.1.1.1 and `--port` 7860 cannot be used"),
    ],
)
def test_the_command_refuses_bad_input(capsys, flags, text):
    assert main(["demo", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(text, error) and error.count("\n") == 1
