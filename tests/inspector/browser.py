"""A headless Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
"""Path of the browser; empty if there is none."""


@contextmanager
def browser() -> Iterator[Any]:
    """Start the browser; skip the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


class Watched:
    """A page, and everything that must not happen on one.

    Args:
        opened: The browser.
        settings: Those of the context, e.g. `viewport`.
    """

    def __init__(self, opened: Any, **settings: Any) -> None:
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page = opened.new_context(**settings).new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.faults.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._console)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.faults.append(f"console: {message.text}")

    def open(self, address: str) -> Any:
        """Go to a place and wait until it is shown; returns the page."""
        self.page.goto("about:blank")
        self.page.goto(address)
        self.page.wait_for_selector("main[data-ready] h1")
        return self.page

    def assert_sound(self, address: str) -> None:
        """Nothing failed, and nothing was asked for elsewhere."""
        assert self.faults == []
        elsewhere = [
            each
            for each in self.requests
            if not each.startswith((address, "data:", "blob:", "about:"))
        ]
        assert elsewhere == []
