"""`compat: study` gives what the published study's own program gives, and goes to no device."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptq4sam.deploy.export import export
from ptq4sam.deploy.storage import save
from ptq4sam.errors import ConfigError, DeployError
from ptq4sam.families import VARIANTS, build_sam
from ptq4sam.families.checkpoint import load_sam
from ptq4sam.families.efficientvit.layers import FusedMBConv, LiteMLA, MBConv
from ptq4sam.families.efficientvit.variants import build_variant
from ptq4sam.families.efficientvit.weights import fold_state
from ptq4sam.methods.assignment import make_quantizer
from ptq4sam.model.audit import audit
from ptq4sam.model.calibration import CalibrationItem
from ptq4sam.model.quantize import quantize_sam
from ptq4sam.operators.base import observe_weights, quantized_operators
from ptq4sam.operators.simulated import SIMULATED
from ptq4sam.quantization.modes import quantizer_mode, quantizers
from ptq4sam.quantization.quantizers import AffineQuantizer, Mode
from ptq4sam.quantization.scheme import Scheme
from ptq4sam.sam.model import Sam
from ptq4sam.skeletons import shapes_alone
from tests.families.efficientvit.conftest import TINY, TINY_VARIANT, golden, official_state
from tests.golden_weights import official_weights
from tests.tiny_runs import SCHEMES

BLOCKS = {
    "QMBConv_8_16_s2_e4": (lambda: MBConv(8, 16, 2, 4, False), (1, 8, 6, 6)),
    "QFusedMBConv_8_16_s2_e4": (lambda: FusedMBConv(8, 16, 2, 4, False), (1, 8, 6, 6)),
    "QLiteMLA_64_dim32_scale5": (lambda: LiteMLA(64, 32, 5, False), (1, 64, 8, 8)),
}
OBSERVERS = {"ema": ("MovingMinMaxObserver", 1e-6), "percentile": ("MovingPCTObserver", 2e-5)}
"""Ours, and how near scales are: positions of its quantiles are rounded to float32."""
SITES = {
    "input": "conv.input",
    "weight": "conv.weight",
    "matmul": "conv.output",
    "norm": "norm.output",
    "act": "act.output",
}
ATTENTION = {
    "Q": "query",
    "K": "key",
    "V": "value",
    "reluQ": "positive_query",
    "reluK": "positive_key",
    "matmul1": "state",
    "matmul2": "sums",
    "act": "output",
}
"""The study's names of sites, and the paths of ours."""


def scheme(name: str, *more: str) -> Scheme:
    read = Scheme.from_yaml(SCHEMES / "efficientvit_sam" / f"study-{name}.yaml")
    return read.with_overrides("calibrate=2", *more)


def our_path(site: str) -> str:
    module, _, name = site.rpartition(".")
    if module == "self":
        return f"core.{ATTENTION[name]}_quantizer"
    if module.startswith("aggreg"):
        return f"{module}.{SITES[name].removeprefix('conv.')}_quantizer"
    return f"{module}.{SITES[name]}_quantizer"


def simulated(block: nn.Module, used: Scheme) -> nn.Module:
    make = partial(make_quantizer, used, roles=frozenset())
    for name, module in list(block.named_modules()):
        if form := SIMULATED.get(type(module)):
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, form.of(module, make))
    return block.requires_grad_(False)


def random_input(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("name", list(BLOCKS))
def test_blocks_are_the_studys_own(name: str, observer: str) -> None:
    """Every scale, the block with quantized weights, and with all of its sites."""
    build, shape = BLOCKS[name]
    block = build()
    shapes = {key: tuple(value.shape) for key, value in block.state_dict().items()}
    block.load_state_dict(official_weights(shapes))
    ours, tolerance = OBSERVERS[observer]
    block = simulated(block.eval(), scheme("int8", f"a_qconfig.observer={ours}"))
    with quantizer_mode(block, Mode.OBSERVE):
        for seed in (100, 101, 102):
            block(random_input(shape, seed))
    with quantizer_mode(block, Mode.FLOAT):
        observe_weights(block)
    prefix = f"{name}/{observer}/"
    known = golden("study")
    published = {key.removeprefix(prefix): v for key, v in known.items() if key.startswith(prefix)}
    own = dict(quantizers(block))
    sites = {key.removeprefix("scale/"): v for key, v in published.items() if "scale/" in key}
    assert {our_path(site) for site in sites} == set(own)
    for site, expected in sites.items():
        quantizer = own[our_path(site)]
        assert isinstance(quantizer, AffineQuantizer)
        published_scale = expected.reshape(quantizer.scale.shape)
        torch.testing.assert_close(
            quantizer.scale, published_scale, rtol=tolerance, atol=0, msg=site
        )
        # A hardly other scale may round a sum to the next step.
        quantizer.set_parameters(published_scale, quantizer.zero_point)
    x = random_input(shape, 200)
    torch.testing.assert_close(block(x), published["w8a8"], atol=1e-6, rtol=0)
    for path, quantizer in own.items():
        if not path.endswith("weight_quantizer"):
            quantizer.mode = Mode.FLOAT
    torch.testing.assert_close(block(x), published["w8"], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def unfolded() -> Sam:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sam = build_variant("tiny_efficientvit", TINY, folded=False)
    with shapes_alone():
        shapes = build_variant("tiny_efficientvit", TINY, folded=False)
    state = official_state(shapes)
    sam.load_state_dict({k: v for k, v in state.items() if k.startswith("image_")}, strict=False)
    return sam.eval()


def forward(sam: Sam, item: CalibrationItem) -> tuple[Tensor, ...]:
    features = sam.embed(item.pixels)
    return (*features, *sam.decode(features, None, item.boxes, None, True))


@pytest.mark.parametrize("name", ["int8", "mix-dwsc", "mix-mbc-neck"])
def test_what_is_simulated(unfolded: Sam, items: list[CalibrationItem], name: str) -> None:
    found = quantize_sam(unfolded, items, scheme(name))
    left = {
        "int8": set[str](),
        "mix-dwsc": {"depthwise", "project"},
        "mix-mbc-neck": {"expand", "depthwise", "project", "join", "output"},
    }[name]
    with shapes_alone():
        source = build_variant("tiny_efficientvit", TINY, folded=False)
    # Three sites a convolution, one behind each norm and activation, eight of the attention.
    sites = {"Conv2d": 3, "BatchNorm2d": 1, "GELU": 1, "ChannelGELU": 1, "ReluLinearAttention": 8}
    expected = 0
    for path, module in source.named_modules():
        address = source.description.address_of(path)
        in_neck = name == "mix-mbc-neck" and address is not None and address.stage == "neck"
        if address is not None and address.kind not in left and not in_neck:
            expected += sites[type(module).__name__]
    assert len(list(quantizers(found))) == expected
    # Nothing beside it, in the layer that sees pixels too.
    stem = [path for path, _ in quantized_operators(found) if ".stages.0.op_list.0." in path]
    assert [path.rpartition(".")[2] for path in stem] == ["conv", "norm", "act"]
    report = audit(found, lambda: forward(found, items[0]))
    assert report.passed, "\n".join(report.lines())
    exact = unfolded.image_encoder(items[0].pixels)
    error = (found.image_encoder(items[0].pixels) - exact).norm() / exact.norm()
    assert 0 < error < 0.3
    # Sums of a trained attention differ a thousandfold between pictures; it averages their ends.
    for path, quantizer in quantizers(found):
        if path.endswith("sums_quantizer"):
            quantizer.scale *= 2000
    assert audit(found, lambda: forward(found, items[0])).passed


def test_it_goes_to_no_device(unfolded: Sam, items: list[CalibrationItem], tmp_path: Path) -> None:
    found = quantize_sam(unfolded, items, scheme("int8"))
    told = "compat: study, which quantizes results between float operations, as no device does"
    with pytest.raises(DeployError, match=told) as refused:
        export(found, tmp_path, "onnx")
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=told):
        save(found, tmp_path / "study.safetensors")
    assert not list(tmp_path.iterdir())


def test_it_needs_batch_normalisations(tiny: Sam, items: list[CalibrationItem]) -> None:
    with pytest.raises(ConfigError, match=r"load an EfficientViT-SAM by load_sam\(..., folded=Fal"):
        quantize_sam(tiny, items, scheme("int8"))
    with pytest.raises(ConfigError, match="vit_b has not: use efficientvit_sam_l0, "):
        build_sam("vit_b", folded=False)
    with pytest.raises(ConfigError, match="ranges alone: leave recon and upscaling out"):
        scheme("int8", "recon={iters: 3, learn_rounding: false}")


def test_checkpoints_are_read_with_their_norms(
    unfolded: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "tiny_efficientvit", TINY_VARIANT)
    path = tmp_path / "tiny.pt"
    state = copy.deepcopy(unfolded.state_dict())
    torch.save(state, path)
    read = load_sam("tiny_efficientvit", path, folded=False)
    assert {name: value.dtype for name, value in read.state_dict().items()} == {
        name: value.dtype for name, value in state.items()
    }
    assert all(torch.equal(value, state[name]) for name, value in read.state_dict().items())
    folded = load_sam("tiny_efficientvit", path)
    assert set(folded.state_dict()) == set(fold_state(state))
    x = random_input((1, 3, TINY.image_size, TINY.image_size), 5)
    torch.testing.assert_close(read.image_encoder(x), folded.image_encoder(x), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["int8", "mix-dwsc", "mix-mbc-neck"])
def test_both_forms_leave_the_same_float(name: str) -> None:
    ours = Scheme.from_yaml(SCHEMES / "efficientvit_sam" / f"{name}.yaml")
    same = {"compat": ours.compat, "calibrate": ours.calibrate, "float_weights": "float16"}
    assert replace(scheme(name), **same) == ours  # type: ignore[arg-type]
