"""A scheme compared with the model that it is for, before anything is done."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from ptq4sam.errors import ConfigError
from ptq4sam.operators.base import QUANTIZED, kinds
from ptq4sam.operators.simulated import SIMULATED
from ptq4sam.quantization.registry import METHODS
from ptq4sam.quantization.scheme import STUDY, Scheme
from ptq4sam.quantization.slots import require_roles, require_slots
from ptq4sam.records import FieldError, unknown_key
from ptq4sam.sam.addresses import Address, is_address, select
from ptq4sam.sam.description import ENCODER, TRANSFORMER
from ptq4sam.sam.model import Sam


def check_units(
    sam: Sam, scheme: Scheme, units: Collection[str], addresses: Mapping[str, Address]
) -> None:
    """Exceptions that a scheme makes of units.

    Args:
        sam: the model.
        scheme: how it is to be quantized.
        units: paths of all that there are.
        addresses: of its operators, by path.

    Raises:
        FieldError: it names a unit or address that there is not.
    """
    known = [*units, ENCODER, TRANSFORMER]
    for name in scheme.units:
        if not is_address(name):
            if name not in known:
                raise unknown_key(name, known).within("units")
            continue
        try:
            paths = select(name, sam.name, addresses)
        except FieldError as error:
            raise error.within("units") from None
        if paths and not any(sam.description.place_of(path) for path in paths):
            raise FieldError(f"units.{name}", f"{paths[0]} stays float in every scheme")


def check_slots(sam: Sam, scheme: Scheme) -> None:
    """Selectors of a scheme, and those that its methods bring.

    Raises:
        FieldError: one names a role that the model has not, or in a scheme no slot of it.
    """
    known = sam.description.known_roles() | kinds()
    require_roles(scheme.slots, known)
    require_slots(scheme.slots, set(_slots(sam, scheme)))
    for name in scheme.method_settings:
        try:
            require_roles(METHODS[name].slots, known)
        except FieldError as error:
            raise error.within(f"methods.{name}") from None


def _slots(sam: Sam, scheme: Scheme) -> Iterator[tuple[str, frozenset[str]]]:
    """Slots of what is listed as quantized, with their roles."""
    forms = SIMULATED if scheme.compat == STUDY else QUANTIZED
    for name, module in sam.named_modules():
        form = forms.get(type(module))
        if form is not None and sam.description.place_of(name) is not None:
            for slot in form.slot_names:
                yield slot, sam.description.roles(name, slot) | {form.kind}


def check_operators(sam: Sam) -> None:
    """What no list has would stay float, unseen until the audit.

    Raises:
        ConfigError: an operator is in no list of the model's description.
    """
    for name, module in sam.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        listed = sam.description.place_of(name) or sam.description.may_hold(name)
        if own and not listed:
            raise ConfigError(
                f"{name} ({type(module).__name__}) is in no list of the description of {sam.name}: "
                "say there whether it is quantized or stays float"
            )
