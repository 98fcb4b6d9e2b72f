"""``%%llm --over DATA``: the data, the options that it has, and where ``-o`` stores the answers."""

from __future__ import annotations

import ast
import builtins
import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exc
from typing import TYPE_CHECKING, Any

from llm_magic.errors import LLMMagicException, OptionError, PromptError, did_you_mean
from llm_magic.notebook.arguments.magic_options import MAP_OPTIONS
from llm_magic.prompts.trusted_types import family
from llm_magic.text import counted, visible_line

if TYPE_CHECKING:
    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.session import Session
    from llm_magic.session.map.mapped import Mapped
    from llm_magic.session.map.options import MapOptions
    from llm_magic.session.map.prompts import MakePrompt
    from llm_magic.session.map.rows import Row
    from llm_magic.session.map.run import MapRun
    from llm_magic.session.requests import DryRun
    from llm_magic.types import Reply

# Rows that a dry run reads to find one without a missing value, and to count those with one.
_SEARCHED, _COUNTED = 100, 100_000
# Rows with a missing value that are named.
_NAMED = 5

# What has no meaning for the rows of --over, and why.
_REFUSED = {
    "chat": "-c continues a chat, but the rows of --over are independent of each other. Remove -c.",
    "trim": "--trim drops turns of a chat, and --over has no chat. Remove --trim.",
    "format": "-f shows one answer, and --over shows a table. Remove -f; reply.json() parses an answer.",
    "replace": "--replace requires -f code, which --over does not have.",
    "literal": "--literal would send the same prompt for each row. To send braces, double them: {{x}}.",
}
# Suffixes of files that --save does not write.
_TABLE_FILES = frozenset((".csv", ".tsv", ".xlsx", ".xls", ".parquet"))
_BRACES = re.compile(r"\{([\w.]+)\}|\$(\w+)")


def check(args: Parsed) -> None:
    """Raise `OptionError` for options that do not go together with ``--over``, or need it."""
    if args["over"] is None:
        given = (one for one in MAP_OPTIONS if args[one.dest] is not None)
        if (option := next(given, None)) is not None:
            raise OptionError(
                f"{option.names[-1]} needs --over DATA, which sends a prompt for each row."
            )
        return
    if not args.prompt.strip():
        raise OptionError("The prompt is empty. Write it after %llm, or below %%llm.")
    for name, advice in _REFUSED.items():
        if args[name]:
            raise OptionError(advice)
    if args["dry_run"] and args["bg"]:
        raise OptionError("--dry-run sends nothing, so --bg has no effect. Remove one of them.")
    if args["sample"] and args["bg"]:
        raise OptionError("--sample ends with its cell, so --bg has no effect. Remove one of them.")


def options(args: Parsed, names: Mapping[str, Any], types: Mapping[str, Any]) -> MapOptions:
    """Return the options of the map, which the session checks; `names` fill in the template, too.

    `types` are the options that name the type of the answers.
    """
    given: dict[str, Any] = {**args.options, **types, "model": args["model"], "names": names}
    for name in ("save", "retry_failed", "workers", "rate", "on_error", "sample"):
        value = args[name]
        if value is not None:
            is_number = name in {"workers", "sample"} and value.isdecimal()
            given[name] = int(value) if is_number else value
    if args["on"] is not None:
        given["on"] = _executor(args["on"], names)
    return given  # type: ignore[return-value]


def save_notes(args: Parsed) -> tuple[str, ...]:
    """Return a note if the name of the file to save to is that of a table."""
    file = Path(args["save"] or "")
    if file.suffix.lower() not in _TABLE_FILES:
        return ()
    jsonl = visible_line(str(file.with_suffix(".jsonl")))
    return (
        f"--save {visible_line(str(file))} writes JSON lines, not a table. Write --save {jsonl}; for a table,"
        " use -o NAME and NAME.to_csv(…).",
    )


def _executor(name: str, names: Mapping[str, Any]) -> Any:
    if name not in names:
        raise OptionError(f"--on {name}: {name} is not defined.{did_you_mean(name, names)}")
    return names[name]


def data_of(code: str, names: Mapping[str, Any], *, may_be_empty: bool = False) -> Any:
    """Return the value of DATA, a Python expression; raises `OptionError` if it has none, or no rows."""
    if (braced := _BRACES.fullmatch(code)) is not None:
        code = braced[1] or braced[2]
    try:
        data = eval(code, {"__builtins__": builtins, **names})
    except LLMMagicException:
        raise
    except SyntaxError:
        raise OptionError(
            f"--over {code} is not a Python expression.{_file_advice(code)}"
        ) from None
    except Exception as error:  # noqa: BLE001 - the code of the user raises anything
        name = error.name if isinstance(error, NameError) else None
        advice = did_you_mean(name, names) if name is not None else ""
        text = f"{name} is not defined" if name is not None else _error_text(error)
        advice = _file_advice(code) or advice or _column_advice(code, names)
        raise OptionError(f"--over {code}: {text}.{advice}", details=format_exc()) from None
    if isinstance(data, Sized) and not len(data) and not may_be_empty:
        raise OptionError(f"--over {code}: there are no rows.")
    return data


def _error_text(error: Exception) -> str:
    return visible_line(f"{type(error).__name__}: {error}").rstrip(".")


def _column_advice(code: str, names: Mapping[str, Any]) -> str:
    """Return how to read a column that has the name of a method, such as ``df.pop``, or an empty string."""
    for node in ast.walk(ast.parse(code.strip(), mode="eval")):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=column):
                table: Any = names.get(name)
                if family(table) == "frame" and column in table and hasattr(type(table), column):
                    return f' {name}.{column} is a method; the column is {name}["{column}"].'
    return ""


def _file_advice(code: str) -> str:
    """Return how to read a file that was named instead of its data, or an empty string."""
    if not Path(code).is_file():
        return ""
    return f" It is a file. Read it first, such as with pandas: data = pd.read_csv({code!r})."


def check_sample(data: object) -> None:
    """Raise `OptionError` if a sample would use up the rows of the data."""
    if isinstance(data, Iterator):
        raise OptionError(
            "--sample would use up the first rows of this iterator. Put all of them into a list first:"
            " rows = list(rows)."
        )


@dataclass(frozen=True, slots=True)
class Output:
    """Where ``-o`` stores the answers: in a variable, or in a column of the table in a variable."""

    name: str
    column: str | None = None

    def __str__(self) -> str:
        return self.name if self.column is None else f'{self.name}["{self.column}"]'

    def check(self, data: object, names: Mapping[str, Any], *, is_ours: bool) -> None:
        """Raise `OptionError` if the answers are no column of the table, or would replace one of the user.

        A column that earlier answers have set is ours.
        """
        table: Any = names.get(self.name)
        if family(table) not in {"frame", "pl_frame"}:
            found = "not defined" if table is None else f"a {type(table).__name__}, not a DataFrame"
            near = did_you_mean(self.name, names) if table is None else ""
            raise OptionError(f"-o {self}: {self.name} is {found}.{near}")
        if self.column in table.columns and not is_ours:
            raise OptionError(
                f"-o {self} would replace the column {self.column} of {self.name}. Choose another name."
            )
        if reason := _mismatch(self.name, data, table):
            raise OptionError(f"-o {self}: {reason} To store a new table, write -o NAME.")

    def store(self, data: object, mapped: Mapped, variables: MutableMapping[str, Any]) -> str:
        """Store the answers, and return what is stored."""
        if self.column is not None:
            return self._set_column(data, mapped, variables)
        if mapped.is_table:
            variables[self.name] = mapped.frame()
            fields = mapped.answer_type.fields if mapped.answer_type is not None else ()
            added = (
                f"a column for each field: {', '.join(mapped.answer_columns())}"
                if fields
                else f"the column {mapped.answer_column}"
            )
            if not fields and mapped.answer_column != "answer":
                added += ", because the data has a column answer"
            return f"{self.name}: a new table of {_rows(mapped)}, with {added}"
        if isinstance(data, Mapping):
            labelled = mapped.to_dict()
            variables[self.name] = {
                label: _of_reply(one, mapped) for label, one in labelled.items()
            }
            return f"{self.name}: a dict of {mapped.amount}"
        variables[self.name] = [_of_reply(one, mapped) for one in mapped]
        return f"{self.name}: a list of {mapped.amount}"

    def _set_column(self, data: object, mapped: Mapped, variables: MutableMapping[str, Any]) -> str:
        outcomes = (mapped.outcome(i) for i in range(len(mapped)))
        texts = [None if one is None else mapped.plain(one) for one in outcomes]
        table = variables[self.name]
        assert self.column is not None
        if family(table) == "pl_frame":
            from llm_magic.session.map.rows import polars_column

            variables[self.name] = table.with_columns(polars_column(self.column, texts))
        elif _is_part(data, table):
            if self.column in table:
                table[self.column] = table[self.column].astype(object)
            import pandas as pd

            # As a column: the items of a list of lists would be those of several columns.
            index = data.index  # type: ignore[attr-defined]
            table.loc[index, self.column] = pd.Series(texts, index=index)
        else:
            table[self.column] = texts
        return f"{self.name}: the column {self.column}, in {_rows(mapped)}"


def _rows(mapped: Mapped) -> str:
    """Return the number of rows, and that of the answers if it is another one, in words."""
    rows, _, answers = mapped.amount.partition(", ")
    return f"{rows} ({answers})" if answers else counted(len(mapped), "row")


def _of_reply(reply: Reply | None, mapped: Mapped) -> object:
    """Return what is stored of an answer: its value if it is typed, else the reply."""
    return reply if reply is None or mapped.answer_type is None else reply.value


def check_column(output: Output | None, run: MapRun) -> None:
    """Raise `OptionError` if each value has several fields, and the answers are to be one column."""
    answer_type = run.mapped.answer_type
    if output is None or output.column is None or answer_type is None or not answer_type.fields:
        return
    raise OptionError(
        f"-o {output}: {answer_type.name} has the fields {', '.join(answer_type.fields[:5])}, and this is one"
        " column. Write -o NAME for a new table with a column for each field."
    )


def output_of(text: str) -> Output:
    """Return what the text after ``-o`` names: ``out``, or ``df["label"]``, or ``df.label``."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return Output(text)
    match tree:
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(column))):
            return Output(name, column)
        case ast.Attribute(value=ast.Name(id=name), attr=column):
            return Output(name, column)
    return Output(text)


def check_not_source(code: str, name: str) -> None:
    """Raise `OptionError` if ``-o`` names a variable of DATA: the same cell would send the answers."""
    tree = ast.parse(code.strip().lstrip("$"), mode="eval")
    if any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree)):
        raise OptionError(
            f"-o {name} would replace the data of --over {code}. Choose another name for the answers."
        )


def _is_part(data: Any, table: Any) -> bool:
    """Return whether data has the labels of some rows of a pandas table, each of them once."""
    if family(table) != "frame" or family(data) not in {"frame", "series"}:
        return False
    return bool(
        table.index.is_unique and data.index.is_unique and data.index.isin(table.index).all()
    )


def _mismatch(name: str, data: Any, table: Any) -> str:
    """Return why the rows of data cannot be matched to those of a table; an empty string if they can.

    They are matched by a unique index. Without one, data must be the rows of the table in their order.
    """
    if data is table or _has_rows_of(data, table):
        return ""
    if _is_part(data, table):
        moved = (
            f"the rows of the data have the values of other rows of {name}. Do not reset its index."
        )
        return moved if _is_renumbered(data, table) else ""
    if family(table) == "frame" and family(data) in {"frame", "series"}:
        if not table.index.is_unique:
            return (
                f"the index of {name} has duplicates, so the rows of the data cannot be matched. Run"
                f" {name} = {name}.reset_index(drop=True), and make the data from it."
            )
        if not data.index.is_unique:
            return "the index of the data has duplicates, so its rows cannot be matched."
        label = data.index[~data.index.isin(table.index)][0]
        return f"the data has a row {visible_line(str(label))}, which {name} does not have."
    rows = len(data) if isinstance(data, Sized) else None
    if rows != len(table):
        count = counted(rows, "row") if rows is not None else "an unknown number of rows"
        return f"{name} has {counted(len(table), 'row')}, and the data has {count}."
    return f"the data is not the rows of {name} in their order, and has no index to match them."


def _has_rows_of(data: Any, table: Any) -> bool:
    """Return whether data and a table have equal rows, in the columns of both, in the same order."""
    from llm_magic.session.map.rows import rows_of

    has_labels = family(table) == "frame" and family(data) in {"frame", "series"}
    if has_labels and not data.index.equals(table.index):
        return False
    if not isinstance(data, Sized) or len(data) != len(table):
        return False
    rows, its = rows_of(data), rows_of(table)
    columns = [name for name in its.columns if name in rows.columns]
    pairs = zip(rows, its, strict=True)
    if columns or rows.columns:
        return bool(columns) and all(
            _is_same(row.columns.get(name), other.columns[name])
            for row, other in pairs
            for name in columns
        )
    # The rows are values, such as those of a list: one of the columns has them.
    columns = list(its.columns)
    for row, other in pairs:
        columns = [name for name in columns if _is_same(row.item, other.columns[name])]
    return bool(columns)


def _is_renumbered(data: Any, table: Any) -> bool:
    """Return whether all columns that part of a pandas table shares with it have values of other rows."""
    part = data if family(data) == "frame" else data.to_frame()
    whole = table.loc[data.index]
    names = [name for name in part.columns if name in table.columns]
    # Lists in a column cannot be searched.
    with contextlib.suppress(TypeError):
        return bool(names) and all(
            not all(map(_is_same, part[name].tolist(), whole[name].tolist()))
            and part[name].isin(table[name]).all()
            for name in names
        )
    return False


def _is_same(value: Any, other: Any) -> bool:
    from llm_magic.session.map.prompts import is_missing

    # Arrays and missing values have no truth.
    with contextlib.suppress(TypeError, ValueError):
        return value is other or bool(value == other) or (is_missing(value) and is_missing(other))
    return False


def dry_run(
    session: Session, template: str, data: object, about: MapOptions
) -> tuple[DryRun, tuple[str, ...]]:
    """Return what would be sent for the first row that has all its values, and notes."""
    from llm_magic.session.map.options import split_options
    from llm_magic.session.map.prompts import FirstRows, prompt_maker
    from llm_magic.session.map.rows import rows_of
    from llm_magic.session.requests import request

    settings, call = split_options(about)
    rows = rows_of(data)
    first = FirstRows(rows)
    make, notes = prompt_maker(template, rows, first, settings.names)
    read = first.all()
    missing: list[Row] = []
    for row in itertools.islice(read, _SEARCHED):
        if (prompt := make(row)) is not None:
            break
        missing.append(row)
    else:
        raise OptionError("The first rows are not sent: a value of each of them is missing.")
    where = f"These are the messages of row {visible_line(str(row.index))}."
    if rows.total is not None:
        where += f" The data has {counted(rows.total, 'row')}."
        # An iterator is not used up.
        missing += _missing(make, itertools.islice(read, _COUNTED))
    notes = (*notes, where, *_missing_note(missing, rows.total or 0))
    return session.dry_run(request(prompt, call)), notes


def _missing(make: MakePrompt, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows in which a value that the template uses is missing."""
    for row in rows:
        # A row that fails is sent, and its error is shown then.
        with contextlib.suppress(PromptError):
            if make(row) is None:
                yield row


def _missing_note(missing: Sequence[Row], total: int) -> Iterator[str]:
    """Yield how many rows will not be sent, because a value is missing."""
    if not missing:
        return
    of = f" of the first {_COUNTED:,}" if total > _COUNTED else ""
    named = ", ".join(visible_line(str(row.index)) for row in missing[:_NAMED])
    more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
    yield (
        f"{counted(len(missing), 'row')}{of} will not be sent, because a value is missing:"
        f" row{'s' * (len(missing) > 1)} {named}{more}. The answer is None there."
    )


def advice(run: MapRun, args: Parsed) -> Iterator[str]:
    """Yield how to send failed rows again."""
    if run.is_sample or not run.progress.failed:
        return
    if args["save"] is not None:
        yield "To send the failed rows again, add --retry-failed and run the cell again."
    else:
        yield "With --save FILE, --retry-failed sends only the failed rows again."


def stored(
    run: MapRun, data: object, output: Output | None, variables: MutableMapping[str, Any], last: str
) -> Iterator[str]:
    """Store the answers, and yield where they are; `last` has them without ``-o``, if it is a name."""
    answers = run.mapped.amount
    if output is None:
        if last:
            yield f"{last}: {answers}; -o NAME stores them in a variable"
    elif run.is_sample and output.column is not None:
        yield f"{output} is unchanged: a sample sets no column."
        yield f"{last}: {answers}"
    else:
        yield output.store(data, run.mapped, variables)
