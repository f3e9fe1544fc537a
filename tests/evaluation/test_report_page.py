"""The report in a real browser, where Chromium is installed: no errors, nothing fetched, wide, on a phone, in print."""

import shutil
import subprocess

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def browse(page, folder, *options):
    """Opens a page; returns what it wrote to the console."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *options, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_opens_without_a_complaint_everywhere(finished, tmp_path):
    faulty = tmp_path / "faulty.html"
    faulty.write_text("<script>console.error('heard')</script>")
    assert any(
        "heard" in line for line in browse(faulty, tmp_path, f"--screenshot={tmp_path / 'x.png'}")
    )
    page = finished[0] / "report" / "report.html"
    for name, size in (("wide", "1200,4200"), ("phone", "500,5000")):
        picture = tmp_path / f"{name}.png"
        assert browse(page, tmp_path, f"--window-size={size}", f"--screenshot={picture}") == []
        assert picture.stat().st_size > 50_000, "an empty page"
    printed = tmp_path / "report.pdf"
    assert browse(page, tmp_path, f"--print-to-pdf={printed}", "--no-pdf-header-footer") == []
    assert printed.read_bytes().startswith(b"%PDF")
