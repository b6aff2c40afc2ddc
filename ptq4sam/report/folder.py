"""What a run's work directory holds, whatever became of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4sam.errors import DataError
from ptq4sam.files import read_json
from ptq4sam.model.journal import INDEX
from ptq4sam.runs.quantizing import JOURNAL
from ptq4sam.runs.record import RECORD, RunRecord, UnitRecord, unit_records
from ptq4sam.runs.run_log import ENDED, LOG

METRICS, SCHEME, SENSITIVITY = "metrics.json", "scheme.yaml", "sensitivity.json"


@dataclass(frozen=True)
class RunFolder:
    """One run.

    Attributes:
        path: the folder.
        metrics: of a run that has ended; empty otherwise, and of a study of sensitivity alone.
        record: what it kept of itself; None where it kept nothing.
        scheme: as used, in YAML; empty for a float model or where it is not known.
        log: its lines.
        ended: whether it came to its end.
        units: those that were reconstructed so far.
        sensitivity: content of sensitivity.json; None without one.
    """

    path: Path
    metrics: Mapping[str, Any]
    record: RunRecord | None
    scheme: str
    log: tuple[str, ...]
    ended: bool
    units: tuple[UnitRecord, ...]
    sensitivity: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read what there is.

        Of a run that has not ended, results that an earlier one left in the folder are not read.

        Raises:
            DataError: there is no run in the folder, or one of its files is damaged.
        """
        if not path.is_dir():
            found = "a file" if path.exists() else "not there"
            raise DataError(
                f"asked for a report of {path}, which is {found}: name the work directory of a run "
                "or of a sweep"
            )
        index = path / JOURNAL / INDEX
        log = _lines(path / LOG)
        sensitivity = _sensitivity(path / SENSITIVITY)
        if not (path / METRICS).exists() and not index.exists() and not log and not sensitivity:
            raise DataError(
                f"{path} is no work directory of a run or a sweep: it has neither {METRICS} nor "
                f"{LOG} nor sweep.sqlite; name the work directory of one"
            )
        study = sensitivity is not None and not (path / METRICS).exists() and not index.exists()
        ended = (path / METRICS).exists() and not index.exists() and _has_ended(log)
        metrics = (_mapping(path / METRICS, "metrics of a run") or {}) if ended else {}
        if ended:
            _require(metrics, path / METRICS, "model", "quantized")
        record = RunRecord.read(path) if ended and (path / RECORD).exists() else None
        units = () if record is None else record.units
        if not ended and index.exists():
            content = _mapping(index, "journal") or {}
            units = unit_records(content.get("parts", {}))
        scheme = path / SCHEME
        return cls(
            path,
            metrics,
            record,
            "\n".join(_lines(scheme)) if ended else "",
            log,
            ended or study,
            units,
            sensitivity,
        )


def _has_ended(log: tuple[str, ...]) -> bool:
    """By its last line; a folder that was copied without the log has its metrics only."""
    return not log or ENDED in log[-1]


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except FileNotFoundError:
        return ()


def _mapping(path: Path, what: str) -> Mapping[str, Any] | None:
    """A JSON file's mapping; None where there is no file."""
    if not path.exists():
        return None
    content, _ = read_json(path, what)
    if not isinstance(content, Mapping):
        raise DataError(f"{path} is damaged: keys and values are needed")
    return content


def _sensitivity(path: Path) -> Mapping[str, Any] | None:
    """What `ptq4sam sensitivity` wrote, looked at as far as it is drawn."""
    content = _mapping(path, "sensitivity")
    if content is None:
        return None
    _require(content, path, "targets", "pictures")
    for target in _list(content["targets"], path):
        _require(target, path, "name", "grain", "rank", "only", "all_but")
        for effect in (target["only"], target["all_but"] or target["only"]):
            _require(effect, path, "agreement")
    return content


def _list(value: object, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{path} is damaged: a list is needed where {str(value)[:40]!r} is")
    return value


def _require(content: object, path: Path, *keys: str) -> None:
    missing = [key for key in keys if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise DataError(f"{path} is damaged: it lacks {', '.join(missing)}; run again to renew it")
