"""Opens the page in headless Chromium."""

import csv
import json
import re
import time
import xml.etree.ElementTree as ET

import pytest

from tethertune.lab import report

from .browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

DRAWN = """[...document.querySelectorAll("figure")].map((figure) => ({
    marks: figure.querySelectorAll("svg [class^=mark-][class*=role-mark] path, svg .mark-rule line").length,
    role: figure.querySelector("[role=graphics-document]")?.getAttribute("aria-label") ?? "",
    text: figure.querySelector("svg").outerHTML,
}))"""
"""Of each chart: how many marks it has, what it is called, and its source."""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def browser(chromium):
    """A browser whose pages must write nothing to the console and ask nothing of a network."""
    chromium.forget()
    yield chromium
    chromium.evaluate("0")  # what came before is told before the reply
    assert chromium.console == []
    assert chromium.requests == []


@pytest.mark.parametrize(("dark", "colour"), [(False, "#c8450a"), (True, "#f2703a")])
def test_every_chart_is_drawn(browser, demo, tmp_path, dark, colour):
    browser.open(report.write([demo.root], tmp_path / "report.html"), dark=dark)

    drawn = browser.evaluate(DRAWN)

    assert len(drawn) == 12
    for chart in drawn:
        assert chart["marks"]
        assert chart["role"]
        assert "NaN" not in chart["text"]
    assert any(f'fill="{colour}"' in chart["text"] for chart in drawn)


def test_every_chart_of_several_tasks_is_drawn(browser, whole, tmp_path):
    browser.open(report.write([whole.root], tmp_path / "report.html"))

    drawn = browser.evaluate(DRAWN)

    assert len(drawn) == 2 * 14
    assert all(chart["marks"] and "NaN" not in chart["text"] for chart in drawn)


def test_certificates_are_drawn(browser, certified, tmp_path):
    browser.open(report.write([certified.root], tmp_path / "report.html"))

    drawn = [
        chart for chart in browser.evaluate(DRAWN) if re.search(r"log10 of the bounds|each layer adds", chart["role"])
    ]

    assert len(drawn) == 2
    for chart in drawn:
        assert len(re.findall(r'aria-roledescription="bar"', chart["text"])) == 2
        assert "NaN" not in chart["text"]


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_down_only(browser, whole, tmp_path, dark):
    browser.open(report.write([whole.root], tmp_path / "report.html"), width=360, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")

    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate("Math.max(...[...document.querySelectorAll('svg')].map((svg) => svg.clientWidth))") <= 360


def test_the_keyboard_reaches_every_control_in_order(browser, whole, tmp_path):
    browser.open(report.write([whole.root], tmp_path / "report.html"))
    reachable = "a[href], button, summary, [tabindex='0']"
    shown = f"[...document.querySelectorAll({reachable!r})].filter((element) => element.checkVisibility())"
    browser.evaluate(f"window.controls = {shown}; document.body.focus()")
    wanted = browser.evaluate("window.controls.length")

    order = []
    for _ in range(wanted):
        browser.press("Tab", 9)
        order.append(browser.evaluate("window.controls.indexOf(document.activeElement)"))

    assert wanted > 50
    assert order == list(range(wanted))


def test_a_button_of_the_legend_brings_out_its_line(browser, demo, tmp_path):
    browser.open(report.write([demo.root], tmp_path / "report.html"))
    browser.evaluate("document.querySelector('.legend button').focus()")

    browser.press("Enter", 13)

    browser.wait("document.querySelector('.legend button').getAttribute('aria-pressed') === 'true'")
    faint = (
        "document.querySelector('.legend').parentElement.querySelectorAll('.mark-line path[opacity=\"0.12\"]').length"
    )
    browser.wait(f"{faint} > 0")


def test_a_chart_is_saved_by_the_keyboard(browser, whole, tmp_path):
    browser.open(report.write([whole.root], tmp_path / "report.html"), dark=True)
    save(browser, tmp_path, "figure .save")

    [saved] = tmp_path.glob("*.svg")
    root = ET.parse(saved).getroot()

    assert saved.name == "resnet101-on-flowers-accuracy-of-every-run-test-accuracy.svg"
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "mars-pgm" in "".join(root.itertext())
    ground = root.find("{http://www.w3.org/2000/svg}rect")
    assert ground.attrib["fill"] == "#1b1f25"


def test_a_table_is_saved_by_the_keyboard(browser, whole, tmp_path):
    browser.open(report.write([whole.root], tmp_path / "report.html"))
    save(browser, tmp_path, ".saves .save")

    [saved] = tmp_path.glob("*.csv")
    with saved.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))

    assert saved.name == "test-accuracy-by-method-and-task-mean-standard-deviation-over-the-seeds.csv"
    assert rows[0][:3] == ["Method", "flowers", "pets"]
    assert rows[1][:3] == ["none", "77.0 ± 1.0 %", "72.0 ± 1.0 %"]


def test_a_saved_table_keeps_commas_and_minus_signs(browser, demo, tmp_path):
    browser.open(report.write([demo.root], tmp_path / "report.html"))
    save(browser, tmp_path, ".saves .save")

    [saved] = tmp_path.glob("*.csv")
    with saved.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))

    assert rows[6][4] == "1, 2, 3"
    assert rows[1][7] == "-4.6 (-6.5 to -3.0) to mars-pgm"
    assert len({len(row) for row in rows}) == 1


def test_every_chart_and_every_table_can_be_saved(browser, whole, tmp_path):
    browser.open(report.write([whole.root], tmp_path / "report.html"))

    assert browser.evaluate("[...document.querySelectorAll('figure')].every((one) => one.querySelector('.save'))")
    assert browser.evaluate(
        "[...document.querySelectorAll('.scroll')].every((one) => one.nextElementSibling.querySelector('.save'))"
    )
    labels = browser.evaluate("[...document.querySelectorAll('.save')].map((one) => one.getAttribute('aria-label'))")
    assert all(re.fullmatch("Save (SVG|CSV): .+", label) for label in labels)


def test_hostile_names_run_no_script(browser, folders, tmp_path):
    classes = ("<img src=x onerror=console.error(1)>", "</script><script>console.error(2)</script>")
    folder = folders.add(0.7, classes=classes)
    info = json.loads((folder / "run.json").read_text())
    info["data"]["name"] = "<img src=http://leak.example/ onerror=console.error(3)>"
    info["model"]["name"] = "</script><script>console.error(4)</script>"
    (folder / "run.json").write_text(json.dumps(info))

    browser.open(report.write([folders.root], tmp_path / "report.html"))

    assert browser.evaluate("document.images.length") == 0


def test_these_tests_would_notice_an_error_and_a_request(chromium, tmp_path):
    chromium.forget()
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://leak.example/pixel'><script>console.error('noticed'); undefined.x</script>")

    chromium.open(page)

    assert "noticed" in chromium.console
    assert any("TypeError" in line for line in chromium.console)
    assert chromium.requests == ["http://leak.example/pixel"]


def save(browser, folder, selector):
    """Press a button by the keyboard, and wait for the file that it saves."""
    before = set(folder.iterdir())
    browser.download_to(folder)
    browser.evaluate(f"document.querySelector({selector!r}).focus()")
    browser.press("Enter", 13)
    until = time.monotonic() + 30
    while not [path for path in set(folder.iterdir()) - before if path.suffix != ".crdownload"]:
        assert time.monotonic() < until, f"nothing was saved; console: {browser.console}"
        time.sleep(0.05)
