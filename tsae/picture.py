"""A plotly figure as PNG, where there is a Chrome to draw it."""

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path

import kaleido
import plotly.graph_objects as go

from tsae import store

WIDTH, HEIGHT = 860, 460  # pixels, of a figure that states no other size


def write_picture(figure: go.Figure, path: Path) -> None:
    """Write the figure as PNG. Without a Chrome nothing is written."""
    if image := picture(figure, 1.5):
        with store.replacing(path) as temporary:
            temporary.write_bytes(image)


def picture(figure: go.Figure, scale: float = 1.0) -> bytes | None:
    """The figure as PNG. None where there is no Chrome to draw it, and with TSAE_PNG=0 set."""
    if os.environ.get("TSAE_PNG") == "0" or not (painter := _painter()).works:
        return None
    options = dict(format="png", scale=scale, width=figure.layout.width or WIDTH,
                   height=figure.layout.height or HEIGHT)
    return painter.wait(lambda browser: browser.calc_fig(figure, options))


class _Painter:
    """One browser for all pictures of a process, on a thread of its own.

    `works` turns False for good at the first failure. Without a Chrome, kaleido's own server dies,
    and whoever asks it for a picture waits for ever.
    """

    def __init__(self, patience_s: float = 60.0):
        self.works, self.patience_s, self.browser = True, patience_s, None
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.browser = self.wait(self._opened)
        if self.browser:
            atexit.register(self.wait, kaleido.Kaleido.close)

    async def _opened(self, _) -> kaleido.Kaleido:
        browser = kaleido.Kaleido()
        await browser.open()
        return browser

    def wait(self, work: Callable[[kaleido.Kaleido | None], Coroutine]) -> object | None:
        """The result of `work(browser)`; None where it fails or takes longer than `patience_s`."""
        future = asyncio.run_coroutine_threadsafe(work(self.browser), self.loop)
        try:
            return future.result(self.patience_s)
        except Exception:  # kaleido's, the browser's, ...: a picture is never worth a run
            future.cancel()
            self.works = False
            return None


_painter = cache(_Painter)
