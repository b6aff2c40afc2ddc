"""The metrics of a run as a table for the terminal."""

from __future__ import annotations

import math
from typing import Any

from ptq4sam.columns import aligned
from ptq4sam.evaluation.evaluate import AFTER_CLICK
from ptq4sam.evaluation.overlap import MEAN_IOU, SIZES

COLUMNS = (
    ("AP", "AP"),
    ("AP50", "AP50"),
    ("AP75", "AP75"),
    ("APs", "APs"),
    ("APm", "APm"),
    ("APl", "APl"),
    ("APr", "APr"),
    ("APc", "APc"),
    ("APf", "APf"),
    ("AR", "AR"),
    ("mean_iou", "mean IoU"),
    ("agreement", "agreement"),
)

PTQ4SAM, NNCF = "ptq4sam", "nncf"
"""Methods of quantization, as metrics name them."""
_ROWS = {None: "float", PTQ4SAM: "quantized", NNCF: "NNCF INT8"}


_AFTER_FIRST = f"{AFTER_CLICK}1"


def summary_table(metrics: dict[str, Any], width: int | None = None) -> str:
    """Rows for the float model, where it was scored, and the evaluated one.

    Without any score: how many masks there are.

    Args:
        metrics: of the run.
        width: of the terminal; None for no limit.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    if "float" in metrics:
        rows.append(("float", metrics["float"]))
    rows.append((_ROWS[metrics.get("method")], metrics))
    shown = [(key, title) for key, title in COLUMNS if any(key in row for _, row in rows)]
    lines: list[str] = []
    if shown:
        table = [[metrics["model"], *(title.replace(" ", "\n") for _, title in shown)]]
        for name, row in rows:
            table.append([name, *(f"{row[key]:.3f}" if key in row else "" for key, _ in shown)])
        lines += aligned(table, width=width)
    elif "masks" in metrics:
        lines.append(
            f"{metrics['model']}: {metrics['masks']} masks on {metrics['pictures']} pictures"
        )
    lines.extend(_by_size(name, row) for name, row in rows if f"{MEAN_IOU}_small" in row)
    lines.extend(_clicks(name, row) for name, row in rows if _AFTER_FIRST in row)
    if "accuracy_control" in metrics:
        control = metrics["accuracy_control"]
        lines.append(
            f"accuracy control: {control['drop']:.2f} percentage points of "
            f"{control['metric']} below float (allowed {control['max_drop']:.2f}), "
            f"{len(control['kept'])} units kept higher"
        )
    if "audit" in metrics:
        lines.append(metrics["audit"]["report"][0])
    elif "encoder" in metrics:
        lines.append(f"image encoder {metrics['encoder']}")
    if "warning" in metrics:
        lines.append(f"warning: {metrics['warning']}")
    return "\n".join(lines)


def _by_size(name: str, row: dict[str, Any]) -> str:
    """One line: mean IoUs of small, medium and large objects; "none" where there is none."""
    found = {size: row[f"{MEAN_IOU}_{size}"] for size in SIZES}
    # metrics.json has null for what is no number.
    told = (
        f"{size} {'none' if iou is None or math.isnan(iou) else f'{iou:.3f}'}"
        for size, iou in found.items()
    )
    return f"{name}, mean IoU by size: {', '.join(told)}"


def _clicks(name: str, row: dict[str, Any]) -> str:
    """One line: mean IoUs after each click."""
    after = {
        key.removeprefix(AFTER_CLICK): v for key, v in row.items() if key.startswith(AFTER_CLICK)
    }
    ious = ", ".join(f"{number}: {value:.3f}" for number, value in after.items())
    best = row["mean_iou_best_of_three"]
    return f"{name}, mean IoU after clicks: {ious} (best of the first three masks {best:.3f})"
