"""Looks at a page in headless Chromium."""

import json
import re
from collections.abc import Iterator

LOOK = """
const shapes = 'circle, rect, line, path, text';
const box = element => element.getBoundingClientRect();
const outside = [...document.querySelectorAll('main *')].filter(
    element => !element.closest('.scroll, pre') && (box(element).right > innerWidth + .5 || box(element).left < -.5));
const covering = (one, other) => Math.min(one.right, other.right) - Math.max(one.left, other.left) > .5
    && Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 2;
const covered = [...document.querySelectorAll('svg.figure')].flatMap(figure => {
    const words = [...figure.querySelectorAll('text:not(.place)')];
    return words.filter((word, at) => words.slice(0, at).some(before => covering(box(word), box(before))));
});
return {
    covered: covered.map(word => word.textContent),
    figures: [...document.querySelectorAll('svg.figure')].map(figure => [
        figure.getAttribute('aria-label'), box(figure).width, box(figure).height,
        [...figure.querySelectorAll(shapes)].filter(mark => box(mark).width + box(mark).height > 0).length]),
    pictures: [...document.images].map(image => image.naturalWidth),
    wide: document.documentElement.scrollWidth,
    outside: outside.map(element => element.outerHTML.slice(0, 200)),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector('svg text.row, svg text.tick')).fill,
};
"""


def brightness(colour: str) -> float:
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 765


def screens(browser) -> Iterator[tuple[int, str]]:
    """Set the browser to three widths, in light and in dark, one after the other."""
    for width in (360, 768, 1280):
        for scheme in ("light", "dark"):
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            yield width, scheme


def in_scheme(seen, scheme: str) -> bool:
    """Whether the colours `paper` and `ink` that were seen are those of a light or a dark page."""
    paper, ink = brightness(seen["paper"]), brightness(seen["ink"])
    return (paper > 0.9 and ink < 0.6) if scheme == "light" else (paper < 0.15 and ink > 0.5)


def asked_for(browser) -> set[str]:
    """The addresses that were requested since this log was last read."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}


def look_at(browser, page) -> int:
    """Look at the page at three widths and in both schemes: all is drawn, nothing lies outside, no text over another,
    the browser complains of nothing and asks for nothing; but names of classes on the map may cover each other. Returns
    the number of figures."""
    figures = set[int]()
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # reading it empties it of an earlier page's
    for width, scheme in screens(browser):
        browser.get(page.as_uri())
        seen = browser.execute_script(LOOK)
        figures.add(len(seen["figures"]))
        for description, wide, high, marks in seen["figures"]:
            assert min(wide, high) > 50, description
            assert marks > 3, description
        assert seen["wide"] <= width
        assert seen["outside"] == []
        assert seen["covered"] == []
        assert all(side > 0 for side in seen["pictures"])
        assert in_scheme(seen, scheme)
    assert browser.get_log("browser") == []
    assert {url for url in asked_for(browser) if not url.startswith("data:")} == {page.as_uri()}
    (number,) = figures
    return number
