"""The page as a browser shows it: headless Chromium, spoken to in its DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_sweep

from qtrain.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH: apt install chromium"),
]

# Everything at once that only a laid-out page can tell
MEASURE = """(() => {
  const images = [...document.images];
  const outside = [...document.querySelectorAll("body *")]
    .filter(one => !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 0.5);
  return {
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    outside: outside.map(one => one.outerHTML.slice(0, 80)),
    images: images.length, broken: images.filter(one => !one.complete || one.naturalWidth === 0).length,
    unnamed: images.filter(one => one.alt.length < 20).length,
    shape: Math.max(...images.map(one => Math.abs(one.width / one.height - one.naturalWidth / one.naturalHeight))),
    figures: document.querySelectorAll("figure").length,
    anchors: [...document.querySelectorAll("nav a")].filter(one => document.querySelector(one.hash) === null).length,
    headings: [...document.querySelectorAll("#overview th")]
      .map(one => [one.textContent, one.getBoundingClientRect().right]),
    letters: Math.min(...[...document.querySelectorAll("p, td, figcaption")]
      .map(one => parseFloat(getComputedStyle(one).fontSize))),
  };
})()"""


class Browser:
    """One page of a headless Chromium. events: what it has told since the last `open`, by method."""

    def __init__(self, profile: Path) -> None:
        read_end, self.out = os.pipe()
        self.inn, write_end = os.pipe()
        options = f"--headless=new --no-sandbox --disable-gpu --no-first-run --user-data-dir={profile}"
        options += " --disable-background-networking --disable-component-update --remote-debugging-pipe"
        command = f"exec {CHROMIUM} {options} about:blank 3<&{read_end} 4>&{write_end}"
        self.process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(read_end, write_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_end)
        os.close(write_end)
        self.number, self.buffer, self.session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        (page,) = (one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.number, "method": method, "params": params, **session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            chunk = os.read(self.inn, 1 << 20)
            assert chunk, "Chromium has ended"
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path, width: int) -> None:
        self.events.clear()
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def measure(self) -> dict[str, Any]:
        return self.call("Runtime.evaluate", expression=MEASURE, returnByValue=True)["result"]["value"]

    def complaints(self) -> list[dict[str, Any]]:
        kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [event for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.out)
        os.close(self.inn)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_sweep(folder / "runs")
    out = folder / "report.html"
    write_report([folder / "runs"], out, [], "bf16", "python scripts/report.py runs --out report.html")
    return out


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_fits_its_window_and_asks_for_nothing(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    found = browser.measure()
    assert found["width"] == width
    assert found["scroll"] <= width and found["outside"] == [], "the page itself must not scroll sideways"
    assert found["images"] == found["figures"] > 8 and found["broken"] == found["unnamed"] == 0
    assert found["shape"] < 0.02, "a picture is stretched"
    assert found["anchors"] == 0, "a link of the navigation leads nowhere"
    assert found["letters"] >= 12
    assert dict(found["headings"])["loss"] < width, "the losses are seen without scrolling"
    assert found["headings"][-1][0] == "directory"
    assert browser.complaints() == []
    assert {url.split(":", 1)[0] for url in browser.requests()} <= {"file", "data"}
    assert [url for url in browser.requests() if url.startswith("file:")] == [page.resolve().as_uri()]


def test_the_page_prints(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    content = browser.pdf()
    pages = len(re.findall(rb"/Type\s*/Page\b", content))
    assert content.startswith(b"%PDF") and 3 <= pages <= 12
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=703, height=1032, deviceScaleFactor=1, mobile=False)
        found = browser.measure()
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
    assert found["scroll"] <= 703, "wider than A4 within its margins"
    wide = "[...document.querySelectorAll('table')].filter(one => one.scrollWidth > 703).length"
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.call("Runtime.evaluate", expression=wide)["result"]["value"] == 0, "a table is cut off in print"
    browser.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        ('<div style="width:2000px">wide</div>', "outside"),
        ('<figure><img src="data:image/png;base64,AAAA" alt="a picture that is no picture at all"></figure>', "broken"),
        ('<img src="https://example.invalid/a.png" alt="a picture from somewhere else entirely">', "complaints"),
        ("<script>console.error(1)</script>", "complaints"),
    ],
)
def test_what_these_tests_look_for_they_would_see(browser: Browser, page: Path, harm: str, kind: str) -> None:
    """A page with a fault is told from one without."""
    faulty = page.with_name("faulty.html")
    faulty.write_text(page.read_text(encoding="utf-8").replace("</main>", harm + "</main>"), encoding="utf-8")
    browser.open(faulty, 360)
    found = browser.measure()
    assert browser.complaints() if kind == "complaints" else found[kind]
