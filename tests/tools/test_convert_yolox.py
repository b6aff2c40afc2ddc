"""A YOLOX .pth file is read, and becomes an ONNX file that computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ptq4sam.data import CocoDataset, ImageRecord
from ptq4sam.deploy.onnx.graph import Graph
from ptq4sam.deploy.onnx.lowering import lowered
from ptq4sam.deploy.onnx.traced import Traced
from ptq4sam.deploy.targets.onnxruntime import DIALECT
from ptq4sam.errors import CheckpointError, ConfigError, DeployError
from ptq4sam.prompts import YoloxOnnx, YoloxTorch
from ptq4sam.prompts.yolox_network import SIZES, ConvBlock, YoloxNetwork
from ptq4sam.prompts.yolox_weights import load_yolox
from tests.prompts.yolox_fixtures import random_network
from tools.convert_yolox import convert_yolox, main


@pytest.fixture(scope="module")
def nano() -> YoloxNetwork:
    return random_network(SIZES["nano"])


@pytest.fixture
def checkpoint(nano: YoloxNetwork, tmp_path: Path) -> Path:
    """As the authors' trainer writes them."""
    path = tmp_path / "yolox_nano.pth"
    state = nano.state_dict()
    torch.save({"start_epoch": 300, "model": state, "optimizer": {"state": {}}}, path)
    return path


def test_onnx_computes_what_torch_computes(
    nano: YoloxNetwork, checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path / "new" / "nano.onnx"
    convert_yolox(checkpoint, target)
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", [1, 3, 416, 416])
    assert (result.name, result.shape) == ("output", [1, 3549, 85])
    images = torch.rand(1, 3, 416, 416) * 255
    (rows,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = nano(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.from_numpy(rows), expected, rtol=1e-4, atol=1e-4)
    assert [path.name for path in target.parent.iterdir()] == ["nano.onnx"]


def test_the_file_is_valid_and_every_size_has_its_operations(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "s.onnx"
    network = random_network(SIZES["s"], classes=2)
    torch.save(network.state_dict(), tmp_path / "s.pth")
    convert_yolox(tmp_path / "s.pth", path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert kinds.count("Conv") == convolutions
    assert "BatchNormalization" not in kinds


def test_boxes_of_the_pth_and_of_the_onnx_file(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    target = tmp_path / "nano.onnx"
    convert_yolox(checkpoint, target)
    image = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    record = ImageRecord(1, Path("a.jpg"), 100, 70)
    ours = YoloxTorch(checkpoint).prompts(record, image)
    theirs = YoloxOnnx(target).prompts(record, image)
    assert len(ours) == len(theirs) > 50
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)


def test_what_yolox_has_not_is_refused() -> None:
    pytest.importorskip("onnx")
    x = torch.rand(1, 3, 8, 8)
    for module, told in (
        (nn.MaxPool2d(3, ceil_mode=True), "pools otherwise"),
        (nn.Upsample(scale_factor=1.5), "resizes otherwise"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "resizes otherwise"),
    ):
        graph = Graph("yolox", DIALECT)
        images = Traced(graph, graph.input("images", np.float32, x.shape), x.shape)
        with pytest.raises(DeployError, match=rf"^neck {told}"), lowered(graph, module, "neck"):
            module(images)


def test_the_tool(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "nano.onnx"
    assert main([str(checkpoint), str(target), "--side", "96"]) == 0
    assert target.is_file()
    assert main([str(tmp_path / "none.pth"), str(target)]) == 2
    assert "none.pth" in capsys.readouterr().err


def test_another_side_and_another_number_of_classes(nano: YoloxNetwork, tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    network = random_network(SIZES["nano"], classes=3)
    torch.save(network.state_dict(), path)
    read = load_yolox(path, 160)
    assert (read.size.side, read.classes) == (160, 3)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(read(images), network(images))
    for side in (0, 100, -32):
        with pytest.raises(ConfigError, match=f"see {side} pixels: give a multiple of 32"):
            load_yolox(path, side)


def test_half_precision_is_widened(nano: YoloxNetwork, tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    torch.save({"model": nano.half().state_dict()}, path)
    nano.float()
    assert {p.dtype for p in load_yolox(path).parameters()} == {torch.float32}


def test_unfit_files_are_one_line_that_names_them(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["model"]
    first, last = next(iter(state)), "head.obj_preds.2.bias"
    nan = state | {first: state[first] * float("nan")}
    cases = {
        f"misses {last}: give an unchanged": {k: v for k, v in state.items() if k != last},
        r"has not, extra\.a and 1 more": state | {"extra.b": torch.ones(1), "extra.a": nan[first]},
        r"obj_preds\.2\.bias of shape \[2\], \[1\] is needed": state | {last: torch.zeros(2)},
        "holds values that are not finite": nan,
        "width 17 and depth 1, which is none of nano, tiny": state | {first: torch.zeros(17, 1)},
        "no YOLOX under its authors' names": {"bbox_head.conv.weight": torch.ones(1)},
        "holds no state dict": {"model": [1, 2]},
    }
    path = tmp_path / "bad.pth"
    for problem, content in cases.items():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=rf"bad\.pth.*{problem}") as caught:
            load_yolox(path)
        assert "\n" not in str(caught.value)
    whole = checkpoint.read_bytes()
    for damaged in (b"", b"this is no file of torch", whole[:1000], whole[:-5000]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"bad\.pth is damaged") as caught:
            load_yolox(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"no YOLOX file .*none\.pth"):
        load_yolox(tmp_path / "none.pth")


def test_pickled_code_is_never_run_and_nothing_is_written(tmp_path: Path) -> None:
    path, target = tmp_path / "module.pth", tmp_path / "a.onnx"
    torch.save({"model": nn.Linear(1, 1)}, path)
    with pytest.raises(CheckpointError, match=r"module\.pth holds more than tensors"):
        convert_yolox(path, target)
    assert not target.exists()


def test_the_trained_nano_keeps_its_boxes(shared_dir: Path, tmp_path: Path) -> None:
    """The authors' own ONNX file: its tensors fit our network in the order of execution."""
    pytest.importorskip("onnxruntime")
    data = shared_dir / "data"
    official = data / "detector" / "yolox_nano.onnx"
    checkpoint, target = tmp_path / "nano.pth", tmp_path / "nano.onnx"
    torch.save({"model": _state_of(official)}, checkpoint)
    convert_yolox(checkpoint, target)
    mini = data / "coco_mini"
    dataset = CocoDataset(
        mini / "images" / "val2017", mini / "annotations" / "instances_val.json", limit=4
    )
    sources = YoloxOnnx(official), YoloxOnnx(target), YoloxTorch(checkpoint)
    found = 0
    for record in dataset.images:
        image = dataset.load(record)
        expected, *others = (source.prompts(record, image) for source in sources)
        for other in others:
            assert np.array_equal(other.category_ids, expected.category_ids)
            np.testing.assert_allclose(other.boxes, expected.boxes, atol=1e-2)
            np.testing.assert_allclose(other.scores, expected.scores, atol=1e-4)
        found += len(expected)
    assert found > 40


def _state_of(official: Path) -> dict[str, torch.Tensor]:
    """A state dict that computes what an ONNX file with folded batch norms does."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(official).graph
    tensors = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    theirs = [node.input[1:] for node in graph.node if node.op_type == "Conv"]
    network = YoloxNetwork(SIZES["nano"]).eval()
    norms = {m.conv: m.bn for m in network.modules() if isinstance(m, ConvBlock)}
    executed: list[nn.Conv2d] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, _inputs, _output: executed.append(conv))
    with torch.no_grad():
        network(torch.zeros(1, 3, 64, 64))
        for conv, (weight, bias) in zip(executed, theirs, strict=True):
            assert conv.weight.shape == tensors[weight].shape
            conv.weight.copy_(tensors[weight])
            if conv in norms:  # which then only adds the bias
                norms[conv].running_var.fill_(1 - norms[conv].eps)
                norms[conv].bias.copy_(tensors[bias])
            else:
                conv.bias.copy_(tensors[bias])
    state = network.state_dict()
    named = {key: value for key, value in state.items() if key in tensors}
    # The predictions keep their official names in the file, so that the order was the right one.
    assert len(named) == 18
    assert all(torch.equal(value, tensors[key]) for key, value in named.items())
    return state
