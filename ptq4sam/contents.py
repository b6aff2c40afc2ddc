"""What a file is by its first bytes, whatever its name says."""

from __future__ import annotations

import codecs
import re
import zipfile
import zlib
from pathlib import Path

_HEAD = 4096
"""Bytes that are looked at."""
_LONGEST_HEADER = 100_000_000
"""Bytes that the header of a safetensors file may have (its specification)."""

_PIECE = 2**24
"""Bytes that are read at once to check them."""

_LAST_PROTOCOL = 5
"""Of Python's pickles."""

_AGAIN = "download it again"
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
    b"(\xb5/\xfd": "Zstandard",
}
_OTHERS = {
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
_SUMMARY_NAMES = 3

# The first field of an ONNX model is its version; next are its producer, graph or operator sets.
_ONNX = re.compile(rb"\x08[\x03-\x20][\x12\x3a\x42]", re.DOTALL)
_LFS = re.compile(r"version https://git-lfs\S+.*?size (\d+)", re.DOTALL)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.DOTALL | re.IGNORECASE)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do: the header's length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER


def is_pickle(path: Path) -> bool:
    """Whether a file begins as pickles do, or is an archive of one."""
    with path.open("rb") as file:
        head = file.read(2)
    return zipfile.is_zipfile(path) or (head[:1] == b"\x80" and 2 <= head[-1] <= _LAST_PROTOCOL)


def damaged_entry(path: Path) -> str | None:
    """Name of the first entry of a ZIP archive whose bytes have another checksum than it says.

    torch does not look at checksums, and may have written none (`set_crc32_options(False)`): where
    none at all is right, none is wrong.

    Returns:
        None for no such entry, and for no archive.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        right, wrong = 0, None
        for entry in archive.infolist():
            if entry.file_size == 0:
                continue
            try:
                with archive.open(entry) as file:
                    while file.read(_PIECE):
                        pass
                right += 1
            except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError):
                wrong = wrong or entry.filename
    return wrong if right else None


def otherwise(
    path: Path, wanted: str = "weights", advice: str = "give the file of a SAM's weights"
) -> str | None:
    """What a file is that cannot be what is wanted, and what to do.

    Args:
        path: the file.
        wanted: what it should be: weights, or what is told by no other bytes.
        advice: what to do with a file of something else.

    Returns:
        The rest of a sentence that begins with the file, as "is empty: download it again"; None for
        what may be weights, sound or damaged.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return f"is empty (0 bytes): {_AGAIN}"
    if not head.strip(b"\0"):
        return f"begins with {len(head)} zeros, as a download that broke off: {_AGAIN}"
    for magic, kind in _PACKED.items():
        if head.startswith(magic):
            return f"is packed ({kind}): unpack it and give what is in it"
    if head[257:262] == b"ustar":
        return "is packed (tar): unpack it and give what is in it"
    for magic, kind in _OTHERS.items():
        if head.startswith(magic) and kind != wanted:
            return f"is {kind}, not {wanted}: {advice}"
    if _ONNX.match(head):
        return (
            "is an ONNX graph, not weights: give the folder that ptq4sam export wrote, or the "
            "weights that the graph was made of"
        )
    return _archive(path) or _text(head, wanted)


def _archive(path: Path) -> str | None:
    """As `otherwise`, for a ZIP archive; torch.save writes one with data.pkl in it."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if not any(name.endswith("data.pkl") for name in names):
        more = ", ..." if len(names) > _SUMMARY_NAMES else ""
        held = ", ".join(names[:_SUMMARY_NAMES]) + more if names else "nothing"
        return f"is packed (ZIP, with {held}): unpack it and give what is in it"
    if any(name.endswith("constants.pkl") for name in names):
        return (
            "is a TorchScript program, not weights: save the state dict of the module that it "
            "was made of, torch.save(model.state_dict(), 'weights.pth')"
        )
    return None


def _text(head: bytes, wanted: str) -> str | None:
    """As `otherwise`, for a text: what a server, Git or an editor left in the place of a file."""
    text = _decoded(head)
    if text is None:
        return None
    pointer = _LFS.match(text)
    if pointer is not None:
        return (
            f"is a Git LFS pointer to {int(pointer[1]):,} bytes, not the "
            f"{wanted.removeprefix('a ')}: run git lfs pull where it was cloned, or download the "
            "file itself"
        )
    lowered = text.lower()
    if lowered.startswith(("<!doctype html", "<html")) or "<html" in lowered[:500]:
        title = _TITLE.search(text)
        named = f' ("{_short(title[1])}")' if title is not None and title[1].strip() else ""
        return (
            f"is a web page{named}, not {wanted}: download the file itself again (a page comes "
            "instead where a server wants a login or a confirmation)"
        )
    if lowered.startswith("<?xml") and "<net " in lowered:
        return (
            "is an OpenVINO graph, not weights: give the folder that ptq4sam export wrote, or the "
            "weights that the graph was made of"
        )
    return f'is a text that begins "{_short(text)}", not {wanted}: {_AGAIN}'


def _decoded(head: bytes) -> str | None:
    """The beginning of a file as text; None for what is no text."""
    try:
        # Not at once: the last character may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        if not head.lstrip().startswith(b"<"):
            return None
        text = head.decode("latin-1")
    text = text.strip("\ufeff \t\r\n")
    printable = all(character.isprintable() or character in "\t\r\n" for character in text)
    return text if printable else None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
