"""A file a runtime that models are exported for."""

from __future__ import annotations

from ptq4sam.deploy.targets import onnxruntime, openvino
from ptq4sam.deploy.targets.target import Target

TARGETS: dict[str, Target] = {
    target.name: target for target in (onnxruntime.TARGET, openvino.TARGET)
}
"""By the name of the runtime."""

FORMATS: dict[str, Target] = {target.form: target for target in TARGETS.values()}
"""By the format of the files."""
