"""Progress where there is no terminal."""

from __future__ import annotations

import logging
import re

import pytest

from ptq4sam.progress import Ticker, bars, shortened, told


def test_a_line_each_half_minute_says_how_long_the_rest_takes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    with caplog.at_level(logging.INFO, "ptq4sam"):
        for step in told(range(10), "segmenting", Ticker(clock=lambda: now[0])):
            now[0] += 12
            assert step < 10
    assert caplog.messages == [
        "segmenting: 3 of 10, 36 s so far, about 84 s left",
        "segmenting: 6 of 10, 72 s so far, about 48 s left",
        "segmenting: 9 of 10, 2 min so far, about 12 s left",
    ]


def test_nothing_is_said_of_short_work(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ptq4sam"):
        assert list(bars(range(5), "segmenting")) == [0, 1, 2, 3, 4]
    assert caplog.messages == []


def test_a_first_step_that_is_long_has_no_forecast(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    ticker = Ticker(clock=lambda: now[0])
    now[0] = 31
    with caplog.at_level(logging.INFO, "ptq4sam"):
        assert list(told(range(2), "reading", ticker)) == [0, 1]
    assert caplog.messages == ["reading: 0 of 2, 31 s so far"]


def test_a_long_description_keeps_its_first_word_and_its_end() -> None:
    unit = "reconstructing mask_decoder.transformer.layers.0.cross_attn_token_to_image"
    assert shortened(unit, 80) == unit
    shown = shortened(unit, 54)
    assert len(shown) == 54
    assert shown.startswith("reconstructing ...")
    assert shown.endswith(".layers.0.cross_attn_token_to_image")


def test_percents_and_time_are_whole_beside_a_long_description(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("COLUMNS", "80"), ("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    unit = "reconstructing mask_decoder.transformer.final_attn_token_to_image"
    assert list(bars(range(3), unit)) == [0, 1, 2]
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err).rstrip()
    assert last.endswith("100% 0:00:00")
