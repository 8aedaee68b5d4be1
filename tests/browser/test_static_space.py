"""The page that tokenizes in the browser: Python's tokens, files both ways, painting, odd pictures, no outside."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from access import check_access
from PIL import Image
from playwright.sync_api import Page, expect

from dualcodebook_hf import DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.hub.space import static_readme
from dualcodebook_hf.image_processing_dualcodebook import read_image
from dualcodebook_hf.onnx_export import export_onnx
from dualcodebook_hf.onnx_runtime import OnnxTokenizer, from_image, to_image
from dualcodebook_hf.tokens.file import TokenFile, TokenizedImage, load_tokens, save_tokens

ROOT = Path(__file__).parents[2]
WAIT = 120_000  # milliseconds: WASM on a busy machine


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with the headers that the Space's README asks for."""

    def end_headers(self) -> None:
        for name, value in re.findall(r"^  (cross-origin-[a-z-]+): (\S+)$", static_readme(), re.M):
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """What `make static-space` writes; STATIC_SPACE names a folder that it has written already."""
    if os.environ.get("STATIC_SPACE"):
        return Path(os.environ["STATIC_SPACE"]).absolute()
    folder = tmp_path_factory.mktemp("static") / "space"
    command = [sys.executable, str(ROOT / "scripts" / "static_space.py"), "--output", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def tokenizer(built) -> OnnxTokenizer:
    return OnnxTokenizer.from_pretrained(built, variant="fp16")


@pytest.fixture(scope="session")
def model() -> DualCodebookVQModel:
    return DualCodebookVQModel.from_pretrained(default_checkpoint()).eval()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address under which its files are."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def site(built):
    with served(built) as address:
        yield address


@pytest.fixture
def visit(browser, site):
    """visit(width=..., color_scheme=...) -> a page that shows its first example. No error, no request elsewhere."""
    errors, contexts = [], []

    def open_page(width: int = 1280, color_scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=color_scheme)
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        context.on("request", lambda request: errors.append(request.url) if is_outside(request.url, site) else None)
        page.goto(site)
        expect(page.locator("#status")).to_have_text("Showing “astronaut.jpg”.", timeout=WAIT)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def is_outside(url: str, site: str) -> bool:
    return not url.startswith((site, "data:", "blob:"))


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def choose(page: Page, path: Path) -> None:
    page.locator("#picture-file").set_input_files(path)
    expect(page.locator("#status")).to_have_text(f"Showing “{path.name}”.", timeout=WAIT)


def saved(page: Page, button: str, folder: Path) -> Path:
    with page.expect_download() as info:
        page.locator(button).click()
    path = folder / info.value.suggested_filename
    info.value.save_as(path)
    return path


@pytest.mark.parametrize(("width", "height"), [(96, 64), (131, 77), (240, 160)])
def test_its_tokens_are_pythons_and_its_files_too(visit, tokenizer, model, tmp_path, width, height) -> None:
    picture = tmp_path / f"some {width}.png"
    draw(width, height, seed=width).save(picture)
    page = visit()
    choose(page, picture)
    content = load_tokens(saved(page, "#save-tokens", tmp_path))
    content.check_model(model, "file")
    (image,) = content.images
    assert (image.name, image.size) == (picture.name, (height, width))
    pixels = from_image(Image.open(picture))
    expected = tokenizer.tokenize(pixels)
    assert np.array_equal(image.tokens.numpy(), expected[0])
    # Against torch in float32 what is lost is float16's rounding.
    assert (image.tokens == model.tokenize(torch.from_numpy(pixels))[0]).float().mean() > 0.95
    decoded = Image.open(saved(page, "#save-picture", tmp_path)).convert("RGB")
    reference = to_image(tokenizer.detokenize(expected, size=(height, width)))
    assert np.abs(np.subtract(decoded, reference, dtype=np.int16)).max() <= 2


def test_a_token_file_of_python(visit, tokenizer, model, tmp_path) -> None:
    pictures = {name: draw(*size, seed=len(name)) for name, size in {"a.png": (100, 60), "bb.png": (33, 50)}.items()}
    tokens = {name: torch.from_numpy(tokenizer.tokenize(from_image(image)))[0] for name, image in pictures.items()}
    images = [TokenizedImage(name, image.size[::-1], tokens[name]) for name, image in pictures.items()]
    save_tokens(tmp_path / "two.safetensors", TokenFile.of_model(model, images))
    page = visit()
    page.locator("#token-file").set_input_files(tmp_path / "two.safetensors")
    expect(page.locator("#numbers")).to_contain_text("100 \u00d7 60", timeout=WAIT)
    expect(page.locator("#original")).to_be_hidden()
    page.locator("#choice").select_option(label="bb.png")
    expect(page.locator("#numbers")).to_contain_text("33 \u00d7 50", timeout=WAIT)
    expect(page.locator("#status")).to_have_text("Showing “bb.png”.", timeout=WAIT)
    decoded = Image.open(saved(page, "#save-picture", tmp_path)).convert("RGB")
    reference = to_image(tokenizer.detokenize(tokens["bb.png"][None].numpy(), size=(50, 33)))
    assert np.abs(np.subtract(decoded, reference, dtype=np.int16)).max() <= 2
    again = load_tokens(saved(page, "#save-tokens", tmp_path))
    assert again.images[0].tokens.equal(tokens["bb.png"])


def test_painting_replaces_a_regions_tokens_and_undo_brings_them_back(visit, tokenizer, tmp_path) -> None:
    draw(160, 96).save(tmp_path / "mine.png")
    draw(160, 96, seed=1).save(tmp_path / "other.png")
    mine, other = (tokenizer.tokenize(from_image(Image.open(tmp_path / name)))[0] for name in ("mine.png", "other.png"))
    page = visit()
    choose(page, tmp_path / "mine.png")
    page.locator("#brush-file").set_input_files(tmp_path / "other.png")
    expect(page.locator("#painting")).to_be_checked(timeout=WAIT)
    page.locator("#brush-codebook").select_option("local")
    box = page.locator("#map-0").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 4.5 / 10, box["y"] + box["height"] * 2.5 / 6)
    expect(page.locator("#numbers")).to_contain_text("(painted)", timeout=WAIT)
    painted = load_tokens(saved(page, "#save-tokens", tmp_path)).images[0].tokens.numpy()
    expected = mine.copy()
    expected[1, 1:4, 3:6] = other[1, 1:4, 3:6]
    assert np.array_equal(painted, expected) and not np.array_equal(painted, mine)
    page.locator("#undo").click()
    expect(page.locator("#numbers")).not_to_contain_text("(painted)", timeout=WAIT)
    assert np.array_equal(load_tokens(saved(page, "#save-tokens", tmp_path)).images[0].tokens.numpy(), mine)


def test_odd_pictures(visit, tokenizer, tmp_path) -> None:
    page = visit()
    turned = draw(64, 32)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (1, 1), 90).save(tmp_path / "one.png")
    draw(3000, 2000).save(tmp_path / "large.jpg")
    for name, size in (
        ("turned.png", "32 \u00d7 64"),
        ("one.png", "1 \u00d7 1"),
        ("large.jpg", "(of 3000 \u00d7 2000)"),
    ):
        choose(page, tmp_path / name)
        expect(page.locator("#numbers")).to_contain_text(size)
    choose(page, tmp_path / "clear.png")  # laid over white, as read_image does it
    tokens = load_tokens(saved(page, "#save-tokens", tmp_path)).images[0].tokens.numpy()
    assert np.array_equal(tokens, tokenizer.tokenize(from_image(read_image(tmp_path / "clear.png")))[0])


def test_what_cannot_be_used_is_told_and_what_was_shown_stays(visit, model, tmp_path) -> None:
    page = visit()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(200))
    (tmp_path / "text.safetensors").write_text("no tokens")
    giant = TokenizedImage("giant.png", (8192, 8192), torch.zeros(2, 512, 512, dtype=torch.int64))
    save_tokens(tmp_path / "giant.safetensors", TokenFile.of_model(model, [giant]))
    for name, text in (
        ("empty.png", "“empty.png” cannot be used: the file is empty."),
        ("broken.jpg", "“broken.jpg” cannot be used: it is damaged, or no image that this browser can read."),
        ("text.safetensors", "“text.safetensors” cannot be used: it is not a token file, or damaged."),
        ("giant.safetensors", "8192 \u00d7 8192 pixels, and this page decodes no more than four megapixels."),
    ):
        page.locator("#picture-file").set_input_files(tmp_path / name)
        expect(page.get_by_role("alert")).to_contain_text(text)
        expect(page.locator("#status")).to_have_text("Showing “astronaut.jpg”.")
        page.locator("#error-close").click()
        expect(page.get_by_role("alert")).to_be_hidden()


def test_keys_move_the_cell_and_the_slider(visit) -> None:
    page = visit()
    page.locator("#map-1").focus()
    expect(page.locator("#cell-text")).to_contain_text("Row 17 of 32, column 17 of 32: global")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#cell-text")).to_contain_text("Row 16 of 32, column 18 of 32: global")
    expect(page.locator("#patches figure")).to_have_count(4)
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    assert page.locator("#decoded").evaluate("canvas => canvas.style.clipPath") == "inset(0px 0px 0px 0%)"


@pytest.mark.parametrize(("width", "color_scheme"), [(390, "light"), (390, "dark"), (1280, "light")])
def test_it_fits_the_screen_and_can_be_used_by_everybody(visit, axe, tmp_path, width, color_scheme) -> None:
    page = visit(width, color_scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    check_access(page, axe, "an example")
    (tmp_path / "empty.png").write_bytes(b"")
    page.locator("#picture-file").set_input_files(tmp_path / "empty.png")
    expect(page.get_by_role("alert")).to_contain_text("the file is empty")
    check_access(page, axe, "an error")
    unnamed = page.locator("button:visible, input, select, canvas:not([aria-hidden])").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim() || e.querySelector('[alt]')))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []


FEATURES = "async () => { const found = await navigator.gpu?.requestAdapter(); return found && [...found.features]; }"


@pytest.mark.slow
def test_on_webgpu_its_tokens_are_pythons(launch, built, model, tmp_path) -> None:
    """An adapter in software, Chromium's own, lacks float16: the page then gets float32 graphs instead of its own."""
    folder = tmp_path / "space"
    shutil.copytree(built, folder)
    draw(40, 40).save(folder / "examples" / "astronaut.jpg")  # a large one would take a software adapter minutes
    chromium = launch("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with served(folder) as address, contextlib.closing(chromium):
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{address}build.json")
        features = page.evaluate(FEATURES)
        if features is None:
            pytest.skip("this Chromium has no WebGPU")
        if "shader-f16" not in features:
            (tmp_path / "float32").mkdir()
            export_onnx(model, tmp_path / "float32", [""])
            for name in ("encoder_model", "decoder_model"):
                shutil.copyfile(tmp_path / "float32/onnx" / f"{name}.onnx", folder / "onnx" / f"{name}_fp16.onnx")
        tokenizer = OnnxTokenizer.from_pretrained(folder, variant="fp16")
        page.set_default_timeout(5 * WAIT)
        page.goto(f"{address}?runtime=webgpu")
        expect(page.locator("#status")).to_have_text("Showing “astronaut.jpg”.", timeout=5 * WAIT)
        expect(page.locator("#runtime")).to_have_text("your GPU (WebGPU)")
        for width, height in ((64, 48), (50, 70), (33, 20)):
            draw(width, height, seed=width).save(tmp_path / f"{width}.png")
            choose(page, tmp_path / f"{width}.png")
            expected = tokenizer.tokenize(from_image(Image.open(tmp_path / f"{width}.png")))
            tokens = load_tokens(saved(page, "#save-tokens", tmp_path)).images[0].tokens.numpy()
            assert (tokens == expected[0]).mean() > 0.95  # of float16 on a GPU, sums are rounded otherwise
            decoded = Image.open(saved(page, "#save-picture", tmp_path)).convert("RGB")
            reference = to_image(tokenizer.detokenize(tokens[None].astype(np.int64), size=(height, width)))
            assert np.abs(np.subtract(decoded, reference, dtype=np.int16)).max() <= 2
