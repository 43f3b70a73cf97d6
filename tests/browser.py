"""Chromium without a window, driven over a pipe by its own protocol (DevTools): pages as people see them, and real clicks."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a browser that has no network: what is asked for over it fails."""

    def __init__(self, page: Path, profile: Path, *, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        assert CHROMIUM is not None
        theirs_in, self.out = os.pipe()
        self.inn, theirs_out = os.pipe()

        def connect() -> None:  # Chromium reads commands from 3 and writes answers to 4
            first, second = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(first, 3)
            os.dup2(second, 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},{height}", "--no-first-run"]
        self.process = subprocess.Popen(
            [CHROMIUM, *options], pass_fds=(3, 4), preexec_fn=connect, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in), os.close(theirs_out)
        self.number, self.left, self.session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        if dark:
            scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
            self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out), os.close(self.inn)

    def call(self, method: str, **about: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        message = json.dumps({"id": self.number, "method": method, "params": about, **session})
        os.write(self.out, message.encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def look(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, expression: str) -> None:
        """A click of the mouse in the middle of an element, which is brought into view first."""
        self.look(f"{expression}.scrollIntoView({{block: 'center'}})")
        place = self.look(
            f"(() => {{const b = {expression}.getBoundingClientRect(); return [b.x + b.width/2, b.y + b.height/2]}})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key on what has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """What is seen, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def printed(self, path: Path) -> int:
        """The page printed as PDF; how many sheets it takes."""
        content = base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])
        path.write_bytes(content)
        return content.count(b"/Type /Page\n") or content.count(b"/Type /Page") - content.count(b"/Type /Pages")

    def complaints(self) -> list[str]:
        """Errors of scripts, refusals of the security policy, and requests for anything but the page itself."""
        said = [e["params"]["entry"]["text"] for e in self.events if e["method"] == "Log.entryAdded"]
        said += [str(e["params"]) for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return said + [url for url in asked if not url.startswith("file:")]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            chunk = os.read(self.inn, 1 << 20)
            assert chunk, "the browser has gone"
            self.left += chunk
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)
