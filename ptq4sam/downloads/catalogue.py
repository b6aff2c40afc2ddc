"""Published weights and data sets by name: where from, how large, under which licence."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from ptq4sam.errors import ConfigError


@dataclass(frozen=True)
class Digest:
    """What is known of a file's checksum.

    Attributes:
        algorithm: as hashlib names it.
        beginning: hexadecimal digits, all or the first ones.
    """

    algorithm: str
    beginning: str


@dataclass(frozen=True)
class Asset:
    """One file of a publisher.

    Attributes:
        name: what it is asked for by.
        path: where it belongs, below the repository's root.
        url: where it comes from.
        licence: of the publisher.
        size: bytes, None where the publisher does not say.
        digest: what the publisher says of its checksum, or None.
        unpacked: folder that a ZIP archive is unpacked into, or None.
        makes: file or folder that unpacking makes, below `unpacked`.
    """

    name: str
    path: Path
    url: str
    licence: str
    size: int | None = None
    digest: Digest | None = None
    unpacked: Path | None = None
    makes: Path | None = None


_CKPT = Path("ckpt")
_COCO = Path("data/coco")
_SAM = "https://dl.fbaipublicfiles.com/segment_anything/"
_MMDET = "https://download.openmmlab.com/mmdetection/"
_YOLOX = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0/"
_HDETR = "https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1/"
_FOCALNET = "https://projects4jw.blob.core.windows.net/focalnet/release/detection/"
_COCO_SITE = "http://images.cocodataset.org/"
_COCO_TERMS = "CC BY 4.0 (annotations), Flickr's terms (pictures)"


def _weights(name: str, url: str, licence: str, size: int | None, digest: Digest | None) -> Asset:
    return Asset(name, _CKPT / url.rpartition("/")[2], url, licence, size, digest)


def _coco(name: str, url: str, size: int | None, md5: str, makes: str, into: Path) -> Asset:
    archive = _COCO / url.rpartition("/")[2]
    digest = Digest("md5", md5)
    return Asset(name, archive, url, _COCO_TERMS, size, digest, into, Path(makes))


_EVERY = (
    _weights(
        "sam-vit-b",
        _SAM + "sam_vit_b_01ec64.pth",
        "Apache-2.0",
        375_042_383,
        Digest("md5", "01ec64"),
    ),
    _weights(
        "sam-vit-l", _SAM + "sam_vit_l_0b3195.pth", "Apache-2.0", None, Digest("md5", "0b3195")
    ),
    _weights(
        "sam-vit-h", _SAM + "sam_vit_h_4b8939.pth", "Apache-2.0", None, Digest("md5", "4b8939")
    ),
    _weights("yolox-nano-onnx", _YOLOX + "yolox_nano.onnx", "Apache-2.0", 3_659_407, None),
    _weights("yolox-l-onnx", _YOLOX + "yolox_l.onnx", "Apache-2.0", None, None),
    _weights("yolox-l-megvii", _YOLOX + "yolox_l.pth", "Apache-2.0", None, None),
    _weights(
        "yolox-l",
        _MMDET + "v2.0/yolox/yolox_l_8x8_300e_coco/"
        "yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth",
        "Apache-2.0",
        None,
        Digest("sha256", "d3bd2b23"),
    ),
    _weights(
        "faster-rcnn-r50",
        _MMDET + "v2.0/faster_rcnn/faster_rcnn_r50_fpn_2x_coco/"
        "faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth",
        "Apache-2.0",
        None,
        Digest("sha256", "a5d8aa15"),
    ),
    _weights(
        "dino-r50",
        _MMDET + "v3.0/dino/dino-4scale_r50_8xb2-12e_coco/"
        "dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth",
        "Apache-2.0",
        None,
        Digest("sha256", "55b2bba2"),
    ),
    _weights(
        "dino-swin-l",
        _MMDET + "v3.0/dino/dino-5scale_swin-l_8xb2-12e_coco/"
        "dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth",
        "Apache-2.0",
        None,
        Digest("sha256", "a654145f"),
    ),
    _weights(
        "hdetr-r50",
        _HDETR
        + "r50_hybrid_branch_lambda1_group6_t1500_dp0_mqs_lft_deformable_detr_plus_iterative_"
        "bbox_refinement_plus_plus_two_stage_36eps.pth",
        "MIT",
        None,
        None,
    ),
    _weights(
        "focalnet-dino-l",
        _FOCALNET + "focalnet_large_fl4_o365_finetuned_on_coco.pth",
        "MIT",
        None,
        None,
    ),
    _coco(
        "coco-val",
        _COCO_SITE + "zips/val2017.zip",
        815_585_330,
        "442b8da7639aecaf257c1dceb8ba8c80",
        "val2017",
        _COCO,
    ),
    _coco(
        "coco-train",
        _COCO_SITE + "zips/train2017.zip",
        None,
        "cced6f7f71b7629ddf16f17bbcfab6b2",
        "train2017",
        _COCO,
    ),
    _coco(
        "coco-annotations",
        _COCO_SITE + "annotations/annotations_trainval2017.zip",
        252_907_541,
        "f4bbac642086de4f52a3fdda2de5fa2c",
        "annotations/instances_val2017.json",
        _COCO,
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
    near = difflib.get_close_matches(name, ASSETS, n=1)
    hint = f"did you mean {near[0]}?" if near else "ptq4sam download --list shows what there is"
    raise ConfigError(f"asked to download {name!r}, which is not known: {hint}")


def asset_of(path: Path) -> Asset | None:
    """What is to be downloaded for a file or folder; None where it is nothing of ours.

    Args:
        path: weights by their name; pictures and annotations by their place, data/coco/val2017.
    """
    for asset in ASSETS.values():
        if asset.path.name == path.name:
            return asset
        if asset.unpacked is None or asset.makes is None:
            continue
        made = asset.unpacked / asset.makes
        # One archive holds the annotations of all splits.
        beside = made.suffix == path.suffix == ".json" and path.parent == made.parent
        if path == made or beside:
            return asset
    return None


def where_from(path: Path) -> str:
    """Where a file comes from, for the message that it is not there.

    Args:
        path: where it was looked for; its name tells which it is.
    """
    asset = asset_of(path)
    if asset is None:
        return "name another file, or see what ptq4sam download --list has"
    known = "the publisher gives no checksum"
    if asset.digest is not None:
        known = f"its {asset.digest.algorithm} begins with {asset.digest.beginning}"
    return f"ptq4sam download {asset.name}, or fetch {asset.url} ({known})"
