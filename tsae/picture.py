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


def write_picture(figure: go.Figure, path: Path) -> None:
    """Write the figure as PNG where there is a Chrome to draw it."""
    image = picture(figure, 1.5)
    if image:
        with store.replacing(path) as temporary:
            temporary.write_bytes(image)


def picture(figure: go.Figure, scale: float = 1.0) -> bytes | None:
    """The figure as PNG, or None where there is no Chrome to draw it (or TSAE_PNG=0)."""
    if os.environ.get("TSAE_PNG") == "0" or not (painter := _painter()).works:
        return None
    size = dict(width=figure.layout.width or 860, height=figure.layout.height or 460)
    return painter.wait(lambda browser: browser.calc_fig(figure, dict(format="png", scale=scale, **size)))


class _Painter:
    """One browser for all pictures of a process, on a thread of its own; `works` turns False for good when it fails.

    kaleido's own server is not used: without a Chrome its thread dies, and who asks it for a picture waits for ever.
    """

    def __init__(self, patience_s: float = 60.0):
        self.works, self.patience_s, self.loop = True, patience_s, asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.browser = self.wait(self._opened)
        atexit.register(self.close)

    async def _opened(self, _) -> kaleido.Kaleido:
        browser = kaleido.Kaleido()
        await browser.open()
        return browser

    def wait(self, work: Callable[[kaleido.Kaleido | None], Coroutine]) -> object | None:
        """What `work`, given the browser, comes to; None where it fails or takes longer than `patience_s`."""
        future = asyncio.run_coroutine_threadsafe(work(getattr(self, "browser", None)), self.loop)
        try:
            return future.result(self.patience_s)
        except Exception:  # kaleido's, choreographer's and the browser's own errors: a picture is never worth a run
            future.cancel()
            self.works = False

    def close(self) -> None:
        if self.browser:
            self.wait(lambda browser: browser.close())


_painter = cache(_Painter)
