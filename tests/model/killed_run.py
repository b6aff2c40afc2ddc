"""A small quantization that kills its own process at a chosen place; see test_engine.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from ptq4sam.families import VARIANTS, build_sam
from ptq4sam.families.family import Weights
from ptq4sam.families.sam_vit.sizes import SamVariant
from ptq4sam.families.sam_vit.variants import variant
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.journal import Journal, run_fingerprint
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.quantization.scheme import Scheme

VARIANT = SamVariant(
    16, 1, 2, (0,), image_size=32, patch_size=8, window_size=2, prompt_dim=16,
    decoder_mlp_dim=16, decoder_heads=2, iou_hidden_dim=16,
)  # fmt: skip
EVENTS = 3000
"""Fewer than the function calls that the journal and the reconstruction make."""

SCHEME = {
    "a_qconfig": {"quantizer": "LSQFakeQuantize", "observer": "AvgMinMaxObserver", "bit": 4},
    "w_qconfig": {
        "quantizer": "AdaRoundFakeQuantize",
        "observer": "MinMaxObserver",
        "bit": 4,
        "ch_axis": 0,
    },
    "recon": {"iters": 5, "rounding_lr": 0.05},
}


def quantized(folder: Path | None) -> QuantizedSam:
    """The run, with a journal in `folder` that it goes on with."""
    VARIANTS["killed"] = variant("killed", VARIANT, Weights("killed.safetensors"))
    try:
        torch.manual_seed(0)
        sam = build_sam("killed")
    finally:
        del VARIANTS["killed"]
    scheme = Scheme.from_dict(SCHEME)
    items = [
        CalibrationItem(torch.randn(1, 3, 32, 32), torch.tensor([[4.0, 4, 20 + i, 25]]))
        for i in range(3)
    ]
    journal = None
    if folder is not None:
        identity = run_fingerprint(sam, items, scheme, quantize_encoder=True, seed=0)
        journal = Journal(folder, identity, resume=True)
    return quantize_sam(sam, items, scheme, journal=journal)


def _kill_at(event: int) -> None:
    """Kill this process at the event-th call of a function of the journal, files or engine."""
    seen = 0

    def count(frame: object, kind: str, _argument: object) -> None:
        nonlocal seen
        name = frame.f_code.co_filename  # type: ignore[attr-defined]
        if kind in ("call", "return", "c_call") and name.endswith(
            ("journal.py", "files.py", "engine.py", "reconstruction.py", "cache.py")
        ):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


if __name__ == "__main__":
    _kill_at(int(sys.argv[2]))
    quantized(Path(sys.argv[1]))
