from __future__ import annotations

import pytest

from ptq4sam.nearest import nearest

METHODS = ("ptq4sam-s", "ptq4sam-l", "qdrop")


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("ptq4samL", METHODS, "ptq4sam-l"),
        ("PTQ4SAM_S", METHODS, "ptq4sam-s"),
        ("q-drop", METHODS, "qdrop"),
        ("qdorp", METHODS, "qdrop"),
        ("recon", ("Reckon",), "Reckon"),
        ("nothing", METHODS, None),
        ("any", (), None),
    ],
)
def test_the_name_that_was_meant(name: str, known: tuple[str, ...], meant: str | None) -> None:
    assert nearest(name, known) == meant
    assert nearest(name, reversed(known)) == meant


def test_names_may_have_to_be_more_alike() -> None:
    assert nearest("qdorp", METHODS, cutoff=0.9) is None
