"""A headless Chromium, driven over the DevTools protocol: pages, clicks, keys, texts, screenshots."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAMS = (
    "chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome",
    "google-chrome-stable", "headless_shell",
)  # fmt: skip
"""Names on PATH, the smallest first."""
MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}
KEY_CODES = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowUp": 38}
VISIBLE = """(selector, text) => [...document.querySelectorAll(selector)].find((node) =>
    node.checkVisibility({visibilityProperty: true}) && (text === null || node.textContent.trim() === text))"""


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """A browser process; a context manager.

    The protocol's messages are JSON, each ended by a zero byte, over the pipes that the browser has as its file
    descriptors 3 and 4.
    """

    def __init__(self, program: str, profile: Path) -> None:
        receive, self._write = os.pipe()
        self._read, reply = os.pipe()

        def connect() -> None:
            # First to numbers that are surely free: one of the pipes may already be 3 or 4.
            high = [os.dup2(fd, number) for fd, number in ((receive, 103), (reply, 104))]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        arguments = [
            program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
            "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking",
            "--force-color-profile=srgb", "--hide-scrollbars",
            "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
        ]  # fmt: skip
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
        self._process = subprocess.Popen(
            arguments, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(receive)
        os.close(reply)
        self._ids = itertools.count(1)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            self.call("Browser.close")
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, session: str | None = None, timeout: float = 30, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that come before it go to `events`."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            reply = self._next(deadline, method)
            if reply.get("id") == number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return dict(reply["result"])
            self.events.append(reply)

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError(f"the browser did not answer {method}")
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(message))

    def open(self, url: str, width: int = 1280, height: int = 800, touch: bool = False) -> "Page":
        """Open a page with its own empty storage."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        page = Page(self, context, width, height, touch)
        page.go(url)
        return page


class Page:
    """A tab; sizes in CSS pixels."""

    def __init__(self, browser: Browser, context: str, width: int, height: int, touch: bool) -> None:
        self._browser = browser
        self.context = context
        self._target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height, touch)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol for this page."""
        return self._browser.call(method, self._session, **parameters)

    def size(self, width: int, height: int, touch: bool = False, scale: float = 1) -> None:
        """Set the size of the window, and whether it is a touch screen."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=touch
        )
        if touch:
            self.call("Emulation.setTouchEmulationEnabled", enabled=True)

    def go(self, url: str) -> None:
        """Load an address."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        """Load the page again."""
        self.evaluate("window.isOld = true")
        self.call("Page.reload")
        self.wait("!window.isOld && document.readyState === 'complete'")

    def close(self) -> None:
        """Close the page and forget its storage."""
        self._browser.call("Target.disposeBrowserContext", browserContextId=self.context)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, or that of its promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(RuntimeError):  # while a page is being loaded
                value = self.evaluate(expression)
                if value not in (None, False, 0, ""):  # an element is an empty object here
                    return value
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {seconds:g} s: {expression}\n{self.text()}")
            time.sleep(0.015)

    def text(self, selector: str = "body") -> str:
        """Return the visible text of an element; empty if there is none."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements."""
        return list(self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((n) => n.textContent)"))

    def is_visible(self, selector: str, text: str | None = None) -> bool:
        """Return whether an element can be seen."""
        return bool(self.evaluate(f"Boolean(({VISIBLE})({json.dumps(selector)}, {json.dumps(text)}))"))

    def click(self, selector: str, text: str | None = None) -> None:
        """Click the first visible element with the selector, and the text."""
        found = f"({VISIBLE})({json.dumps(selector)}, {json.dumps(text)})"
        x, y = self.wait(
            f"(async () => {{ const node = {found}; if (!node || node.disabled) return null;"
            " node.scrollIntoView({block: 'nearest'}); const before = node.getBoundingClientRect();"
            " await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));"
            " const box = node.getBoundingClientRect();"
            " const at = [box.x + box.width / 2, box.y + box.height / 2];"
            " const hit = document.elementFromPoint(...at);"
            " return box.x === before.x && box.y === before.y && node.contains(hit) && at; })()"
        )  # not while it moves, or is under something else
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type a text into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def key(self, key: str, *modifiers: str) -> None:
        """Press a key, by its name in JavaScript."""
        code = KEY_CODES.get(key, ord(key[0].upper()))
        pressed = sum(MODIFIERS[name] for name in modifiers)
        shared = {"key": key, "windowsVirtualKeyCode": code, "modifiers": pressed}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **shared, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in a file field."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def save_downloads(self, folder: Path) -> None:
        """Save what the page downloads in a folder."""
        self._browser.call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), browserContextId=self.context
        )

    def screenshot(self, path: Path) -> None:
        """Write a picture of the window as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def problems(self) -> list[str]:
        """Return and forget errors of scripts, violations of the content policy and failed loads of this page."""
        self.evaluate("1")  # what was sent before has arrived
        found = []
        for event in self._browser.events:
            parameters = event.get("params", {})
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
                values = (value.get("value", value.get("description")) for value in parameters["args"])
                found.append(" ".join(map(str, values)))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(parameters["entry"]["text"])
        self._browser.events = [event for event in self._browser.events if event.get("sessionId") != self._session]
        return found
