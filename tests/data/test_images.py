from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptq4sam.data import ImageFolder, images, read_image
from ptq4sam.data.images import read_size
from ptq4sam.errors import ConfigError, DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def _halves(width: int = 40, height: int = 24) -> Image.Image:
    """Left half red, right half blue."""
    picture = Image.new("RGB", (width, height), RED)
    picture.paste(BLUE, (width // 2, 0, width, height))
    return picture


def _near(pixel: np.ndarray, colour: tuple[int, int, int], tolerance: int = 6) -> bool:
    return bool((np.abs(pixel.astype(int) - colour) <= tolerance).all())


def _save_rotated(path: Path, orientation: int, picture: Image.Image | None = None) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    (picture or _halves()).save(path, exif=exif)
    return path


def test_rgb_keeps_its_bytes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert np.array_equal(read, pixels)
    assert read.dtype == np.uint8
    assert read.flags.writeable


def test_grey_scale_has_three_equal_channels(tmp_path: Path) -> None:
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.repeat(grey[..., None], 3, axis=2))


def test_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_has_the_colours_it_was_made_from(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    _halves().convert("CMYK").save(path)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    read = read_image(path)
    assert _near(read[10, 5], RED)
    assert _near(read[10, 35], BLUE)


def test_palette(tmp_path: Path) -> None:
    _halves().convert("P").save(tmp_path / "a.gif")
    read = read_image(tmp_path / "a.gif")
    assert read.shape == (24, 40, 3)
    assert _near(read[0, 0], RED)
    assert _near(read[0, 39], BLUE)


def test_transparent_pictures_are_laid_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "rgba.png")
    read = read_image(tmp_path / "rgba.png")
    assert read[0, 0].tolist() == list(RED)
    assert read[0, 1].tolist() == list(WHITE)
    assert _near(read[0, 2], (127, 127, 127), 1)
    Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").tolist() == [[[9] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([*GREEN, *BLUE])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    assert read_image(tmp_path / "p.png").tolist() == [[list(GREEN), list(WHITE)]]


# Where the corner that is drawn red ends up, for each EXIF orientation of a picture 40x24.
@pytest.mark.parametrize(
    ("orientation", "shape", "corner"),
    [
        (1, (24, 40), (0, 0)),
        (2, (24, 40), (0, -1)),
        (3, (24, 40), (-1, -1)),
        (4, (24, 40), (-1, 0)),
        (5, (40, 24), (0, 0)),
        (6, (40, 24), (0, -1)),
        (7, (40, 24), (-1, -1)),
        (8, (40, 24), (-1, 0)),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_exif_orientation_is_applied(
    tmp_path: Path, orientation: int, shape: tuple[int, int], corner: tuple[int, int], suffix: str
) -> None:
    picture = Image.new("RGB", (40, 24), GREEN)
    picture.paste(RED, (0, 0, 8, 8))
    path = _save_rotated(tmp_path / f"a{suffix}", orientation, picture)
    read = read_image(path)
    assert read.shape[:2] == shape
    assert read_size(path) == shape[::-1]
    corners = {(y, x): _near(read[y, x], RED, 12) for y in (0, -1) for x in (0, -1)}
    assert [place for place, red in corners.items() if red] == [corner]


def test_a_given_size_says_whether_the_annotations_are_of_the_turned_picture(
    tmp_path: Path,
) -> None:
    path = _save_rotated(tmp_path / "a.jpg", 6)
    turned, stored = read_image(path, (24, 40)), read_image(path, (40, 24))
    assert turned.shape == (40, 24, 3)
    assert _near(turned[5, 12], RED)
    assert _near(turned[35, 12], BLUE)
    assert stored.shape == (24, 40, 3)
    assert _near(stored[12, 5], RED)
    assert _near(stored[12, 35], BLUE)


def test_where_both_fit_the_picture_is_turned(tmp_path: Path) -> None:
    path = _save_rotated(tmp_path / "a.jpg", 6, _halves(40, 40))
    assert _near(read_image(path, (40, 40))[5, 20], RED)
    assert _near(read_image(path, (40, 40))[35, 20], BLUE)


def test_another_size_is_an_error_that_names_both(tmp_path: Path) -> None:
    path = _save_rotated(tmp_path / "a.jpg", 1)
    with pytest.raises(DataError, match=r"a\.jpg has 40x24 .* say 24x40"):
        read_image(path, (24, 40))


def _damaged(path: Path, how: str) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    raw = path.read_bytes()
    middle = len(raw) // 2
    path.write_bytes(
        {
            "truncated": raw[:middle],
            "empty": b"",
            "text": b"no picture at all\n" * 40,
            "header only": raw[:30],
            "garbled": raw[:middle] + b"\x55" * 400 + raw[middle + 400 :],
        }[how]
    )
    return path


@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        (".jpg", "truncated"),
        (".jpg", "empty"),
        (".jpg", "text"),
        (".jpg", "header only"),
        (".png", "truncated"),
        (".png", "header only"),
        (".png", "garbled"),
        (".tif", "truncated"),
        (".webp", "truncated"),
        (".bmp", "truncated"),
        (".gif", "header only"),
    ],
)
def test_damaged_files_are_one_line_that_names_them(tmp_path: Path, suffix: str, how: str) -> None:
    path = _damaged(tmp_path / f"a{suffix}", how)
    with pytest.raises(DataError, match=rf"a\{suffix} cannot be read: .+") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty"),
        (
            b"<!doctype html><html><title>Log in</title>",
            r'it is a web page \("Log in"\), not a pict',
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\nsize 12\n",
            "LFS pointer .* not the picture",
        ),
        (b"\x93NUMPY\x01", "it is a NumPy array, not a picture: convert it to PNG or JPEG"),
        (b"<svg/>", "it is a text that begins .*, not a picture"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "no format that Pillow knows: .*convert it to PNG"),
        (b"\x89PNG\r\n\x1a\n", "damaged or of no format"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jpg cannot be read: .*{told}"):
        read_image(tmp_path / "a.jpg")


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png is a file, not an image folder: give .+"):
        ImageFolder(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "val/a.png")
    with pytest.raises(DataError, match=r"val\.zip is packed \(ZIP, with val/a\.png\): unpack it"):
        ImageFolder(tmp_path / "val.zip")


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no image file .*b\.jpg"):
        read_image(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").mkdir()
    with pytest.raises(DataError, match=r"c\.jpg cannot be read"):
        read_image(tmp_path / "c.jpg")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".gif"])
def test_pillows_limit_of_pixels_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    _halves().save(path)
    for limit in (100, 600):  # Pillow refuses a picture of 960 pixels, or warns of it.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(path).shape == (24, 40, 3)
            assert read_size(path) == (40, 24)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_a_picture_beyond_our_limit_is_refused_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _halves().save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MOST_PIXELS", 40 * 24 - 1)
    for read in (read_image, read_size):
        with pytest.raises(DataError, match=r"a\.png has 40x24 pixels, more than .* scale it down"):
            read(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"image id 1: .*40x24"):
        ImageFolder(tmp_path)


def _folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "A.PNG", "c.jpeg"):
        _halves().save(tmp_path / name)
    _save_rotated(tmp_path / "d.jpg", 6)
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_a_folder_gives_its_pictures_by_name(tmp_path: Path) -> None:
    folder = ImageFolder(_folder(tmp_path))
    assert [r.path.name for r in folder.images] == ["A.PNG", "b.jpg", "c.jpeg", "d.jpg"]
    assert [r.id for r in folder.images] == [1, 2, 3, 4]
    assert folder.category_ids == []
    for record in folder.images:
        assert folder.load(record).shape == (record.height, record.width, 3)
    assert (folder.images[3].width, folder.images[3].height) == (24, 40)


def test_a_folder_with_a_damaged_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _folder(tmp_path)
    (tmp_path / "b.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"image id 2: .*b\.jpg .*skip what is bad"):
        ImageFolder(tmp_path)
    folder = ImageFolder(tmp_path, skip_bad=True)
    assert [r.id for r in folder.images] == [1, 3, 4]
    assert folder.skipped == {"damaged image": 1}
    assert "skipped 1 x damaged image" in caplog.text


def test_a_folder_skips_what_turns_out_to_be_damaged(tmp_path: Path) -> None:
    _folder(tmp_path)
    _damaged(tmp_path / "b.jpg", "truncated")
    strict = ImageFolder(tmp_path)
    with pytest.raises(DataError, match=r"image id 2: .*b\.jpg"):
        strict.load_or_skip(strict.images[1])
    lenient = ImageFolder(tmp_path, skip_bad=True)
    walked = [lenient.load_or_skip(record) is None for record in lenient.images]
    assert walked == [False, True, False, False]
    assert [r.id for r in lenient.images] == [1, 3, 4]
    assert lenient.skipped == {"damaged image": 1}


def test_the_limit_counts_usable_pictures(tmp_path: Path) -> None:
    _folder(tmp_path)
    (tmp_path / "A.PNG").write_bytes(b"nothing")
    assert [r.id for r in ImageFolder(tmp_path, skip_bad=True, limit=2).images] == [2, 3]
    with pytest.raises(ConfigError, match="first 0 pictures"):
        ImageFolder(tmp_path, limit=0)


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no picture"):
        ImageFolder(tmp_path)
    with pytest.raises(DataError, match="there is no image folder"):
        ImageFolder(tmp_path / "nowhere")


def test_the_fingerprint_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    _folder(tmp_path)
    before = ImageFolder(tmp_path).fingerprint()
    assert ImageFolder(tmp_path, limit=1).fingerprint() == before
    _halves(400).save(tmp_path / "b.jpg")
    changed = ImageFolder(tmp_path).fingerprint()
    (tmp_path / "b.jpg").rename(tmp_path / "e.jpg")
    assert len({before, changed, ImageFolder(tmp_path).fingerprint()}) == 3
