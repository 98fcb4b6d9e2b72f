"""Finds the variables of a notebook that keep an unloaded model in memory."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType, FunctionType, ModuleType, TracebackType
from typing import Any

import torch

from llm_magic.errors import chained, is_own

# Limits of the search: steps from a weight to a variable, with a call of the garbage collector for
# each; objects in one step; objects that it starts from; functions of an autograd graph.
_MAX_STEPS = 12
_MAX_OBJECTS = 500
_MAX_STARTS = 1_000
_MAX_FUNCTIONS = 10_000
_MAX_KINDS = 3
_LEADING_KEY = re.compile(r"^\['([^']+)'\]")
# References that IPython keeps besides Out[N] or a variable.
_STORED_BY_IPYTHON = re.compile(r"(_{1,3}|_\d+|_oh)$|sys\.displayhook$|get_ipython\(\)\.")
_IPYTHON = "get_ipython()"
_LAST_ERROR = {"last_exc", "last_value", "last_traceback"}


class ReferenceSearch:
    """Finds the references to models that should have been freed; stores weak references only."""

    def __init__(self, models: Iterable[torch.nn.Module]) -> None:
        models = list(models)
        self._models = [weakref.ref(model) for model in models]
        tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
        self._addresses = frozenset(map(_address, tensors)) - {0}
        # Packed weights have no address, and no views.
        self._packed = [weakref.ref(t) for t in tensors if t.is_mkldnn]

    def holders(self) -> tuple[str, ...]:
        """Return the names of the variables that keep a model or one of its weights in memory."""
        models = [model for ref in self._models if (model := ref()) is not None]
        weights: list[object] = list(self._weights())
        if not models:
            return names(weights) if weights else ()
        # The model itself refers to its parts and weights: those references are not reported.
        parts = [part for model in models for part in model.modules()]
        own = {at for part in parts for at in _structure(part)} | set(map(id, models))
        beside = _found([*weights, *(p for p in parts if p not in models)], own).names()
        return tuple(sorted({*names(models), *beside}))

    def _weights(self) -> Iterator[torch.Tensor]:
        tensors = list(_tensors())
        # A view is another object than the weight whose memory it shares.
        left = [t for t in tensors if _address(t) in self._addresses]
        left += [t for ref in self._packed if (t := ref()) is not None]
        yield from left
        if left:
            known = set(map(id, left))
            yield from (t for t in tensors if id(t) not in known and self._is_computed_from(t))

    def _is_computed_from(self, tensor: torch.Tensor) -> bool:
        """Return whether the autograd graph of a tensor, which is in C++, refers to a weight."""
        functions = [tensor.grad_fn]
        seen: set[object] = set()
        while functions and len(seen) < _MAX_FUNCTIONS:
            function = functions.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            leaf = getattr(function, "variable", None)
            if leaf is not None and _address(leaf) in self._addresses:
                return True
            functions += [before for before, _number in function.next_functions]
        return False


def _structure(module: torch.nn.Module) -> Iterator[int]:
    """Yield the ids of a module and of the dictionaries with its parts."""
    yield id(module)
    for attribute in (vars(module), *vars(module).values()):
        if isinstance(attribute, dict):
            yield id(attribute)


def _tensors() -> Iterator[torch.Tensor]:
    for thing in gc.get_objects():
        # Not `isinstance`, which calls code of proxy objects.
        if issubclass(type(thing), torch.Tensor):
            yield thing


def _address(tensor: torch.Tensor) -> int:
    """Return the address of the memory of a tensor; 0 if it has none."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        # A wrapper, such as a fake tensor, has no memory.
        return 0
    return tensor.untyped_storage().data_ptr()


def names(things: Sequence[object]) -> tuple[str, ...]:
    """Return the names of variables that refer to objects: ``x``, ``x[0]``, ``Out[3]``.

    If there are none, returns the types of the objects that refer to them.
    """
    search = _found(things)
    kinds = tuple(sorted(search.kinds)[:_MAX_KINDS])
    return search.names() or kinds or ("something without a name",)


def _found(things: Sequence[object], ignored: Iterable[int] = ()) -> _Search:
    """Search from `things` to variables, without the objects that have an `ignored` id."""
    search = _Search()
    search.seen |= {id(things), *ignored}
    level = _Level()
    for thing in things[:_MAX_STARTS]:
        level.add(thing, "")
    steps = _MAX_STEPS
    while level.objects and steps:
        level = search.above(level)
        steps -= 1
        search.kinds = search.kinds or {f"a {type(owner).__name__}" for owner in level.objects}
    return search


@dataclass(slots=True)
class _Level:
    """Objects at the same number of steps from the start.

    `texts` has, by id, the expression that leads from each object to the start.
    """

    objects: list[object] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)

    def add(self, thing: object, text: str) -> None:
        """Add an object by its id: comparing it could run code of the user."""
        self.objects.append(thing)
        self.texts[id(thing)] = text


class _Search:
    """Follows references backwards, step by step, until they come from variables."""

    def __init__(self) -> None:
        self.found: defaultdict[str, set[str]] = defaultdict(set)
        self.kinds: set[str] = set()
        self.seen: set[int] = set()
        # By the id of each namespace: the prefix of the names in it.
        self._namespaces = {id(vars(m)): f"{name}." for name, m in _modules()}
        self._namespaces |= _ipythons_namespaces()
        main = vars(sys.modules["__main__"])
        # `__main__` may be in `sys.modules` under other names.
        self._namespaces[id(main)] = ""
        self._outputs = id(main.get("Out"))
        self._failed = set(map(id, _failed_frames()))

    def above(self, level: _Level) -> _Level:
        """Return the objects that refer to those of a level; adds variables to `found`."""
        above = _Level()
        self.seen |= {id(level.objects), *level.texts}
        for owner in gc.get_referrers(*level.objects):
            if id(owner) in self.seen or len(above.texts) >= _MAX_OBJECTS:
                continue
            steps = list(_steps(owner, level.texts))
            if self._is_root(owner, steps):
                continue
            self.seen.add(id(owner))
            if steps:
                above.add(owner, steps[0][1] if len(steps) == 1 else "")
        self.seen.add(id(above.objects))
        return above

    def _is_root(self, owner: object, steps: list[_Step]) -> bool:
        """Record the variables in a namespace, in ``Out`` or in the last error; returns if it is one."""
        prefix = self._namespaces.get(id(owner))
        is_output, is_failed = id(owner) == self._outputs, id(owner) in self._failed
        for key, text in steps:
            if prefix is not None:
                self._record(prefix, key, text)
            elif is_output:
                self.found[f"Out[{key}]"].add(text.removeprefix(_item(key)))
            elif is_failed:
                self._record_error(text)
        return prefix is not None or is_output or is_failed

    def _record(self, prefix: str, key: object, text: str) -> None:
        if prefix == "sys." and key in _LAST_ERROR:
            self._record_error("")
        elif prefix == _IPYTHON:
            self.found[_IPYTHON + _LEADING_KEY.sub(r".\1", text)].add("")
        else:
            self.found[f"{prefix}{key}"].add(text.removeprefix(_item(key)))

    def _record_error(self, text: str) -> None:
        """Record a variable in the frames of the last error; the first one is the nearest."""
        texts = self.found["sys.last_value"]
        if not any(texts):
            texts.clear()
            texts.add(text)

    def names(self) -> tuple[str, ...]:
        """Return the names that were found, without a path if one refers to several objects."""
        found = {
            name if len(texts) > 1 else f"{name}{min(texts)}": name
            for name, texts in self.found.items()
        }
        better = {whole for whole, name in found.items() if not _STORED_BY_IPYTHON.match(name)}
        return tuple(sorted(better or found))


# A key or name, and the expression from there to the start.
_Step = tuple[object, str]


def _steps(owner: Any, texts: Mapping[int, str]) -> Iterator[_Step]:
    """Yield how `owner` refers to the objects in `texts`."""
    if isinstance(owner, dict | list | tuple):
        items = owner.items() if isinstance(owner, dict) else enumerate(owner)
        for key, value in list(items):
            if id(value) in texts:
                yield key, f"{_item(key)}{texts[id(value)]}"
        return
    if isinstance(owner, FrameType):
        for name, value in owner.f_locals.items():
            if id(value) in texts:
                what = f"{name}{texts[id(value)]} in {owner.f_code.co_name}"
                # The user cannot delete variables of this package.
                yield name, "" if is_own(owner.f_globals) else f" ({what})"
        return
    for value in gc.get_referents(owner):
        if id(value) in texts:
            yield "", _attribute(owner, value, texts[id(value)])


def _attribute(owner: Any, value: object, text: str) -> str:
    """Return the expression for the attribute `value` of an object."""
    if isinstance(owner, torch.nn.Module | FunctionType):
        # Its attributes are not what a user would delete.
        return ""
    if isinstance(owner, type):
        # The `__dict__` of a class is a view of the dictionary that the class refers to.
        return _LEADING_KEY.sub(r".\1", text) if type(value) is dict else text
    try:
        attributes = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return text
    if value is attributes:
        return _LEADING_KEY.sub(r".\1", text)
    return next((f".{name}{text}" for name, at in attributes.items() if at is value), text)


def _item(key: object) -> str:
    """Return a key in brackets; only a type name for an object whose repr could run other code."""
    return f"[{key!r}]" if type(key) in {str, int} else f"[<{type(key).__name__}>]"


def _modules() -> list[tuple[str, ModuleType]]:
    """Return the modules with a namespace; those of cffi create one each time it is read."""
    modules = [(name, m) for name, m in list(sys.modules.items()) if isinstance(m, ModuleType)]
    return [(name, m) for name, m in modules if vars(m) is vars(m)]


def _ipythons_namespaces() -> dict[int, str]:
    """Return the ids of IPython's shell and of its attributes."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return {} if shell is None else {id(shell): _IPYTHON, id(vars(shell)): _IPYTHON}


def _failed_frames() -> Iterator[FrameType]:
    """Yield the frames of the last error of the notebook and of the errors before it."""
    for error in chained(getattr(sys, "last_value", None)):
        traceback: TracebackType | None = error.__traceback__
        while traceback is not None:
            yield traceback.tb_frame
            traceback = traceback.tb_next
