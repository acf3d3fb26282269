"""The example page, as `evermind-pack serve` gives it: at work, offline, and without text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.network.server import Server
from tests.packages import LM_CONFIG, export, golden_source, random_source

from .browser import Browser, Page
from .site import DEMO, ORT, WEB


@contextmanager
def served(package: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command that docs/browser.md gives."""
    command = [sys.executable, "-m", "evermind_pack", "serve", str(package), "--port", "0"]
    for name, folder in {"app": DEMO, "evermind": WEB, "ort": ORT}.items():
        command += ["--mount", f"{name}={folder}"]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            line = process.stdout.readline()
            yield json.loads(line)["url"], process
        finally:
            process.kill()


def until(page: Page, condition: str) -> None:
    """Wait for a condition; fail with what the page shows."""
    end = time.monotonic() + 60
    while not page.run(f"return Boolean({condition})"):
        assert time.monotonic() < end, page.run("return document.body.innerText")
        time.sleep(0.05)


READY = "!document.getElementById('go').disabled && document.readyState === 'complete'"
WRITE = """
document.getElementById('prompt').value = 'def ';
document.getElementById('count').value = 12;
document.getElementById('temperature').value = 0;
document.getElementById('composer').requestSubmit();
"""
WRITTEN = "document.querySelectorAll('.made').length >= 1 && document.getElementById('go')" + (
    ".textContent === 'Generate'"
)
SHOWN = """
const text = (id) => document.getElementById(id).textContent;
return {
  output: text('output'), badge: text('badge'), used: text('used'),
  fetched: text('fetched-words'), meter: parseFloat(document.getElementById('fetched').style.width),
  heat: [...document.querySelectorAll('.cell')].filter((c) => c.style.getPropertyValue('--heat'))
    .length,
  wide: document.documentElement.scrollWidth - innerWidth,
};
"""


def test_the_page_writes_and_goes_on_without_a_server(tmp_path: Path, chromium: Browser) -> None:
    config = LM_CONFIG | {"vocabSize": 256}
    package = export(random_source("evermind-lm", config, tokenizer="bytes"), tmp_path / "p")
    with served(package) as (url, process):
        page = chromium.page(url + "app/index.html", context=chromium.new_context())
        until(page, READY)
        page.run(WRITE)
        until(page, WRITTEN)
        first = page.run(SHOWN)
        assert first["badge"] == "online"
        assert first["output"].startswith("def ")
        assert first["used"] == f"{first['heat']} of 24"
        assert 0 < first["meter"] < 100
        phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        page.call("Emulation.setDeviceMetricsOverride", phone)
        assert page.run(SHOWN)["wide"] <= 0
        process.kill()
        process.wait()
        page.call("Page.reload")
        until(page, "document.getElementById('badge')?.textContent.startsWith('offline')")
        until(page, READY)
        page.run(WRITE)
        until(page, WRITTEN)
        second = page.run(SHOWN)
    assert second["output"] == first["output"]
    assert second["fetched"] == "0 B downloaded"
    assert (second["used"], second["heat"]) == (first["used"], first["heat"])


def test_the_page_runs_packages_that_write_no_text(tmp_path: Path, chromium: Browser) -> None:
    package = export(golden_source("moe_small"), tmp_path / "p")
    with served(package) as (url, _):
        page = chromium.page(url + "app/index.html", context=chromium.new_context())
        until(page, READY)
        page.run("document.getElementById('composer').requestSubmit()")
        until(page, "document.querySelectorAll('.made').length > 1")
        assert "y [32, " in page.run(SHOWN)["output"]
        page.run(
            "document.getElementById('address').value = '/nowhere/';"
            "document.getElementById('picker').requestSubmit()"
        )
        until(page, "!document.getElementById('failure').hidden")
        assert "404" in page.run("return document.getElementById('failure').textContent")
        assert page.run("return document.querySelectorAll('.cell, .made').length") == 0
        page.run(
            "document.getElementById('address').value = '/';"
            "document.getElementById('picker').requestSubmit()"
        )
        until(page, READY)
        page.run("document.getElementById('composer').requestSubmit()")
        until(page, "document.querySelectorAll('.made').length > 1")
        assert page.run("return document.getElementById('failure').hidden")


def test_the_page_in_the_documentation(
    tmp_path: Path, serve: Callable[..., Server], chromium: Browser
) -> None:
    config = LM_CONFIG | {"vocabSize": 256}
    package = export(random_source("evermind-lm", config, tokenizer="bytes"), tmp_path / "p")
    text = (DEMO.parents[1] / "docs" / "browser.md").read_text()
    (html,) = re.findall(r"^```html\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    server = serve(package)
    server.behaviour.replaced["page.html"] = html.encode()
    page = chromium.page(server.url + "page.html", context=chromium.new_context())
    until(page, "document.body.textContent.includes('bytes fetched')")
