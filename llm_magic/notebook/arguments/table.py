"""The magics as a table: what each is for, what it takes; help and completion are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionKind, OptionSpec

OptionSet = Literal["", "loading", "generation"]


@dataclass(frozen=True, slots=True)
class Argument:
    """One option or positional of a magic; `complete` names what its values are chosen from."""

    names: tuple[str, ...]
    help: str
    metavar: str = ""
    kind: OptionKind = "value"
    choices: tuple[str, ...] = ()
    complete: str = ""
    dest: str = ""


@dataclass(frozen=True, slots=True)
class Magic:
    """What a magic is for and takes.

    `takes_prompt` says that what follows the options is a prompt; `example` may hold several, with a
    blank line between them.
    """

    name: str
    summary: str
    usage: str
    arguments: tuple[Argument, ...] = ()
    options: OptionSet = ""
    positional: Argument | None = None
    example: str = ""
    takes_prompt: bool = False


FORMATS = ("markdown", "text", "code", "json")

_MODEL = Argument(
    ("-m", "--model"), "Which loaded model; else the active one.", "NAME", complete="loaded"
)
_OUTPUT = Argument(("-o", "--output"), "Put the Reply in a variable.", "VAR", complete="variables")
_DRY_RUN = Argument(
    ("--dry-run",), "Show the exact messages and their tokens; call nothing.", kind="switch"
)
_SHOWN = (
    Argument(("--plain",), "Stream to stdout as plain text.", kind="switch"),
    Argument(("--quiet",), "Show no footer.", kind="switch"),
)
_ANSWER = (
    _MODEL,
    Argument(("-s", "--system"), "System prompt; {var} is filled in.", "TEXT"),
    Argument(
        ("-c", "--chat"),
        "Continue this conversation. Running the cell again replaces its turn, and what followed is"
        " stale: not sent until its own cell runs again.",
        "NAME",
        complete="chats",
    ),
    _OUTPUT,
    Argument(
        ("--trim",),
        "Where the chat does not fit the context, leave out its oldest turns for this call; a quarter of"
        " the context, or --max-new-tokens if that is less, is kept for the answer.",
        kind="switch",
    ),
    Argument(
        ("-f", "--format"),
        "How to show it, markdown by itself; code also puts the first fenced block into the next cell,"
        " and never runs it.",
        "FORMAT",
        choices=FORMATS,
    ),
    Argument(("--replace",), "With -f code: put it in the place of this cell.", kind="switch"),
    Argument(
        ("--bg",),
        "Return at once and stream into this cell while other cells run; -o stores the Job. Running the"
        " cell again stops its earlier job, where the frontend sends cell ids.",
        kind="switch",
    ),
    Argument(("--literal",), "Send braces as they are; fill in no variables.", kind="switch"),
    _DRY_RUN,
    *_SHOWN,
)  # fmt: skip
_EXPLANATION = (
    _MODEL,
    Argument(("-c", "--chat"), "Ask on about it with %%llm -c NAME.", "NAME", complete="chats"),
    _OUTPUT,
    Argument(
        ("-f", "--format"),
        "How to show it; code asks for the mended cell and puts it into the next one.",
        "FORMAT",
        choices=FORMATS,
    ),
    _DRY_RUN,
    *_SHOWN,
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
                Argument(("--bg",), "Return at once; the next %%llm waits for the model.", kind="switch"),
            ),
            "loading",
            Argument(
                ("model",),
                "Hugging Face id, folder or .gguf file, or the name that a server (-b) knows."
                " Without it: the configured default, else the embedded SmolLM2-135M-Instruct.",
                "MODEL",
                complete="models",
            ),
            "%llm_load\n\n"
            "%llm_load Qwen/Qwen2.5-7B-Instruct -q 4bit\n\n"
            "%llm_load llama3.2 -b ollama\n\n"
            "%llm_load some/model -b openai --base-url https://host/v1 --key-env MY_KEY",
        ),
        Magic(
            "llm",
            "Ask the active model, and stream its answer into the cell.",
            "%%llm [options] above the prompt, or %llm [options] PROMPT",
            _ANSWER,
            "generation",
            example="%%llm -t 0 -o reply\nWhat does {df.head()} show?\n\n"
            "%llm -c colours Name a colour that is not {reply}.",
            takes_prompt=True,
        ),
        Magic(
            "llm_explain",
            "Explain the last exception: its cause and a fix. Secrets are left out of what is sent.",
            "%llm_explain [options]",
            _EXPLANATION,
            "generation",
            example="%llm_explain -f code",
        ),
        Magic(
            "llm_config",
            "Show the generation settings, or change them for the following cells.",
            "%llm_config [name=value ...] [--reset]",
            (Argument(("--reset",), "Go back to the settings of the environment.", kind="switch"),),
            positional=Argument(
                ("changes",),
                "Settings; name=none leaves one to the model.",
                "name=value",
                "repeated",
                complete="settings",
            ),
            example="%llm_config temperature=0.2 top_k=40\n\n%llm_config seed=none",
        ),
        Magic("llm_status", "Show what is loaded, where, and the memory it takes.", "%llm_status"),
        Magic(
            "llm_models",
            "List the models: loaded, embedded, in the local folder, in the hub's cache, on a server.",
            "%llm_models [-b BACKEND] [--base-url URL] [--key-env NAME]",
            (
                Argument(
                    ("-b", "--backend"),
                    "List what this backend has; else the default one.",
                    "BACKEND",
                    complete="backends",
                ),
                Argument(
                    ("--base-url",),
                    "Ask the server at this address; else the one in use, or that of the settings.",
                    "URL",
                    complete="choices:base_url",
                ),
                Argument(
                    ("--key-env",),
                    "Environment variable that holds its key.",
                    "NAME",
                    complete="choices:key_env",
                ),
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
        Magic(
            "llm_doctor",
            "Say what is installed, which devices, caches and servers there are, and how to mend them.",
            "%llm_doctor",
        ),
        Magic("llm_jobs", "List what runs in the background, and what ended last.", "%llm_jobs"),
        Magic(
            "llm_stop",
            "Stop what runs in the background; what was answered stays.",
            "%llm_stop [ID]",
            positional=Argument(("job",), "Number of the job; all if left away.", "ID", complete="jobs"),
        ),
        Magic(
            "llm_wait",
            "Wait for what runs in the background, and show how it ended; ■ only ends the waiting.",
            "%llm_wait [ID]",
            positional=Argument(("job",), "Number of the job; all if left away.", "ID", complete="jobs"),
        ),
        Magic(
            "llm_chats",
            "List the conversations of %%llm --chat, show one, or move them to and from files.",
            "%llm_chats [CHAT] [--export FILE | --import FILE] [--force]",
            (
                Argument(("--export",), "Write CHAT as JSON messages, or all by name.", "FILE"),
                Argument(("--import",), "Read JSON messages as CHAT, or chats by name.", "FILE"),
                Argument(("--force",), "Replace the file, or the chats.", kind="switch"),
            ),
            positional=Argument(("chat",), "Its name; all if left away.", "CHAT", complete="chats"),
        ),
        Magic(
            "llm_reset",
            "Forget a conversation, or all of them.",
            "%llm_reset [CHAT] [--stale]",
            (Argument(("--stale",), "Forget only the stale turns.", kind="switch"),),
            positional=Argument(("chat",), "Its name; all if left away.", "CHAT", complete="chats"),
        ),
    )
}  # fmt: skip


def arguments(name: str) -> tuple[Argument, ...]:
    """Return the options of a magic, with those of its option set."""
    magic = MAGICS[name]
    return magic.arguments + option_arguments(magic.options)


def option_arguments(options: OptionSet) -> tuple[Argument, ...]:
    """Return the arguments that an option set makes."""
    if not options:
        return ()
    return tuple(_from_spec(spec) for spec in option_specs(options).values() if spec.flag)


def option_specs(options: OptionSet) -> Mapping[str, OptionSpec]:
    """Return the options of an option set by name, each with the backends that have it."""
    from llm_magic.backends import registry

    if not options:
        return {}
    return registry.load_specs() if options == "loading" else registry.generation_specs()


# What the values of an option are chosen from, where they are no fixed choices.
_COMPLETED = {"backend": "backends", "assistant": "models"}


def _from_spec(spec: OptionSpec) -> Argument:
    assert spec.flag is not None
    # Values are checked by the option set itself, so that a flag, a keyword argument and a
    # setting say the same about the same mistake.
    complete = _COMPLETED.get(spec.name, f"choices:{spec.name}")
    return Argument(
        spec.flag.names, spec.help, spec.flag.metavar, spec.kind, complete=complete, dest=spec.name
    )


def dest(argument: Argument) -> str:
    """Return the name under which a parsed value is found."""
    return argument.dest or argument.names[-1].lstrip("-").replace("-", "_")
