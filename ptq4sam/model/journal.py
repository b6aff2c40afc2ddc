"""What a reconstruction has finished, on disk, so that a killed run can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ptq4sam.errors import ConfigError, ResourceError, in_one_line
from ptq4sam.extensions import extensions_fingerprint
from ptq4sam.files import read_json, replacing, write_json
from ptq4sam.methods.reconstruction import UnitLosses
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.numerics import description
from ptq4sam.quantization.fused import compiles
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.version import __version__

_log = logging.getLogger(__name__)

INDEX = "journal.json"
"""The file in a journal's folder that names its parts."""
CALIBRATED, BEGUN = "calibrated", "begun"
"""Parts that are whole models: with ranges, and as the fine-tuning of a model begins."""


class Journal:
    """Finished parts of one run in a folder: an index, and a safetensors file a part.

    The index names a part only after its file is complete, and both are replaced at once: a run
    killed anywhere leaves a journal of what was finished before.

    Args:
        folder: made where it is missing.
        fingerprint: what the results depend on, by name.
        resume: go on with what the folder has; else an unfinished run in it is moved aside.

    Raises:
        ConfigError: the folder's run differs in something; the message says in what.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        self.folder = folder
        self._fingerprint = dict(fingerprint)
        self._parts: dict[str, dict[str, Any]] = {}
        index = folder / INDEX
        if resume and index.exists():
            self._parts = read_own(index, "journal", "parts", self._fingerprint)
            _log.info("going on after %d finished parts in %s", len(self._parts), folder)
            return
        if resume:
            _log.info("nothing to resume in %s: starting from the beginning", folder)
        if any(folder.glob("*.safetensors")):
            _move_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_index()

    @property
    def parts(self) -> Mapping[str, Mapping[str, Any]]:
        """What is known of each finished part, by name, in order; units have their losses."""
        return self._parts

    def restore_model(self, name: str, sam: QuantizedSam) -> bool:
        """Read the model as it was at a stage (CALIBRATED, BEGUN), where the journal has it."""
        if not self.restore(name, sam):
            return False
        sam.folded = list(self._parts[name]["folded"])
        sam.applied = dict(self._parts[name]["applied"])
        return True

    def record_model(self, name: str, sam: QuantizedSam) -> None:
        """Write the model as it is at a stage."""
        # Copies: later hooks add to what the model says of itself.
        self._record(name, sam, folded=list(sam.folded), applied=dict(sam.applied))

    def restore(self, name: str, module: nn.Module) -> bool:
        """Read the state of a finished module into it.

        Returns:
            False where the journal does not have it.

        Raises:
            ConfigError: its file is damaged.
        """
        part = self._parts.get(name)
        if part is None:
            return False
        path = self.folder / part["file"]
        try:
            module.load_state_dict(load_file(path, device="cpu"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ConfigError(
                f"the journal's {path} cannot be read ({' '.join(str(error).split())[:200]}): "
                "start again without resuming"
            ) from error
        return True

    def record(self, name: str, module: nn.Module, losses: UnitLosses) -> None:
        """Write the state of a finished module, then name it in the index."""
        self._record(name, module, **dataclasses.asdict(losses))

    def _record(self, name: str, module: nn.Module, **more: object) -> None:
        file = f"{len(self._parts):03d}.safetensors"
        state = {key: value.contiguous() for key, value in module.state_dict().items()}
        try:
            with replacing(self.folder / file) as temporary:
                save_file(state, temporary)
            self._parts[name] = {"file": file, **more}
            self._write_index()
        except OSError as error:
            raise ResourceError(
                f"{in_one_line(error)}: the journal of finished units cannot be written: make "
                "room or choose another work directory, then resume; what was finished before is "
                "kept"
            ) from error

    def _write_index(self) -> None:
        content = {"fingerprint": self._fingerprint, "parts": self._parts}
        write_json(content, self.folder / INDEX)


def run_fingerprint(
    sam: Sam,
    items: Sequence[CalibrationItem],
    scheme: Scheme,
    *,
    quantize_encoder: bool,
    seed: int,
) -> dict[str, str]:
    """Everything that the bits of a reconstruction depend on, by name."""
    data = hashlib.sha256()
    for item in items:
        data.update(_bytes(item.pixels))
        data.update(_bytes(item.boxes))
    return {
        "model": model_fingerprint(sam),
        "calibration data": f"{len(items)} pictures {data.hexdigest()[:16]}",
        # Not sorted: methods work in their order, and of several exceptions the last counts.
        "scheme": json.dumps(scheme.to_dict()),
        "quantized encoder": str(quantize_encoder),
        "seed": str(seed),
        "extensions": extensions_fingerprint() or "none",
        "ptq4sam": __version__,
        "torch": torch.__version__,
        **description(sam.device),
        "kernels": "compiled" if compiles(sam.device) else "one by one",
    }


def model_fingerprint(sam: Sam) -> str:
    """A SAM's name, and what tells its weights from others."""
    weights = hashlib.sha256()
    for name, value in sam.state_dict().items():
        weights.update(name.encode())
        weights.update(_bytes(value))
    return f"{sam.name} {weights.hexdigest()[:16]}"


def _move_aside(folder: Path) -> None:
    """Hours of work may lie there: to forget that a run is to be resumed must not cost them."""
    names = (folder.with_name(f"{folder.name}.before{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    _log.warning(
        "%s held an unfinished run, which is now in %s: to go on with it, move it back and "
        "resume; delete it otherwise",
        folder,
        aside,
    )


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def read_own(path: Path, what: str, entries: str, fingerprint: Mapping[str, str]) -> dict[str, Any]:
    """Entries of a JSON file that a run has kept, beside its fingerprint.

    Args:
        path: the file.
        what: what it is, for messages, as "journal".
        entries: under which key they are.
        fingerprint: of the run that asks.

    Raises:
        ConfigError: it is no such file, or of another run.
        DataError: it is damaged.
    """
    content, _ = read_json(path, what)
    whole = content if isinstance(content, dict) else {}
    found, kept = whole.get("fingerprint"), whole.get(entries)
    if not (isinstance(found, dict) and isinstance(kept, dict)):
        raise ConfigError(
            f"{path} is no {what}: it has no fingerprint with {entries}; delete it, or start "
            "without resuming"
        )
    require_same(path, found, fingerprint)
    return kept


def require_same(index: Path, found: Mapping[str, str], asked: Mapping[str, str]) -> None:
    """Refuse to go on with what another run left.

    Raises:
        ConfigError: fingerprints differ; the message says in what.
    """
    different = [name for name, value in asked.items() if found.get(name) != value]
    if different:
        there, now = _parts_that_differ(found.get(different[0]), asked[different[0]])
        raise ConfigError(
            f"{index} belongs to another run; {', '.join(different)} differ ({different[0]} there: "
            f"{_short(there)}, asked now: {_short(now)}): start without resuming, or with "
            "the settings of that run"
        )


def _parts_that_differ(there: str | None, now: str) -> tuple[str | None, str]:
    """Of two JSON mappings what is not equal in both, or its order; other texts whole."""
    try:
        first, second = _flat(json.loads(there or "")), _flat(json.loads(now))
    except (ValueError, AttributeError):
        return there, now
    names = [name for name in first | second if first.get(name) != second.get(name)]
    if not names:
        others = [pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]]
        return ", ".join(there for there, _ in others), ", ".join(now for _, now in others)
    return tuple(", ".join(f"{n}: {x.get(n)}" for n in names) for x in (first, second))  # type: ignore[return-value]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        # An empty one has a place too.
        inner = isinstance(value, Mapping) and len(value) > 0
        flat.update(_flat(value, f"{prefix}{name}.") if inner else {prefix + name: value})
    return flat


def _short(text: str | None) -> str:
    return "none" if text is None else text if len(text) < 60 else text[:57] + "..."
