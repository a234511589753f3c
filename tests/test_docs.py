"""The documentation: the site builds without a warning and needs no network, commands exist, examples run."""

import doctest
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import draw_picture

import equipoise
from equipoise.cli.main import main
from equipoise.config.reading import shipped_recipes

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "equipoise"
GONE = {"log.md", "decisions.md"}  # they may name what was there once


@pytest.mark.slow
def test_examples_in_docstrings_run(tmp_path, monkeypatch):
    """The first of them, of `train`, makes the run that others use."""
    monkeypatch.chdir(tmp_path)
    draw_picture(Path("picture.png"), 0, 0)
    files = [file for file in sorted(SOURCE.rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]
    for file in sorted(files, key=lambda file: file.name != "session.py"):
        module = import_module(".".join(file.relative_to(SOURCE.parent).with_suffix("").parts))
        done = doctest.testmod(module, extraglobs={"equipoise": equipoise, "torch": torch})
        assert (done.failed, done.attempted > 0) == (0, True), file


def test_commands_in_the_documentation_exist(capsys):
    used = dict[str, set[str]]()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ") if page.name not in GONE else ""
        for command, words in re.findall(r"equipoise ([a-z]+)\b([^`\n#]*)", text):
            flags = (flag.replace("_", "-") for flag in re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", words))
            used.setdefault(command, set()).update(flags)
    assert len(used) > 8
    for command, flags in used.items():
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, command
        assert flags <= {*re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", capsys.readouterr().out)}, command
    targets = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        assert {*re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))} <= targets, page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """As `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    built = subprocess.run([*words, "-d", out / "docs", ROOT / "docs", out], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


class Asked(HTMLParser):
    """What a page asks for by itself: all addresses but those that links lead to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses = set[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses |= {value or "" for name, value in attrs if name in ("src", "srcset", "href") and tag != "a"}


@pytest.mark.long
def test_no_page_asks_for_another_host(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > 30
    for page in pages:
        assert not {address for address in Asked(page).addresses if "//" in address}, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert (site / "searchindex.js").stat().st_size > 10_000


@pytest.mark.long
def test_what_the_pages_must_have(site):
    api = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in equipoise.__all__[1:] if f'id="equipoise.{name}"' not in api] == []
    assert api.count('class="highlight-pycon') == 8, "examples are shown as code"
    recipes = (site / "recipes.html").read_text(encoding="utf-8")
    assert [name for name in shipped_recipes() if f">{name}</" not in recipes] == []
    methods = (site / "methods.html").read_text(encoding="utf-8")
    assert 'href="api.html#equipoise.method.losses.balanced_contrastive_loss"' in methods, "the function of an equation"
    assert "z·z'/T" in methods, "no apostrophe became a quotation mark"
    assert 'id="see-it"' in (site / "index.html").read_text(encoding="utf-8"), "the README's beginning"


@pytest.mark.long
def test_the_site_in_a_browser_without_a_network(site, browser):
    for width in (390, 1280):
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        for page in site.glob("*.html"):
            browser.get(page.as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page.name
    browser.get((site / "search.html").as_uri() + "?q=temperature")
    browser.implicitly_wait(10)
    assert browser.find_elements("css selector", "#search-results a[href*='probabilities.html']")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith(("data:", site.as_uri()))] == []
