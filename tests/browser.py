"""A headless Chromium for tests, spoken to over WebDriver: chromedriver and the standard library.

Debian's packages ``chromium`` and ``chromium-driver`` are enough.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]

FLAGS = [
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    # Chromium's sandbox refuses to run as root, as containers do.
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
]

KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Right": "\ue014", "Left": "\ue012", "End": "\ue010"}


class Browser:
    """One window of a headless Chromium."""

    def __init__(self, address: str, session: str) -> None:
        self._address, self._session = address, session

    def call(self, method: str, path: str, body: object = None) -> Any:
        """A WebDriver command of this session; the value that it answers."""
        return request(method, f"{self._address}/session/{self._session}{path}", body)

    def open(self, file: Path) -> None:
        """Load a local file and wait for it."""
        self.call("POST", "/url", {"url": file.resolve().as_uri()})

    def run(self, script: str, *arguments: object) -> Any:
        """Run a function body in the page."""
        return self.call("POST", "/execute/sync", {"script": script, "args": arguments})

    def press(self, *keys: str) -> None:
        """Press keys one after the other; names are those of ``KEYS``."""
        actions = []
        for key in keys:
            value = KEYS.get(key, key)
            actions += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        self.call("POST", "/actions", {"actions": [source]})

    def emulate(self, *, width: int, dark: bool = False, media: str = "") -> None:
        """A window of this width, a colour scheme, and ``print`` as the medium if wanted."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        # Without it some versions of a headless Chromium send no focus events.
        self._devtools("Emulation.setFocusEmulationEnabled", {"enabled": True})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size)

    def screenshot(self, file: Path, *, most: int = 6000) -> None:
        """The whole page as PNG, down to ``most`` pixels."""
        width, height = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, most), "scale": 1}
        shot = self._devtools(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
        file.write_bytes(base64.b64decode(shot["data"]))

    def messages(self) -> list[str]:
        """What the page wrote to the console since last asked, errors and warnings included."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def _devtools(self, command: str, params: dict[str, object]) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})


def request(method: str, url: str, body: object = None) -> Any:
    """One WebDriver request."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None


@contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium with an empty profile; both it and its driver are gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"HOME": home},
        )
        assert driver.stdout is not None
        try:
            line = next(line for line in driver.stdout if "successfully on port" in line)
            port = line.rsplit("on port ", 1)[1].strip().rstrip(".")
            address = f"http://127.0.0.1:{port}"
            chrome = {"args": [*FLAGS, f"--user-data-dir={home}/profile"]}
            wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
            made = request("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
            try:
                yield Browser(address, made["sessionId"])
            finally:
                request("DELETE", f"{address}/session/{made['sessionId']}")
        finally:
            driver.terminate()
            driver.wait(timeout=30)
            driver.stdout.close()
