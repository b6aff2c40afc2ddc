"""Sessions of the runtimes that are opened once for all tests that open the same files."""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_MOST = 12
"""Sessions that are kept, those that were opened last."""
_Init = Callable[..., None]


def opened_once(init: _Init) -> _Init:
    """The constructor of a session which takes over what another one compiled of the same files.

    Compiling takes a runtime seconds, most of the time of a test on a model that is run once.
    """
    compiled: OrderedDict[tuple[object, ...], dict[str, Any]] = OrderedDict()

    def once(
        self: Any,
        path: Path,
        outputs: Sequence[str],
        precision: str = "f32",
        products: str | None = None,
    ) -> None:
        # OpenVINO's weights are in another file.
        files = [file for file in (path, path.with_suffix(".bin")) if file.exists()]
        content = tuple(hashlib.sha256(file.read_bytes()).digest() for file in files)
        # Where a test takes a runtime away, nothing is opened.
        there = tuple(sys.modules.get(name) is not None for name in ("onnxruntime", "openvino"))
        key = (content, tuple(outputs), precision, products, torch.get_num_threads(), there)
        if key in compiled:
            vars(self).update(compiled[key])
            if "_request" in compiled[key]:
                self._request = self._compiled.create_infer_request()
        else:
            init(self, path, outputs, precision, products)
            compiled[key] = dict(vars(self))
            if len(compiled) > _MOST:
                compiled.popitem(last=False)
        compiled.move_to_end(key)

    return once
