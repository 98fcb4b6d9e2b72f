"""The magics as a table: what each is for, what it takes; help and completion are made from it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llm_magic.specs import OptionSpec

Kind = Literal["value", "switch", "repeated", "pairs"]
OptionSet = Literal["", "loading", "generation"]


@dataclass(frozen=True, slots=True)
class Argument:
    """One option or positional of a magic; `complete` names what its values are chosen from."""

    names: tuple[str, ...]
    help: str
    metavar: str = ""
    kind: Kind = "value"
    choices: tuple[str, ...] = ()
    complete: str = ""
    dest: str = ""


@dataclass(frozen=True, slots=True)
class Magic:
    """What a magic is for and takes."""

    name: str
    summary: str
    usage: str
    arguments: tuple[Argument, ...] = ()
    options: OptionSet = ""
    positional: Argument | None = None
    example: str = ""


FORMATS = ("markdown", "text", "code", "json", "raw")

_ANSWER = (
    Argument(("-m", "--model"), "Which loaded model; else the active one.", "NAME", complete="loaded"),
    Argument(("-s", "--system"), "System prompt; {var} is filled in.", "TEXT"),
    Argument(
        ("-c", "--chat"),
        "Continue this conversation; running the cell again replaces its turn.",
        "NAME",
        complete="chats",
    ),
    Argument(("-o", "--output"), "Put the Reply in a variable.", "VAR", complete="variables"),
    Argument(("-f", "--format"), "How to show it.", "FORMAT", choices=FORMATS),
    Argument(("--raw",), "Fill in no variables.", kind="switch"),
    Argument(("--dry-run",), "Show the exact messages and their tokens; call nothing.", kind="switch"),
    Argument(("--plain",), "Stream to stdout as plain text.", kind="switch"),
    Argument(("--quiet",), "Show no footer.", kind="switch"),
)  # fmt: skip

MAGICS: dict[str, Magic] = {
    magic.name: magic
    for magic in (
        Magic(
            "llm_load",
            "Load a model into this kernel and make it the active one.",
            "%llm_load [MODEL] [options]",
            (
                Argument(("--name",), "Call it that afterwards (%%llm -m NAME).", "ALIAS"),
                Argument(("--keep",), "Keep the models that are already loaded.", kind="switch"),
                Argument(("--no-wait",), "Return at once; the next %%llm waits for it.", kind="switch"),
            ),
            "loading",
            Argument(
                ("model",),
                "Hugging Face id, folder or .gguf file, or the name that a server (-b) knows; left"
                " away: the configured default, else the embedded SmolLM2-135M-Instruct.",
                "MODEL",
                complete="models",
            ),
            "%llm_load Qwen/Qwen2.5-7B-Instruct -q 4bit",
        ),
        Magic(
            "llm",
            "Ask the active model, and stream its answer into the cell.",
            "%%llm [options] above the prompt, or %llm [options] PROMPT",
            _ANSWER,
            "generation",
            example="%%llm -t 0 -o reply\nWhat does {df.head()} show?",
        ),
        Magic(
            "llm_config",
            "Show the generation settings, or change them for the following cells.",
            "%llm_config [name=value ...] [--reset]",
            (Argument(("--reset",), "Go back to the settings of the environment.", kind="switch"),),
            positional=Argument(
                ("changes",),
                "Settings; none leaves one to the model.",
                "name=value",
                "repeated",
                complete="settings",
            ),
            example="%llm_config temperature=0.2 top_k=40",
        ),
        Magic("llm_status", "Show what is loaded, where, and the memory it takes.", "%llm_status"),
        Magic(
            "llm_models",
            "List the models: loaded, embedded, in the local folder, in the hub's cache, on a server.",
            "%llm_models [-b BACKEND]",
            (
                Argument(("-b", "--backend"), "List what this backend has.", "BACKEND", complete="backends"),
                Argument(("--base-url",), "Ask the server at this address.", "URL"),
                Argument(("--key-env",), "Environment variable with its key.", "NAME"),
            ),
        ),
        Magic(
            "llm_unload",
            "Free a model and show what came back.",
            "%llm_unload [NAME | --all]",
            (Argument(("--all",), "Free every model.", kind="switch"),),
            positional=Argument(("name",), "The model; else the active one.", "NAME", complete="loaded"),
        ),
        Magic(
            "llm_panel",
            "Show the control panel: all of this with a mouse; it says the magic of what was done.",
            "%llm_panel",
        ),
        Magic("llm_chats", "List the conversations of %%llm --chat.", "%llm_chats"),
        Magic(
            "llm_reset",
            "Forget a conversation, or all of them.",
            "%llm_reset [CHAT]",
            positional=Argument(("chat",), "Its name; all if left away.", "CHAT", complete="chats"),
        ),
    )
}  # fmt: skip


def arguments(name: str) -> tuple[Argument, ...]:
    """Return the options of a magic, with those of its option set."""
    magic = MAGICS[name]
    return magic.arguments + option_arguments(magic.options)


@functools.cache
def option_arguments(options: OptionSet) -> tuple[Argument, ...]:
    """Return the arguments that an option set makes."""
    from llm_magic.config import GenerationConfig, LoadConfig
    from llm_magic.specs import specs

    if not options:
        return ()
    source = LoadConfig if options == "loading" else GenerationConfig
    return tuple(_from_spec(spec) for spec in specs(source).values() if spec.flag is not None)


def _from_spec(spec: OptionSpec) -> Argument:
    assert spec.flag is not None
    # Values are checked by the option set itself, so that a flag, a keyword argument and a
    # setting say the same about the same mistake.
    kind: Kind = "value"
    if isinstance(spec.default, bool):
        kind = "switch"
    elif isinstance(spec.default, tuple):
        kind = "repeated"
    elif isinstance(spec.default, dict):
        kind = "pairs"
    complete = "backends" if spec.name == "backend" else f"choices:{spec.name}"
    return Argument(
        spec.flag.names, spec.help, spec.flag.metavar, kind, complete=complete, dest=spec.name
    )


def help_text(name: str) -> str:
    """Return what ``%NAME?`` shows."""
    magic = MAGICS[name]
    lines = [magic.summary, "", f"    {magic.usage}", ""]
    listed = [*((magic.positional,) if magic.positional else ()), *arguments(name)]
    if listed:
        labels = [_label(argument) for argument in listed]
        width = max(map(len, labels))
        lines += [
            f"  {label:<{width}}  {text}"
            for label, text in zip(labels, _helps(listed, name), strict=True)
        ]
    if magic.example:
        lines += ["", "Example:", "", *(f"    {row}" for row in magic.example.splitlines())]
    return "\n".join(lines) + "\n"


def _label(argument: Argument) -> str:
    if argument.names[0].startswith("-"):
        return f"{', '.join(argument.names)} {argument.metavar}".strip()
    return argument.metavar


def _helps(listed: Sequence[Argument], name: str) -> Iterator[str]:
    from llm_magic.config import GenerationConfig, LoadConfig
    from llm_magic.specs import specs

    known = {"": {}, "loading": specs(LoadConfig), "generation": specs(GenerationConfig)}
    for argument in listed:
        spec = known[MAGICS[name].options].get(dest(argument))
        choices = f" ({', '.join(argument.choices)})" if argument.choices else ""
        limits = f" [{spec.range}]" if spec and spec.range and not spec.choices else ""
        yield argument.help + choices + limits


def dest(argument: Argument) -> str:
    """Return the name under which a parsed value is found."""
    return argument.dest or argument.names[-1].lstrip("-").replace("-", "_")
