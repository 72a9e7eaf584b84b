"""JupyterLab in a real browser: what a scorer types reaches the disk, on a slow line too."""

import asyncio
import csv
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import nbformat
import pytest

FORM = """
import pandas as pd
from IPython.display import display
from tsae.study import form
shown = {("a", 0, i): pd.DataFrame([dict(code=2.0, before="x ", token=f"t{i}", after=" y")]) for i in range(4)}
study = form.Study(shown, FOLDER, "ada", repeats=0)
display(form.form(study))
"""
TEXT = "document.querySelector('input[placeholder^=\"or type\"]')"
DELAY_S = 0.125  # each way
WAIT_S = 120  # for the page and the kernel, on a busy machine


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


async def _pipe(reader, writer) -> None:
    """Pass bytes on, each DELAY_S after it came, in their order."""
    queue: asyncio.Queue = asyncio.Queue()

    async def give() -> None:
        while (item := await queue.get()) is not None:
            due, part = item
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            writer.write(part)
            await writer.drain()
        writer.close()

    giving = asyncio.create_task(give())
    while part := await reader.read(65536):
        queue.put_nowait((time.monotonic() + DELAY_S, part))
    queue.put_nowait(None)
    await giving


def slow_line(to_port: int) -> int:
    """A port of this machine behind which `to_port` answers, a quarter of a second later."""
    port = free_port()

    async def connected(reader, writer) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", to_port)
            await asyncio.gather(_pipe(reader, other_writer), _pipe(other_reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", port)
        await server.serve_forever()

    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    return port


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a folder with one notebook, the form's; its address by the slow line."""
    source = FORM.strip().replace("FOLDER", repr(str(tmp_path / "scores")))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="Python 3", language="python")
    (tmp_path / "lab").mkdir()
    nbformat.write(nb, tmp_path / "lab/study.ipynb")
    port = free_port()
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=",
         "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1"], cwd=tmp_path / "lab", env=os.environ | own,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(300):
        try:
            direct.open(f"http://127.0.0.1:{port}/api", timeout=5).close()
            break
        except OSError:
            time.sleep(0.1)
    yield f"http://127.0.0.1:{slow_line(port)}/lab/tree/study.ipynb?reset"
    server.terminate()
    server.wait(30)


def scores(tmp_path) -> list[list[str]]:
    path = tmp_path / "scores/ada.csv"
    return [row[-2:] for row in csv.reader(path.open())][1:] if path.is_file() else []


def test_a_score_is_recorded_as_it_was_typed_on_a_slow_line(chromium, lab, tmp_path):
    """At a quarter of a second a round trip, "8 10" and Enter were once stored as 8 and 1."""
    chromium.open(lab, "window.jupyterapp", WAIT_S)
    for _ in range(8):  # until the kernel is there and takes the cell
        chromium.run("window.jupyterapp.commands.execute('notebook:run-all-cells').catch(() => null)")
        if chromium.comes(TEXT, 15):
            break
    for step, typed in enumerate(("8 10", "10 3"), 1):
        chromium.run(f"{TEXT}.focus()")
        chromium.type(typed)
        chromium.press("Enter")
        chromium.until(f"document.body.innerText.includes('Recorded {typed.replace(' ', ' / ')}')")
        chromium.until(f"{TEXT}.value === '' && document.body.innerText.includes('{step} of 4')")
    assert scores(tmp_path) == [["8", "10"], ["10", "3"]]
    widths = chromium.run("[...document.querySelectorAll('.widget-toggle-button')].filter(b => b.textContent.trim() === '10')"
                          ".map(b => [b.scrollWidth, b.clientWidth])")
    assert len(widths) == 2 and all(wanted <= given for wanted, given in widths), "the button for 10 shows 10"
