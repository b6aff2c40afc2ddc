"""Post-training quantization of Segment Anything Models: PTQ4SAM and beyond.

sam = ptq4sam.load_sam("vit_b", checkpoint="ckpt/sam_vit_b_01ec64.pth")
qsam = ptq4sam.quantize(sam, calibration, scheme="ptq4sam-l44")
score = ptq4sam.evaluate(qsam, dataset, prompts)
ptq4sam.save(qsam, "sam_b_w4a4.safetensors")
qsam = ptq4sam.load("sam_b_w4a4.safetensors")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptq4sam.threads import wait_asleep
from ptq4sam.version import __version__

if TYPE_CHECKING:
    from ptq4sam.api import evaluate, quantize
    from ptq4sam.data import CocoDataset, ImageFolder
    from ptq4sam.deploy.storage import load, save
    from ptq4sam.families.checkpoint import load_sam
    from ptq4sam.prompts import open_prompts
    from ptq4sam.quantization.scheme import Scheme

__all__ = [
    "CocoDataset",
    "ImageFolder",
    "Scheme",
    "__version__",
    "evaluate",
    "load",
    "load_sam",
    "open_prompts",
    "quantize",
    "save",
]

_WHERE = {
    "CocoDataset": "ptq4sam.data",
    "ImageFolder": "ptq4sam.data",
    "Scheme": "ptq4sam.quantization.scheme",
    "evaluate": "ptq4sam.api",
    "load": "ptq4sam.deploy.storage",
    "load_sam": "ptq4sam.families.checkpoint",
    "open_prompts": "ptq4sam.prompts",
    "quantize": "ptq4sam.api",
    "save": "ptq4sam.deploy.storage",
}

# Whatever imports anything of ours begins here, before torch is loaded.
wait_asleep()


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import ptq4sam` and --help do not wait for torch.
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'ptq4sam' has no attribute {name!r}")
