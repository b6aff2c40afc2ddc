from __future__ import annotations

import pytest

from ptq4sam.errors import CheckpointError
from ptq4sam.prompts.categories import (
    COCO_CATEGORY_IDS,
    NO_CATEGORY,
    category_ids_by_number,
    category_ids_of,
)

COCO = {id_: f"thing {id_}" for id_ in COCO_CATEGORY_IDS}
COCO_80 = [COCO[id_] for id_ in COCO_CATEGORY_IDS]
COCO_91 = [COCO.get(place, "N/A") for place in range(91)]
NUMBERED_80 = [f"LABEL_{place}" for place in range(80)]


def ids(labels: list[str], categories: dict[int, str]) -> list[int]:
    return category_ids_of(labels, categories, "a detector").tolist()


def test_names_decide() -> None:
    assert ids(["Cat", "dog", " car "], {7: "car", 3: "cat"}) == [3, NO_CATEGORY, 7]


def test_ninety_one_labels_are_coco_ids() -> None:
    expected = [place if place in COCO else NO_CATEGORY for place in range(91)]
    for categories in (COCO, {}):
        assert ids(COCO_91, categories) == expected
        assert ids([f"LABEL_{place}" for place in range(91)], categories) == expected


def test_eighty_labels_are_coco_ids_in_rising_order() -> None:
    for categories in (COCO, {}):
        assert ids(COCO_80, categories) == ids(NUMBERED_80, categories) == list(COCO_CATEGORY_IDS)
    others = {200 - place: f"other {place}" for place in range(80)}
    assert ids(NUMBERED_80, others) == sorted(others)


def test_a_label_that_is_written_another_way_goes_by_its_place() -> None:
    renamed = ["aeroplane" if name == "thing 5" else name for name in COCO_80]
    assert ids(renamed, COCO) == list(COCO_CATEGORY_IDS)
    part = {id_: COCO[id_] for id_ in (1, 5, 90)}
    assert ids(renamed, part)[:6] == [1] + [NO_CATEGORY] * 3 + [5, NO_CATEGORY]


def test_places_are_not_used_against_names() -> None:
    mine = {1: "thing 90", 2: "thing 1", 3: "another thing"}
    found = ids(COCO_91, mine)
    assert {place: id_ for place, id_ in enumerate(found) if id_ != NO_CATEGORY} == {90: 1, 1: 2}


@pytest.mark.parametrize("categories", [{1: "circle", 2: "star"}, COCO])
def test_foreign_names_are_an_error(categories: dict[int, str]) -> None:
    with pytest.raises(CheckpointError, match=r"finds nut, bolt, the data set has .*names"):
        ids(["nut", "bolt"], categories)
    with pytest.raises(CheckpointError, match="finds x0, x1, x2, "):
        ids([f"x{place}" for place in range(80)], categories)


@pytest.mark.parametrize("categories", [{}, COCO])
def test_numbers_without_names_must_be_coco(categories: dict[int, str]) -> None:
    with pytest.raises(CheckpointError, match=r"has 5 classes, the data set \d+ categories"):
        ids(NUMBERED_80[:5], categories)


def test_as_many_classes_as_categories_are_the_data_sets_own() -> None:
    own = range(101, 181)
    assert category_ids_by_number(80, list(own), "it").tolist() == list(own)
    assert category_ids_by_number(80, [1, 2], "it").tolist() == list(COCO_CATEGORY_IDS)
    with pytest.raises(CheckpointError, match="it knows 91 classes, the data set 80 categories"):
        category_ids_by_number(91, list(own), "it")
