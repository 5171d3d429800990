"""The site: made by its own tools, then read as a reader would, in a browser without a network."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from mtprune_utils import registry
from mtprune_utils.files import PROJECT, read_json
from mtprune_utils.study import store
from test_browser import browser  # noqa: F401  (a fixture)

TOOLS = PROJECT / ".venv" / "site"  # see SITE in Makefile
SOURCE = PROJECT / "docs" / "site"
PHONE, DESK = (390, 844), (1300, 1000)
LOADED = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src"}

if not (TOOLS / "sphinx").exists():
    if os.environ.get("CI"):
        pytest.fail("the site's tools are missing, which `make test` installs", pytrace=False)
    pytest.skip("needs .venv/site: `make site` installs it", allow_module_level=True)
sys.path += [str(SOURCE), str(TOOLS)]

import api  # noqa: E402
import formulas  # noqa: E402
import pages  # noqa: E402


class Page(HTMLParser):
    """What a page loads, where it leads, and the names in it that can be led to."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.links, self.anchors = [], [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given.get("id"), given.get("name")}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if LOADED.get(tag) in given:
            self.loads.append(given[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site, made anew."""
    out = tmp_path_factory.mktemp("site")
    path = os.pathsep.join((str(TOOLS), str(PROJECT)))
    made = subprocess.run(
        [sys.executable, str(SOURCE / "pages.py"), str(out)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return out / "html"


def all_pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def broken(site: Path) -> list[str]:
    """Links, images, scripts and styles of all pages that lead nowhere, or out to be loaded."""
    page = cache(Page)
    found = []
    for path in all_pages(site):
        for target in {*page(path).loads, *page(path).links}:
            url = urlsplit(target)
            if url.scheme in ("data", "mailto"):
                continue
            if url.scheme or url.netloc:
                if target in page(path).loads:
                    found.append(f"{path.name} loads {target}")
                continue
            place = (path.parent / unquote(url.path)) if url.path else path
            if not place.is_file():
                found.append(f"{path.name} -> {target}")
            elif place.suffix == ".html" and unquote(url.fragment) not in page(place).anchors:
                found.append(f"{path.name} -> {target}: no such place there")
    return found


def see(driver, width: int, height: int, scheme: str) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preferred})


# --- what is on it ---


def test_everything_is_on_the_site_and_leads_somewhere(site):
    assert broken(site) == []
    there = {path.relative_to(site).with_suffix("").as_posix() for path in all_pages(site)}
    expected = {"index", "search", "api/core.pruner", "api/weightings"}
    expected |= {f"notebooks/{path.stem}" for path in store.notebook_paths()}
    expected |= {f"docs/{path.stem}" for path in (PROJECT / "docs").glob("*.md")}
    expected |= {f"criteria/{name}" for name in registry.names("criteria")}
    assert expected <= there


def test_a_broken_link_is_found(site, tmp_path):
    (tmp_path / "page.html").write_text(
        '<a href="gone.html">a</a><a href="#gone">a</a><img src="https://somewhere/a.png">'
        '<a href="page.html#here">a</a><b id="here"></b><a href="https://somewhere">a</a>'
    )
    assert len(broken(tmp_path)) == 3
    with pytest.raises(ValueError, match="docs/code.md links to gone.md, which is not there"):
        pages.Site(tmp_path).linked("[a](gone.md)", "docs/code.md")


def test_every_figure_says_which_notebook_command_and_commit_it_is_from(site):
    images = (PROJECT / "figures").glob("*/fig*.png")
    images = [image for image in images if not pages.OWN.search(image.parent.name)]
    assert len(images) > 15
    for image in images:
        page = (site / "figures" / f"{image.parent.name}.html").read_text()
        figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
        (shown,) = [figure for figure in figures if f"/{image.stem}.csv" in figure]
        origin = read_json(image.with_suffix(".json"))
        words = " ".join(re.sub("<[^>]+>", "", shown).split())
        notebook = store.figure_notebooks()[image.stem].stem
        command = "make study" if image.parent.name == "study" else "make figures PROFILE="
        assert re.match(rf"Figure \d.*: this notebook {notebook}, this command {command}", words)
        assert f"this commit {origin['commit'][:12]}" in words
        assert f'{notebook}.html"' in shown


def test_each_criterion_has_its_formula(site):
    for name in registry.names("criteria"):
        text = (PROJECT / "mtprune_utils" / "criteria" / f"{name}.py").read_text()
        has_formula = "\n\n    " in text.split('"""')[1]
        assert ("<math" in (site / "criteria" / f"{name}.html").read_text()) == has_formula


def test_formulas_are_typeset_and_prose_stays_prose():
    inner = r"\left\langle w, g \right\rangle"
    assert formulas.latex("E (<w, g> + b g^b)^2") == ([rf"\mathbb{{E}}\, ({inner}  + b g^b)^2"], [])
    assert formulas.latex("E mean over pairs i < j of cos(g_i, g_j)") == (
        [r"\mathbb{E}\, \underset{i<j}{\mathrm{mean}} \cos(g_i, g_j)"],
        [],
    )
    assert formulas.latex("max over k of R_k, R_k the rank among all") == (
        [r"\max_{k} R_k"],
        [r"R_k \text{ the rank among all }"],
    )


# --- the reference ---


def test_every_public_name_of_the_reference_is_documented():
    assert list(api.undocumented(api.load())) == []


def test_an_undocumented_public_name_is_found(tmp_path):
    package = tmp_path / api.NAME
    for folder in (*api.PACKAGES, *api.REGISTRIES):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").write_text('"""One file each: `score(signals)`."""')
    (package / "__init__.py").write_text('"""A package."""')
    (package / "criteria" / "own.py").write_text('"""An entry."""\n\ndef score(signals): ...')
    (package / "core" / "part.py").write_text(
        '"""A module."""\n\n'
        'class Base:\n    """A class."""\n\n    def told(self):\n        """Told."""\n\n\n'
        'class Own(Base):\n    """Another."""\n\n    def told(self): ...\n'
        "    def untold(self): ...\n    def _private(self): ...\n\n\ndef bare(): ...\n"
    )
    found = list(api.undocumented(api.load(tmp_path)))
    part = f"{api.NAME}.core.part"
    assert found == [f"{part}.Own.untold", f"{part}.bare"]


# --- in a browser ---

LOOK = """
const shown = document.querySelector("article") ?? document.body;
const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(c => {
  c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4 });
const seen = [0.2126, 0.7152, 0.0722];
const light = colour => channels(colour).reduce((sum, c, i) => sum + c * seen[i], 0);
const text = light(getComputedStyle(shown).color);
const paper = light(getComputedStyle(document.body).backgroundColor);
return {
  width: document.documentElement.scrollWidth,
  contrast: (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05),
  dark: paper < 0.2,
  broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
  outside: performance.getEntriesByType("resource").map(e => e.name).filter(n => /^http/.test(n)),
};
"""


def test_every_page_is_sound_on_a_phone_in_light_and_dark(browser, site):  # noqa: F811
    wrong = []
    for number, path in enumerate(all_pages(site)):
        scheme = ("light", "dark")[number % 2]
        see(browser, *PHONE, scheme)
        browser.get(path.as_uri())
        found = browser.execute_script(LOOK)
        told = [entry["message"] for entry in browser.get_log("browser")]
        sound = found["width"] <= PHONE[0] and found["contrast"] >= 7
        sound &= found["dark"] == (scheme == "dark")
        if not sound or found["broken"] or found["outside"] or told:
            wrong.append((path.name, found, told))
    assert wrong == []


def test_search_finds_a_word_without_a_server(browser, site):  # noqa: F811
    see(browser, *DESK, "light")
    browser.get((site / "index.html").as_uri())
    field = browser.find_element(By.CSS_SELECTOR, "input[name=q]")
    field.send_keys("quarrel")
    field.submit()
    results = WebDriverWait(browser, 20).until(
        lambda driver: driver.find_elements(By.CSS_SELECTOR, "#search-results li a")
    )
    assert any("taylor_minus_conflict" in result.get_attribute("href") for result in results)


def test_charts_answer_to_their_controls(browser, site):  # noqa: F811
    see(browser, *DESK, "dark")
    for page in sorted((site / "figures").glob("*.html")):
        browser.get(page.as_uri())
        moving = [NoSuchElementException, StaleElementReferenceException]  # while they are drawn
        patient = WebDriverWait(browser, 20, ignored_exceptions=moving)
        charts = len(browser.find_elements(By.CSS_SELECTOR, ".chart"))

        def drawn() -> tuple[int, str]:
            lines = browser.find_elements(By.CSS_SELECTOR, ".chart svg .mark-line path")
            axis = browser.find_element(By.CSS_SELECTOR, ".chart svg .role-axis-label")
            return len(lines), axis.get_attribute("textContent")

        lines = charts * len(_checked(browser, page))
        assert lines > 2
        patient.until(lambda driver: drawn()[0] == lines)
        before = drawn()
        box = browser.find_element(By.CSS_SELECTOR, "[name=networks][value=CosPrune]")
        box.click()
        box.click()
        browser.find_element(By.CSS_SELECTOR, "select option[value=macs]").click()
        patient.until(lambda driver: drawn()[1] != before[1])
        browser.find_elements(By.CSS_SELECTOR, ".chart-controls button")[1].click()
        patient.until(lambda driver: drawn()[0] == 0)
        assert browser.get_log("browser") == []


def _checked(browser, page: Path) -> set[str]:  # noqa: F811
    """The networks that are shown and have a curve."""
    boxes = browser.find_elements(By.CSS_SELECTOR, "[name=networks]:checked")
    specs = re.findall(r'application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    rows = json.loads(specs[0])["datasets"]["rows"]
    curves = {row["network"] for row in rows if row["kind"] == "iterative"}
    return curves & {box.get_attribute("value") for box in boxes}
