"""All families of SAMs: a folder and a name here for each."""

from __future__ import annotations

import functools
from importlib import import_module

import torch
import yaml

from ptq4sam.errors import ConfigError
from ptq4sam.families.family import Variant
from ptq4sam.nearest import nearest
from ptq4sam.sam.model import Sam
from ptq4sam.skeletons import shapes_alone

FAMILIES = ("sam_vit", "tiny_vit", "efficientvit")
"""Folders here, each with a module `variants` that lists VARIANTS."""

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for family in FAMILIES
    for variant in import_module(f"{__name__}.{family}.variants").VARIANTS
}


def variant_of(name: str, folded: bool = True) -> Variant:
    """A SAM by its name.

    Args:
        name: a key of VARIANTS, perhaps with other sizes of its family's record behind it, as
            vit_nano:embed_dim=80,depth=4.
        folded: without batch normalisations, as for inference; else as `compat: study` needs it.

    Raises:
        ConfigError: there is none, or it has no such sizes.
    """
    own, _, sizes = name.partition(":")
    if own not in VARIANTS:
        plain = own.lower().replace("-", "_").removeprefix("sam_")
        near = nearest(plain, VARIANTS, cutoff=0.85)
        hint = f"did you mean {near}? Else " if near else ""
        raise ConfigError(f"unknown SAM {own!r}: {hint}choose one of {', '.join(VARIANTS)}")
    variant = _sized(VARIANTS[own], name, sizes) if sizes else VARIANTS[own]
    if folded:
        return variant
    if variant.unfolded is None:
        others = ", ".join(other.name for other in VARIANTS.values() if other.unfolded)
        raise ConfigError(
            f"compat: study simulates networks with their batch normalisations, which {name} has "
            f"not: use {others}, or compat: faithful"
        )
    return variant.unfolded


@functools.cache
def _sized(variant: Variant, name: str, sizes: str) -> Variant:
    """A variant with the sizes that a name says; that it can have them is tried once.

    Raises:
        ConfigError: it cannot have them.
    """
    if variant.sized is None:
        raise ConfigError(f"asked for {name}, but {variant.name} has no sizes to choose")
    try:
        changes = yaml.safe_load("{" + sizes.replace("=", ": ") + "}")
        resized = variant.sized(name, changes)
        with shapes_alone():
            sam = resized.build(None)
            side = sam.image_size
            sam.embed(torch.zeros(1, 3, side, side, device="meta"))
    except (ConfigError, yaml.YAMLError, RuntimeError, ValueError, AssertionError) as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"asked for {name}: {told}; write sizes that go together as NAME:SIZE=VALUE,SIZE=VALUE"
        ) from error
    return resized


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
