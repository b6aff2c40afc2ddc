"""Tensors are where the model is: proved without a GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import torch

import ptq4sam
from ptq4sam.data import CocoDataset
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.runs.auditing import audit_model
from tests.device_watch import FACTORIES, PACKAGE, DefaultDevice
from tests.tiny_runs import QUICK, SCHEMES
from tests.tiny_sams import TinySam

pytest_plugins = ("tests.tiny_sam_fixtures",)


def test_no_tensor_of_a_run_is_made_without_a_device(tiny_sam: TinySam) -> None:
    scheme = Scheme.from_yaml(SCHEMES / "ptq4sam-l44.yaml").with_overrides(
        *QUICK, "calibrate=1", "recon.iters=2"
    )
    training, validation = (
        CocoDataset(
            tiny_sam.folder / "images" / split, tiny_sam.folder / "annotations" / f"{split}.json"
        )
        for split in ("train", "val")
    )
    with DefaultDevice() as watch:
        sam = ptq4sam.load_sam("tiny", tiny_sam.weights)
        quantized = ptq4sam.quantize(sam, training, scheme)
        assert audit_model(quantized).passed
        ptq4sam.save(quantized, "w4a4.safetensors")
        loaded = ptq4sam.load("w4a4.safetensors")
        ptq4sam.evaluate(loaded, validation, reference=sam)
    assert not watch.found


def test_the_watch_sees_a_factory_without_a_device() -> None:
    code = compile("torch.zeros(3), torch.zeros(3, device='cpu')", PACKAGE / "made.py", "eval")
    with DefaultDevice() as watch:
        eval(code, {"torch": torch})
    assert watch.found == {"made.py:1 torch.zeros"}


def _factories_without_a_device(tree: ast.AST) -> Iterator[int]:
    """Lines of calls like torch.zeros(3), but in constructors (see `DefaultDevice`)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            continue
        called = node.func if isinstance(node, ast.Call) else None
        if (
            isinstance(node, ast.Call)
            and isinstance(called, ast.Attribute)
            and isinstance(called.value, ast.Name)
            and called.value.id == "torch"
            and called.attr in FACTORIES
            and not any(keyword.arg == "device" for keyword in node.keywords)
        ):
            yield node.lineno
        yield from _factories_without_a_device(node)


def test_no_line_of_the_package_makes_a_tensor_without_a_device() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in _factories_without_a_device(ast.parse(path.read_text()))
    ]
    assert not found


def test_exports_read_weights_of_any_device() -> None:
    """numpy() of a tensor on a GPU raises an error."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted((PACKAGE / "deploy" / "onnx").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "numpy"
        and ".cpu()" not in ast.unparse(node.func.value)
    ]
    assert not found
