"""The tiny models of tests/model."""

from __future__ import annotations

from tests.model.conftest import (  # noqa: F401
    forward,
    items,
    make_scheme,
    sam,
    tiny_variant,
)
