"""The demo, started by its command, and Chromium; every page must do without errors and without the internet."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import Page, expect, sync_playwright

from dualcodebook_hf import DualCodebookVQModel, default_checkpoint

expect.set_options(timeout=30_000)
SINGLE_CODEBOOK = {
    "quantizer": "single",
    "block_out_channels": [4, 4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention": False,
    "global_codebook_size": 0,
    "global_dim": 0,
    "local_codebook_size": 20,
    "local_dim": 8,
}
ROOT = Path(__file__).parents[2]
AXE = ROOT / ".axe" / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    """`dualcodebook demo` with the embedded checkpoint and a small random model with one codebook."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    DualCodebookVQModel(**SINGLE_CODEBOOK).save_pretrained(folder / "one-book")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    models = ["--models", default_checkpoint(), str(folder / "one-book")]
    command = [sys.executable, "-m", "dualcodebook_hf.cli", "demo", "--port", str(port), *models]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "gradio"), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    line = server.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line, line
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(timeout=20)


@pytest.fixture(scope="session")
def launch():
    """launch(*flags) -> Chromium, to be closed by who launched it."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "no Chromium: apt-get install -y chromium"
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        yield lambda *flags: playwright.chromium.launch(executable_path=path, args=[*sandbox, *flags])


@pytest.fixture(scope="session")
def browser(launch):
    browser = launch()
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's script, which `make test-browser` takes from npm into an ignored folder."""
    assert AXE.is_file(), f"no axe-core: make {AXE.relative_to(ROOT)}"
    return AXE.read_text(encoding="utf-8")


@pytest.fixture
def visit(browser, address):
    """visit(width=..., color_scheme=..., watch=...) -> a new visitor's page; `watch` sees its requests."""
    errors, contexts = [], []

    def open_page(width: int = 1280, color_scheme: str = "light", watch: Callable = lambda request: None) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=color_scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: errors.append(request.url) if _is_outside(request.url) else None)
        page.on("request", watch)
        page.goto(address)
        expect(page.locator("#numbers")).to_contain_text("dB")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def _is_outside(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1"
