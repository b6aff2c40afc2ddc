"""Published weights and data sets by name: where from, how large, under which licence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptq4sam.errors import ConfigError
from ptq4sam.nearest import nearest


@dataclass(frozen=True)
class Digest:
    """What is known of a file's checksum.

    Attributes:
        algorithm: as hashlib names it.
        beginning: hexadecimal digits, all or the first ones.
    """

    algorithm: str
    beginning: str

    def __str__(self) -> str:
        """As `sha256 d3bd2b23...`."""
        whole = len(self.beginning) == 2 * hashlib.new(self.algorithm).digest_size
        return f"{self.algorithm} {self.beginning}{'' if whole else '...'}"


@dataclass(frozen=True)
class Asset:
    """One file of a publisher.

    Attributes:
        name: what it is asked for by.
        path: where it belongs, below the repository's root.
        url: where it comes from.
        licence: of the publisher.
        size: bytes, which a download must have; None where they are not known for certain.
        digest: what the publisher says of its checksum, or None.
        about: bytes of copies that others keep of it, to plan by; None where none was found.
        unpacked: folder that a ZIP archive is unpacked into, or None.
        makes: files or folders that unpacking makes, below `unpacked`.
        of: an instances file: what is fetched are the first annotated pictures in it,
            CALIBRATION_PICTURES of them, into the folder `pictures`; `url` is that of the
            publisher's folder, `path` the list of what came.
        pictures: see `of`.
        needs: name of the asset that has to be there before, or None.
    """

    name: str
    path: Path
    url: str
    licence: str
    size: int | None = None
    digest: Digest | None = None
    about: int | None = None
    unpacked: Path | None = None
    makes: tuple[Path, ...] = ()
    of: Path | None = None
    pictures: Path | None = None
    needs: str | None = None

    @property
    def places(self) -> tuple[Path, ...]:
        """What is there after a download, below the repository's root."""
        if self.unpacked is None:
            return (self.path,)
        return tuple(self.unpacked / made for made in self.makes)

    def place_of(self, path: Path) -> Path:
        """The one of `places` that a file or folder of that name would be."""
        places = self.places if self.pictures is None else (self.pictures, *self.places)
        return next(place for place in places if place.name == path.name)

    @property
    def size_text(self) -> str:
        """The size for people: "375 MB", "about 2.6 GB", "?"."""
        if self.size is not None:
            return _decimal(self.size)
        return "?" if self.about is None else f"about {_decimal(self.about)}"

    @property
    def facts(self) -> str:
        """What a message says of it: size, and of weights the checksum and where they are from.

        What an archive holds is fetched and checked by the command, hardly by hand.
        """
        known = [] if self.size_text == "?" else [self.size_text]
        if self.unpacked is None and self.of is None:
            known.append("no checksum" if self.digest is None else str(self.digest))
            known.append(self.url)
        return ", ".join(known)


def _decimal(size: int) -> str:
    """Bytes in units of 1000, as publishers give them."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


CALIBRATION_PICTURES = 32
"""How many pictures of train2017 the published calibration takes: the first with annotations."""

_CKPT = Path("ckpt")
_FAMILIES = Path(__file__).resolve().parents[1] / "families"
_COCO = Path("data/coco")
_LVIS = Path("data/lvis")
_BOXES = "https://huggingface.co/mit-han-lab/efficientvit-sam/resolve/main/source_json_file/"
_MMDET = "https://download.openmmlab.com/mmdetection/"
_YOLOX = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0/"
_HDETR = "https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1/"
_FOCALNET = "https://projects4jw.blob.core.windows.net/focalnet/release/detection/"
_TORCHVISION = "https://download.pytorch.org/models/"
_COCO_SITE = "http://images.cocodataset.org/"
_COCO_TERMS = "CC BY 4.0 (annotations), Flickr's terms (pictures)"

_TORCHVISION_FILES = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("-907ea3f9", 74.239),
    "fasterrcnn_mobilenet_v3_large_fpn": ("-fb6a3cc7", 74.239),
    "fasterrcnn_resnet50_fpn": ("_coco-258fb6c6", 159.743),
    "fasterrcnn_resnet50_fpn_v2": ("_coco-dd69338a", 167.104),
    "fcos_resnet50_fpn": ("_coco-99b0c9b7", 123.608),
    "keypointrcnn_resnet50_fpn": ("_coco-fc266e95", 226.054),
    "maskrcnn_resnet50_fpn": ("_coco-bf2d0c1e", 169.84),
    "maskrcnn_resnet50_fpn_v2": ("_coco-73cbd019", 177.219),
    "retinanet_resnet50_fpn": ("_coco-eeacb38b", 130.267),
    "retinanet_resnet50_fpn_v2": ("_coco-5905b1c5", 146.037),
    "ssd300_vgg16": ("_coco-b556d3b4", 135.988),
    "ssdlite320_mobilenet_v3_large": ("_coco-a79551df", 13.418),
}
"""torchvision's detectors: how its default weights' name ends, and their MiB, as it says itself."""


def _weights(
    name: str,
    url: str,
    licence: str,
    digest: Digest | None = None,
    *,
    size: int | None = None,
    about: int | None = None,
) -> Asset:
    return Asset(name, _CKPT / url.rpartition("/")[2], url, licence, size, digest, about)


def _of_families() -> Iterator[Asset]:
    """The weights of SAMs, which stand in a file of each family."""
    for path in sorted(_FAMILIES.glob("*/weights.json")):
        for entry in json.loads(path.read_text(encoding="utf-8")):
            digest = entry.pop("digest", None)
            yield _weights(**entry, digest=None if digest is None else Digest(*digest))


def _of_torchvision(model: str, ending: str, mebibytes: float) -> Asset:
    return _weights(
        f"torchvision-{model.replace('_', '-')}",
        f"{_TORCHVISION}{model}{ending}.pth",
        "BSD-3-Clause",
        Digest("sha256", ending.rpartition("-")[2]),
        about=round(mebibytes * 2**20),
    )


def _coco(
    name: str, url: str, md5: str, *makes: str, size: int | None = None, about: int | None = None
) -> Asset:
    archive = _COCO / url.rpartition("/")[2]
    made = tuple(map(Path, makes))
    return Asset(name, archive, url, _COCO_TERMS, size, Digest("md5", md5), about, _COCO, made)


# Sizes after `about` are those of copies of the same name on the Hugging Face Hub, of YOLOX-L of
# mmdetection the copy with the published checksum; torchvision gives its own.
_EVERY = (
    *_of_families(),
    _weights("yolox-nano-onnx", _YOLOX + "yolox_nano.onnx", "Apache-2.0", size=3_659_407),
    _weights("yolox-l-onnx", _YOLOX + "yolox_l.onnx", "Apache-2.0", about=217_000_000),
    _weights("yolox-l-megvii", _YOLOX + "yolox_l.pth", "Apache-2.0", about=434_357_141),
    _weights(
        "yolox-l",
        _MMDET + "v2.0/yolox/yolox_l_8x8_300e_coco/"
        "yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth",
        "Apache-2.0",
        Digest("sha256", "d3bd2b23"),
        about=217_289_556,
    ),
    _weights(
        "faster-rcnn-r50",
        _MMDET + "v2.0/faster_rcnn/faster_rcnn_r50_fpn_2x_coco/"
        "faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth",
        "Apache-2.0",
        Digest("sha256", "a5d8aa15"),
    ),
    _weights(
        "dino-r50",
        _MMDET + "v3.0/dino/dino-4scale_r50_8xb2-12e_coco/"
        "dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth",
        "Apache-2.0",
        Digest("sha256", "55b2bba2"),
    ),
    _weights(
        "dino-swin-l",
        _MMDET + "v3.0/dino/dino-5scale_swin-l_8xb2-12e_coco/"
        "dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth",
        "Apache-2.0",
        Digest("sha256", "a654145f"),
    ),
    _weights(
        "hdetr-r50",
        _HDETR
        + "r50_hybrid_branch_lambda1_group6_t1500_dp0_mqs_lft_deformable_detr_plus_iterative_"
        "bbox_refinement_plus_plus_two_stage_36eps.pth",
        "MIT",
    ),
    _weights(
        "focalnet-dino-l",
        _FOCALNET + "focalnet_large_fl4_o365_finetuned_on_coco.pth",
        "MIT",
        about=2_740_000_000,
    ),
    *(_of_torchvision(model, *file) for model, file in _TORCHVISION_FILES.items()),
    _coco(
        "coco-val",
        _COCO_SITE + "zips/val2017.zip",
        "442b8da7639aecaf257c1dceb8ba8c80",
        "val2017",
        size=815_585_330,
    ),
    _coco(
        "coco-train",
        _COCO_SITE + "zips/train2017.zip",
        "cced6f7f71b7629ddf16f17bbcfab6b2",
        "train2017",
        about=19_300_000_000,
    ),
    # The publisher states a checksum of the archive of all pictures, of single ones neither
    # checksum nor size: this is 32 times the archive's mean.
    Asset(
        "coco-calibration",
        _COCO / "calibration_pictures.txt",
        _COCO_SITE + "train2017/",
        _COCO_TERMS,
        about=CALIBRATION_PICTURES * 19_300_000_000 // 118_287,
        of=_COCO / "annotations/instances_train2017.json",
        pictures=_COCO / "train2017",
        needs="coco-annotations",
    ),
    _coco(
        "coco-annotations",
        _COCO_SITE + "annotations/annotations_trainval2017.zip",
        "f4bbac642086de4f52a3fdda2de5fa2c",
        "annotations/instances_val2017.json",
        "annotations/instances_train2017.json",
        size=252_907_541,
    ),
    Asset("coco-vitdet", _COCO / "coco_vitdet.json", _BOXES + "coco_vitdet.json", "Apache-2.0"),
    Asset("lvis-vitdet", _LVIS / "lvis_vitdet.json", _BOXES + "lvis_vitdet.json", "Apache-2.0"),
    # A copy that TinySAM's authors publish: the data set's own page has an archive.
    Asset(
        "lvis-annotations",
        _LVIS / "lvis_v1_val.json",
        "https://github.com/xinghaochen/TinySAM/releases/download/3.0/lvis_v1_val.json",
        "CC BY 4.0",
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _EVERY}
"""Everything that can be downloaded, by name."""


def find_asset(name: str) -> Asset:
    """The file of that name.

    Raises:
        ConfigError: there is none; the message names the nearest one.
    """
    if name in ASSETS:
        return ASSETS[name]
    near = nearest(name, ASSETS)
    hint = f"did you mean {near}?" if near else "ptq4sam download lists what there is"
    raise ConfigError(f"asked to download {name!r}, which is not known: {hint}")


def asset_at(path: Path, enough: int | None = None) -> Asset | None:
    """The asset that a missing file or folder would be part of, or None.

    Weights are known by their file's name, parts of a data set by the names behind "data/".

    Args:
        path: the file or folder.
        enough: of a folder of pictures: how many of the first annotated ones are needed; None for
            all of them.
    """
    few = enough is not None and enough <= CALIBRATION_PICTURES
    every = ASSETS.values()
    for asset in sorted(every, key=lambda one: one.of is None) if few else every:
        places = asset.places if not few or asset.pictures is None else (asset.pictures,)
        for place in places:
            known = place.parts[1:]
            if path.parts[-len(known) :] == known:
                return asset
    return None


def where_from(path: Path) -> str:
    """Where a file comes from, for the message that it is not there.

    Args:
        path: where it was looked for; its name tells which it is.
    """
    asset = asset_at(path)
    if asset is not None:
        moved = "" if path in asset.places else f", which puts it at {asset.place_of(path)}"
        return f"ptq4sam download {asset.name} ({asset.facts}){moved}"
    scenes = generated_in(path)
    if scenes is not None:
        return f"ptq4sam scenes {scenes} generates it"
    return "name another, or see what ptq4sam download lists"


def generated_in(path: Path) -> Path | None:
    """The data set of generated scenes that a path belongs to, as `ptq4sam scenes` makes it."""
    parts = path.parts
    for place, name in enumerate(parts):
        if name == "scenes" and parts[place + 1 : place + 2] in (("images",), ("annotations",)):
            return Path(*parts[: place + 1])
    return None
