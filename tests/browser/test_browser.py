"""The demo as a visitor uses it, in Chromium: every tab, odd pictures, a phone's width, light and dark, two at once."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from access import check_access
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
    expect(page.locator("#about")).to_contain_text(path.name, timeout=120_000)  # a megapixel, on a busy machine


def tab(page: Page, name: str) -> None:
    """Opens a tab; on a phone the last ones are in a menu."""
    place = page.get_by_role("tab", name=name)
    if not place.is_visible():
        menu = page.locator("#results .overflow-menu")
        menu.locator("> button").click()
        place = menu.get_by_text(name, exact=True)
    place.click()


def shown(page: Page, selector: str, index: int = 0) -> Image.Image:
    """The picture that an <img> shows, at its full size."""
    image = page.locator(f"{selector} img").nth(index)
    expect(image).to_be_visible()
    source = image.evaluate("image => image.src")
    if source.startswith("data:"):
        content = base64.b64decode(source.partition(",")[2])
    else:
        content = page.request.get(source).body()
    return Image.open(io.BytesIO(content)).convert("RGB")


def choose(page: Page, selector: str, name: str) -> None:
    """An option of a dropdown."""
    page.locator(f"{selector} input").click()
    page.get_by_role("option", name=re.compile(name)).click()


def remove(page: Page) -> None:
    """Takes the picture away."""
    page.locator("#picture").get_by_label(re.compile("clear|remove", re.I)).first.click()


def at(page: Page, selector: str, row: int, column: int, factor: int = 16) -> tuple[float, float]:
    """Where on the screen a square of a grid is."""
    page.locator(f"{selector} .grid").scroll_into_view_if_needed()
    box = page.locator(f"{selector} .grid").bounding_box()
    width = int(page.locator(f"{selector} .grid").get_attribute("data-width"))
    scale = box["width"] / width * factor
    return box["x"] + (column + 0.5) * scale, box["y"] + (row + 0.5) * scale


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
    for index, (name, expected) in enumerate([("Original", result.original), ("embedded checkpoint", result.image)]):
        assert_alike(shown(page, "#slider", index), expected)
        expect(page.locator("#slider img").nth(index)).to_have_attribute("alt", name)
    for name in ("error", "jpeg", "webp"):
        assert shown(page, f"#{name}").size == (320, 200)
    with page.expect_download() as download:
        page.get_by_text("Download the reconstruction").click()
    assert download.value.suggested_filename == "a picture-reconstruction.png"
    assert_alike(Image.open(download.value.path()).convert("RGB"), result.image)
    with page.expect_download() as download:
        page.locator("#error").get_by_label("Download").click()
    assert download.value.suggested_filename == "a picture-error-map.png"


def test_the_slider_moves_by_keyboard(visit):
    page = visit()
    handle = page.locator("#slider input")
    before = page.locator("#slider .handle").bounding_box()["x"]
    handle.focus()
    for _ in range(3):
        page.keyboard.press("PageUp")
    assert page.locator("#slider .handle").bounding_box()["x"] > before + 50


def test_an_example_is_shown_at_once_and_nobody_waits_for_it(visit):
    asked = []
    page = visit(watch=lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    title = page.locator("#about").inner_text()
    assert title.startswith("chelsea.png")
    for name, frames in {
        "Reconstruct": ["#slider", "#error", "#jpeg", "#webp"],
        "Look inside": ["#map-0", "#map-1", "#places-0", "#places-1", "#half-0", "#half-1"],
        "Mix": ["#other", "#paint", "#mixed", "#swap-0", "#swap-1"],
    }.items():
        tab(page, name)
        for frame in frames:
            page.locator(frame).scroll_into_view_if_needed()
            expect(page.locator(f"{frame} img").first).to_be_visible()
            expect(page.locator(f"{frame} img").first).to_have_js_property("complete", True)
            assert page.locator(f"{frame} img").first.evaluate("image => image.naturalWidth") > 0, frame
    assert not asked


def test_an_example_and_then_nothing(visit):
    page = visit()
    page.locator("#picture-examples").get_by_role("button", name="Rocket").click()
    expect(page.locator("#about")).to_contain_text("rocket.jpg")
    expect(page.locator("#rates tbody tr")).to_have_count(4)
    widths = {}
    for name in ("Reconstruct", "Look inside", "Mix", "Tokens"):
        tab(page, name)
        widths[name] = page.locator("#results").bounding_box()
    remove(page)
    expect(page.locator("#numbers")).to_contain_text("Drop in a picture")
    expect(page.locator("#slider img")).to_have_count(0)
    tab(page, "Look inside")
    expect(page.locator("#inside-empty")).to_be_visible()
    expect(page.locator("#map-0")).to_be_hidden()
    tab(page, "Mix")
    expect(page.locator("#mix-empty")).to_be_visible()
    tab(page, "Tokens")
    expect(page.locator("#download")).to_be_disabled()
    for name, box in widths.items():
        tab(page, name)
        empty = page.locator("#results").bounding_box()
        assert (empty["x"], empty["width"]) == (box["x"], box["width"]), name


def test_a_picture_taken_away_while_the_other_tabs_are_computed_does_not_stay(visit, tmp_path):
    draw(1024, 1024).save(tmp_path / "large.png")
    page = visit()
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "large.png")
    expect(page.locator("#about")).to_contain_text("large.png", timeout=120_000)
    remove(page)  # the second tab of a megapixel takes seconds
    expect(page.locator("#numbers")).to_contain_text("Drop in a picture")
    for name, hint in (("Look inside", "#inside-empty"), ("Mix", "#mix-empty")):
        tab(page, name)
        expect(page.locator(hint)).to_be_visible(timeout=120_000)
    page.wait_for_timeout(3000)
    expect(page.locator("#map-0")).to_be_hidden()


def test_look_inside(visit, model, photo):
    page = visit()
    tab(page, "Look inside")
    upload(page, photo)
    tokens = model.tokenize(to_pixels(read_image(photo))[None])
    expect(page.locator("#cell")).to_contain_text("Row 7 of 13, column 11 of 20")  # the middle, at first
    for index, name in enumerate(("Global", "Local")):
        used = len(tokens[0, index].unique())
        expect(page.locator("#usage")).to_contain_text(f"{name} codebook: {used} of 512 codes used")
        assert shown(page, f"#map-{index}").size == (320, 200)

    page.mouse.click(*at(page, "#map-1", 7, 2))
    expect(page.locator("#cell")).to_contain_text("Row 8 of 13, column 3 of 20")
    for index, name in enumerate(("global", "local")):
        id_ = tokens[0, index, 7, 2].item()
        expect(page.locator("#cell")).to_contain_text(f"{name} code {id_} occurs")
        expect(page.locator(f"#places-{index}")).to_contain_text(f"{name} code {id_}")
        expected = to_image(model.detokenize(tokens, size=(200, 320), only=name)[0])
        assert_alike(shown(page, f"#half-{index}"), expected)
    expect(page.locator("#cell figure")).to_have_count(5)


def test_tokens_are_looked_up_by_keyboard(visit, model, photo):
    page = visit()
    upload(page, photo)
    tab(page, "Look inside")
    expect(page.locator("#cell")).to_contain_text("Row 7 of 13, column 11 of 20")
    page.get_by_role("application", name="Global tokens").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    expect(page.locator("#cell")).to_contain_text("Row 6 of 13, column 12 of 20")
    for index in range(2):  # one cursor over both maps
        expect(page.locator(f"#map-{index} .grid")).to_have_attribute("data-column", "11")
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#cell")).to_contain_text("Row 6 of 13, column 1 of 20")
    expect(page.get_by_role("application", name="Global tokens")).to_be_focused()
    id_ = model.tokenize(to_pixels(read_image(photo))[None])[0, 0, 5, 0].item()
    expect(page.locator("#cell")).to_contain_text(f"global code {id_} occurs")


def test_swap(visit, model, photo, tmp_path):
    draw(320, 200, seed=1).save(tmp_path / "other.png")
    page = visit()
    upload(page, photo)
    tab(page, "Mix")
    page.locator("#other").get_by_label(re.compile("clear|remove", re.I)).first.click()
    expect(page.locator("#mixed")).to_contain_text("Choose the other picture")
    expect(page.locator("#swap-0 img")).to_have_count(0)
    page.locator("#other input[type=file]").set_input_files(tmp_path / "other.png")
    mine, other = (model.tokenize(to_pixels(read_image(path))[None]) for path in (photo, tmp_path / "other.png"))
    mixed = torch.cat([mine[:, :1], other[:, 1:]], 1), torch.cat([other[:, :1], mine[:, 1:]], 1)
    for index, tokens in enumerate(mixed):
        expected = to_image(model.detokenize(tokens, size=(200, 320))[0])
        assert_alike(shown(page, f"#swap-{index}"), expected)


def test_painted_squares_take_other_tokens(visit, model, photo, tmp_path):
    draw(320, 200, seed=1).save(tmp_path / "other.png")
    mine, other = (model.tokenize(to_pixels(read_image(path))[None])[0] for path in (photo, tmp_path / "other.png"))
    page = visit()
    upload(page, photo)
    tab(page, "Mix")
    page.locator("#other input[type=file]").set_input_files(tmp_path / "other.png")
    expect(page.locator("#paint .grid")).to_have_attribute("data-width", "320", timeout=120_000)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#mixed")).to_contain_text("0 of 520 tokens")
    page.get_by_label("Brush").select_option("1 square")
    page.mouse.move(*at(page, "#paint", 2, 3))
    page.mouse.down()
    page.mouse.move(*at(page, "#paint", 2, 7), steps=20)
    page.mouse.up()
    page.get_by_role("application", name="Your reconstruction").focus()
    for key in ("ArrowDown", "Space", "Shift+ArrowDown"):
        page.keyboard.press(key)
    region = torch.zeros(13, 20, dtype=torch.bool)
    region[2, 3:8] = region[3, 7] = region[4, 7] = True

    def check(tokens: torch.Tensor) -> None:
        expect(page.locator("#mixed")).to_contain_text(f"{int((tokens != mine).sum())} of 520 tokens")
        expected = to_image(model.detokenize(tokens[None], size=(200, 320))[0])
        assert_alike(shown(page, "#mixed", 1), expected)

    check(torch.where(region, other, mine))
    page.locator("#which").get_by_label("the local codebook alone").check()
    check(torch.stack([mine[0], torch.where(region, other[1], mine[1])]))
    page.locator("#by").get_by_label(re.compile("the token looked up")).check()
    check(torch.stack([mine[0], torch.where(region, mine[1, 6, 10], mine[1])]))
    with page.expect_download() as download:
        page.get_by_text("Download the mixed picture").click()
    assert download.value.suggested_filename == "a picture-mixed.png"
    page.keyboard.press("Escape")
    page.get_by_role("application", name="Your reconstruction").focus()
    page.keyboard.press("Space")  # on a painted square: it is wiped
    region[4, 7] = False
    check(torch.stack([mine[0], torch.where(region, mine[1, 6, 10], mine[1])]))


def test_two_models_on_one_slider(visit, model, photo):
    page = visit()
    upload(page, photo)
    choose(page, "#left", "one-book")
    expect(page.locator("#rates tbody tr")).to_have_count(5)
    expect(page.locator("#rates tbody tr").nth(1)).to_contain_text("2,161")
    expect(page.locator("#slider img").first).to_have_attribute("alt", "one-book")
    expect(page.locator("#slider img").nth(1)).to_have_attribute("alt", "embedded checkpoint")
    result = reconstruct_image(model, read_image(photo))
    assert_alike(shown(page, "#slider", 1), result.image)
    assert shown(page, "#slider", 0).tobytes() not in (result.original.tobytes(), result.image.tobytes())
    choose(page, "#left", "the original")
    expect(page.locator("#rates tbody tr")).to_have_count(4)
    assert_alike(shown(page, "#slider", 0), result.original)


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
        told = "onerror" if "<" in name else name
        expect(page.locator("#about")).to_contain_text(told, timeout=120_000)  # 24 megapixels, on a busy machine
        expect(page.locator("#about")).to_contain_text(note)
        expect(page.locator("#slider img")).to_have_count(2)
        remove(page)
        expect(page.locator("#rates table")).to_have_count(0)


def test_what_cannot_be_read_gets_a_message_that_stays_and_leaves_nothing_old(visit, photo, tmp_path):
    page = visit()
    upload(page, photo)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:500])
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "cut.png")
    message = page.locator("#about").get_by_role("alert")
    expect(message).to_contain_text("cannot read image 'cut.png'")
    expect(message).not_to_contain_text("Traceback")
    expect(page.locator("#numbers")).not_to_contain_text("Drop in a picture")
    expect(page.locator("#rates table")).to_have_count(0)
    expect(page.locator("#slider img")).to_have_count(0)
    tab(page, "Tokens")
    expect(page.locator("#download")).to_be_disabled()
    (tmp_path / "not.safetensors").write_bytes(b"nothing")
    page.locator("#token-file input[type=file]").set_input_files(tmp_path / "not.safetensors")
    expect(page.locator("#opened").get_by_role("alert")).to_contain_text("cannot read token file 'not.safetensors'")
    expect(page.get_by_test_id("toast-body")).to_have_count(0)  # a toast would go by itself
    expect(message).to_be_visible()
    upload(page, photo)
    expect(message).to_have_count(0)
    expect(page.locator("#rates tbody tr")).to_have_count(4)


def test_a_long_picture_squeezes_nothing(visit, photo, tmp_path):
    page = visit()
    upload(page, photo)
    before = page.locator("#slider .slider").bounding_box()
    draw(12_000, 100).save(tmp_path / "long.png")
    upload(page, tmp_path / "long.png")
    expect(page.locator("#slider img")).to_have_count(2)
    assert page.locator("#slider .slider").bounding_box() == before
    image = page.locator("#slider img").first.bounding_box()
    assert image["width"] / 12_000 * 100 > 90  # the picture itself, as high as can be looked at
    tab(page, "Look inside")
    expect(page.locator("#cell")).to_contain_text("of 7, column", timeout=120_000)
    assert page.locator("#map-0 .grid").bounding_box()["height"] > 60
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_another_model(visit, photo):
    page = visit()
    upload(page, photo)
    expect(page.locator("#numbers")).to_contain_text("585")
    expect(page.locator("#about-model")).to_contain_text("0.07031 bits per pixel, 576 bytes for 256 x 256 pixels")
    choose(page, "#model", "one-book")
    expect(page.locator("#about-model")).to_contain_text("one of 20 codes")
    expect(page.locator("#numbers")).to_contain_text("2,161")  # 80 x 50 positions of log2(20) bits, in bytes
    tab(page, "Look inside")
    expect(page.locator("#usage")).to_contain_text("of 20 codes used")
    expect(page.locator("#map-1")).to_be_hidden()
    expect(page.locator("#half-0")).to_be_hidden()
    choose(page, "#model", "embedded checkpoint")
    expect(page.locator("#map-1 img")).to_be_visible()
    expect(page.locator("#half-1 img")).to_be_visible()


def test_a_class_is_drawn_step_by_step_and_a_part_of_the_picture_repainted(visit, photo):
    page = visit()
    upload(page, photo)
    tab(page, "Generate")
    page.get_by_label("shoes", exact=True).check()
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#steps input[type=number]").blur()
    page.locator("#draw").click()
    expect(page.locator("#drawn-line")).to_contain_text("shoes, seed 0: step 2 of 2", timeout=60_000)
    assert shown(page, "#drawn").size == shown(page, "#drawn-tokens").size == (512, 512)
    page.locator("#repaint-grid [data-fill='0']").click()
    page.locator("#repaint").click()
    expect(page.locator("#repainted-line")).to_contain_text("Paint over a part of the picture first.")
    page.locator("#repaint-grid .grid").click()
    page.wait_for_timeout(400)  # the grid tells a quarter of a second after the last stroke
    page.locator("#repaint").click()
    expect(page.locator("#repainted-line")).to_contain_text("9 positions: step 2 of 2", timeout=60_000)
    before, after = (np.asarray(shown(page, "#repainted", number), int) for number in range(2))
    assert before.shape == after.shape == (200, 320, 3)
    changed = np.abs(before - after).max(2) > 24
    assert changed.any() and not changed[:, :64].any()


# Gradio's own, which no option changes: the words on its upload button and the words that it says differ.
GRADIOS = frozenset({"label-content-name-mismatch"})


@pytest.mark.parametrize(("width", "color_scheme"), [(390, "dark"), (1280, "dark"), (390, "light"), (1280, "light")])
def test_every_tab_fits_the_screen_and_can_be_used_by_everybody(visit, axe, photo, tmp_path, width, color_scheme):
    page = visit(width, color_scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (color_scheme == "dark")
    contents = {"Reconstruct": "#rates", "Look inside": "#usage", "Mix": "#mixed", "Tokens": "#download"}
    contents |= {"Generate": "#repaint-grid img"}
    for name, content in contents.items():
        tab(page, name)
        expect(page.locator(content)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        check_access(page, axe, name, GRADIOS)
    for frame in ("#picture", "#other"):
        expect(page.locator(frame)).to_have_attribute("aria-label", re.compile("picture"))
    remove(page)
    expect(page.locator("#inside-empty")).to_be_attached()
    for name in contents:
        tab(page, name)
        check_access(page, axe, f"{name}, empty", GRADIOS)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:500])
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "cut.png")
    expect(page.locator("#about").get_by_role("alert")).to_be_visible()
    check_access(page, axe, "an error", GRADIOS)


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
