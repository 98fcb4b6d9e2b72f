"""What holds a weight after an unload is named as a notebook's user would name it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from llm_magic.backends.local.cpu_linear import Bfloat16Linear
from llm_magic.backends.local.memory_holders import ReferenceSearch


class Model(torch.nn.Module):
    """A small model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 5)


class Holder:
    """An object of the user."""

    def __init__(self, held: object) -> None:
        self.held = held


def fails(weight: object) -> None:
    """Keep `weight` in the frames of an error."""
    copy = [weight]
    raise ZeroDivisionError(len(copy))


def bound(value: object) -> Callable[[], object]:
    """Return a function that refers to `value`."""
    return lambda: value


def store(value: object) -> type:
    """Return a class with `value` as its attribute."""
    return type("Store", (), {"w": value})


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Return the namespace of a notebook."""
    notebook = type(sys)("__main__")
    notebook.Out = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    yield vars(notebook)
    vars(notebook).clear()


HOLDS: list[tuple[str, Callable[[Model], dict[str, Any]], tuple[str, ...]]] = [
    ("the model", lambda m: {"x": m}, ("x",)),
    ("a part", lambda m: {"x": m.inner}, ("x",)),
    ("a weight", lambda m: {"x": m.inner.weight}, ("x",)),
    ("in a list", lambda m: {"x": [1, m.inner.weight]}, ("x[1]",)),
    ("in a dict", lambda m: {"x": {"a": (m.inner.weight,)}}, ("x['a'][0]",)),
    ("in an object", lambda m: {"x": Holder(m.inner.weight)}, ("x.held",)),
    ("in a namespace", lambda m: {"x": SimpleNamespace(y=[m.inner.weight])}, ("x.y[0]",)),
    ("a view", lambda m: {"x": m.inner.weight[0]}, ("x",)),
    ("detached", lambda m: {"x": m.inner.weight.detach()}, ("x",)),
    ("data", lambda m: {"x": m.inner.weight.data}, ("x",)),
    ("an array", lambda m: {"x": m.inner.weight.detach().numpy()}, ("something without a name",)),
    ("all of them", lambda m: {"x": m.state_dict()}, ("x",)),
    ("two names", lambda m: {"x": m.inner.weight, "y": [m.inner.bias]}, ("x", "y[0]")),
    ("a function", lambda m: {"x": lambda: m.inner}, ("x",)),
    ("an output", lambda m: {"Out": {3: m.inner.weight}, "_": m.inner.weight}, ("Out[3]",)),
    ("two outputs", lambda m: {"Out": {3: m.inner.weight, 4: [m.inner.bias]}},
     ("Out[3]", "Out[4][0]")),
    ("the last output", lambda m: {"_": m.inner.weight}, ("_",)),
    ("many", lambda m: {"a": m.inner.weight, "f": bound(m.inner.weight), "s": {m.inner.weight},
                        "t": (1, m.inner.weight), "Store": store(m.inner.weight)},
     ("Store.w", "a", "f", "s", "t[1]")),
    ("a class", lambda m: {"Store": store(m.inner.weight)}, ("Store.w",)),
    ("in a class", lambda m: {"Store": store([m.inner])}, ("Store.w[0]",)),
    ("a graph", lambda m: {"x": [(m.inner.weight * 2).sum()]}, ("x[0]",)),
    ("a copy", lambda m: {"x": m.inner.weight.detach().clone()}, ()),
    ("beside", lambda m: {"x": m, "y": [m.inner.weight]}, ("x", "y[0]")),
    ("a part beside", lambda m: {"x": m, "y": [m.inner]}, ("x", "y[0]")),
    ("far beside", lambda m: {"x": m, "y": bound([[m.inner.weight]])}, ("x", "y")),
    ("a number", lambda m: {"x": m.inner.weight.tolist(), "y": m.inner.weight.shape}, ()),
]  # fmt: skip


def assert_held_until_last_value_is_replaced(
    search: ReferenceSearch, holders: tuple[str, ...]
) -> None:
    assert search.holders() == holders
    sys.last_value = None
    gc.collect()
    assert search.holders() == ()


@pytest.mark.parametrize(("hold", "named"), [case[1:] for case in HOLDS], ids=[c[0] for c in HOLDS])
def test_holder_is_named(
    main: dict[str, Any], hold: Callable[[Model], dict[str, Any]], named: tuple[str, ...]
) -> None:
    model = Model()
    search = ReferenceSearch([model])
    main |= hold(model)
    del model
    assert search.holders() == named
    main.clear()
    gc.collect()
    assert search.holders() == ()


def test_holder_of_a_packed_weight_is_named(main: dict[str, Any]) -> None:
    model = Model()
    Bfloat16Linear.convert(model.inner).pack()
    search = ReferenceSearch([model])
    main["weight"] = next(model.inner.parameters())
    del model
    assert search.holders() == ("weight",)
    main.clear()
    assert search.holders() == ()


class MadeModule(ModuleType):
    """A module that makes its namespace each time it is read, as cffi's libraries do."""

    def __getattribute__(self, name: str) -> Any:
        return {} if name == "__dict__" else super().__getattribute__(name)


@pytest.mark.usefixtures("whole_heap")
def test_last_error_is_named_with_its_variable(
    main: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        # The identity of such a namespace soon is that of another dictionary.
        monkeypatch.setitem(sys.modules, f"made{number}", MadeModule(f"made{number}"))

    def fail() -> ReferenceSearch:
        model = Model()
        search = ReferenceSearch([model])
        weight = model.inner.weight
        del model
        try:
            fails(weight)
        except ZeroDivisionError as error:
            deepest = error.__traceback__
            assert deepest is not None
            monkeypatch.setattr(
                sys, "last_value", error.with_traceback(deepest.tb_next), raising=False
            )
        return search

    assert_held_until_last_value_is_replaced(fail(), ("sys.last_value (weight in fails)",))


@pytest.mark.usefixtures("whole_heap")
def test_attribute_error_of_a_model_is_named(
    main: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> ReferenceSearch:
        model = Model()
        search = ReferenceSearch([model])
        try:
            _ = model.inner.weight.nowhere  # type: ignore[attr-defined]
        except AttributeError as error:
            main["sys"] = sys
            monkeypatch.setattr(sys, "last_value", error.with_traceback(None), raising=False)
        return search

    assert_held_until_last_value_is_replaced(fail(), ("sys.last_value",))


@pytest.mark.usefixtures("whole_heap")
def test_own_frame_of_last_error_is_not_shown(
    main: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"__name__": "llm_magic.backends.local.backend"}
    exec("def check(loaded): raise ValueError", own)

    def fail() -> ReferenceSearch:
        model = Model()
        search = ReferenceSearch([model])
        try:
            own["check"](model)
        except ValueError as error:
            own_frame = error.__traceback__.tb_next if error.__traceback__ else None
            monkeypatch.setattr(sys, "last_value", error.with_traceback(own_frame), raising=False)
        return search

    assert_held_until_last_value_is_replaced(fail(), ("sys.last_value",))
