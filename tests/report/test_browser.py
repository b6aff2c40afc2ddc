"""Reports in a real browser: clicked, dragged, with a keyboard, on a phone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptq4sam.cli import main
from tests.report.conftest import Browser
from tests.report.synthetic import write_run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"))
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


def shown(browser: Browser, tmp_path: Path) -> np.ndarray:
    """Pixels of the first picture, within its rounded corners."""
    path = tmp_path / "shot.png"
    browser.driver.find_element("css selector", ".stage").screenshot(str(path))
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)[8:-8, 8:-8]


def press(browser: Browser, view: str) -> None:
    browser.driver.find_element("css selector", f".picture button[data-view={view}]").click()


def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.complaints() == []
    loaded = browser.run("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert loaded == [True] * 12


def test_the_slider_moves_by_keyboard_and_changes_the_picture(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    browser.open(page)
    slider = browser.driver.find_element("css selector", ".picture input")
    before = shown(browser, tmp_path)
    slider.send_keys("\ue011")  # home: nothing but quantized masks
    quantized = shown(browser, tmp_path)
    slider.send_keys("\ue010")  # end: nothing but float masks
    exact = shown(browser, tmp_path)
    slider.send_keys("\ue012")  # one to the left
    assert slider.get_attribute("value") == "99"
    middle = before.shape[1] // 2
    left, right = slice(None, middle - 40), slice(middle + 40, None)
    top = slice(None, before.shape[0] // 2)  # above the words float and quantized
    assert np.abs(exact - quantized)[top].max() > 40
    np.testing.assert_array_equal(before[top, left], exact[top, left])
    np.testing.assert_array_equal(before[top, right], quantized[top, right])


def test_the_picture_is_divided_where_it_is_touched(browser: Browser, page: Path) -> None:
    from selenium.webdriver import ActionChains

    browser.open(page)
    stage = browser.driver.find_element("css selector", ".stage")
    slider = browser.driver.find_element("css selector", ".picture input")
    quarter = -int(stage.size["width"] / 4)
    ActionChains(browser.driver).move_to_element_with_offset(stage, quarter, 0).click().perform()
    assert abs(int(slider.get_attribute("value")) - 25) <= 1


def test_views_by_click(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    views = {}
    for view in ("image", "reference", "quantized", "difference"):
        press(browser, view)
        views[view] = shown(browser, tmp_path)
        pressed = browser.driver.find_elements("css selector", ".picture button[aria-pressed=true]")
        assert pressed[0].get_attribute("data-view") == view
    assert len(np.unique(views["image"].reshape(-1, 3), axis=0)) == 1
    for first, second in (("reference", "quantized"), ("image", "difference")):
        assert np.abs(views[first] - views[second]).max() > 40
    press(browser, "slider")
    assert browser.driver.find_element("css selector", ".picture input").is_enabled()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_page_is_wider_than_its_screen(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    browser.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return getComputedStyle(document.body).fontSize") == "16px"


def test_everything_has_a_name(browser: Browser, page: Path) -> None:
    browser.open(page)
    unnamed = "return [...document.querySelectorAll(arguments[0])].filter(one => !(%s)).length"
    for what, name in (
        ("svg", "one.getAttribute('aria-label') && one.getAttribute('role') === 'img'"),
        ("img", "one.alt"),
        ("input, [role=group], [role=region]", "one.getAttribute('aria-label')"),
        ("button, summary, h2", "one.textContent.trim()"),
    ):
        assert browser.run("return document.querySelectorAll(arguments[0]).length", what) > 0
        assert browser.run(unnamed % name, what) == 0
    assert browser.run("return document.documentElement.lang") == "en"
    targets = (
        "return [...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))"
    )
    assert browser.run(targets) is True


def test_light_and_dark(browser: Browser, page: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.open(page)
        style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        colours.append(browser.run(style))
        drawn = "return getComputedStyle(document.querySelector('figure svg text')).fill"
        assert browser.run(drawn) == colours[-1][0]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours[0] != colours[1]
