"""How graphs are written for a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dialect:
    """What differs between graphs of one model for several runtimes.

    Attributes:
        codes: of activations: "unsigned" ones; or "signed" ones around 0 where their grid fits
            (symmetric ones, and up to 7 bits).
        products: of "worths", which a runtime makes integer products of, whose sums it multiplies
            with scales as the simulation does; or of "steps", whole numbers, with the scales behind
            the product.
        dequantizes: operands of an attention at their "quantizers"; or at their "products", of
            whose pieces too a runtime then makes integer ones.
        between: what lies between products of codes: "portable", computed as in the simulation, bit
            for bit; or the runtime's "own" operators.
        convolutions: "integer" operators, or "dequantized" factors, which the runtime makes integer
            products of.
        lookup: how numbers of a table are picked: "Gather" or "GatherElements".
        whole_bytes: logits of an attention up to this size are one tensor.
        group_bytes: size of groups of small grids; None where the runtime joins the chain of a
            softmax's operations itself.
        piece_bytes: size of the pieces of larger attentions.
    """

    codes: Literal["unsigned", "signed"]
    products: Literal["worths", "steps"]
    dequantizes: Literal["quantizers", "products"]
    between: Literal["portable", "own"]
    convolutions: Literal["integer", "dequantized"]
    lookup: Literal["Gather", "GatherElements"]
    whole_bytes: int
    group_bytes: int | None
    piece_bytes: int
