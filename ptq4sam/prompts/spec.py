"""How the command line names a prompt source, taken apart, and what such a source needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ptq4sam.downloads import ASSETS, Missing
from ptq4sam.errors import ConfigError
from ptq4sam.nearest import nearest

BOXES = "boxes"
"""The kind of a source that is a file of boxes."""

FORMS = {
    BOXES: "BOXES.json",
    "ground-truth": "ground-truth[:all]",
    "clicks": "clicks[:N]",
    "scene-detector": "scene-detector",
    "onnx": "onnx:FILE",
    "yolox": "yolox:FILE.pth",
    "hdetr": "hdetr:FILE",
    "focalnet-dino": "focalnet-dino:FILE",
    "torchvision": "torchvision:NAME[:FILE]",
    "transformers": "transformers:FOLDER",
    "mmdet": "mmdet:CONFIG:FILE",
}
"""How each kind of source is named."""

_PAIR = re.compile(r"(.+?):((?:[A-Za-z]:[\\/])?[^:]+)")
"""Two names; the second may begin with a drive of Windows."""

_ALONE = ("ground-truth", "scene-detector")
ALL = "all"
"""Of ground truth: crowd regions too."""
_MOST_CLICKS = 20

PACKAGES = {
    "onnx": (("onnxruntime",), "pip install 'ptq4sam[onnx]'"),
    "transformers": (("transformers",), "pip install 'ptq4sam[transformers]'"),
    "mmdet": (("mmengine", "mmcv", "mmdet"), "./environment.sh mmdet"),
}
"""What a kind of source imports besides what is always installed, and how to install it."""


@dataclass(frozen=True)
class Spec:
    """A prompt source's name, taken apart.

    Attributes:
        kind: a key of `FORMS`.
        name: of the model in torchvision, the configuration for mmdet, the folder for transformers,
            how many clicks, `ALL` of ground truth.
        file: boxes or weights; None where there are none, or torchvision's own are meant.
    """

    kind: str
    name: str = ""
    file: Path | None = None


def parse_spec(text: str) -> Spec:
    """Read the name of a prompt source.

    Raises:
        ConfigError: it is none; the message names the nearest one, or what it lacks.
    """
    kind, _, rest = text.partition(":")
    if text in _ALONE:
        return Spec(text)
    if text == f"ground-truth:{ALL}":
        return Spec(kind, ALL)
    if kind == "clicks":
        return Spec(kind, str(_clicks(text, rest)))
    if kind in FORMS and kind not in (BOXES, *_ALONE):
        if not rest:
            raise ConfigError(f"prompts {text!r} name no detector: write {FORMS[kind]}")
        return _with_argument(kind, rest)
    if is_boxes_file(text):
        return Spec(BOXES, file=Path(text).expanduser())
    raise ConfigError(
        f"no prompts are named {text!r}: {_hint(text)}known are {', '.join(FORMS.values())}"
    )


def _clicks(text: str, count: str) -> int:
    if text == "clicks":
        return 1
    if not count.isascii() or not count.isdigit() or not 1 <= int(count) <= _MOST_CLICKS:
        raise ConfigError(
            f"prompts {text!r}: write clicks, or clicks:N for up to N clicks an object, "
            f"1 to {_MOST_CLICKS}"
        )
    return int(count)


def is_boxes_file(text: str) -> bool:
    """Whether a prompt source's name is that of a file of boxes."""
    return text.lower().endswith((".json", ".json.gz"))


def _with_argument(kind: str, rest: str) -> Spec:
    if kind == "transformers":
        return Spec(kind, rest)
    if kind == "torchvision":
        name, _, file = rest.partition(":")
        return Spec(kind, name, Path(file).expanduser() if file else None)
    if kind != "mmdet":
        return Spec(kind, file=Path(rest).expanduser())
    pair = _PAIR.fullmatch(rest)
    if pair is None:
        config = rest.strip(":")
        raise ConfigError(
            f"prompts 'mmdet:{rest}' name no weights: write mmdet:{config}:FILE{_weights(config)}"
        )
    return Spec(kind, pair[1], Path(pair[2]).expanduser())


def _weights(config: str) -> str:
    """The published weights of a configuration of mmdetection, by its name in version 2 or 3."""
    wanted = _plain(Path(config).stem) + "_"
    for asset in ASSETS.values():
        if _plain(asset.path.name).startswith(wanted):
            return f", where FILE is {asset.path} of ptq4sam download {asset.name}"
    return ""


def _plain(name: str) -> str:
    """Without what differs between version 2 (dino_4scale_8x2) and 3 (dino-4scale_8xb2)."""
    return name.replace("-", "_").replace("8xb", "8x")


def _hint(text: str) -> str:
    kind = text.partition(":")[0]
    if kind == text and Path(text).suffix == ".onnx":
        return f"did you mean onnx:{text}? "
    if Path(text).is_file():
        return "a file of boxes is a list of COCO results, named *.json; "
    near = nearest(kind, (name for name in FORMS if name != BOXES))
    return f"did you mean {FORMS[near]}? " if near else ""


def look_for_prompts(missing: Missing, text: str, what: str = "detector") -> None:
    """Note the files and packages that a prompt source needs and that are not there.

    Args:
        missing: is told.
        text: the source's name.
        what: it is, for the message.

    Raises:
        ConfigError: the name is not understood.
    """
    spec = parse_spec(text)
    file = spec.file
    if spec.kind == "torchvision" and file is None:
        from ptq4sam.prompts.torchvision_detector import own_weights

        file = own_weights(spec.name)
    if spec.kind == "transformers":
        from ptq4sam.prompts.transformers_detector import is_path

        file = Path(spec.name) if is_path(spec.name) else None
    if spec.kind == BOXES:
        advice = "ptq4sam prompts writes such a file"
        missing.look_for("file of boxes", file, advice)
    elif spec.kind == "transformers":
        missing.look_for(what, file, "give a folder that save_pretrained has written")
    else:
        missing.look_for(what, file)
    if spec.kind in PACKAGES:
        packages, install = PACKAGES[spec.kind]
        missing.look_for_packages(f"{what} {spec.kind}", packages, install)
