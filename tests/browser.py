"""The browser that some tests use: the system's Chromium, which is never downloaded."""

from __future__ import annotations

import os
import shutil

import pytest


def chromium(what: str) -> str:
    """The path of Chromium. Without one the test is skipped, unless CIL_REQUIRE_CHROMIUM says it must be there.

    Args:
        what: What is not tested without it.
    """
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("CIL_REQUIRE_CHROMIUM"):
            pytest.fail("no Chromium on PATH, and CIL_REQUIRE_CHROMIUM is set")
        pytest.skip(f"no chromium, chromium-browser or google-chrome on PATH: {what} is not checked here")
    return found
