"""Chromium without a network, driven over WebDriver's plain HTTP."""

import base64
import contextlib
import http.client
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing() -> str | None:
    """Why there is no browser to test in, or None if there is one."""
    absent = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    return f"not installed: {', '.join(absent)}" if absent else None


class Browser:
    """One window; `open` a file, then ask."""

    def __init__(self, port: int, profile: Path) -> None:
        self._port = port
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._base = "/session"
        session = self._post("", {"capabilities": {"alwaysMatch": wanted}})
        self._base = f"/session/{session['sessionId']}"

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, self._base + path, None if body is None else json.dumps(body))
            value = json.loads(connection.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{value['error']}: {value['message']}")
        return value

    def _post(self, path: str, body: Any) -> Any:
        return self._send("POST", path, body)

    def devtools(self, command: str, **params: Any) -> Any:
        """Run a command of the DevTools protocol."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": params})

    def open(self, page: Path, width: int, height: int = 900) -> None:
        """Load the file in a window of that width."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self._post("/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        """The value that the script returns."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """What the page wrote to the console since the last call, warnings and errors included."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call, except for the browser's own pages."""
        log = [
            json.loads(entry["message"])["message"]
            for entry in self._post("/se/log", {"type": "performance"})
        ]
        urls = [
            event["params"]["request"]["url"]
            for event in log
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("chrome:")]

    def theme(self, scheme: str) -> None:
        """Prefer "light" or "dark" pages from now on."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def overflow(self) -> list[str]:
        """What makes the page scroll sideways: the tags of all elements that reach beyond it."""
        script = (
            "const page = document.documentElement;"
            "if (page.scrollWidth <= page.clientWidth) return [];"
            "return [...document.querySelectorAll('body *')]"
            ".filter(one => one.getBoundingClientRect().right > page.clientWidth + 0.5)"
            ".map(one => one.outerHTML.slice(0, 80))"
        )
        return list(self.run(script))

    def color(self, expression: str) -> tuple[int, ...]:
        """Red, green and blue of a computed colour."""
        return tuple(int(n) for n in re.findall(r"\d+", self.run(f"return {expression}"))[:3])

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        image = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def close(self) -> None:
        """End the session, and with it the browser."""
        self._send("DELETE", "")


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser of its own, ended with the block."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with driver:
        try:
            assert driver.stdout is not None
            port = (
                next(line for line in driver.stdout if "successfully on port" in line)
                .rstrip(".\n")
                .rpartition(" ")[2]
            )
            window = Browser(int(port), profile)
            try:
                yield window
            finally:
                window.close()
        finally:
            driver.terminate()
