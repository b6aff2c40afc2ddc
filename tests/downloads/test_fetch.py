"""Downloads from a server that cuts the connection, lies about the length and sends wrong files."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import logging
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptq4sam.downloads import Asset, Digest, State, fetch, state_of
from ptq4sam.downloads.fetch import OnBytes
from ptq4sam.errors import DownloadError, in_one_line
from tests.full_disks import no_bytes

CONTENT = bytes(range(256)) * 3000


@dataclasses.dataclass
class Behaviour:
    """What the server does, and what it was asked for."""

    content: bytes = CONTENT
    cuts: list[int] = dataclasses.field(default_factory=list)
    claimed: int | None = None
    status: int = 200
    kind: str = "application/octet-stream"
    ranges: bool = True
    tag: str = '"one"'
    asked: list[str | None] = dataclasses.field(default_factory=list)


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
def url(behaviour: Behaviour) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            behaviour.asked.append(asked)
            first = 0
            if asked and behaviour.ranges and self.headers.get("If-Range") in (None, behaviour.tag):
                first = int(asked.removeprefix("bytes=").rstrip("-"))
            body = behaviour.content[first:]
            status = 206 if first else behaviour.status
            if first >= len(behaviour.content):
                status, body = 416, b""
            self.send_response(status)
            self.send_header("Content-Type", behaviour.kind)
            self.send_header("ETag", behaviour.tag)
            claimed = behaviour.claimed or len(body)
            self.send_header("Content-Length", str(claimed))
            self.end_headers()
            if behaviour.cuts:
                body = body[: behaviour.cuts.pop(0)]
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/file.bin"
    server.shutdown()
    thread.join()
    server.server_close()


def asset(url: str, **more: object) -> Asset:
    digest = Digest("sha256", hashlib.sha256(CONTENT).hexdigest()[:8])
    fields = {"size": len(CONTENT), "digest": digest, **more}
    return Asset("thing", Path("ckpt/file.bin"), url, "MIT", **fields)  # type: ignore[arg-type]


def get(what: Asset, root: Path, on_bytes: OnBytes = lambda done, total: None) -> Path:
    return fetch(what, root, on_bytes, attempts=2, pause=0)


def test_a_file_comes_once(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    what = asset(url)
    assert state_of(what, tmp_path) is State.MISSING
    path = get(what, tmp_path, lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "ckpt/file.bin"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [file.name for file in path.parent.glob("[!.]*")] == ["file.bin"]
    assert state_of(what, tmp_path) is State.THERE
    get(what, tmp_path)
    assert len(behaviour.asked) == 1


def test_a_cut_connection_goes_on(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.cuts = [1000, 50_000, 1]
    assert get(asset(url), tmp_path).read_bytes() == CONTENT
    assert behaviour.asked == [None, "bytes=1000-", "bytes=51000-", "bytes=51001-"]


def test_a_full_disk_names_the_file(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.tag = ""
    # Free room was asked for before: this disk fills while the file comes.
    what = dataclasses.replace(asset(url), path=Path("d/file.bin"))
    (tmp_path / "d").mkdir()
    with no_bytes() as reason, pytest.raises(OSError, match=reason) as caught:
        get(what, tmp_path)
    assert in_one_line(caught.value) == f"{tmp_path / 'd' / 'file.bin.partial'}: {reason}"


def test_a_partial_file_of_before_goes_on(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.cuts = [7000, 0, 0, 0]
    with pytest.raises(DownloadError, match="after 7,000 bytes, which are kept"):
        get(asset(url), tmp_path)
    assert state_of(asset(url), tmp_path) is State.PARTIAL
    behaviour.cuts, behaviour.asked = [], []
    assert get(asset(url), tmp_path).read_bytes() == CONTENT
    assert behaviour.asked == ["bytes=7000-"]


@pytest.mark.parametrize("changed", [True, False])
def test_another_file_or_no_ranges_start_anew(
    changed: bool, url: str, behaviour: Behaviour, tmp_path: Path
) -> None:
    behaviour.cuts = [7000, 0, 0]
    with pytest.raises(DownloadError):
        get(asset(url), tmp_path)
    behaviour.cuts = []
    if changed:
        behaviour.tag = '"two"'
    else:
        behaviour.ranges = False
    assert get(asset(url), tmp_path).read_bytes() == CONTENT


def test_a_server_that_claims_too_much(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.claimed = len(CONTENT) + 1000
    with pytest.raises(DownloadError, match="the server has 769,000 bytes"):
        get(asset(url), tmp_path)
    assert not (tmp_path / "ckpt/file.bin").exists()


def test_a_server_that_claims_too_little(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.claimed = 500
    behaviour.ranges = False
    with pytest.raises(DownloadError, match="was cut"):
        get(asset(url), tmp_path)
    behaviour.claimed, behaviour.content, behaviour.ranges = None, CONTENT[:500], True
    with pytest.raises(DownloadError, match="500 bytes came, the publisher's file has 768,000"):
        get(asset(url), tmp_path)


def test_a_wrong_file_is_deleted(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.content = CONTENT[::-1]
    with pytest.raises(DownloadError, match=r"a wrong file came and was deleted .*sha256"):
        get(asset(url), tmp_path)
    assert list((tmp_path / "ckpt").glob("[!.]*")) == []


def test_a_page_that_is_sent_as_weights_is_deleted(
    url: str, behaviour: Behaviour, tmp_path: Path
) -> None:
    behaviour.content = b"<html><title>Sign in</title></html>"
    unknown = dataclasses.replace(asset(url), path=Path("a.pth"), size=None, digest=None)
    with pytest.raises(DownloadError, match=r'was deleted \(it is a web page \("Sign in"\)'):
        get(unknown, tmp_path)
    assert list(tmp_path.glob("[!.]*")) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "text/html", "a web page instead of the file"),
        ("status", 404, "the server says 404"),
        ("status", 503, "the server says 503"),
    ],
)
def test_refusals(
    field: str, value: object, message: str, url: str, behaviour: Behaviour, tmp_path: Path
) -> None:
    setattr(behaviour, field, value)
    with pytest.raises(DownloadError, match=message) as error:
        get(asset(url), tmp_path)
    assert "put it at ckpt/file.bin" in str(error.value)


def test_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="is there a network") as error:
        get(asset("http://127.0.0.1:9/file.bin"), tmp_path)
    assert "\n" not in str(error.value)


def test_no_room(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    with pytest.raises(DownloadError, match="768,000 bytes are to come, 10 are free"):
        get(asset(url), tmp_path)


def archive(names: list[str]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as packed:
        for name in names:
            packed.writestr(name, name)
    return memory.getvalue()


def test_an_archive_is_unpacked(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.content = archive(["annotations/one.json", "annotations/two.json"])
    more = {
        "size": None,
        "digest": None,
        "unpacked": Path("data"),
        "makes": (Path("annotations/two.json"),),
    }
    what = asset(url, **more)
    (tmp_path / "data/annotations").mkdir(parents=True)
    (tmp_path / "data/annotations/mine.json").write_text("mine")
    assert get(what, tmp_path) == tmp_path / "data"
    found = sorted(path.name for path in (tmp_path / "data/annotations").iterdir())
    assert found == ["mine.json", "one.json", "two.json"]
    assert state_of(what, tmp_path) is State.THERE
    (tmp_path / "ckpt/file.bin").unlink()
    assert state_of(what, tmp_path) is State.THERE, "the archive need not be kept"


def test_what_is_no_archive(url: str, tmp_path: Path) -> None:
    what = asset(url, unpacked=Path("data"), makes=(Path("x"),))
    with pytest.raises(DownloadError, match="is no ZIP archive"):
        get(what, tmp_path)
    assert state_of(what, tmp_path) is State.PARTIAL


def test_two_downloads_at_once_do_not_mix(
    url: str, behaviour: Behaviour, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others: list[threading.Thread] = []

    def join_in(done: int, total: int | None) -> None:
        if not others:
            others.append(threading.Thread(target=get, args=(asset(url), tmp_path)))
            others[0].start()
            time.sleep(0.3)

    with caplog.at_level(logging.INFO, "ptq4sam"):
        path = get(asset(url), tmp_path, join_in)
        others[0].join()
    assert path.read_bytes() == CONTENT
    # The second waited, and found the file.
    assert len(behaviour.asked) == 1
    assert "waiting for it" in caplog.text
