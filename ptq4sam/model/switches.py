"""Single quantizers of a frozen model on and off, those of weights included."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ptq4sam.errors import ConfigError
from ptq4sam.methods.norm_scales import folded_scales
from ptq4sam.model.calibration import methods_with
from ptq4sam.model.insertion import QuantizedSam, folded_layers
from ptq4sam.operators.base import QuantizedLayer, quantized_layers
from ptq4sam.quantization.modes import WEIGHT_QUANTIZER, quantizers
from ptq4sam.quantization.quantizers import Mode
from ptq4sam.sam.model import Sam


class Switches:
    """Quantizers of a frozen model by path; any set of them can quantize alone.

    A frozen weight is on its grid, so that switching its quantizer off is not enough: the float
    model's weight takes its place, with the signs and the scales of norms that methods folded into
    both.

    Args:
        sam: the frozen model; it is as before outside of `only`.
        float_sam: the model that it was made of.

    Attributes:
        names: paths of all quantizers.

    Raises:
        ConfigError: the model was corrected after reconstruction.
    """

    def __init__(self, sam: QuantizedSam, float_sam: Sam) -> None:
        require_switchable(sam)
        self._quantizers = dict(quantizers(sam))
        self.names = frozenset(self._quantizers)
        folded = set(folded_layers(sam))
        norms, scaled = sam.normalized_layers(), sam.scaled_layers()
        self._weights: dict[str, tuple[QuantizedLayer, Tensor, Tensor]] = {}
        for name, layer in quantized_layers(sam):
            source = float_sam.get_submodule(name)
            weight = source.get_parameter("weight").detach()
            if name in folded:
                weight = weight * _folded_signs(layer, source)[:, None]
            if name in norms:
                both = (model.get_submodule(norms[name]) for model in (sam, float_sam))
                weight = weight * folded_scales(*both)
            if name in scaled:
                weight = weight / scaled[name].factors
            quantizer = f"{name}.{WEIGHT_QUANTIZER}"
            self._weights[quantizer] = (layer, layer.weight.detach(), weight)

    @contextlib.contextmanager
    def only(self, names: Collection[str]) -> Iterator[None]:
        """Within the `with` block these quantizers quantize, and all others are off.

        Args:
            names: paths of quantizers; none gives the float model.
        """
        before = {name: quantizer.mode for name, quantizer in self._quantizers.items()}
        try:
            for name, quantizer in self._quantizers.items():
                quantizer.mode = Mode.QUANTIZE if name in names else Mode.FLOAT
            for name, (layer, on_grid, exact) in self._weights.items():
                layer.weight.data = on_grid if name in names else exact
            yield
        finally:
            for name, mode in before.items():
                self._quantizers[name].mode = mode
            for layer, on_grid, _ in self._weights.values():
                layer.weight.data = on_grid


def require_switchable(sam: QuantizedSam) -> None:
    """Refuse a model whose float weights alone do not make it the float model again.

    What methods change before reconstruction leaves the float output as it is; corrections behind
    it are in biases too.

    Raises:
        ConfigError: a method of its scheme corrects after reconstruction.
    """
    if correcting := methods_with(sam.scheme, "after_reconstruction"):
        raise ConfigError(
            f"asked to switch quantizers of a model that {', '.join(correcting)} corrected after "
            "reconstruction, which no switch takes back: use a scheme without it"
        )


@torch.no_grad()
def _folded_signs(layer: QuantizedLayer, source: nn.Module) -> Tensor:
    """Sign of each output channel [channels] of a layer against the one that it was made of.

    Quantization leaves most of a row of weights on its side of zero, and where all of it becomes 0
    the bias tells: alone it does not, as methods move biases beyond zero.
    """
    products = (layer.weight * source.get_parameter("weight")).sum(dim=1)
    if layer.bias is not None:
        beside = layer.bias * source.get_parameter("bias")
        products = torch.where(products == 0, beside, products)
    return torch.where(products < 0, -1.0, 1.0)
