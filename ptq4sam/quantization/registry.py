"""Observers, quantizers and methods by name, open to those from outside. Nothing here needs torch.

A module of one's own registers a class under the name that schemes will use:

    @OBSERVERS.register("MedianObserver")
    class MedianObserver(Observer): ...

Where a scheme names what is not registered, the modules and .py files in the environment variable
PTQ4SAM_EXTENSIONS (separated as in PATH) are imported first, in workers of a sweep too.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from ptq4sam.errors import ConfigError
from ptq4sam.extensions import EXTENSIONS, load_extensions, note, told_of_extensions
from ptq4sam.records import FieldError, Record

if TYPE_CHECKING:
    from ptq4sam.quantization.affine import AffineQuantizer
    from ptq4sam.quantization.base import Quantizer
    from ptq4sam.quantization.observers import Observer

T = TypeVar("T")
Kind = TypeVar("Kind")


class Registry(Mapping[str, T]):
    """What is registered, by name.

    Args:
        kind: what they are, for messages.
        published: names of ours, known before the modules that define them are imported; as a
            mapping with the module that is imported when one is asked for.
    """

    def __init__(self, kind: str, published: Iterable[str] | Mapping[str, str] = ()) -> None:
        self.kind = kind
        self._published = tuple(published)
        self._modules = dict(published) if isinstance(published, Mapping) else {}
        self._items: dict[str, T] = {}
        self.check: Callable[[str, Any], None] = lambda _name, _item: None
        """Refuses what cannot be used, by its name."""

    def __getitem__(self, name: str) -> T:
        if name not in self._items and name in self._modules:
            importlib.import_module(self._modules[name])
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def names(self) -> list[str]:
        """All names that a scheme can use now."""
        return list(dict.fromkeys((*self._published, *self._items)))

    def register(self, name: str) -> Callable[[Kind], Kind]:
        """Decorator: make a class or function known under a name.

        Raises:
            ConfigError: the name is taken, or the class cannot be used.
        """

        def decorate(item: Kind) -> Kind:
            if name in self._items:
                raise ConfigError(
                    f"there is another {self.kind} {name!r}: register yours under another name"
                )
            taken: Any = item
            self.check(name, taken)
            self._items[name] = taken
            note(taken, f"{self.kind} {name}")
            return item

        return decorate

    def require(self, name: str, key: str) -> None:
        """Refuse a name that nothing is registered under, extensions included.

        Args:
            name: the name.
            key: of the scheme, for the message.

        Raises:
            FieldError: it is unknown; the nearest known name is given.
            ConfigError: an extension cannot be imported.
        """
        if name not in self.names:
            load_extensions()
        if name in self.names:
            return
        near = difflib.get_close_matches(name, self.names, n=1)
        if near:
            hint = f"did you mean {near[0]!r}? {told_of_extensions()}"
        else:
            known = ", ".join(self.names) or "none"
            hint = f"allowed: {known}; {told_of_extensions()}"
            if os.environ.get(EXTENSIONS):
                hint += f": yours needs @{self.kind.upper()}S.register({name!r}) above its class"
        raise FieldError(key, f"{name!r} given; {hint}")


OBSERVERS: Registry[type[Observer]] = Registry(
    "observer",
    (
        "MinMaxObserver",
        "MovingMinMaxObserver",
        "AvgMinMaxObserver",
        "MSEObserver",
        "AvgMSEObserver",
        "MSEFastObserver",
        "AvgMSEFastObserver",
        "PCTObserver",
        "MovingPCTObserver",
    ),
)
"""Observers by their published names, and those from outside."""

QUANTIZERS: Registry[type[AffineQuantizer]] = Registry(
    "quantizer",
    (
        "FixedFakeQuantize",
        "LSQFakeQuantize",
        "LSQPlusFakeQuantize",
        "AdaRoundFakeQuantize",
    ),
)
"""Quantizers by their published names, and those from outside."""

GRIDS: Registry[type[Quantizer]] = Registry(
    "grid",
    {
        "affine": "ptq4sam.quantization.quantizers",
        "logarithmic": "ptq4sam.methods.adaptive_granularity",
        "grouped": "ptq4sam.methods.grouped",
        "hybrid": "ptq4sam.methods.hybrid",
        "lnq": "ptq4sam.methods.lnq",
    },
)
"""Quantizers that a scheme assigns by slot, by the name of their grid, and those from outside.

"affine" stands for whichever of QUANTIZERS the scheme has.
"""


class MethodKind(Protocol):
    """What schemes need of the class of a method; see `methods.method.Method`."""

    settings_type: ClassVar[type[Record]]
    slots: ClassVar[Mapping[str, Mapping[str, Any]]]

    def __call__(self, settings: Any) -> Any:
        """Make one with settings."""


METHODS: Registry[MethodKind] = Registry(
    "method",
    {
        "bimodal-integration": "ptq4sam.methods.bimodal",
        "acnr": "ptq4sam.methods.acnr",
        "aqer": "ptq4sam.methods.aqer",
        "key-centring": "ptq4sam.methods.key_centring",
        "mac": "ptq4sam.methods.mac",
        "norm-scales": "ptq4sam.methods.norm_scales",
        "channel-scales": "ptq4sam.methods.channel_scales",
        "pcc": "ptq4sam.methods.pcc",
        "range-search": "ptq4sam.methods.range_search",
        "qwt-v2": "ptq4sam.methods.qwt",
    },
)
"""Methods that change a model around its calibration, and those from outside."""
