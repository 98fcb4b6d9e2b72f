"""The prompt of each row, from a template whose references are found once, or from a function."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

from llm_magic.errors import OptionError, PromptError
from llm_magic.prompts.template import MAX_PROMPT, Compiled, Reference, compile_template
from llm_magic.prompts.trusted_types import family
from llm_magic.prompts.values_as_text import is_entry

if TYPE_CHECKING:
    from llm_magic.session.map.rows import Row, Rows
    from llm_magic.session.requests import Prompt

# What a template calls the value of a row and its label.
ITEM, INDEX = "item", "index"
_PLAIN = frozenset({int, float, bool})
# In the name of a column, what ends a reference or a quotation.
_ODD = re.compile(r"[{}\"'\\\n]")
# The conversion and the format spec behind a name.
_FORMAT = r"((?:![rsa])?(?::(?! )[^{}\"'\\\n]{1,100})?)"
# The text of a missing value, as in ``nan%``.
_NO_VALUE = re.compile(r"\W*(?:nan|none|nat|na)\W*", re.IGNORECASE)
# The most elements of a row of an array that are inserted as a list.
_LONGEST_ROW = 1_000
# The first rows of a map that are filled in before any is sent: an error of all is one of the template.
_CHECKED = 3
_CALL = 'llm.map(PROMPT, DATA). To send each row as it is: llm.map("{item}", DATA).'

MakePrompt = Callable[["Row"], "Prompt | None"]
"""Returns the prompt of a row, None for a missing value; may raise anything."""


def is_missing(value: object) -> bool:
    """Return whether a value is None, NaN, NaT, ``pd.NA``, or an empty or blank text."""
    if type(value) is str:
        return not value or value.isspace()
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Decimal):
        return value.is_nan()
    if isinstance(value, (float, complex)) or (kind := family(value)) == "scalar":
        # Also of NumPy's numbers and dates, of which only float64 is a float.
        return bool(value != value)
    return kind == "missing"


class FirstRows:
    """The first rows of a map, which are read before the template is checked."""

    def __init__(self, rows: Rows) -> None:
        self._unread = iter(rows)
        self._read: list[Row] = []

    def __getitem__(self, position: int) -> Row | None:
        """Return a row, which is read if necessary; None behind the last one."""
        missing = position + 1 - len(self._read)
        self._read += itertools.islice(self._unread, max(0, missing))
        return self._read[position] if position < len(self._read) else None

    def all(self) -> Iterator[Row]:
        """Return all rows."""
        return itertools.chain(self._read, self._unread)


def prompt_maker(
    prompt: object, rows: Rows, first: FirstRows, names: Mapping[str, Any]
) -> tuple[MakePrompt, tuple[str, ...]]:
    """Return what makes the prompt of a row, and notes.

    `names` are the notebook's variables that a template may use.

    Raises:
        OptionError: `prompt` is neither a template nor a function.
        PromptError: A name in the template does not exist, or the template fails for all first rows.
    """
    if isinstance(prompt, str):
        template = RowTemplate(prompt, rows.columns, first[0], names)
        _check_first(template, first)
        return template, template.notes
    check_prompt(prompt)
    function: Callable[[Any], Any] = prompt  # type: ignore[assignment]
    return lambda row: function(row.item), ()


def check_prompt(prompt: object) -> None:
    """Raise `OptionError` if `prompt` is empty, or neither a template nor a function: it may be the data."""
    if isinstance(prompt, str) and not prompt.strip():
        raise OptionError(f"The prompt is empty. It comes first: {_CALL}")
    if isinstance(prompt, str) or callable(prompt):
        return
    raise OptionError(
        f"The prompt of a map is a template or a function of a row, not a {type(prompt).__name__}."
        f" The prompt comes first: {_CALL}"
    )


def _check_first(template: RowTemplate, first: FirstRows) -> None:
    """Raise the error of the first row, if the template fails for all of the first rows."""
    failed: PromptError | None = None
    for position in range(_CHECKED):
        # The next one only after an error: an iterator may be slow.
        if (row := first[position]) is None:
            break
        try:
            template(row)
            return
        except PromptError as error:
            failed = failed or error
    if failed is not None:
        raise failed


class RowTemplate:
    """A template with references to the columns of a row, or to the row itself.

    ``{item}`` is the row: the value of a list, the dict of a table. ``{index}`` is its label: the
    position in a list, the key of a dict, the index of a pandas object. Columns precede both, and all
    of them precede the notebook's variables.
    """

    def __init__(
        self, template: str, columns: Sequence[str], row: Row | None, names: Mapping[str, Any]
    ) -> None:
        # The keys are the names, in order.
        self._columns = dict.fromkeys(name for name in columns if isinstance(name, str))
        others = [name for name in columns if not isinstance(name, str)]
        # A column may have the name of the row.
        self._item = _unused(f"{ITEM}_", template) if ITEM in self._columns else ITEM
        template, self._written = _readable(template, self._columns, row, self._item)
        known = dict.fromkeys(self._columns)
        known |= {ITEM: None, INDEX: None}
        if row is not None:
            known |= {n: one for n, one in self._values(row).items() if isinstance(n, str)}
        compiled = compile_template(template, {**names, **known})
        shown = [name for name in known if name == ITEM or name != self._item]
        _check_notes(compiled, shown, self._columns, others)
        used = {name for one in compiled.references for name in one.expression.names}
        self._names = {name: names[name] for name in used if name not in known and name in names}
        self._parts = [self._part(part) for part in compiled.parts]
        references = tuple(dict.fromkeys(p for p in self._parts if isinstance(p, Reference)))
        # Of the columns in the template, an empty one makes its row a missing value.
        self._required = tuple(
            dict.fromkeys(n for one in references for n in self._columns_in(one))
        )
        # Of other rows, an attribute or an element.
        self._members = tuple(
            one for part in references for one in _members_of_item(part, self._columns)
        )
        # The references whose values a view shows beside the label of a row.
        self.shown = tuple(
            one
            for one in references
            if str(one) != INDEX and known.keys() & set(one.expression.names)
        )
        self.notes = tuple(self._all_notes(template, compiled, others, names))

    def _all_notes(
        self,
        template: str,
        compiled: Compiled,
        others: Sequence[object],
        names: Mapping[str, Any],
    ) -> Iterator[str]:
        """Yield the notes; `others` are the names of columns that are no texts, such as 0."""
        used = dict.fromkeys(n for one in compiled.references for n in one.expression.names)
        for name in used:
            if name in names and name in self._columns:
                yield f"{{{name}}} is the column, not the variable of the notebook."
        of_row = {*self._columns, ITEM, INDEX, self._item}
        for reference in dict.fromkeys(compiled.references):
            table, column = _column_of_table(reference)
            if table in names and table not in of_row and column in self._columns:
                yield (
                    f"{{{reference}}} is the whole column, the same in each prompt. Write {{{column}}} for"
                    " the value of the row."
                )
        is_of_rows = not of_row.isdisjoint(used)
        for number in others:
            if isinstance(number, int) and re.search(rf"(?<!\{{)\{{{number}\}}(?!\}})", template):
                if not is_of_rows:
                    raise PromptError(_number_note(number))
                yield _number_note(number)
        if not is_of_rows:
            what = f"{{{next(iter(self._columns))}}}" if self._columns else f"{{{ITEM}}}"
            yield f"The template has no reference to the rows, such as {what}: all prompts are equal."

    def _columns_in(self, reference: Reference) -> Iterator[str]:
        """Yield the columns that a reference uses, and the name of the row if it does."""
        names = reference.expression.names
        yield from (name for name in names if name in self._columns or name == self._item)
        yield from _columns_of_item(reference, self._columns, self._item)

    def _is_missing(self, reference: Reference, values: Mapping[str, Any]) -> bool:
        """Return whether a value that a reference uses is missing."""
        members = _members_of_item(reference, self._columns)
        return any(is_missing(values.get(name)) for name in self._columns_in(reference)) or any(
            is_missing(member.value_of(values)) for member in members
        )

    def _is_no_value(self, reference: Reference, text: str, values: Mapping[str, Any]) -> bool:
        """Return whether the text of a reference to the row is that of a missing value."""
        if _NO_VALUE.fullmatch(text) is None or self._names.keys() >= set(
            reference.expression.names
        ):
            return False
        value = reference.value_of(values)
        return not isinstance(value, str) and is_missing(value)

    def _part(self, part: str) -> str | Reference:
        """Return a part with ``item.name`` read as ``item["name"]`` where that is a column."""
        if not isinstance(part, Reference) or not self._columns:
            return part
        part = Reference(self._written.get(part, part), part.expression)
        found = part.expression
        tree = _ColumnsOfItem(self._columns).visit(copy.deepcopy(found.tree))
        expression = dataclasses.replace(found, tree=tree, nodes=tuple(ast.walk(tree)))
        return Reference(str(part), expression)

    def _values(self, row: Row) -> dict[str, Any]:
        item = dict(row.item) if row.item is row.columns else row.item
        return {INDEX: row.index, ITEM: item, **row.columns, self._item: item}

    def __call__(self, row: Row) -> str | None:
        """Return the prompt of a row, None if a value that it needs is missing."""
        values = {**self._names, **self._values(row)}
        if any(is_missing(values.get(name)) for name in self._required) or any(
            is_missing(member.value_of(values)) for member in self._members
        ):
            return None
        texts = []
        for part in self._parts:
            text = _text(part, values) if isinstance(part, Reference) else part
            if isinstance(part, Reference) and self._is_no_value(part, text, values):
                return None
            texts.append(text)
        text = "".join(texts)
        if len(text) > MAX_PROMPT:
            raise PromptError(f"The prompt has more than {MAX_PROMPT:,} characters.")
        return text

    def texts(self, row: Row) -> tuple[str, ...]:
        """Return the texts of the `shown` references for a row; "" for a missing one and one that fails."""
        values = {**self._names, **self._values(row)}
        texts = []
        for reference in self.shown:
            text = ""
            # The error of the row is its outcome.
            with contextlib.suppress(PromptError):
                if not self._is_missing(reference, values):
                    text = _text(reference, values)
                if self._is_no_value(reference, text, values):
                    text = ""
            texts.append(text)
        return tuple(texts)


def _readable(
    template: str, columns: Collection[str], row: Row | None, item: str
) -> tuple[str, Mapping[str, str]]:
    """Return a template with ``{item['my column']}`` in place of ``{my column}``, not a Python name.

    The second value has what was replaced, by what replaces it.
    """
    names = [n for n in columns if (not n.isidentifier() or iskeyword(n)) and not _ODD.search(n)]
    if not names or row is None:
        return template, {}
    # A Series has one column, whose values are the rows.
    is_record = isinstance(row.item, Mapping)
    codes = {name: f"{item}[{name!r}]" if is_record else item for name in names}
    any_name = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    found = re.compile(rf"(?<!\{{)\{{({any_name}){_FORMAT}\}}(?!\}})")
    written: dict[str, str] = {}

    def replaced(match: re.Match[str]) -> str:
        name, form = match[1], match[2]
        if is_entry(form.partition(":")[2]):
            return match[0]
        written[f"{codes[name]}{form}"] = f"{name}{form}"
        return f"{{{codes[name]}{form}}}"

    template = found.sub(replaced, template)
    return template, written if is_record else {}


def _unused(name: str, template: str) -> str:
    """Return a name that begins with `name` and that a template does not contain."""
    while name in template:
        name += "_"
    return name


def _number_note(name: int) -> str:
    """Return why ``{0}`` is not the column 0."""
    return (
        f"{{{name}}} was not replaced: a number in braces is not a name. Write {{{ITEM}[{name}]}} for the"
        f' column {name}, or rename the columns first, such as df = df.add_prefix("column_").'
    )


def _text(reference: Reference, values: Mapping[str, Any]) -> str:
    """Return the text of a reference; quickly for a name whose value is a text or a number."""
    expression = reference.expression
    tree = expression.tree
    if type(tree) is ast.Name and not expression.spec and not expression.conversion:
        value: Any = values.get(tree.id)
        if type(value) is str:
            return value
        if type(value) in _PLAIN:
            return str(value)
        if tree.id == ITEM and family(value) == "array" and _is_short(value):
            return str(value.tolist())
    return reference.text_of(values)


def _is_short(row: Any) -> bool:
    """Return whether a row of an array is a few numbers or texts."""
    return row.ndim == 1 and row.size <= _LONGEST_ROW and row.dtype.kind in "biufcU"


def _columns_of_item(reference: Reference, columns: Collection[str], item: str) -> Iterator[str]:
    """Yield the columns that are read as ``item["name"]``; `item` is the name of the row."""
    for node in reference.expression.nodes:
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(column))):
                if name == item and column in columns:
                    yield column


def _column_of_table(reference: Reference) -> tuple[str, str]:
    """Return the names of a variable and of its attribute or element, empty if it is something else."""
    match reference.expression.tree:
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(column))):
            return name, column
        case ast.Attribute(value=ast.Name(id=name), attr=column):
            return name, column
    return "", ""


def _members_of_item(reference: Reference, columns: Collection[str]) -> Iterator[Reference]:
    """Yield ``item.name`` and ``item[0]`` in a reference, but not columns and calls of methods."""
    expression = reference.expression
    called = {node.func for node in expression.nodes if isinstance(node, ast.Call)}
    for node in expression.nodes:
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=key)):
                is_member = name == ITEM and key not in columns
            case ast.Attribute(value=ast.Name(id=name)):
                is_member = name == ITEM and node not in called
            case _:
                is_member = False
        if is_member and ITEM not in columns and isinstance(node, ast.expr):
            nodes = tuple(ast.walk(node))
            made = dataclasses.replace(expression, tree=node, nodes=nodes, conversion="", spec="")
            yield Reference(str(reference), made)


class _ColumnsOfItem(ast.NodeTransformer):
    """Reads ``item.name`` as ``item["name"]`` for the names of columns."""

    def __init__(self, columns: Collection[str]) -> None:
        self._columns = columns

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Return the subscript for an attribute of the row."""
        self.generic_visit(node)
        is_item = isinstance(node.value, ast.Name) and node.value.id == ITEM
        if not is_item or node.attr not in self._columns:
            return node
        return ast.Subscript(node.value, ast.Constant(node.attr), ast.Load())


def _check_notes(
    compiled: Compiled, known: Collection[str], columns: Collection[str], others: Sequence[object]
) -> None:
    """Raise an error for what looks like a reference and is none: it would be sent for each row."""
    if not compiled.notes:
        return
    names = f"The names of a row are {', '.join(known)}."
    if not columns and set(known) == {ITEM, INDEX}:
        names = f"The rows have no columns: write {{{ITEM}}} for the value of a row."
    if levels := next((name for name in others if isinstance(name, tuple)), None):
        names = (
            f"The columns have several levels: write {{{ITEM}[{levels!r}]}}, or join them first:"
            ' df.columns = ["_".join(map(str, names)) for names in df.columns].'
        )
    elif others:
        names += f" The column {others[0]} is {{{ITEM}[{others[0]!r}]}}."
    note = compiled.notes[0].rstrip(".")
    raise PromptError(
        f"{note}{'' if note.endswith('?') else '.'} {names} To send braces unchanged, double them."
    )
