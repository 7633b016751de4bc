"""Drives headless Chromium over its debugging pipe: JSON messages that end in a zero byte, no library needed."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)


class Browser:
    """One tab; closes the browser at the end of a ``with`` block.

    Attributes:
        console: What pages wrote to their console, and errors that they did not catch.
        requests: URLs that pages asked for over a network.
    """

    def __init__(self, scratch):
        self._numbers = itertools.count(1)
        self.console, self.requests, self._replies, self._rest = [], [], {}, b""
        theirs, self._write = os.pipe()
        self._read, other = os.pipe()
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{other}', "-", CHROMIUM, *_OPTIONS,
             f"--user-data-dir={scratch / 'profile'}"],
            pass_fds=(theirs, other), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(other)
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._write)
        os.close(self._read)
        self._process.kill()
        self._process.wait()

    def call(self, method, **params):
        """Send a command and wait for its reply."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while number not in self._replies:
            self._take()
        reply = self._replies.pop(number)
        assert "error" not in reply, (method, reply)
        return reply["result"]

    def open(self, path, *, width=1200, dark=False):
        """Load a page, in a window of a width and in the light or the dark scheme, and wait until it is drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete'")
        self.wait("[...document.querySelectorAll('figure')].every((figure) => figure.querySelector('svg'))")

    def forget(self):
        """Leave the page, and forget what pages wrote and asked for."""
        self.call("Page.navigate", url="about:blank")
        self.console.clear()
        self.requests.clear()

    def evaluate(self, expression):
        """The value of a JavaScript expression, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=60):
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"{expression} is still false; console: {self.console}"
            time.sleep(0.05)

    def press(self, key, code):
        """Press and release a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    def download_to(self, folder):
        """Save what pages offer for download in a folder."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def screenshot(self, path):
        """Write a picture of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _take(self):
        while b"\0" not in self._rest:
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "Chromium ended"
            self._rest += chunk
        raw, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(raw)
        if "id" in message:
            self._replies[message["id"]] = message
            return
        params = message.get("params", {})
        match message["method"]:
            case "Runtime.consoleAPICalled":
                self.console.append(
                    " ".join(str(item.get("value", item.get("description"))) for item in params["args"])
                )
            case "Runtime.exceptionThrown":
                self.console.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.console.append(params["entry"]["text"])
            case "Network.requestWillBeSent" if params["request"]["url"].split(":")[0] not in ("file", "data", "blob"):
                self.requests.append(params["request"]["url"])
