"""Checks of what a release's files hold, without the second that their child takes to start."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpf_release.release import contents


@pytest.fixture(autouse=True)
def _structure_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported into a file of tests: in them the same code looks at the same files, and its answers are JSON too.

    The child itself is tested in `tests/release`; what makes the shared project, and every real command, starts it.
    """

    def here(module: str, request: Any, seconds: int) -> tuple[list[Any], str]:
        assert module == contents.__name__
        return json.loads(json.dumps([*contents.answers_to(json.loads(json.dumps(request)))])), ""

    monkeypatch.setattr(contents, "run_limited", here)
