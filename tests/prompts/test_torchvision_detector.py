from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.data import ImageRecord
from ptq4sam.errors import CheckpointError, ConfigError
from ptq4sam.prompts import TorchvisionDetector

NAME = "ssdlite320_mobilenet_v3_large"
RECORD = ImageRecord(6, Path("a.jpg"), 90, 60)


class Fixed(nn.Module):
    """Finds the brightest pixel's neighbourhood, and some boxes that are always there."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.tensor(0.6))
        self.seen: list[Tensor] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.seen.extend(images)
        boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 200, 20], [1, 1, 2, 2]])
        scores = torch.stack([self.score, self.score + 0.3, self.score * 0])
        return [{"boxes": boxes, "scores": scores, "labels": torch.tensor([1, 90, 3])}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(NAME, weights=None, weights_backbone=None)
    path = tmp_path_factory.mktemp("weights") / "ssd.pth"
    torch.save(model.state_dict(), path)
    return path


def _image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def test_any_module_of_that_interface_gives_prompts() -> None:
    model, image = Fixed(), _image()
    source = TorchvisionDetector(model)
    found = source.prompts(RECORD, image)
    assert found.image_id == 6
    assert found.boxes.tolist() == [[5, 5, 90, 20], [0, 0, 10, 10]]
    assert np.allclose(found.scores, [0.9, 0.6])
    assert found.category_ids.tolist() == [90, 1]
    assert np.allclose(model.seen[0].permute(1, 2, 0).numpy() * 255, image, atol=1e-3)
    assert not model.training
    assert len(TorchvisionDetector(model, limit=1).prompts(RECORD, image)) == 1


def test_numbers_that_are_none_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    model, image = Fixed(), _image()
    with torch.no_grad():
        model.score.fill_(float("nan"))
    assert len(TorchvisionDetector(model).prompts(RECORD, image)) == 0
    assert "dropped 3 x box that is not a number" in caplog.text


def test_fingerprints_follow_weights_and_settings(checkpoint: Path, tmp_path: Path) -> None:
    model = Fixed()
    first = TorchvisionDetector(model).fingerprint()
    limited = TorchvisionDetector(model, limit=5).fingerprint()
    assert TorchvisionDetector(Fixed()).fingerprint() == first
    with torch.no_grad():
        model.score.add_(0.1)
    named = TorchvisionDetector(NAME, checkpoint).fingerprint()
    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint.read_bytes() + b"\0")
    prints = {
        first,
        limited,
        TorchvisionDetector(model).fingerprint(),
        named,
        TorchvisionDetector(NAME, other).fingerprint(),
        TorchvisionDetector("fcos_resnet50_fpn", checkpoint).fingerprint(),
    }
    assert len(prints) == 6


def test_nothing_is_downloaded_unasked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*arguments: object, **options: object) -> None:
        raise AssertionError(f"asked for {arguments}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", fetched)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    command = "ptq4sam download torchvision-ssdlite320-mobilenet-v3-large$"
    with pytest.raises(CheckpointError, match=command):
        TorchvisionDetector(NAME)
    with pytest.raises(ConfigError, match="did you mean ssdlite320_mobilenet_v3_large"):
        TorchvisionDetector("ssdlite320_mobilenet_v3")
    # What torchvision or the download has put here is used.
    file = Path("ckpt/ssdlite320_mobilenet_v3_large_coco-a79551df.pth")
    file.parent.mkdir()
    file.write_bytes(checkpoint.read_bytes())
    image = _image()
    found = TorchvisionDetector(NAME).prompts(RECORD, image)
    expected = TorchvisionDetector(NAME, checkpoint).prompts(RECORD, image)
    assert np.array_equal(found.boxes, expected.boxes)


def test_a_named_model_gives_what_torchvision_gives(checkpoint: Path) -> None:
    from torchvision.models import get_model

    image = _image()
    found = TorchvisionDetector(NAME, checkpoint, limit=20).prompts(RECORD, image)
    model = get_model(NAME, weights=None, weights_backbone=None).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    with torch.no_grad():
        (expected,) = model([torch.from_numpy(image).permute(2, 0, 1) / 255.0])
    assert len(found) == 20
    top = expected["scores"].numpy()
    assert np.array_equal(found.scores, np.sort(top)[::-1][:20])
    kept = {tuple(box) for box in expected["boxes"].numpy().tolist()}
    assert all(tuple(box) in kept for box in found.boxes.tolist())


def test_weights_of_a_training_run_are_found_under_their_key(
    checkpoint: Path, tmp_path: Path
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    torch.save({"model": state, "epoch": 3}, tmp_path / "run.pth")
    image = _image()
    nested = TorchvisionDetector(NAME, tmp_path / "run.pth").prompts(RECORD, image)
    plain = TorchvisionDetector(NAME, checkpoint).prompts(RECORD, image)
    assert np.array_equal(nested.boxes, plain.boxes)


def test_unknown_names_and_unfit_weights(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no detection model 'ssdlite320'.*ssdlite320_mobilenet"):
        TorchvisionDetector("ssdlite320", checkpoint).prompts(RECORD, _image())
    with pytest.raises(CheckpointError, match=r"not there: detector .*none\.pth"):
        TorchvisionDetector(NAME, tmp_path / "none.pth")
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(3)}, other)
    with pytest.raises(CheckpointError, match=r"other\.pth has no weights of ssdlite320") as caught:
        TorchvisionDetector(NAME, other).prompts(RECORD, _image())
    assert "\n" not in str(caught.value)
    for content in (b"", b"garbage", checkpoint.read_bytes()[:5000]):
        other.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"other\.pth has no weights"):
            TorchvisionDetector(NAME, other).prompts(RECORD, _image())
    torch.save([1, 2], other)
    with pytest.raises(CheckpointError, match=r"other\.pth has no weights"):
        TorchvisionDetector(NAME, other).prompts(RECORD, _image())


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "module.pth"
    torch.save(Fixed(), path)
    with pytest.raises(CheckpointError, match=r"module\.pth has no weights"):
        TorchvisionDetector(NAME, path).prompts(RECORD, _image())
