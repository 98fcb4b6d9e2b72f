"""The base class of the bars that replace those of huggingface_hub and Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm.std import tqdm


class CountingBar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
    """A progress bar that counts and displays nothing; subclasses override `on_update`."""

    # Otherwise each subclass starts a thread that redraws its bars, and never ends.
    monitor_interval = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # `name` is an option of the bars of huggingface_hub, which tqdm does not have.
        kwargs.pop("name", None)
        self.counts_bytes = kwargs.get("unit") == "B"
        super().__init__(*args, **{**kwargs, "disable": True})

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable or ():
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """Add `n`, and call `on_update`."""
        self.n += n or 0
        self.on_update()
        return None

    def on_update(self) -> None:
        """Report the progress; an exception stops the work."""
