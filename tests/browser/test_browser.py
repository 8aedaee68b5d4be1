"""The demo as a visitor uses it, in Chromium: every tab, odd pictures, a phone's width, light and dark, two at once."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from assertions import assert_alike
from PIL import Image
from playwright.sync_api import Page, expect

from dualcodebook_hf import DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.image_processing_dualcodebook import read_image, to_image, to_pixels
from dualcodebook_hf.reconstruction import reconstruct_image
from dualcodebook_hf.tokens.file import load_tokens


@pytest.fixture(scope="module")
def model() -> DualCodebookVQModel:
    return DualCodebookVQModel.from_pretrained(default_checkpoint()).eval()


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photo(tmp_path) -> Path:
    draw(320, 200).save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def upload(page: Page, path: Path) -> None:
    """Gives the page a picture and waits for its numbers, in which the file's name appears."""
    page.locator("#picture input[type=file]").set_input_files(path)
    expect(page.locator("#about")).to_contain_text(path.name)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def shown(page: Page, selector: str) -> Image.Image:
    """The picture that an <img> shows, at its full size."""
    image = page.locator(f"{selector} img").first
    expect(image).to_be_visible()
    return Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())).convert("RGB")


def test_reconstruct(visit, model, photo):
    page = visit()
    upload(page, photo)
    result = reconstruct_image(model, read_image(photo))
    numbers = page.locator("#numbers")
    expect(numbers).to_contain_text(f"{result.psnr:.2f} dB")
    expect(numbers).to_contain_text("585")  # 20 x 13 positions of 18 bits, in bytes
    rows = page.locator("#rates tbody tr")
    expect(rows).to_have_count(4)
    expect(rows.last).to_contain_text(f"{photo.stat().st_size:,}")
    for row, name in ((1, "JPEG"), (2, "WebP")):
        expect(rows.nth(row)).to_contain_text(re.compile(f"{name}, (smallest possible|quality \\d+)"))
    images = page.locator("#slider img")
    expect(images).to_have_count(2)
    sources = [images.nth(index).get_attribute("src") for index in range(2)]
    contents = [Image.open(io.BytesIO(page.request.get(source).body())) for source in sources]
    contents.sort(key=lambda image: image.tobytes() != result.original.tobytes())
    for image, expected in zip(contents, (result.original, result.image), strict=True):
        assert_alike(image, expected)
    for name in ("error", "jpeg", "webp"):
        assert shown(page, f"#{name}").size == (320, 200)


def test_an_example_and_then_nothing(visit):
    page = visit()
    page.locator("#picture-examples button").first.click()
    expect(page.locator("#rates tbody tr")).to_have_count(4)
    page.locator("#picture").get_by_label(re.compile("clear|remove", re.I)).first.click()
    expect(page.locator("#numbers")).to_contain_text("Drop in a picture")
    expect(page.locator("#slider img")).to_have_count(0)
    tab(page, "Look inside")
    expect(page.locator("#inside-empty")).to_be_visible()
    expect(page.locator("#map-0")).to_be_hidden()
    tab(page, "Tokens")
    expect(page.locator("#download")).to_be_disabled()


def test_look_inside(visit, model, photo):
    page = visit()
    tab(page, "Look inside")
    expect(page.locator("#inside-empty")).to_contain_text("Choose a picture first")
    upload(page, photo)
    tokens = model.tokenize(to_pixels(read_image(photo))[None])
    expect(page.locator("#cell")).to_contain_text("Row 7 of 13, column 11 of 20")  # the middle, at first
    for index, name in enumerate(("Global", "Local")):
        used = len(tokens[0, index].unique())
        expect(page.locator("#usage")).to_contain_text(f"{name} codebook: {used} of 512 codes used")
        assert shown(page, f"#map-{index}").size == (320, 200)

    image = page.locator("#map-1 img")
    box = image.bounding_box()
    scale = min(box["width"] / 320, box["height"] / 200, 1)
    left, top = (box["width"] - 320 * scale) / 2, (box["height"] - 200 * scale) / 2
    image.click(position={"x": left + 40 * scale, "y": top + 120 * scale})  # column 40 // 16, row 120 // 16
    expect(page.locator("#cell")).to_contain_text("Row 8 of 13, column 3 of 20")
    for index, name in enumerate(("global", "local")):
        id_ = tokens[0, index, 7, 2].item()
        expect(page.locator("#cell")).to_contain_text(f"{name} code {id_} occurs")
        expect(page.locator(f"#places-{index}")).to_contain_text(f"{name} code {id_}")
        expected = to_image(model.detokenize(tokens, size=(200, 320), only=name)[0])
        assert_alike(shown(page, f"#half-{index}"), expected)
    expect(page.locator("#cell figure")).to_have_count(5)


def test_swap(visit, model, photo, tmp_path):
    draw(320, 200, seed=1).save(tmp_path / "other.png")
    page = visit()
    upload(page, photo)
    tab(page, "Look inside")
    page.locator("#other input[type=file]").set_input_files(tmp_path / "other.png")
    mine, other = (model.tokenize(to_pixels(read_image(path))[None]) for path in (photo, tmp_path / "other.png"))
    mixed = torch.cat([mine[:, :1], other[:, 1:]], 1), torch.cat([other[:, :1], mine[:, 1:]], 1)
    for index, tokens in enumerate(mixed):
        expected = to_image(model.detokenize(tokens, size=(200, 320))[0])
        assert_alike(shown(page, f"#swap-{index}"), expected)


def test_tokens_there_and_back(visit, model, photo, tmp_path):
    page = visit()
    upload(page, photo)
    tab(page, "Tokens")
    expect(page.locator("#token-note")).to_contain_text("20 x 13 = 260 positions")
    with page.expect_download() as download:
        page.locator("#download").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "a picture.safetensors"
    tokens = model.tokenize(to_pixels(read_image(photo))[None])
    assert torch.equal(load_tokens(file).images[0].tokens, tokens[0])

    stranger = visit()
    tab(stranger, "Tokens")
    stranger.locator("#token-file input[type=file]").set_input_files(file)
    expect(stranger.locator("#opened")).to_contain_text("a picture.png, 320 x 200 pixels")
    expected = to_image(model.detokenize(tokens, size=(200, 320))[0])
    assert_alike(shown(stranger, "#decoded"), expected)


def test_odd_images(visit, tmp_path):
    translucent = draw(60, 40).convert("RGBA")
    translucent.putalpha(Image.linear_gradient("L").resize(translucent.size))
    frames = {"save_all": True, "append_images": [draw(60, 40, 1)], "duration": 90}
    page = visit()
    for name, image, options, note in [
        ("one.png", Image.new("RGB", (1, 1), (9, 99, 199)), {}, "1 x 1 pixels"),
        ("huge.jpg", Image.new("RGB", (6000, 4000), (9, 99, 199)), {}, "Shrunk from 6000 x 4000"),
        ("clear.png", translucent, {}, "Transparency laid over white"),
        ("grey.png", draw(60, 40).convert("L"), {}, "60 x 40 pixels"),
        ("moving.gif", draw(60, 40), frames, "The first frame alone"),
        ("<img src=x onerror=alert(1)> ${alert(2)}.png", draw(60, 40), {}, "60 x 40 pixels"),
    ]:
        image.save(tmp_path / name, **options)
        page.locator("#picture input[type=file]").set_input_files(tmp_path / name)
        expect(page.locator("#about")).to_contain_text("onerror" if "<" in name else name)
        expect(page.locator("#about")).to_contain_text(note)
        expect(page.locator("#slider img")).to_have_count(2)
        page.locator("#picture").get_by_label(re.compile("clear|remove", re.I)).first.click()
        expect(page.locator("#rates table")).to_have_count(0)


def test_what_cannot_be_read_gets_a_message_and_leaves_nothing_old(visit, photo, tmp_path):
    page = visit()
    upload(page, photo)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:500])
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "cut.png")
    message = page.get_by_test_id("toast-body")
    expect(message).to_contain_text("cannot read image 'cut.png'")
    expect(message).not_to_contain_text("Traceback")
    expect(page.locator("#rates table")).to_have_count(0)
    expect(page.locator("#slider img")).to_have_count(0)
    tab(page, "Tokens")
    expect(page.locator("#download")).to_be_disabled()
    (tmp_path / "not.safetensors").write_bytes(b"nothing")
    page.locator("#token-file input[type=file]").set_input_files(tmp_path / "not.safetensors")
    expect(message.last).to_contain_text("cannot read token file 'not.safetensors'")


def test_another_model(visit, photo):
    page = visit()
    upload(page, photo)
    expect(page.locator("#numbers")).to_contain_text("585")
    page.locator("#model input").click()
    page.get_by_role("option", name=re.compile("one-book")).click()
    expect(page.locator("#numbers")).to_contain_text("2,161")  # 80 x 50 positions of log2(20) bits, in bytes
    tab(page, "Look inside")
    expect(page.locator("#usage")).to_contain_text("of 20 codes used")
    expect(page.locator("#map-1")).to_be_hidden()
    expect(page.locator("#half-0")).to_be_hidden()
    page.locator("#model input").click()
    page.get_by_role("option", name="embedded checkpoint").click()
    expect(page.locator("#map-1 img")).to_be_visible()
    expect(page.locator("#half-1 img")).to_be_visible()


@pytest.mark.parametrize(("width", "color_scheme"), [(390, "dark"), (1280, "dark"), (390, "light")])
def test_every_tab_fits_the_screen(visit, photo, width, color_scheme):
    page = visit(width, color_scheme)
    upload(page, photo)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (color_scheme == "dark")
    for name, content in (("Reconstruct", "#rates"), ("Look inside", "#usage"), ("Tokens", "#download")):
        tab(page, name)
        expect(page.locator(content)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_visitors_at_once_see_their_own_images(visit, model, tmp_path):
    pages = []
    for seed in range(2):
        draw(200 + 16 * seed, 120, seed).save(tmp_path / f"{seed}.png")
        pages.append(visit())
    for seed, page in enumerate(pages):
        page.locator("#picture input[type=file]").set_input_files(tmp_path / f"{seed}.png")
    for seed, page in enumerate(pages):
        expect(page.locator("#about")).to_contain_text(f"{seed}.png")
        result = reconstruct_image(model, read_image(tmp_path / f"{seed}.png"))
        expect(page.locator("#numbers")).to_contain_text(f"{result.psnr:.2f} dB")
