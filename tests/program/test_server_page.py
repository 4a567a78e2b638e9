"""The page that the server shows: its files, what it may load, and (heavy) a real browser in it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serving import Served, served
from support.tiny import spec_named, variant
from support.vocab import V25_TEMPLATE, write_model

from dsv2cli.commands.serve import rules_of

HTML = {"accept": "text/html"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = variant(spec_named("lite"), n_ctx=4096)
    return write_model(tmp_path_factory.mktemp("page") / "tiny.gguf", spec, V25_TEMPLATE, endless=True)


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Served]:
    with served(path) as running:
        yield running


def test_its_files_and_nothing_from_elsewhere(server: Served) -> None:
    page = server.client.get("/", headers=HTML)
    assert page.status_code == 200 and "<!doctype html>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sorted(named) == ["/page.css", "/page.js"]
    for name in named:
        file = server.client.get(name)
        assert file.status_code == 200 and "http" not in file.text and "innerHTML" not in file.text
    assert server.client.get("/").text == "Ollama is running"
    assert server.client.head("/").status_code == 200


def test_every_name_in_the_script_is_on_the_page(server: Served) -> None:
    script = server.client.get("/page.js").text
    page = server.client.get("/", headers=HTML).text
    names = set(re.findall(r'\$\("(\w+)"\)', script))
    assert names and all(f'id="{name}"' in page for name in names)


def test_the_page_needs_no_key_but_its_questions_do(path: Path) -> None:
    with served(path, rules=rules_of("127.0.0.1", ["sesame"], [], [])) as server:
        assert server.client.get("/", headers=HTML).status_code == 200
        assert server.client.get("/v1/models").status_code == 401


@pytest.mark.heavy
def test_in_a_browser(server: Served) -> None:
    """Chromium runs the page: it finds the model, and the form is there."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
        command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
        command += ["--virtual-time-budget=5000", "--dump-dom", str(server.client.base_url)]
        drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert '<h1 id="model">tiny</h1>' in drawn and 'id="ask"' in drawn
