"""Tables on terminals of any width."""

from __future__ import annotations

import pytest

from ptq4sam.columns import aligned, wrapped

LONG = "mask_decoder.transformer.layers.0.cross_attn_image_to_token"
TABLE = [
    ["target", "bits", "only\ndB", "all\nbut\ndB"],
    ["float", "", "", "-"],
    [LONG, "4", "18.2", "120.3"],
    ["neck.0", "4, 8", "102.4", "7.0"],
]


def test_columns_end_together_and_titles_on_one_line() -> None:
    assert "\n".join(aligned([*TABLE[:2], TABLE[3]])).split("\n") == [
        "                     all",
        "               only  but",
        "target  bits     dB   dB",
        "float                  -",
        "neck.0  4, 8  102.4  7.0",
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200, None])
def test_every_cell_is_whole(width: int | None) -> None:
    texts = aligned(TABLE, width=width)
    assert len(texts) == len(TABLE)
    for line, text in zip(TABLE[1:], texts[1:], strict=True):
        assert text.split() == " ".join(line).split()
    short = [line for text in texts for line in text.split("\n") if line != LONG]
    assert width is None or max(map(len, short)) <= width


def test_a_name_without_room_stands_above_its_numbers() -> None:
    assert aligned(TABLE, width=50)[2:] == [
        f"{LONG}\n           4   18.2  120.3",
        "neck.0  4, 8  102.4    7.0",
    ]
    assert "\n" not in aligned(TABLE, width=100)[2]


def test_columns_move_together_where_names_have_no_room() -> None:
    short = [*TABLE[:2], TABLE[3]]
    assert aligned(short, width=23)[2] == "neck.0 4, 8 102.4 7.0"
    assert aligned(short, width=24)[2] == "neck.0  4, 8  102.4  7.0"


def test_headings_and_columns_of_words() -> None:
    lines = aligned([["a", "b"], ["a heading of some length"], ["1", "x"], ["22", "yy"]], {1})
    assert lines == [" a  b", "a heading of some length", " 1  x", "22  yy"]


def test_sentences_are_wrapped_for_terminals_alone() -> None:
    text = "one sentence of several words"
    assert wrapped(text, None, "  ") == f"  {text}"
    assert wrapped(text, 14, "  ") == "  one sentence\n  of several\n  words"
    assert wrapped("get sam-vit-b", 10) == "get\nsam-vit-b", "a name to be copied stays whole"
