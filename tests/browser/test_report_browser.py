"""The report as a real browser shows it: headless Chromium, without a network."""

from __future__ import annotations

import html
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from cge_report_data import results as cge_results
from cge_report_data import write_run as write_cge_run
from report_data import TESTS, results, write_run
from unidetox_report_data import TARGETS
from unidetox_report_data import results as unidetox_results
from unidetox_report_data import write_run as write_unidetox_run

from isoray.report import build

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a headless browser: apt-get install chromium, or any Chrome on the PATH"
)


def browse(page: Path, profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--disable-background-networking", "--enable-logging=stderr", f"--user-data-dir={profile}", *arguments,
        page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(write_run(tmp_path_factory.mktemp("run"), results(tests=TESTS[:3])))


def test_the_answer_is_shown_without_console_errors(report: Path, tmp_path: Path) -> None:
    shown = browse(report, tmp_path, "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    lead = re.search(r'<p class="lead">(.*?)</p>', shown.stdout, re.DOTALL)
    assert lead is not None
    assert "helped most on" in lead.group(1)
    assert shown.stdout.count('role="img"') > 10


def test_console_errors_would_be_noticed(report: Path, tmp_path: Path) -> None:
    # Guards the test above: a script and an image from elsewhere are refused by the page's policy, and that is logged.
    broken = tmp_path / "broken.html"
    bad = '<script>console.error("x")</script><img src="http://localhost:1/x.png"></body>'
    broken.write_text(report.read_text().replace("</body>", bad))
    assert "CONSOLE" in browse(broken, tmp_path / "profile", "--dump-dom").stderr


def test_only_citations_point_to_the_network(report: Path) -> None:
    page = report.read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert addresses == {"https://arxiv.org/abs/2401.15241"}
    assert all(tag.startswith("<a ") for tag in re.findall(r"<[^>]*https?://[^>]*>", page))


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (500, False)])
def test_renders_in_light_and_dark_and_on_a_phone(report: Path, tmp_path: Path, width: int, dark: bool) -> None:
    picture = tmp_path / "page.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(report, tmp_path / "profile", f"--screenshot={picture}", f"--window-size={width},1600", *scheme)
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (width, 1600)
    assert len(data) > 40_000, "a page of text and figures does not compress to less"


@pytest.mark.parametrize("width", [500, 1200])
def test_nothing_but_tables_scrolls_sideways(report: Path, tmp_path: Path, width: int) -> None:
    # The page allows no scripts of its own, so the copy that measures it goes without the policy.
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text())
    copy = tmp_path / "copy.html"
    copy.write_text(page.replace("</body>", measure))
    shown = browse(copy, tmp_path / "profile", "--dump-dom", f"--window-size={width},1600").stdout
    found = re.search(r"<title>(\d+) of (\d+)</title>", shown)
    assert found is not None
    assert int(found.group(1)) <= int(found.group(2))


@pytest.mark.parametrize("recipe", ["unidetox", "cge"])
def test_reports_fit_a_phone_and_keep_toxic_text_folded(tmp_path: Path, recipe: str) -> None:
    if recipe == "unidetox":
        report = build(write_unidetox_run(tmp_path / "run", unidetox_results(targets=TARGETS)))
    else:
        report = build(write_cge_run(tmp_path / "run", cge_results()))
    assert "TOXICWORD" in report.read_text()
    shown = browse(report, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    # What a closed fold holds is no part of what is rendered as text. Chromium's window is no narrower than 500 pixels,
    # so the phone is a frame.
    measure = """<script>
    const frame = document.querySelector("iframe");
    frame.onload = () => {
      const page = frame.contentDocument, text = page.body.innerText;
      document.title = [page.documentElement.scrollWidth, frame.clientWidth, text.includes("TOXICWORD"),
        text.includes("Content warning"), page.querySelectorAll("details[open]").length].join(" ");
    };
    </script>"""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text())
    holder = tmp_path / "phone.html"
    frame = f'<iframe style="width:390px;height:900px;border:0" srcdoc="{html.escape(page, quote=True)}"></iframe>'
    holder.write_text(f"<title></title>{frame}{measure}")
    shown = browse(holder, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=5000")
    found = re.search(r"<title>(\d+) (\d+) (\w+) (\w+) (\d+)</title>", shown.stdout)
    assert found is not None
    assert int(found.group(1)) <= int(found.group(2)) == 390
    assert found.groups()[2:] == ("false", "true", "0")
