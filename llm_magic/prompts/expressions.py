"""Parse and evaluate the expressions of prompts: a safe part of Python, without side effects.

An expression consists of names, attributes, subscripts, literals, arithmetic and comparisons, and of
calls of a few functions and methods. It is evaluated node by node and never compiled. Operators,
subscripts and calls are for values of trusted types only (`trusted_types`). Of other objects attributes
can be read, which runs their properties, and the text is inserted, which runs their `__str__`.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llm_magic.errors import did_you_mean
from llm_magic.prompts.allowed_methods import ATTRIBUTES, METHODS, AllowedCall, call_method
from llm_magic.prompts.allowed_operations import (
    FUNCTIONS,
    OPERATORS,
    arithmetic,
    call_function,
    comparison,
    item,
    truth,
    unary,
)
from llm_magic.prompts.trusted_types import (
    ARRAYS,
    ASSIGN,
    MAPPINGS,
    NODE_COST,
    SCALARS,
    Budget,
    NotAllowed,
    classes_of,
    family,
    is_environment,
    own_names,
    require_own,
    require_plain_cells,
    require_plain_labels,
    size,
    trusted_type,
)
from llm_magic.prompts.values_as_text import (
    describe,
    format_value,
    full_repr,
    is_plain_text,
    is_word,
    require_printable,
    shortening,
    to_text,
)

_STRING = r"""(?:"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+')"""
_PART = re.compile(
    rf"{_STRING}|(?P<open>[(\[{{])|(?P<close>[)\]}}])|(?P<end>![rsa](?=:|$)|:(?!=))"
    r"|[^\"'()\[\]{}!:]++|."
)
# A space after the colon makes it an entry of a dict, or CSS.
_SPEC = re.compile(r"""(?!\ )[^{}"'\\\n]{0,100}""")
ALLOWED = (
    ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.keyword, ast.Constant, ast.UnaryOp,
    ast.BinOp, ast.Compare, ast.Slice, ast.List, ast.Tuple, ast.Load, *OPERATORS,
)  # fmt: skip
# Python 3.14 has template strings.
_TEMPLATES = [getattr(ast, name) for name in ("TemplateStr", "Interpolation") if hasattr(ast, name)]
KINDS: Mapping[type[ast.AST], str] = {
    ast.Lambda: "a lambda", ast.IfExp: '"if" and "else"', ast.BoolOp: '"and" or "or"',
    ast.NamedExpr: "an assignment", ast.Starred: "a star", ast.LShift: "<<", ast.RShift: ">>",
    ast.MatMult: "@", ast.JoinedStr: "an f-string", ast.FormattedValue: "an f-string",
    ast.ListComp: "a list comprehension", ast.SetComp: "a set comprehension",
    ast.DictComp: "a dict comprehension", ast.GeneratorExp: "a generator expression",
    ast.Dict: "a dict", ast.Set: "a set", ast.Await: "await", ast.Yield: "yield",
    ast.YieldFrom: "yield", **dict.fromkeys(_TEMPLATES, "a t-string"),
}  # fmt: skip
_CONVERSIONS: Mapping[str, Callable[[Any], str]] = {"r": full_repr, "s": str, "a": ascii}
_DATE_AS_TEXT = 'Compare with a text instead, such as df["day"] > "2026-01-31"'
_MISSING = object()
_MOST_COMPARED = 10_000  # names that exist, with one that does not
_MOST_NAMED = 12  # attributes of an object, in an error
_KEYS: Mapping[str, str] = {
    **dict.fromkeys(MAPPINGS, "keys"), "series": "labels",
    **dict.fromkeys(("frame", "groups", "pl_frame"), "columns"),
}  # fmt: skip
_VISITS_CELLS = frozenset({
    "str", "dt", "values", "T", "is_unique", "hasnans", "is_monotonic_increasing",
    "is_monotonic_decreasing",
})  # fmt: skip
# Their attributes lead to the code and the variables of running functions.
_CLOSED = (
    types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.GeneratorType,
    types.CoroutineType, types.AsyncGeneratorType, types.FrameType, types.TracebackType,
    types.CodeType,
)  # fmt: skip


class EvaluationError(Exception):
    """An expression raised its cause; `advice` is what to write instead."""

    def __init__(self, advice: str) -> None:
        super().__init__(advice)
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Expression:
    """The content of two braces: an expression, a conversion and a format spec.

    `names` are its variables of the notebook, without Python's own functions.
    """

    tree: ast.expr
    nodes: tuple[ast.AST, ...]
    names: tuple[str, ...]
    conversion: str
    spec: str


def parse(text: str) -> Expression | None:
    """Return the expression in a text, allowed or not; None if the text is no expression."""
    code, conversion, spec = _split(text)
    if not code or code != code.strip() or not _SPEC.fullmatch(spec) or is_word(spec):
        return None
    if "#" in code and "#" in re.sub(_STRING, "", code):  # a comment
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "\d" in a text is no Python on purpose
            tree = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes = tuple(ast.walk(tree))
    if isinstance(tree, (ast.Tuple, ast.Constant, ast.List, ast.Starred)) or not any(
        isinstance(node, (ast.Name, ast.Call)) for node in nodes
    ):
        return None
    return Expression(tree, nodes, tuple(_variables(tree, nodes)), conversion, spec)


def _variables(tree: ast.expr, nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the names in an expression, but not those that it binds and functions in its calls."""
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    for node, in_call in pending:  # which grows
        in_call = in_call or isinstance(node, ast.Call)
        if isinstance(node, ast.Name):
            is_own = node.id in bound or (in_call and hasattr(builtins, node.id))
            yield from () if is_own else (node.id,)
        pending += ((child, in_call) for child in ast.iter_child_nodes(node))


def _split(text: str) -> tuple[str, str, str]:
    """Split ``price * 1.2!r:.2f`` into the expression, the conversion and the format spec."""
    depth = 0
    for part in _PART.finditer(text):
        depth += bool(part["open"]) - bool(part["close"])
        if part["end"] and depth == 0:
            conversion = part[0][1:] if part[0][0] == "!" else ""
            spec = text[part.end() :] if not conversion else text[part.end() + 1 :]
            return text[: part.start()], conversion, spec
    return text, "", ""


def check(expression: Expression, names: Mapping[str, Any]) -> None:
    """Raise `NotAllowed` if an expression contains syntax that is not allowed in prompts."""
    if not any(isinstance(node, ast.Name) for node in expression.nodes):
        raise NotAllowed("contains no variable")
    for node in expression.nodes:
        if not isinstance(node, ALLOWED):
            raise NotAllowed(f"contains {KINDS.get(type(node), type(node).__name__)}")
        match node:
            case ast.Name(id=name) if name.startswith("__"):
                raise NotAllowed(private(name))
            case ast.Attribute(attr=name) if name.startswith("_"):
                raise NotAllowed(f"reads {name}, which is private")
            case ast.keyword(arg=None):
                raise NotAllowed("contains a star")
            case ast.Call(func=func) if not isinstance(func, ast.Attribute):
                _check_function(func, names)


def _check_function(func: ast.expr, names: Mapping[str, Any]) -> None:
    called = func.id if isinstance(func, ast.Name) else "the result of an expression"
    if called == "print":
        raise NotAllowed("calls print, which returns None", "Insert the value itself")
    if called not in FUNCTIONS:
        raise NotAllowed(
            f"calls {called}; the functions that are called are {', '.join(FUNCTIONS)}"
        )
    if called in names and names[called] is not getattr(builtins, called):
        raise NotAllowed(f"calls {called}, which is a variable of the notebook")


def private(name: str) -> str:
    """Return the reason that a name with two underscores in front is not allowed."""
    return f"reads {name}; names that begin with two underscores are refused"


@dataclass(frozen=True, slots=True)
class Inserted:
    """The text of a value; what it lacks of a table or an array, and how to send more of it.

    `is_block`: the text has several lines, which no other text may share.
    `complete` is what follows the expression to send all of it, `part` to send a part of a large one.
    """

    text: str
    lacks: str = ""
    complete: str = ""
    part: str = ""
    is_block: bool = False


def value_of(expression: Expression, names: Mapping[str, Any], budget: Budget) -> Any:
    """Return the value of an expression whose names all exist, without its conversion and format spec.

    Raises `NotAllowed` for what is not allowed, and whatever the evaluation raises.
    """
    check(expression, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Evaluator(names, budget).value(expression.tree)


def evaluate(expression: Expression, names: Mapping[str, Any], budget: Budget) -> Inserted:
    """Return the text of an expression whose names all exist, by its conversion and format spec.

    Raises `NotAllowed` for what is not allowed, and whatever the evaluation raises.
    """
    value = value_of(expression, names, budget)
    # The text of a method is its source.
    if expression.conversion or expression.spec or type(value) is not types.MethodType:
        require_printable(value, budget)
    shown = _CONVERSIONS[expression.conversion](value) if expression.conversion else value
    is_python, is_part = bool(expression.conversion or expression.spec), _is_part(expression.tree)
    has_spec = bool(expression.spec)
    text = _formatted(shown, expression, budget) if has_spec else to_text(shown, is_part=is_part)
    lacks = shortening(value, text, is_python=is_python, is_part=is_part)
    is_block = "\n" in text and (not is_plain_text(value) or _is_exported(expression.tree))
    return Inserted(text, *lacks, is_block=is_block)


def _formatted(value: Any, expression: Expression, budget: Budget) -> str:
    """Return a value by the format spec of its expression."""
    try:
        return format_value(value, expression.spec, budget)
    except ValueError as error:
        if expression.conversion or family(value) != "str":
            raise
        advice = "The value is a text, not a number."
        with contextlib.suppress(ValueError):
            better = f"float({ast.unparse(expression.tree)}):{expression.spec}"
            format(float(str.__str__(value)), expression.spec)
            advice = f"The value is a text; write {{{better}}}."
        raise EvaluationError(advice) from error


def _is_part(tree: ast.expr) -> bool:
    """Return whether an expression selects rows of a table: ``df.head(50)``, ``df[10:60]``."""
    if isinstance(tree, ast.Subscript):
        keys = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
        return isinstance(keys[0], ast.Slice) if keys else False
    return _method(tree) in {"head", "tail", "sample"}


def _is_exported(tree: ast.expr) -> bool:
    """Return whether an expression makes a text of a table: ``df.to_string()``."""
    return _method(tree).startswith(("to_", "write_"))


def _method(tree: ast.expr) -> str:
    """Return the name of the method that an expression calls last, or ``""``."""
    called = tree.func if isinstance(tree, ast.Call) else None
    return called.attr if isinstance(called, ast.Attribute) else ""


class _Evaluator:
    """Walks the syntax tree of an expression."""

    def __init__(self, names: Mapping[str, Any], budget: Budget) -> None:
        self._names = names
        self._budget = budget

    def value(self, node: ast.expr | None) -> Any:
        """Return the value of a node; raises `NotAllowed` for the environment and inner modules."""
        self._budget.spend(NODE_COST)
        found = self._raw(node)
        if is_environment(found):
            raise NotAllowed("reads the environment variables, which may hold keys", advice="")
        if issubclass(type(found), types.ModuleType) and not isinstance(node, ast.Name):
            raise NotAllowed("reads a module from another object")
        return found

    def _raw(self, node: ast.expr | None) -> Any:
        value, budget = self.value, self._budget
        match node:
            case ast.Name(id=name):
                return self._variable(name)
            case ast.Attribute(value=inner, attr=name):
                owner = value(inner)
                with _suggesting(owner, name):
                    return self._attribute(owner, name)
            case ast.Subscript(value=inner, slice=key):
                owner, index = value(inner), value(key)
                variable = key.id if isinstance(key, ast.Name) else ""
                with _suggesting(owner, index, keys=True, variable=variable):
                    return item(owner, index, budget)
            case ast.Call():
                return self._call(node)
            case ast.UnaryOp(op=operator, operand=operand):
                return unary(type(operator), value(operand), budget)
            case ast.BinOp(left=left, op=operator, right=right):
                return arithmetic(type(operator), value(left), value(right), budget)
            case ast.Compare():
                return self._compare(node)
            case ast.Slice(lower=lower, upper=upper, step=step):
                return slice(value(lower), value(upper), value(step))
            case ast.List(elts=items) | ast.Tuple(elts=items):
                values = [value(one) for one in items]
                return values if isinstance(node, ast.List) else tuple(values)
        return getattr(node, "value", None)  # of a constant; None is the open end of a slice

    def _variable(self, name: str) -> Any:
        if name not in self._names:
            is_type = name in {"int", "float", "bool", "str"}
            advice = f'For a data type, write "{name}"' if is_type else ASSIGN
            raise NotAllowed(f"passes {name}, a function of Python", advice)
        return self._names[name]

    def _compare(self, node: ast.Compare) -> Any:
        left, result = self.value(node.left), None
        for number, operator in enumerate(node.ops):
            if number and not truth(result):
                return result
            right = self.value(node.comparators[number])
            result = comparison(type(operator), left, right, self._budget)
            left = right
        return result

    def _call(self, node: ast.Call) -> Any:
        name, owner = getattr(node.func, "id", ""), None
        if isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, self.value(node.func.value)
            if issubclass(type(owner), (types.ModuleType, type, *_CLOSED)):
                is_date = name in {"Timestamp", "to_datetime"}
                advice = _DATE_AS_TEXT if is_date else ASSIGN
                raise NotAllowed(f"calls .{name}() of {_described(owner)}", advice)
            require_plain_labels(owner, self._budget)
            if _is_missing(owner, name):
                with _suggesting(owner, name):
                    getattr(owner, name)  # raises the error of the type
        args = [self.value(one) for one in node.args]
        named = {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg}
        call = call_method if isinstance(node.func, ast.Attribute) else call_function
        with _suggesting_column(owner, (*args, *named.values())):
            return call(AllowedCall(owner, name, args, named, self._budget))

    def _attribute(self, owner: Any, name: str) -> Any:
        kind, base = trusted_type(owner)
        if issubclass(type(owner), types.ModuleType):
            return _module_attribute(owner, name)
        if issubclass(type(owner), _CLOSED):
            raise NotAllowed(f"reads .{name} of {_described(owner)}")
        require_plain_labels(owner, self._budget)
        if kind == "unknown" or _is_missing(owner, name):
            return getattr(owner, name)
        # As in Python, a label does not hide an attribute of a Series: `.name` of a row is often both.
        is_label = kind in {"frame", "groups"} or (kind == "series" and not _defines(base, name))
        if is_label and name in _labels(owner):
            return item(owner, name, self._budget)
        if name not in ATTRIBUTES.get(kind, ()):
            if name in METHODS.get(kind, ()):
                raise NotAllowed(f"reads a method; write .{name}() to call it", advice="")
            raise NotAllowed(f"reads .{name} of a {type(owner).__name__}, which is not supported")
        require_own(owner, base, name)
        if kind in ARRAYS and name in _VISITS_CELLS:
            require_plain_cells(owner, self._budget)
            columns = name == "T" and kind == "frame"  # one is made for each row
            self._budget.spend(owner.shape[0] * 200 if columns else size(owner))
        return getattr(owner, name)


@contextlib.contextmanager
def _suggesting(
    owner: Any, name: object, *, keys: bool = False, variable: str = ""
) -> Iterator[None]:
    """Raise `EvaluationError` instead of an error about a name that resembles one that exists.

    `variable` is the name of the variable that a key was taken from.
    """
    try:
        yield
    except (AttributeError, KeyError) as error:
        if not (near := _near(owner, name, keys=keys, variable=variable)):
            raise
        raise EvaluationError(near) from error


@contextlib.contextmanager
def _suggesting_column(owner: Any, given: Sequence[Any]) -> Iterator[None]:
    """Raise `EvaluationError` for a column that a method of a table gets and that does not exist."""
    try:
        yield
    except KeyError as error:
        if family(owner) not in {"frame", "groups"}:
            raise
        names = [name for one in given for name in _column_names(one)]
        tables = (owner, *(one for one in given if family(one) == "frame"))
        unknown = ((one, name) for one in tables for name in names if not has_key(one, name))
        table, name = next(unknown, (owner, None))
        if name is None or not (near := _near(table, name, keys=True, variable="")):
            raise
        raise EvaluationError(near) from error


def _column_names(argument: Any) -> list[str]:
    """Return the texts in an argument of a method, which may be names of columns."""
    kind = family(argument)
    names = list(argument) if kind in {"list", "tuple", "dict"} else [argument]
    return [name for name in names if type(name) is str]


def _near(owner: Any, name: object, *, keys: bool, variable: str) -> str:
    """Return what to write instead of an attribute or a key that does not exist, or ``""``."""
    kind = family(owner)
    if kind == "indexer":
        return _near_label(owner.obj, name if type(name) is tuple else (name,))
    key = next((one for one in (variable, name) if type(one) is str and has_key(owner, one)), "")
    if key:
        return f'For the key, write ["{key}"].' if keys or kind in MAPPINGS else ""
    names = islice(_known(owner, keys=keys), _MOST_COMPARED)
    texts = [one for one in names if type(one) is str]
    if type(name) is str and name in texts:
        return ""
    if type(name) is str and (near := did_you_mean(name, texts, count=1)):
        return near.strip()
    what = _KEYS.get(kind, "")
    known = list(islice(_known(owner, keys=True), _MOST_COMPARED)) if what else []
    if known or keys:
        return f"The {what} are {describe('', known)}." if known else ""
    own = list(islice(dict.fromkeys(_own_attributes(owner)), _MOST_NAMED + 1))
    more = ", …" if len(own) > _MOST_NAMED else ""
    return f"The attributes are {', '.join(own[:_MOST_NAMED])}{more}." if own else ""


def _own_attributes(owner: Any) -> Iterator[str]:
    """Yield the public attributes of an object and its classes, without those of trusted types."""
    with contextlib.suppress(AttributeError):  # of an object with slots
        yield from (one for one in object.__getattribute__(owner, "__dict__") if one[:1] != "_")
    kind, base = trusted_type(owner)
    for one in classes_of(owner):
        if kind != "unknown" and one is base:
            return
        yield from (name for name in own_names(one) if name[:1] != "_")


def _near_label(table: Any, keys: Sequence[Any]) -> str:
    """Return what to write instead of a label in ``df.loc[…]`` that does not exist, or ``""``."""
    for axis, key in zip(table.axes, keys, strict=False):
        labels = list(islice(axis, _MOST_COMPARED))
        for one in key if type(key) is list else (key,):
            if type(one) not in {str, int} or one in labels:
                continue
            texts = [label for label in labels if type(label) is str]
            near = did_you_mean(one, texts, count=1).strip() if type(one) is str else ""
            what = "labels" if axis is table.axes[0] else "columns"
            return near or f"The {what} are {describe('', labels)}."
    return ""


def is_unquoted_key(name: str, expression: Expression, names: Mapping[str, Any]) -> bool:
    """Return whether a name that does not exist is a key of what it is looked up in: ``df[price]``."""
    return any(
        has_key(names[node.value.id], name)
        for node in expression.nodes
        if isinstance(node, ast.Subscript) and getattr(node.slice, "id", "") == name
        if isinstance(node.value, ast.Name) and node.value.id in names
    )


def has_key(owner: Any, name: str) -> bool:
    """Return whether a dict or a table has a key or a column of this name, without running its code."""
    some = islice(_known(owner, keys=True), _MOST_COMPARED)
    return any(type(one) is str and one == name for one in some)


def _known(owner: Any, *, keys: bool) -> Iterator[object]:
    """Yield the keys of a value, or its public attributes, without running its code."""
    kind = family(owner)
    if kind in MAPPINGS and keys:
        yield from dict.keys(owner)
    elif kind in {"frame", "series", "pl_frame", "groups"}:
        yield from _labels(owner) if kind != "pl_frame" else owner.columns
    if keys:
        return
    yield from sorted(ATTRIBUTES.get(kind, frozenset()) | METHODS.get(kind, frozenset()))
    if kind == "unknown":
        for one in classes_of(owner):
            yield from (name for name in own_names(one) if name[:1] != "_")
        with contextlib.suppress(AttributeError):  # of an object with slots
            yield from object.__getattribute__(owner, "__dict__")


def _is_missing(owner: Any, name: str) -> bool:
    """Return whether the trusted type of a value has no such attribute, and the value no such label.

    A subclass of the user's may have it: a field of a named tuple.
    """
    kind, base = trusted_type(owner)
    if kind == "unknown" or name in _labels(owner):
        return False
    return not _defines(base, name)


def _defines(kind: type, name: str) -> bool:
    return inspect.getattr_static(kind, name, _MISSING) is not _MISSING


def _labels(owner: Any) -> Any:
    """Return the labels that are attributes of a table, a column or groups of them, too."""
    table = owner.obj if family(owner) == "groups" else owner
    if family(table) == "frame":
        return table.columns
    return owner.index if family(owner) == "series" else ()


def _module_attribute(module: types.ModuleType, name: str) -> Any:
    """Return an attribute of a module, unless it is a module or made when it is read."""
    names = types.ModuleType.__getattribute__(module, "__dict__")
    if name not in names and (type(module) is not types.ModuleType or "__getattr__" in names):
        raise NotAllowed(f"reads .{name} of {_described(module)}, which is made as it is read")
    value = names[name] if name in names else getattr(module, name)
    if issubclass(type(value), types.ModuleType):
        raise NotAllowed(f"reads a module from {_described(module)}")
    parts = value if family(value) == "tuple" else (value,)
    closed = not is_environment(value) and not issubclass(type(value), (types.FunctionType, type))
    if closed and not all(family(one) in SCALARS | ARRAYS for one in parts):
        raise NotAllowed(f"reads .{name} of {_described(module)}, which is not a number or a text")
    return value


def _described(value: object) -> str:
    if issubclass(type(value), types.ModuleType):
        names = types.ModuleType.__getattribute__(value, "__dict__")
        return f"the module {names.get('__name__')}"
    if issubclass(type(value), type):
        return f"the class {getattr(value, '__name__', '')}"
    return f"a {type(value).__name__}"
