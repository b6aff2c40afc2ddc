from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptq4sam.data import ImageFolder, read_image
from ptq4sam.errors import DataError

Pixels = np.ndarray

RGB, GREY_AND_ALPHA, RGBA = 2, 4, 6
"""A PNG's colour types."""


def _png(path: Path, pixels: Pixels, colour_type: int) -> Path:
    """A PNG with 16 bits a channel, which Pillow writes in grey alone."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    signature = b"\x89PNG\r\n\x1a\n"
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(signature + body)
    return path


def _tiff(
    path: Path, pixels: Pixels, order: str, deflated: bool = False, *, kind: str = "RGB"
) -> Path:
    """A TIFF with 16 bits a channel of RGB, premultiplied RGBa or CMYK."""
    height, width, bands = pixels.shape
    strip = pixels.astype(f"{order}u2").tobytes()
    strip = zlib.compress(strip) if deflated else strip
    count = 10 if kind == "RGBa" else 9
    depths = 8 + 2 + 12 * count + 4
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, bands, depths),
        (259, 3, 1, 8 if deflated else 1),
        (262, 3, 1, 5 if kind == "CMYK" else 2),
        (273, 4, 1, depths + 2 * bands),
        (277, 3, 1, bands),
        (278, 3, 1, height),
        (279, 4, 1, len(strip)),
        # One extra band, of premultiplied transparency.
        *([(338, 3, 1, 1)] if kind == "RGBa" else []),
    ]
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, count)
    for tag, form, number, value in entries:
        short = form == 3 and number == 1
        content += struct.pack(f"{order}HHI", tag, form, number)
        content += struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
    content += struct.pack(f"{order}I{bands}H", 0, *[16] * bands)
    path.write_bytes(content + strip)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 163, 255], [0, 1, 163, 255]),
        ([0, 4, 256, 1023], [0, 1, 64, 255]),
        ([0, 480, 2613, 4095], [0, 30, 163, 255]),
        ([0, 64, 4096, 16383], [0, 1, 64, 255]),
        ([0x00FF, 0x0100, 0x8000, 0xFFFF], [0, 1, 128, 255]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_grey_of_16_bits_is_scaled_by_the_bits_of_the_largest(
    tmp_path: Path, suffix: str, values: list[int], expected: list[int]
) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.array([values], np.uint16)).save(path)
    assert read_image(path).tolist() == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "<", ">", "<deflated", ">deflated"])
def test_colours_of_16_bits_are_scaled_by_the_bits_of_the_largest(
    tmp_path: Path, bits: int, kind: str
) -> None:
    """The upper bytes alone, which Pillow gives, would be black at 8 bits."""
    rng = np.random.default_rng(bits)
    pixels = rng.integers(0, 2**bits, (5, 7, 3)).astype(np.uint16)
    pixels[0, 0] = 2**bits - 1
    if kind == "RGB":
        path = _png(tmp_path / "a.png", pixels, RGB)
    elif kind == "RGBA":
        # Opaque: the largest value that the file's bits can say.
        opaque = np.full((5, 7, 1), 0xFFFF, np.uint16)
        path = _png(tmp_path / "a.png", np.concatenate([pixels, opaque], axis=2), RGBA)
    else:
        path = _tiff(tmp_path / "a.tif", pixels, kind[0], deflated="deflated" in kind)
    assert np.array_equal(read_image(path), pixels >> (bits - 8))


@pytest.mark.parametrize("colours", [False, True])
def test_a_few_values_far_above_all_others_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, colours: bool
) -> None:
    """A hot pixel makes a picture of 12 bits one of 16, and so dark."""
    caplog.set_level("INFO")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 2**12, (50, 60, 3) if colours else (50, 60)).astype(np.uint16)
    for few, told in ((0, False), (1, True), (300, False)):
        pixels.reshape(-1)[:few] = 65535
        if colours:
            read_image(_png(tmp_path / "a.png", pixels, RGB))
        else:
            Image.fromarray(pixels).save(tmp_path / "a.png")
            read_image(tmp_path / "a.png")
        assert ("16-bit values, though hardly any needs more than 12" in caplog.text) == told
        caplog.clear()


@pytest.mark.parametrize("most", [0xFFFF, 4095])
def test_transparency_of_16_bits_is_scaled_by_itself(tmp_path: Path, most: int) -> None:
    pixels = np.array([[[255, 128, 0, alpha] for alpha in (0, most // 2, most)]])
    path = _png(tmp_path / "a.png", pixels, RGBA)
    assert read_image(path)[0, :, 1].tolist() == pytest.approx([255, 191, 128], abs=1)


def test_32_bits_and_floating_point_numbers(tmp_path: Path) -> None:
    def read(values: list[float], kind: type) -> list[int]:
        Image.fromarray(np.array([values], kind)).save(tmp_path / "a.tif")
        return read_image(tmp_path / "a.tif")[0, :, 0].tolist()

    assert read([0, 480, 2613], np.int32) == [0, 30, 163]
    assert read([0, 255, 30.7], np.float32) == [0, 255, 30]
    assert read([0, 0.5, 1, 1.01], np.float32) == [0, 128, 255, 255]
    assert read([0, 65535, 256], np.float32) == [0, 255, 1]


@pytest.mark.parametrize(
    ("values", "kind", "told"),
    [
        ([0, 70000], np.int32, "exceed 16 bits: they go from 0 to 70000"),
        ([-1, 5], np.int32, "exceed 16 bits: they go from -1 to 5"),
        ([0, 70000], np.float32, "exceed 16 bits"),
        ([-0.5, 1], np.float32, "floating-point numbers below 0"),
        ([np.nan, 1], np.float32, "floating-point numbers below 0 or not finite"),
        ([np.inf, 1], np.float32, "floating-point numbers below 0 or not finite"),
    ],
)
def test_what_no_bits_are_known_of_is_refused(
    tmp_path: Path, values: list[float], kind: type, told: str
) -> None:
    Image.fromarray(np.array([values], kind)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif cannot be read: .*{told}.*convert it to 8 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("opaque", [0xFFFF, "as many bits"])
def test_grey_with_transparency_is_scaled_as_grey_alone(
    tmp_path: Path, bits: int, opaque: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of which Pillow reads the upper bytes alone, and has no mode for the lower ones."""
    caplog.set_level("INFO")
    grey = np.random.default_rng(bits).integers(0, 2**bits, (5, 7, 1))
    grey[0, 0] = 2**bits - 1
    alpha = np.full_like(grey, opaque if isinstance(opaque, int) else 2**bits - 1)
    path = _png(tmp_path / "a.png", np.concatenate([grey, alpha], axis=2), GREY_AND_ALPHA)
    assert np.array_equal(read_image(path), np.repeat(grey >> (bits - 8), 3, axis=2))
    assert f"a.png holds {bits}-bit values" in caplog.text


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflated", [False, True])
def test_other_colours_of_16_bits(tmp_path: Path, order: str, deflated: bool) -> None:
    ink = np.array([[[0, 0, 0, 0], [4095, 0, 0, 0], [0, 0, 0, 4095], [0, 2048, 0, 0]]])
    cmyk = _tiff(tmp_path / "a.tif", ink, order, deflated, kind="CMYK")
    expected = [[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 127, 255]]
    assert read_image(cmyk).tolist() == [expected]
    # Half transparent: colours, stored times 0.5, lie on white.
    colours = np.array([[[4095, 2048, 0, 0xFFFF], [2048, 0, 0, 0x8000], [0, 0, 0, 0]]])
    premultiplied = _tiff(tmp_path / "b.tif", colours, order, deflated, kind="RGBa")
    expected = [[255, 128, 0], [255, 127, 127], [255, 255, 255]]
    assert np.abs(read_image(premultiplied) - np.array([expected])).max() <= 1


def test_it_is_noted_once_a_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name, largest in (("a.png", 255), ("b.png", 4095)):
        Image.fromarray(np.array([[0, largest]], np.uint16)).save(tmp_path / name)
    Image.new("L", (2, 1)).save(tmp_path / "narrow.png")
    folder = ImageFolder(tmp_path)
    for record in [*folder.images, *folder.images]:
        folder.load(record)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "a.png holds 8-bit values" in told
    caplog.clear()
    read_image(tmp_path / "b.png")
    assert "b.png holds 12-bit values" in caplog.text
    caplog.clear()
    read_image(tmp_path / "narrow.png")
    assert not caplog.records
