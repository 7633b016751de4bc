"""Opens the page in headless Chromium."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

from tethertune.lab import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=20000",
)
DARK, LIGHT = 0, 1  # Chromium's numbers of the schemes


@dataclass
class Opened:
    dom: str
    console: list[str]
    requests: list[str]


def open_page(path, scratch, *, scheme=LIGHT):
    """Load a page; return its elements after its scripts have run, its console, and what it asked the network for."""
    log = scratch / "net.json"
    own = (f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={log}", "--dump-dom", path.as_uri())
    options = (*QUIET, f"--blink-settings=preferredColorScheme={scheme}", *own)
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=300, check=True)
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked_by_pages(log))


def asked_by_pages(log):
    """URLs that a page asked the network for; what the browser asks of itself has no origin."""
    document = json.loads(log.read_text())
    start = document["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    started = [event["params"] for event in document["events"] if event["type"] == start and "params" in event]
    return [params["url"] for params in started if params.get("initiator", "not an origin") != "not an origin"]


@pytest.mark.parametrize(("scheme", "colour"), [(LIGHT, "#c8450a"), (DARK, "#f2703a")])
def test_every_chart_is_drawn_without_an_error_or_a_request(demo, tmp_path, scheme, colour):
    page = report.write([demo.root], tmp_path / "report.html")

    opened = open_page(page, tmp_path, scheme=scheme)

    assert opened.console == []
    assert opened.requests == []
    drawn = opened.dom.split("<figure>")[1:]
    assert len(drawn) == 12
    for figure in drawn:
        svg = figure[figure.index("<svg") : figure.index("</svg>")]
        marks = re.findall(r'<g class="mark-(?:symbol|rect|line|area|rule) role-mark[^>]*>\s*<(?:path|line)', svg)
        assert marks
        assert "NaN" not in svg
        assert 'role="graphics-document"' in figure
    assert f'fill="{colour}"' in opened.dom


def test_certificates_are_drawn(certified, tmp_path):
    opened = open_page(report.write([certified.root], tmp_path / "report.html"), tmp_path)

    assert opened.console == []
    assert opened.requests == []
    drawn = [
        figure for figure in opened.dom.split("<figure>")[1:] if re.search("log10 of the bounds|layer adds", figure)
    ]
    assert len(drawn) == 2
    for figure, marks in zip(drawn, (2, 2), strict=True):
        svg = figure[figure.index("<svg") : figure.index("</svg>")]
        assert len(re.findall(r'aria-roledescription="bar"', svg)) == marks
        assert "NaN" not in svg


def test_hostile_names_run_no_script(folders, tmp_path):
    folder = folders.add(
        0.7, classes=("<img src=x onerror=console.error(1)>", "</script><script>console.error(2)</script>")
    )
    info = json.loads((folder / "run.json").read_text())
    info["data"]["name"] = "<img src=http://leak.example/ onerror=console.error(3)>"
    info["model"]["name"] = "</script><script>console.error(4)</script>"
    (folder / "run.json").write_text(json.dumps(info))

    opened = open_page(report.write([folders.root], tmp_path / "report.html"), tmp_path)

    assert opened.console == []
    assert opened.requests == []


def test_this_test_would_notice_an_error_and_a_request(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://leak.example/pixel'><script>console.error('noticed')</script>")

    opened = open_page(page, tmp_path)

    assert any("noticed" in line for line in opened.console)
    assert opened.requests == ["http://leak.example/pixel"]
