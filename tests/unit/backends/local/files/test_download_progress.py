"""The progress bars that report and display nothing."""

from __future__ import annotations

import threading

import pytest

from llm_magic.backends.local.files.download_progress import CountingBar


def test_bar_counts_reports_and_displays_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    reported: list[float] = []

    class Bar(CountingBar):
        def on_update(self) -> None:
            reported.append(self.n)

    before = threading.enumerate()
    assert list(Bar("abc", name="files")) == ["a", "b", "c"]
    assert reported == [1, 2, 3]
    assert capfd.readouterr() == ("", "")
    assert threading.enumerate() == before
