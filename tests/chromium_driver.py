"""A real browser for tests of what people click: Chromium, through its debugging protocol."""

import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """A headless browser that sees this machine and no network, driven through its debugging protocol."""

    def __init__(self, profile: Path):
        websocket = pytest.importorskip("websocket")
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1300,800", f"--user-data-dir={profile}",
             "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = profile / "DevToolsActivePort"
        for _ in range(300):
            if port.is_file() and "\n" in port.read_text():
                break
            time.sleep(0.1)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)
        self.numbers, self.events, self.frame = itertools.count(1), [], {}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given):
        number = next(self.numbers)
        self.socket.send(json.dumps(dict(id=number, method=method, params=given) | self.frame))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, code: str):
        """The value of a JavaScript expression in the page, or in the frame whose session is `self.frame`."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def comes(self, code: str, seconds: float) -> bool:
        """Whether an expression comes true in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.run(f"!!({code})"):
                return True
            time.sleep(0.05)
        return False

    def until(self, code: str, seconds: float = 10):
        if not self.comes(code, seconds):
            raise AssertionError(f"never came true: {code}; the page shows {self.run('document.body.innerText')[:800]}")

    def open(self, address: str, ready: str = "document.querySelector('tr.at')", seconds: float = 10):
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.until(f"document.readyState === 'complete' && ({ready})", seconds)

    def press(self, key: str, text: str = ""):
        code = {"Enter": 13, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38, "End": 35}.get(key, 0)
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector: str):
        """A click of the mouse in the middle of an element."""
        x, y = self.run("(box => [box.x + box.width / 2, box.y + box.height / 2])"
                        f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str):
        for letter in text:
            self.press(letter)

    def trouble(self) -> list:
        """Requests that failed or left the disk, messages of the console, exceptions."""
        self.run("1")
        bad = {"Network.loadingFailed", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event["method"] == "Network.requestWillBeSent"]
        return [event["params"] for event in self.events if event["method"] in bad] + \
            [url for url in asked if not url.startswith(("file:", "about:", "data:"))]
