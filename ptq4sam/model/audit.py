"""Proof that a quantized model is one: deterministic, on its grids, with nothing left out.

The check does not ask the insertion code what it did. It walks every layer with weights and every
attention, classifies each by the table of what is quantized, and watches the quantizers at work.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq4sam.methods.adaptive_granularity import AdaptiveGranularityQuantizer
from ptq4sam.methods.granularity_table import point_table
from ptq4sam.model.attention import QuantizedDecoderAttention, QuantizedEncoderAttention
from ptq4sam.model.insertion import QuantizedSam
from ptq4sam.model.layers import QuantizedConv2d, QuantizedLinear, weight_quantizers
from ptq4sam.quantization.modes import quantizers
from ptq4sam.quantization.quantizers import Mode, Quantizer
from ptq4sam.quantization.scheme import FLOAT, Scheme, bits_of_level, described_level
from ptq4sam.sam import image_encoder, transformer

_ENCODER = re.compile(
    r"image_encoder\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(lin1|lin2))|neck\.(0|2))"
)
_DECODER = re.compile(
    r"mask_decoder\.transformer\.(layers\.\d+\.(self_attn|cross_attn_token_to_image|"
    r"cross_attn_image_to_token)\.(q_proj|k_proj|v_proj|out_proj)|layers\.\d+\.mlp\.(lin1|lin2)|"
    r"final_attn_token_to_image\.(q_proj|k_proj|v_proj|out_proj))"
)
_FLOAT = re.compile(
    r"image_encoder\.patch_embed\.proj|prompt_encoder\..*|mask_decoder\.(iou_token|mask_tokens|"
    r"output_upscaling\.\d+|output_hypernetworks_mlps\.\d+\.layers\.\d+|"
    r"iou_prediction_head\.layers\.\d+)"
)
_WEIGHTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)

# Elements of an activation that are compared with their grid; quantizers work element by element.
_SAMPLE = 65_536


@dataclass(frozen=True)
class Finding:
    """Something that a quantized model must not have."""

    where: str
    problem: str


@dataclass(frozen=True)
class AuditReport:
    """What was checked and what was found.

    Attributes:
        layers: layers whose weights were compared with their grid.
        activations: activation quantizers seen at work.
        forwards: forward passes compared bit for bit.
        findings: violations; empty for an honest quantized model.
        kept: units that the scheme quantizes to other bits than the rest, or keeps float.
    """

    layers: int
    activations: int
    forwards: int
    findings: tuple[Finding, ...]
    kept: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def lines(self) -> list[str]:
        """The report for people."""
        verdict = "passed" if self.passed else f"FAILED with {len(self.findings)} findings"
        head = (
            f"audit {verdict}: {self.layers} layers on their grids, {self.activations} activations "
            f"through a quantizer, {self.forwards} forwards compared"
        )
        kept = [
            f"  {name}: kept {described_level(level)} by the scheme"
            for name, level in self.kept.items()
        ]
        return [head, *kept, *(f"  {found.where}: {found.problem}" for found in self.findings)]


@torch.no_grad()
def audit(sam: QuantizedSam, run: Callable[[], Sequence[Tensor]]) -> AuditReport:
    """Check a frozen model.

    Args:
        sam: the model.
        run: one forward pass of a picture with prompts, giving the tensors to compare.
    """
    findings = [*_missed_modules(sam), *_weights_off_grid(sam), *_other_bits(sam)]
    watched: dict[str, _Watch] = {}
    with _watching(sam, watched):
        first = run()
    second = run()
    for name, watch in watched.items():
        findings.extend(Finding(name, problem) for problem in watch.problems())
    expected = expected_activations(sam)
    if len(watched) != expected:
        problem = f"{expected} are listed as quantized, {len(watched)} have a quantizer"
        findings.append(Finding("activations", problem))
    if len(first) != len(second) or not all(map(torch.equal, first, second)):
        findings.append(Finding("forward", "two passes on the same input differ"))
    layers = sum(1 for m in sam.modules() if isinstance(m, QuantizedLinear | QuantizedConv2d))
    return AuditReport(layers, len(watched), 2, tuple(findings), dict(sam.scheme.units))


def must_be_quantized(name: str, sam: QuantizedSam) -> bool:
    """Whether the table of what is quantized lists this layer, and the scheme excepts it not."""
    listed = _DECODER.fullmatch(name) or (sam.encoder_quantized and _ENCODER.fullmatch(name))
    return bool(listed) and _exception(name, sam.scheme) != FLOAT


def _exception(name: str, scheme: Scheme) -> int | str | None:
    """What the scheme says of the unit that something belongs to, where it is an exception."""
    for unit, level in scheme.units.items():
        if name == unit or name.startswith(f"{unit}."):
            return level
    return None


def _missed_modules(sam: QuantizedSam) -> Iterator[Finding]:
    for name, module in sam.named_modules():
        if isinstance(module, _WEIGHTED):
            quantized = isinstance(module, QuantizedLinear | QuantizedConv2d)
            if must_be_quantized(name, sam):
                if not quantized:
                    yield Finding(name, "is listed as quantized but is a float layer")
            elif not (
                _FLOAT.fullmatch(name)
                or _ENCODER.fullmatch(name)
                or _exception(name, sam.scheme) == FLOAT
            ):
                yield Finding(name, "is in no list: neither quantized nor known to be float")
        float_encoder = type(module) is image_encoder.Attention and sam.encoder_quantized
        float_attention = float_encoder or type(module) is transformer.Attention
        if float_attention and _exception(name, sam.scheme) != FLOAT:
            yield Finding(name, "its query, key, value and softmax pass no quantizer")


def _other_bits(sam: QuantizedSam) -> Iterator[Finding]:
    """Quantizers with other bits than the scheme says; none may be in a unit that is kept float."""
    scheme = sam.scheme
    weights = {id(quantizer) for quantizer in weight_quantizers(sam)}
    for name, quantizer in quantizers(sam):
        level = _exception(name, scheme)
        of_all = (scheme.w_qconfig.bit, scheme.a_qconfig.bit)
        both = of_all if level is None else bits_of_level(level)
        said = None if both is None else both[0 if id(quantizer) in weights else 1]
        if quantizer.grid.bits != said:
            told = "float" if said is None else f"{said} bits"
            yield Finding(name, f"has {quantizer.grid.bits} bits where the scheme says {told}")


def _weights_off_grid(sam: QuantizedSam) -> Iterator[Finding]:
    for name, layer in sam.named_modules():
        if not isinstance(layer, QuantizedLinear | QuantizedConv2d):
            continue
        quantizer, weight = layer.weight_quantizer, layer.weight
        if not quantizer.is_calibrated:
            yield Finding(name, "its weight has no grid")
            continue
        used = quantizer(weight)
        shape = [-1] + [1] * (weight.dim() - 1)
        scale = quantizer.scale.reshape(shape)
        zero_point = quantizer.zero_point.reshape(shape)
        code = torch.round(used / scale) + zero_point
        low, high = quantizer.grid.qmin, quantizer.grid.qmax
        on_grid = (code >= low) & (code <= high) & ((code - zero_point) * scale == used)
        # What a file holds must be what is computed: a frozen weight is on its grid itself.
        on_grid &= weight == used
        if not bool(on_grid.all()):
            share = 1 - float(on_grid.float().mean())
            yield Finding(name, f"{share:.1%} of its weight is off the grid")


class _Watch:
    """What one activation quantizer did during a forward pass."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.calls = 0
        self.off_grid = 0

    def saw(self, output: Tensor, steps: bool) -> None:
        self.calls += 1
        flat = output.flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
        if steps:
            self.off_grid += int((~_are_points(sample, self.quantizer)).sum())
            return
        with _without_dropping(self.quantizer):
            self.off_grid += int((self.quantizer(sample.clone()) != sample).sum())

    def problems(self) -> Iterator[str]:
        if self.quantizer.mode is not Mode.QUANTIZE:
            yield f"is switched to {self.quantizer.mode.name.lower()}"
        if self.quantizer.drop_probability > 0:
            yield f"drops quantization with probability {self.quantizer.drop_probability}"
        if self.calls == 0:
            yield "no activation passed it"
        elif self.off_grid:
            yield f"gave {self.off_grid} sampled values off its grid"


def _are_points(steps: Tensor, quantizer: Quantizer) -> Tensor:
    """Which of these numbers of steps belong to a code of the quantizer's grid."""
    grid = quantizer.grid
    if isinstance(quantizer, AdaptiveGranularityQuantizer):
        points = point_table(grid.levels, int(quantizer.tau), quantizer.fraction_bits())
        return torch.isin(steps.double(), points.to(steps.device).double())
    codes = steps + quantizer.zero_point.round()
    return (codes == codes.round()) & (codes >= grid.qmin) & (codes <= grid.qmax)


@contextlib.contextmanager
def _without_dropping(quantizer: Quantizer) -> Iterator[None]:
    drop, quantizer.drop_probability = quantizer.drop_probability, 0.0
    try:
        yield
    finally:
        quantizer.drop_probability = drop


@contextlib.contextmanager
def _watching(sam: QuantizedSam, watched: dict[str, _Watch]) -> Iterator[None]:
    handles = []
    checking: list[bool] = []

    def hook_for(watch: _Watch) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, more: dict[str, object], out: Tensor) -> None:
            # The check calls the quantizer again: that call is not one of the model's.
            if not checking:
                checking.append(True)
                watch.saw(out, steps=bool(more.get("steps")))
                checking.pop()

        return hook

    weights = {
        id(module.weight_quantizer)
        for module in sam.modules()
        if isinstance(module, QuantizedLinear | QuantizedConv2d)
    }
    for name, quantizer in quantizers(sam):
        if id(quantizer) not in weights:
            watched[name] = _Watch(quantizer)
            hook = hook_for(watched[name])
            handles.append(quantizer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expected_activations(sam: QuantizedSam) -> int:
    """How many activations the table lists for this model: layer inputs, and 4 an attention."""
    layers = sum(
        1
        for name, module in sam.named_modules()
        if isinstance(module, _WEIGHTED) and must_be_quantized(name, sam)
    )
    kinds = (QuantizedDecoderAttention, QuantizedEncoderAttention)
    return layers + 4 * sum(isinstance(module, kinds) for module in sam.modules())
