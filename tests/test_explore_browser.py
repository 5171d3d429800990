"""The explorer in a real JupyterLab: its slider is moved by keyboard, and what it shows follows."""

import contextlib
import json
import statistics
import sys

import nbformat
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mtprune_utils.files import PROJECT
from test_browser import browser  # noqa: F401  (a fixture)
from test_faults import serving

SHORT = {
    "seeds": 1,
    "dense.steps": 8,
    "prune.filters_per_step": 60,
    "prune.prune_interval": 2,
    "criteria": ["taylor", "l1"],
}


class Page:
    """A notebook in JupyterLab, through the application itself."""

    def __init__(self, driver):
        self.driver, self.console = driver, []
        driver.set_script_timeout(120)

    def ask(self, script: str, *arguments):
        """What JavaScript returns that knows the application (`app`) and the notebook (`panel`)."""
        return self.driver.execute_async_script(
            "const given = [...arguments], done = given.pop(), app = window.jupyterapp;"
            "const panel = app?.shell.currentWidget;"
            f"(async () => {{{script}}})().then(done, error => done(`failed: ${{error}}`))",
            *arguments,
        )

    def run_all(self) -> None:
        """Returns as the last cell has run, or one has failed."""
        WebDriverWait(self.driver, 60).until(
            lambda _: self.ask(
                "return Boolean(panel?.sessionContext) && panel.sessionContext.isReady"
                " && panel.content.model !== null && Boolean(panel.sessionContext.session?.kernel)"
            )
        )
        assert self.ask("await app.commands.execute('notebook:run-all-cells')") is None

    def outputs(self) -> list[dict]:
        cells = self.ask("return panel.content.model.toJSON()")["cells"]
        return [output for cell in cells for output in cell.get("outputs", ())]

    def kernel_says(self, code: str) -> str:
        return self.ask(
            "const kernel = panel.sessionContext.session.kernel; let text = '';"
            "const future = kernel.requestExecute({code: given[0], store_history: false});"
            "future.onIOPub = message => { text += message.content.text ?? '' };"
            "await future.done; return text",
            code,
        ).strip()

    def problems(self) -> list[str]:
        """Errors of cells, of the page, and widgets that are not shown."""
        failed = [o["evalue"] for o in self.outputs() if o["output_type"] == "error"]
        log = self.driver.get_log("browser")  # what is new there
        self.console += [entry["message"] for entry in log if entry["level"] == "SEVERE"]
        text = self.driver.find_element(By.CSS_SELECTOR, ".jp-Notebook").text
        unseen = [w for w in ("Loading widget", "Error displaying widget") if w in text]
        return failed + self.console + unseen

    def light(self, selector: str, colour: str) -> float:
        """How light a colour of an element is, from 0 to 255: the mean of its channels."""
        value = self.find(selector).value_of_css_property(colour)
        channels = value[value.index("(") + 1 : -1].split(",")[:3]
        return statistics.mean(map(float, channels))

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)


@pytest.fixture
def opened(browser, tmp_path):  # noqa: F811
    """Opens the explorer's notebook, over runs of the test, with cells added."""
    notebook = nbformat.read(PROJECT / "notebooks" / "14_explore_pruning.ipynb", as_version=4)

    with contextlib.ExitStack() as stack:

        def open_(*added: str, only: bool = False) -> Page:
            for cell in notebook.cells:
                if "parameters" in cell.metadata.get("tags", []):
                    folder = json.dumps(str(tmp_path / "runs"))
                    cell.source = cell.source.replace('"runs"', folder)
                    cell.source = cell.source.replace("= {}", f"= {SHORT}")
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            cells = [nbformat.v4.new_code_cell(source) for source in added]
            notebook.cells = cells if only else [*notebook.cells, *cells]
            place = tmp_path / "notebooks" / "explore.ipynb"
            place.parent.mkdir()
            nbformat.write(notebook, place)
            command = [
                sys.executable,
                "-m",
                "jupyter",
                "lab",
                "--ip=localhost",
                "--LabApp.expose_app_in_browser=True",
                str(place.parent),
            ]
            port, token = stack.enter_context(serving(command, tmp_path / "jupyter"))
            browser.get(f"http://localhost:{port}/lab/tree/{place.name}?token={token}")
            return Page(browser)

        yield open_


def test_the_slider_moves_the_kernel_the_words_and_the_picture(opened):
    page = opened()
    page.run_all()
    patient = WebDriverWait(page.driver, 20)
    patient.until(lambda driver: driver.find_elements(By.CSS_SELECTOR, ".explore .readout"))
    assert page.problems() == []
    words = "".join(output.get("text", "") for output in page.outputs())
    assert "taylor, seed 0: replayed" in words
    page.driver.execute_script(
        "const handle = document.querySelector('.explore-size .noUi-handle');"
        "handle.scrollIntoView({block: 'center'}); handle.focus()"
    )

    def state() -> tuple[str, ...]:
        pictures = page.driver.find_elements(By.CSS_SELECTOR, ".explore .tile img")
        return (
            page.kernel_says("print(explorer.size.value)"),
            page.find(".explore .readout").text,
            page.find(".explore-size .widget-readout").text,
            "".join(picture.get_attribute("src") for picture in pictures),
            *(
                drawing.get_attribute("outerHTML")
                for drawing in page.driver.find_elements(By.CSS_SELECTOR, ".explore svg")
            ),
        )

    before, milliseconds = state(), []
    assert before[0] == "0" and "The dense network" in before[1]
    for removal in ("1", "2", "3"):
        page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        at = f".explore .readout[data-removal='{removal}']"
        readout = patient.until(lambda _: page.find(at))
        milliseconds.append(float(readout.get_attribute("data-milliseconds")))
        after = state()
        assert after[0] == removal and f"After removal {removal}" in after[1]
        assert all(new != old for new, old in zip(after, before, strict=True))
        before = after
    assert min(milliseconds) < 200  # by the kernel's clock; other work may hold up single moves
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        page.ask("await app.commands.execute('apputils:change-theme', {theme: given[0]})", theme)
        patient.until(
            lambda _: (
                (page.light(".jp-Notebook", "background-color") > 128) == theme.endswith("Light")
            )
        )
        paper = page.light(".jp-Notebook", "background-color")
        for text, ink in ((".explore svg text", "fill"), (".explore .readout", "color")):
            assert abs(page.light(text, ink) - paper) > 180
    assert page.problems() == []


def test_a_planted_failure_is_found(opened):
    page = opened("print('fine')", "raise ValueError('planted in a cell')", only=True)
    page.run_all()
    page.driver.execute_script("setTimeout(() => { throw new Error('planted in the page') })")
    WebDriverWait(page.driver, 10).until(lambda _: len(page.problems()) == 2)
    assert all("planted in" in problem for problem in page.problems())
