"""Images of every kind become [-1, 1] pixels and come back."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from icc import cmyk_profile, grey_profile, p3_profile, srgb_profile
from PIL import Image

from dualcodebook_hf.image_processing_dualcodebook import (
    DEFAULT_MAX_PIXELS,
    LARGEST_ENLARGEMENT,
    BadImageError,
    DualCodebookImageProcessor,
    center_crop,
    cut_for_enlargement,
    read_image,
    resize_shorter_side,
    resize_to_max_pixels,
    to_image,
    to_pixels,
)


def noise(height: int = 12, width: int = 20) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((0, 0))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (20, 12)])
def test_pixels_and_back_is_the_same_image(size: tuple[int, int]) -> None:
    image = noise(*size)
    assert np.array_equal(to_image(to_pixels(image)), image)


def test_black_and_white_are_exactly_the_ends_of_the_range() -> None:
    pixels = to_pixels(Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8)))
    assert pixels.shape == (3, 1, 2) and pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == [-1, -1, -1] and pixels[:, 0, 1].tolist() == [1, 1, 1]


def test_values_outside_the_range_are_clamped_and_others_rounded() -> None:
    pixels = torch.tensor([-3.0, 0.6 / 127.5 - 1, 5.0]).reshape(3, 1, 1)
    assert pixel(to_image(pixels)) == (0, 1, 255)


def test_the_processor_and_the_functions_and_diffusers_agree_bit_for_bit() -> None:
    diffusers = pytest.importorskip("diffusers")
    every_value = Image.fromarray(np.arange(768).astype(np.uint8).reshape(16, 16, 3))
    ours = DualCodebookImageProcessor()(every_value, return_tensors="pt")["pixel_values"]
    assert torch.equal(ours[0], to_pixels(every_value))
    assert torch.equal(ours, diffusers.image_processor.VaeImageProcessor(vae_scale_factor=1).preprocess(every_value))


def test_exif_orientation_is_applied(tmp_path) -> None:
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (2, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_shows_the_upright_image(orientation: int) -> None:
    upright = noise()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # tag -> the PIL transposition that a camera would have stored
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_image(encoded(stored, "PNG", exif=exif)), upright)


def test_transparency_is_laid_over_white() -> None:
    half_red = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert pixel(read_image(half_red)) == (255, 127, 127)
    assert pixel(read_image(Image.new("RGBA", (2, 2), (9, 9, 9, 0)))) == (255, 255, 255)
    assert pixel(read_image(Image.new("LA", (2, 2), (0, 0)))) == (255, 255, 255)
    assert pixel(read_image(Image.new("LA", (2, 2), (40, 255)))) == (40, 40, 40)
    assert pixel(read_image(Image.new("PA", (2, 2), (0, 0)))) == (255, 255, 255)


def test_transparent_palette_and_transparent_colour_are_laid_over_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    read = read_image(encoded(palette, "PNG", transparency=0))
    assert read.getpixel((0, 0)) == (255, 255, 255) and read.getpixel((1, 0)) == (200, 100, 50)
    assert pixel(read_image(palette)) == (10, 20, 30)
    assert pixel(read_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))) == (255,) * 3


def test_grey_and_black_and_white_and_cmyk_become_rgb() -> None:
    assert pixel(read_image(Image.new("L", (1, 1), 77))) == (77, 77, 77)
    assert pixel(read_image(Image.new("1", (1, 1), 1))) == (255, 255, 255)
    assert pixel(read_image(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))) == (255, 0, 0)
    assert pixel(read_image(Image.new("HSV", (1, 1), (0, 255, 255)))) == (255, 0, 0)
    assert read_image(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("value, grey", [(0, 0), (257, 1), (257 * 128, 128), (65535, 255), (200, 1), (100, 0)])
def test_sixteen_bit_grey_is_divided_by_257(value: int, grey: int) -> None:
    image = Image.fromarray(np.full((2, 2), value, dtype=np.uint16))
    assert image.mode == "I;16"
    for source in (image, encoded(image, "PNG"), encoded(image, "TIFF")):
        assert pixel(read_image(source)) == (grey, grey, grey)
    big_endian = Image.frombytes("I;16B", (1, 1), value.to_bytes(2, "big"))
    assert pixel(read_image(big_endian)) == (grey, grey, grey)


@pytest.mark.parametrize("values, grey", [([200, 0], 200), ([65535, 0], 255), ([-5, 0], 0)])
def test_32_bit_grey_is_16_bit_only_where_a_value_exceeds_255(values: list[int], grey: int) -> None:
    assert pixel(read_image(Image.fromarray(np.array([values], dtype=np.int32)))) == (grey, grey, grey)


@pytest.mark.parametrize("values, grey", [([0.5, 1], 128), ([200, 0], 200), ([65535, 0], 255), ([np.nan, 1], 0)])
def test_floating_point_grey_has_the_range_that_its_largest_value_fits(values: list[float], grey: int) -> None:
    assert pixel(read_image(Image.fromarray(np.array([values], dtype=np.float32)))) == (grey, grey, grey)


def png(depth: int, colour_type: int, pixel: bytes, transparent: bytes) -> bytes:
    """A PNG of one pixel with a transparent colour."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, depth, colour_type, 0, 0, 0)), (b"tRNS", transparent)]
    chunks += [(b"IDAT", zlib.compress(b"\0" + pixel)), (b"IEND", b"")]
    packed = b""
    for kind, data in chunks:
        packed += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + packed


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white_at_every_depth_and_its_neighbours_stay(depth: int) -> None:
    top = 2**depth - 1
    for value in {0, 1, top // 2, top}:
        stored = value.to_bytes(2, "big") if depth == 16 else bytes([value << (8 - depth)])
        for transparent in {0, 1, top // 2, top}:
            read = read_image(png(depth, 0, stored, struct.pack(">H", transparent)))
            expected = 255 if value == transparent else round(value * 255 / top)
            assert pixel(read) == (expected,) * 3, (value, transparent)


def test_a_transparent_colour_of_sixteen_bits_is_white() -> None:
    colours = [struct.pack(">3H", *values) for values in ((1000, 2000, 3000), (9000, 2000, 3000))]
    assert pixel(read_image(png(16, 2, colours[0], colours[0]))) == (255, 255, 255)
    assert pixel(read_image(png(16, 2, colours[1], colours[0]))) == (35, 7, 11)


def in_srgb(p3: tuple[int, int, int]) -> np.ndarray:
    """By the definitions of the two spaces, which share a tone curve."""
    values = np.array(p3) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    matrix = [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]
    linear = np.clip(np.array(matrix) @ linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("colour", [(60, 140, 70), (200, 150, 120), (255, 255, 255), (0, 0, 0)])
def test_colours_of_a_wide_space_become_srgb(kind: str, colour: tuple[int, int, int]) -> None:
    read = read_image(encoded(Image.new("RGB", (8, 8), colour), kind, icc_profile=p3_profile()))
    assert np.abs(np.subtract(pixel(read), in_srgb(colour))).max() <= (4 if kind == "JPEG" else 2)
    assert "icc_profile" not in read.info
    assert np.array_equal(read_image(read), read)


def test_a_profile_acts_under_transparency_and_on_palettes() -> None:
    half = read_image(encoded(Image.new("RGBA", (8, 8), (60, 140, 70, 128)), "PNG", icc_profile=p3_profile()))
    assert np.abs(np.subtract(pixel(half), (in_srgb((60, 140, 70)) * 128 + 255 * 127) / 255)).max() <= 2
    clear = read_image(encoded(Image.new("RGBA", (8, 8), (60, 140, 70, 0)), "PNG", icc_profile=p3_profile()))
    assert pixel(clear) == (255, 255, 255)
    palette = Image.new("P", (8, 8))
    palette.putpalette([60, 140, 70])
    read = read_image(encoded(palette, "PNG", icc_profile=p3_profile()))
    assert np.abs(np.subtract(pixel(read), in_srgb((60, 140, 70)))).max() <= 2


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_have_the_colours_of_their_profile(kind: str) -> None:
    """Lab (54.3, 80.8, 69.9) is sRGB's red under D50."""
    profile = cmyk_profile((138, 209, 198))
    for inks, colour in (((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 0), (255, 0, 0))):
        read = read_image(encoded(Image.new("CMYK", (8, 8), inks), kind, icc_profile=profile))
        assert np.abs(np.subtract(pixel(read), colour)).max() <= 4
    assert pixel(read_image(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"))) == (0, 255, 255)


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_has_the_tone_curve_of_its_profile(bits: int) -> None:
    """A linear 55 / 255 is 128 / 255 in sRGB."""
    image = Image.new("L", (8, 8), 55) if bits == 8 else Image.fromarray(np.full((8, 8), 55 * 257, np.uint16))
    assert pixel(read_image(encoded(image, "PNG", icc_profile=grey_profile(1.0)))) == (128, 128, 128)


def test_srgb_and_broken_and_foreign_profiles_change_nothing() -> None:
    image = noise(40, 40)
    for profile in (srgb_profile(), b"", b"no profile" * 20, p3_profile()[:300], cmyk_profile((136, 208, 195))):
        assert np.array_equal(read_image(encoded(image, "PNG", icc_profile=profile)), image)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_of_several_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixel(read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))) == (
        255,
        0,
        0,
    )


def test_path_bytes_file_and_image_give_the_same(tmp_path) -> None:
    image = noise()
    path = tmp_path / "a.png"
    image.save(path)
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file, image):
            assert np.array_equal(read_image(source), image)


def test_the_given_image_is_left_as_it_is() -> None:
    image = Image.new("RGBA", (2, 2), (1, 2, 3, 0))
    read_image(image)
    assert image.mode == "RGBA" and pixel(image) == (1, 2, 3, 0)


@pytest.mark.parametrize(
    "kind, cut", [("PNG", 0.5), ("JPEG", 0.5), ("GIF", 0.5), ("TIFF", 0.5), ("WEBP", 0.5), ("PNG", 0.01)]
)
def test_a_broken_file_is_a_value_error_that_names_it(tmp_path, kind: str, cut: float) -> None:
    path = tmp_path / "broken.img"
    data = encoded(noise(60, 60), kind)
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(ValueError, match=r"broken.img"):
        read_image(path)


def test_missing_file_folder_text_and_empty_file_are_value_errors_that_name_them(tmp_path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("missing.png", "text.png", "empty.png", "folder.png"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"in memory"):
        read_image(b"no image")


def test_a_decompression_bomb_is_a_value_error_and_a_large_image_makes_no_warning(tmp_path, monkeypatch) -> None:
    noise(20, 20).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "large.png").size == (20, 20)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match=r"large.png.*bomb"):
            read_image(tmp_path / "large.png")


def test_an_error_holds_the_reason_and_the_file_apart(tmp_path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(BadImageError) as caught:
        read_image(tmp_path / "text.png")
    assert caught.value.file == str(tmp_path / "text.png")
    assert str(tmp_path) not in caught.value.reason
    truncated = Image.open(io.BytesIO(encoded(noise(60, 60), "JPEG")[:1000]))
    with pytest.raises(BadImageError):  # an opened image is decoded late
        read_image(truncated)


def test_a_header_of_too_many_pixels_is_refused_before_they_are_decoded() -> None:
    header = bytearray(png(1, 0, b"\0", b"\0\0"))
    struct.pack_into(">II", header, 16, 60000, 60000)
    struct.pack_into(">I", header, 29, zlib.crc32(header[12:29]))
    with pytest.raises(BadImageError, match="bomb"):
        read_image(bytes(header))


def heic(brand: bytes = b"heic") -> bytes:
    return b"\0\0\0\x1cftyp" + brand + bytes(16)


def test_a_format_that_needs_a_package_names_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadImageError, match="HEIC needs a package: pip install pillow-heif"):
        read_image(heic())


def test_an_installed_plugin_is_used(tmp_path, monkeypatch) -> None:
    """A package of that name whose decoder makes every file one red pixel."""
    (tmp_path / "pillow_heif.py").write_text(
        "import io\n"
        "from PIL import Image\n"
        "def register_heif_opener():\n"
        "    red = lambda file, name: Image.new('RGB', (1, 1), 'red')\n"
        "    Image.register_open('HEIF', red, lambda head: head[4:8] == b'ftyp')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    (tmp_path / "a.heic").write_bytes(heic())
    with (tmp_path / "a.heic").open("rb") as file:
        for source in (tmp_path / "a.heic", heic(), file):
            assert pixel(read_image(source)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(20, 12), (300, 200), (4000, 256), (12, 3000), (1, 250), (256, 40000)])
def test_ordinary_images_are_enlarged_whole(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    assert cut_for_enlargement(image, 256) is image


@pytest.mark.parametrize("shorter, longer", [(1, 60000), (1, 60001), (3, 60000), (200, 60001)])
def test_a_long_image_keeps_its_centre_and_as_much_as_the_limit_allows(shorter: int, longer: int) -> None:
    for size in ((shorter, longer), (longer, shorter)):
        cut = cut_for_enlargement(Image.new("RGB", size), 256)
        kept = max(cut.size)
        assert min(cut.size) == shorter and (longer - kept) % 2 == 0
        assert kept * 256 // shorter * 256 <= LARGEST_ENLARGEMENT * 1.01 or cut.size == size
        assert kept >= 255 * shorter


@pytest.mark.parametrize("size", [(400, 300), (1, 1000), (1000, 1), (7, 100), (100, 100), (99, 101)])
@pytest.mark.parametrize("limit", [1, 2, 50, 1000, 10_000])
def test_no_more_pixels_than_the_limit_and_the_aspect_is_kept(size: tuple[int, int], limit: int) -> None:
    image = Image.new("RGB", size)
    resized = resize_to_max_pixels(image, limit)
    assert 1 <= resized.width * resized.height <= limit or resized is image
    assert (resized is image) == (size[0] * size[1] <= limit)
    if min(resized.size) > 20:
        assert resized.width / resized.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_a_12_megapixel_photograph_is_resized_to_one_megapixel_unless_asked_otherwise() -> None:
    photograph = Image.new("RGB", (4000, 3000))
    processor = DualCodebookImageProcessor()
    shape = processor(photograph, return_tensors="pt")["pixel_values"].shape
    assert 0.99 * DEFAULT_MAX_PIXELS < shape[2] * shape[3] <= DEFAULT_MAX_PIXELS
    assert shape[2:] == resize_to_max_pixels(photograph).size[::-1]
    assert processor(photograph, max_pixels=None, return_tensors="pt")["pixel_values"].shape == (1, 3, 3000, 4000)


def test_shorter_side_and_centre_crop() -> None:
    image = resize_shorter_side(noise(10, 25), 8, "bilinear")
    assert image.size == (20, 8)
    cropped = center_crop(image, (6, 10))
    assert np.array_equal(cropped, np.array(image)[1:7, 5:15])
    assert center_crop(image, 8).size == (8, 8)
    assert resize_shorter_side(noise(1, 30), 2).size == (60, 2)


def test_wrong_sizes_and_filters_are_value_errors_that_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"`size`.*30x30.*20x12"):
        center_crop(noise(), 30)
    with pytest.raises(ValueError, match=r"`resample`.*lanczos.*'best'"):
        resize_shorter_side(noise(), 8, "best")
    with pytest.raises(ValueError, match=r"`size`"):
        resize_shorter_side(noise(), 0)
    with pytest.raises(ValueError, match=r"`max_pixels`"):
        resize_to_max_pixels(noise(), 0)
    with pytest.raises(ValueError, match=r"`image`.*RGB.*L"):
        to_pixels(Image.new("L", (1, 1)))
    with pytest.raises(ValueError, match=r"`pixels`.*\(1, 3, 2, 2\)"):
        to_image(torch.zeros(1, 3, 2, 2))


def test_the_processor_resizes_and_crops_a_mixed_batch_as_the_functions_do() -> None:
    images = [noise(30, 50), noise(64, 40)]
    processor = DualCodebookImageProcessor(
        do_resize=True, size={"shortest_edge": 24}, do_center_crop=True, crop_size={"height": 24, "width": 24}
    )
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, torch.stack([to_pixels(center_crop(resize_shorter_side(i, 24), 24)) for i in images]))
    exact = DualCodebookImageProcessor(do_resize=True, size={"height": 16, "width": 8})
    assert exact(images, return_tensors="pt")["pixel_values"].shape == (2, 3, 16, 8)


def test_a_batch_of_different_sizes_is_a_value_error_that_names_the_sizes() -> None:
    processor = DualCodebookImageProcessor()
    with pytest.raises(ValueError, match=r"`images`.*20x12.*50x30"):
        processor([noise(), noise(30, 50)], return_tensors="pt")
    assert [array.shape for array in processor([noise(), noise(30, 50)])["pixel_values"]] == [(3, 12, 20), (3, 30, 50)]
    with pytest.raises(ValueError, match=r"`crop_size`.*256x256.*20x12"):
        processor(noise(), do_center_crop=True, return_tensors="pt")


def test_the_processor_takes_paths_bytes_and_arrays(tmp_path) -> None:
    image = noise(18, 21)
    image.save(tmp_path / "a.png")
    array = np.array(image)
    processor = DualCodebookImageProcessor()
    sources = (str(tmp_path / "a.png"), tmp_path / "a.png", encoded(image, "PNG"), array, torch.from_numpy(array))
    for source in (*sources, np.moveaxis(array, -1, 0)):
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"][0], to_pixels(image))
    grey = processor(array[..., :1], return_tensors="pt")["pixel_values"]
    assert torch.equal(grey[0], to_pixels(Image.fromarray(array[..., 0]).convert("RGB")))
    clear = np.zeros((5, 6, 4), dtype=np.uint8)
    assert torch.equal(processor(clear, return_tensors="pt")["pixel_values"], torch.ones(1, 3, 5, 6))


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_the_processor_takes_grey_arrays_and_masks_of_two_dimensions(convert) -> None:
    grey = np.arange(30, dtype=np.uint8).reshape(5, 6)
    processor = DualCodebookImageProcessor()
    expected = to_pixels(Image.fromarray(grey).convert("RGB"))
    for source in (convert(grey), convert(grey.astype(np.float32)), convert(grey.astype(np.int64)), [convert(grey)]):
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected[None])
    assert processor([convert(grey)] * 2, return_tensors="pt")["pixel_values"].shape == (2, 3, 5, 6)
    mask = processor(convert(grey > 9), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(mask, to_pixels(Image.fromarray(grey > 9).convert("RGB")))


@pytest.mark.parametrize("shape", [(7,), (2, 5, 6), (5, 6, 2), (0, 4), (1, 1, 2, 5, 6)])
def test_arrays_of_another_shape_are_refused_in_one_short_message(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^`images` must be of shape \(H, W\), .*") as caught:
        DualCodebookImageProcessor()(np.zeros(shape, np.uint8))
    assert str(shape) in str(caught.value) and len(str(caught.value)) < 150


@pytest.mark.parametrize("dtype", [np.complex64, object, "U1"])
def test_arrays_of_what_is_no_real_number_are_refused(dtype) -> None:
    with pytest.raises(ValueError, match=f"`images` must hold integers, real numbers.*{np.dtype(dtype)}"):
        DualCodebookImageProcessor()(np.ones((4, 4, 3)).astype(dtype))


def test_floats_in_0_1_are_refused_where_they_would_be_divided_by_255() -> None:
    values = np.linspace(0, 1, 75, dtype=np.float32).reshape(5, 5, 3)
    processor = DualCodebookImageProcessor()
    for source in (values, torch.from_numpy(values), torch.from_numpy(values).bfloat16()):
        with pytest.raises(ValueError, match=r"`images` holds float32 of at most 1: .* pass do_rescale=False"):
            processor(source, return_tensors="pt")
        pixels = processor(source, do_rescale=False, return_tensors="pt")["pixel_values"]
        assert pixels.min() == -1 and pixels.max() == 1
    black = processor(np.zeros((5, 5, 3)), return_tensors="pt")["pixel_values"]  # the same in both ranges
    assert (black == -1).all()


@pytest.mark.parametrize(
    "values, options",
    [
        ([0, 256], {}),
        ([-1, 200], {}),
        ([0.0, np.nan], {}),
        ([0.0, 2.0], {"do_rescale": False}),
        ([-0.5, 0.5], {"do_rescale": False}),
    ],
)
def test_values_outside_the_documented_range_are_refused(values: list[float], options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"`images` must hold values in 0\.\.(255|1) with do_rescale"):
        DualCodebookImageProcessor()(np.array([values]), **options)


def test_without_rescaling_and_normalisation_values_are_taken_as_they_are() -> None:
    values = np.linspace(-1, 1, 75, dtype=np.float32).reshape(3, 5, 5)
    processor = DualCodebookImageProcessor(do_rescale=False, do_normalize=False)
    assert torch.equal(processor(values, return_tensors="pt")["pixel_values"][0], torch.from_numpy(values))


def test_the_processor_does_not_enlarge_a_long_image_whole() -> None:
    long = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60000, 1, 3), dtype=np.uint8))
    processor = DualCodebookImageProcessor(do_resize=True)
    with pytest.raises(ValueError, match="1x60000 is too long"):
        processor(long)
    pixels = processor([long, center_crop(long, (40, 1))], do_center_crop=True, return_tensors="pt")["pixel_values"]
    assert (pixels[0] - pixels[1]).abs().max() <= 2 / 255


def test_postprocess_undoes_preprocess() -> None:
    processor = DualCodebookImageProcessor()
    images = [noise(9, 7), noise(9, 7).transpose(Image.Transpose.ROTATE_180)]
    restored = processor.postprocess(processor(images, return_tensors="pt")["pixel_values"])
    assert all(np.array_equal(a, b) for a, b in zip(restored, images, strict=True))
    with pytest.raises(ValueError, match=r"`pixel_values`.*\(3, 9, 7\)"):
        processor.postprocess(torch.zeros(3, 9, 7))


@pytest.mark.parametrize("max_pixels", [None, 5000, DEFAULT_MAX_PIXELS])
def test_options_survive_saving(tmp_path, max_pixels: int | None) -> None:
    saved = DualCodebookImageProcessor(max_pixels=max_pixels, do_center_crop=True, crop_size={"height": 8, "width": 9})
    saved.save_pretrained(tmp_path)
    loaded = DualCodebookImageProcessor.from_pretrained(tmp_path)
    assert loaded.max_pixels == max_pixels
    assert loaded.to_dict() == saved.to_dict()
    assert loaded(noise(90, 80), return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 9)


@pytest.mark.parametrize(
    "options", [{"image_mean": [0.0] * 3, "image_std": [1.0] * 3}, {"do_normalize": False}], ids=str
)
def test_postprocess_undoes_the_processors_own_normalisation(options):
    image = Image.effect_mandelbrot((20, 10), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    processor = DualCodebookImageProcessor(**options)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.min() >= 0 and pixels.max() <= 1
    assert processor.postprocess(pixels)[0].tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="do_rescale"):
        DualCodebookImageProcessor(do_rescale=False).postprocess(pixels)
