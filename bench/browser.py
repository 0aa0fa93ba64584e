"""A headless Chromium, driven by its DevTools protocol over one websocket."""
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from websockets.sync.client import connect

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
         "--disable-extensions", "--disable-background-networking", "--disable-component-update",
         "--remote-debugging-port=0", "--mute-audio", "--disable-dev-shm-usage")


def program():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


class Browser:
    """One tab. `problems`: what it printed as an error or warning; ended on leaving the block."""

    def __init__(self, width=1200, height=900):
        self.size = (width, height)
        self.problems = []
        self.ids = itertools.count(1)

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen([program(), *FLAGS, f"--user-data-dir={self.profile.name}",
                                         "about:blank"], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        try:
            self.socket = connect(self.address(), max_size=None)
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.resize(*self.size)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.profile.cleanup()

    def address(self):
        """The websocket of the first tab, once there is one (20 s at most)."""
        port = Path(self.profile.name) / "DevToolsActivePort"
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            lines = port.read_text(encoding="utf-8").split() if port.exists() else []
            if lines:
                url = f"http://127.0.0.1:{lines[0]}/json"
                tabs = json.loads(urllib.request.urlopen(url, timeout=10).read())
                pages = [tab for tab in tabs if tab["type"] == "page"]
                if pages:
                    return pages[0]["webSocketDebuggerUrl"]
            time.sleep(0.05)
        raise TimeoutError("Chromium did not start")

    def call(self, method, **params):
        """One command's result; what the page reports meanwhile is noted."""
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(message["error"]["message"])
                return message["result"]
            self.note(message.get("method"), message.get("params", {}))

    def note(self, method, params):
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(json.dumps(params["args"])[:500])
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])

    def resize(self, width, height, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, source):
        """What a JavaScript expression is, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=source, awaitPromise=True,
                           returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def until(self, source, seconds=60):
        """Wait for an expression to be true; returns it. Raises TimeoutError."""
        limit = time.monotonic() + seconds
        while not (value := self.run(source)):
            if time.monotonic() > limit:
                raise TimeoutError(f"never true: {source}")
            time.sleep(0.05)
        return value

    def text(self, css):
        return self.run(f"document.querySelector({json.dumps(css)}).textContent")

    def press(self, key, code=None):
        """A key, as a keyboard sends it: 'Tab', 'Enter' or a character."""
        numbers = {"Tab": 9, "Enter": 13, " ": 32}
        text = {"Enter": "\r", "Tab": ""}.get(key, key)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code or key,
                      windowsVirtualKeyCode=numbers.get(key, ord(key[0])), text=text)

    def picture(self, path):
        """A PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))
