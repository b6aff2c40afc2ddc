"""The tiny models of tests/model."""

from tests.model.conftest import forward, items, make_scheme, sam, tiny_variant

__all__ = ["forward", "items", "make_scheme", "sam", "tiny_variant"]
