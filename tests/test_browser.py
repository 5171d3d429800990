"""A reader's way in: a notebook opened in JupyterLab in a real browser, and Run All."""

import json
import os
import shutil
import sys

import nbformat
import pytest
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from mtprune_utils.files import PROJECT
from test_faults import serving

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path):
    if not (CHROMIUM and DRIVER):
        if os.environ.get("CI"):
            pytest.fail("chromium and chromedriver are missing, which .ci/run installs")
        pytest.skip(
            "needs chromium and chromedriver (Debian: apt install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = f"--user-data-dir={tmp_path / 'browser'}"
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
        profile,
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def lab(tmp_path):
    """JupyterLab over a copy of the first notebook, whose runs go into a folder of the test.

    Returns the notebook and its address.
    """
    notebook = nbformat.read(PROJECT / "notebooks" / "01_train_dense.ipynb", as_version=4)
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    )
    assert '"runs"' in parameters.source
    parameters.source = parameters.source.replace('"runs"', json.dumps(str(tmp_path / "runs")))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    place = tmp_path / "notebooks" / "01_train_dense.ipynb"
    place.parent.mkdir()
    nbformat.write(notebook, place)
    command = [sys.executable, "-m", "jupyter", "lab", "--ip=localhost", str(place.parent)]
    with serving(command, tmp_path / "jupyter") as (port, token):
        yield place, f"http://localhost:{port}/lab/tree/{place.name}?token={token}"


def test_run_all_in_jupyterlab_shows_every_output(browser, lab):
    notebook, address = lab
    browser.get(address)
    redrawn = (
        NoSuchElementException,
        StaleElementReferenceException,
        ElementClickInterceptedException,
    )
    patient = WebDriverWait(browser, 120, ignored_exceptions=redrawn)

    def click(selector: str, text: str) -> None:
        def clicked(_):
            items = browser.find_elements(By.CSS_SELECTOR, selector)
            item = next((item for item in items if text in item.text), None)
            return item and (item.click() or True)

        patient.until(clicked)

    patient.until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-CodeCell"))
    kernel = ".jp-Notebook-ExecutionIndicator"

    def idle(_) -> bool:
        indicator = browser.find_element(By.CSS_SELECTOR, kernel)
        return indicator.get_attribute("data-status") in ("idle", "Idle")

    patient.until(idle)
    click(".lm-MenuBar-itemLabel", "Run")
    click(".lm-Menu-itemLabel", "Run All Cells")
    cells = ".jp-Notebook .jp-CodeCell"
    patient.until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, cells)[-1].find_element(
            By.CSS_SELECTOR, ".jp-RenderedImage"
        )
    )
    tables = browser.find_elements(By.CSS_SELECTOR, f"{cells} .jp-RenderedHTMLCommon table")
    # not `text`: what lies below the window is not rendered, and has none
    assert "position prior" in tables[-1].get_attribute("textContent")
    assert not browser.find_elements(
        By.CSS_SELECTOR, '[data-mime-type="application/vnd.jupyter.error"]'
    )
    assert list(notebook.parents[1].glob("runs/smoke/dense/*/done.json"))
