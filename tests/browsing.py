"""A browser without a window, where this machine has one."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def browsing() -> Iterator[Any]:
    """Chromium, driven by Playwright; a test without one is skipped. Within it no other event loop may run on this
    thread, so that it is to be closed with its module."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright (the extra test has it)")
    found = shutil.which("chromium")
    if not found:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS.split())
        yield browser
        browser.close()


class Browsed:
    """A page in a context of its own: cookies, storage and windows of no other."""

    def __init__(
        self,
        browser: Any,
        address: str,
        theme: str = "light",
        width: int = 1280,
        height: int = 800,
        before: str = "",
        **how: Any,
    ) -> None:
        """before: a script that runs before the page's."""
        size = {"width": width, "height": height}
        self.context = browser.new_context(viewport=size, color_scheme=theme, reduced_motion="reduce", **how)
        self.context.set_default_timeout(10_000)
        self.page, self.errors = self.context.new_page(), []
        self.allowed = re.compile("(?!)")
        """What the console may say of errors that a test makes."""
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        if before:
            self.page.add_init_script(before)
        self.page.goto(address)

    def close(self) -> None:
        """Fails where the page had an error."""
        self.context.close()
        assert not (wrong := [error for error in self.errors if not self.allowed.search(error)]), wrong


def axe_findings(page: Any) -> list[str]:
    """What axe finds serious or critical, in lines. Its script comes past the page's policy."""
    from axe_playwright_python.base import AXE_FILE_PATH

    page.evaluate(AXE_FILE_PATH.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then((all) => all.violations)")
    return [
        f"{each['id']}: {each['help']}: {node['html'][:120]}: {node['failureSummary']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
