"""All families of SAMs: a folder and a name here for each."""

from __future__ import annotations

from importlib import import_module

from ptq4sam.errors import ConfigError
from ptq4sam.families.family import Variant
from ptq4sam.sam.model import Sam

FAMILIES = ("sam_vit", "tiny_vit", "efficientvit")
"""Folders here, each with a module `variants` that lists VARIANTS."""

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for family in FAMILIES
    for variant in import_module(f"{__name__}.{family}.variants").VARIANTS
}


def variant_of(name: str, folded: bool = True) -> Variant:
    """A SAM by its name, a key of VARIANTS.

    Args:
        name: of the SAM.
        folded: without batch normalisations, as for inference; else as `compat: study` needs it.

    Raises:
        ConfigError: there is none.
    """
    if name not in VARIANTS:
        raise ConfigError(f"unknown SAM {name!r}: choose one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    if folded:
        return variant
    if variant.unfolded is None:
        others = ", ".join(other.name for other in VARIANTS.values() if other.unfolded)
        raise ConfigError(
            f"compat: study simulates networks with their batch normalisations, which {name} has "
            f"not: use {others}, or compat: faithful"
        )
    return variant.unfolded


def build_sam(name: str, image_size: int | None = None, folded: bool = True) -> Sam:
    """Build a SAM with random weights by its name.

    Args:
        name: a key of VARIANTS.
        image_size: side of the input in pixels of a SAM that was fine-tuned for another; None for
            the variant's own.
        folded: without batch normalisations, see `variant_of`.

    Raises:
        ConfigError: the name is unknown, or there is no such size.
    """
    return variant_of(name, folded).build(image_size)
