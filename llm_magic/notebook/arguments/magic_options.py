"""The table of magics and their arguments, from which parsers, help and completion are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llm_magic.config.option_spec import OptionKind, OptionSpec

OptionSet = Literal["", "loading", "generation", "session"]


@dataclass(frozen=True, slots=True)
class Argument:
    """An option or a positional argument of a magic; `complete` names the source of its values."""

    names: tuple[str, ...]
    help: str
    metavar: str = ""
    kind: OptionKind = "value"
    choices: tuple[str, ...] = ()
    complete: str = ""
    option: str = ""  # its name in an option set
    is_code: bool = False  # a Python expression: brackets group it, and its quotes are kept

    @property
    def dest(self) -> str:
        """The name of its parsed value."""
        return self.option or self.names[-1].lstrip("-").replace("-", "_")


@dataclass(frozen=True, slots=True)
class Magic:
    """A magic: its purpose, arguments and examples.

    `takes_prompt`: a prompt follows the options. `example` may hold several examples, separated by
    blank lines.
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

HELP = Argument(("-h", "--help"), "Show this help.", kind="switch")
_MODEL = Argument(
    ("-m", "--model"), "Loaded model to use. Default: the active one.", "NAME", complete="loaded"
)
_OUTPUT = Argument(
    ("-o", "--output"),
    "Store the reply (a str subclass) in this variable; with -f json, --schema and --choice, the value.",
    "VAR",
    complete="variables",
    is_code=True,
)
# The options of %%llm that need --over; the session checks their values.
MAP_OPTIONS = (
    Argument(
        ("--sample",),
        "With --over: send only so many rows, spread over the data, and estimate tokens and time of all.",
        "N",
    ),
    Argument(
        ("--save",),
        "With --over: the file (JSONL) of the finished rows. The same cell goes on from it, also after a"
        " restart.",
        "FILE",
        complete="files",
    ),
    Argument(
        ("--retry-failed",),
        "With --save: send the rows again that failed before.",
        kind="switch",
    ),
    Argument(
        ("--workers",), "With --over: the number of requests at once. Default: it adapts.", "N"
    ),
    Argument(("--rate",), "With --over: the most requests, such as 500/min or 5/s.", "RATE"),
    Argument(
        ("--on",),
        "With --over: the executor or the Dask client whose worker processes answer, each with the model.",
        "NAME",
        complete="variables",
        is_code=True,
    ),
    Argument(
        ("--on-error",),
        "With --over: keep the error of a row in its place (the default), or stop at the first one.",
        "WHEN",
        choices=("keep", "stop"),
    ),
)
# The options that name the type of the answer.
TYPE_OPTIONS = (
    Argument(
        ("--schema",),
        "Answer with a value of this type: a pydantic model, dataclass, TypedDict, Enum, list[Person], a JSON"
        " schema or a file with one, or fields such as 'name, age int, tags list'. -o stores the value.",
        "TYPE",
        complete="types",
        is_code=True,
    ),
    Argument(
        ("--choice",),
        "Answer with one of these labels: red,green,blue, or a list or an Enum. -o stores the label.",
        "LABELS",
        complete="variables",
        is_code=True,
    ),
    Argument(("--regex",), "Answer with a text that matches this regular expression.", "REGEX"),
    Argument(
        ("--grammar",),
        "Answer with a text that fits the grammar in this file or variable, in the notation of Lark; servers"
        " have their own (GBNF).",
        "FILE",
        complete="files",
    ),
    Argument(
        ("--schema-by",),
        "How to get a value: backend (the default) holds the model to the type while it generates; prompt"
        " only describes it, and gives the model a second try if the answer is invalid.",
        "HOW",
        choices=("backend", "prompt"),
    ),
)
_DRY_RUN = Argument(
    ("--dry-run",), "Show the exact messages and their token count; send nothing.", kind="switch"
)
_SHOWN = (
    Argument(("--plain",), "Stream plain text to stdout.", kind="switch"),
    Argument(("--quiet",), "Hide the footer.", kind="switch"),
)
_ANSWER = (
    _MODEL,
    Argument(
        ("-s", "--system"),
        'System prompt. {references} are replaced. "" sends no system prompt. Default: the one set with'
        " %llm_config.",
        "TEXT",
    ),
    Argument(
        ("-c", "--chat"),
        "Continue this chat. Running the cell again replaces its turn; later turns become stale and are"
        " not sent until their own cells run again.",
        "NAME",
        complete="chats",
    ),
    _OUTPUT,
    Argument(
        ("--trim",),
        "Drop the oldest turns of the chat from this call if it exceeds the context. A quarter of the"
        " context, or --max-new-tokens if that is less, is reserved for the answer.",
        kind="switch",
    ),
    Argument(
        ("-f", "--format"),
        "How to show the answer. Default: markdown. code also puts the first fenced block into the next"
        " cell and never runs it. json fails the cell if the answer is not JSON.",
        "FORMAT",
        choices=FORMATS,
    ),
    *TYPE_OPTIONS,
    Argument(
        ("--replace",), "With -f code: put the code into this cell instead of the next one.", kind="switch"
    ),
    Argument(
        ("--bg",),
        "Return at once and stream into this cell while other cells run; -o stores the Response. Running the"
        " cell again stops its earlier job, where the frontend sends cell ids.",
        kind="switch",
    ),
    Argument(
        ("--over",),
        "Send the prompt for each row of this list, dict, iterator, Series, DataFrame or data set, with the"
        " row's {column}, {item} and {index}. -o stores a list, a dict or a new table; -o df[\"NAME\"] sets a"
        " column.",
        "DATA",
        complete="data",
        is_code=True,
    ),
    *MAP_OPTIONS,
    Argument(("--literal",), "Send braces as they are; replace no {references}.", kind="switch"),
    _DRY_RUN,
    *_SHOWN,
)  # fmt: skip
_EXPLANATION = (
    _MODEL,
    Argument(
        ("-c", "--chat"),
        "Store the explanation in this chat, for follow-up questions with %%llm -c NAME.",
        "NAME",
        complete="chats",
    ),
    _OUTPUT,
    Argument(
        ("-f", "--format"),
        "How to show the answer. code asks for the corrected cell and puts it into the next cell.",
        "FORMAT",
        choices=FORMATS,
    ),
    _DRY_RUN,
    *_SHOWN,
)  # fmt: skip

_JOBS = Argument(
    ("jobs",),
    "Number of a job, or its variable. Default, and with all: all jobs.",
    "JOB",
    "repeated",
    complete="jobs",
)
_CHAT = Argument(("chat",), "Name of the chat. Default: all chats.", "CHAT", complete="chats")

MAGICS: dict[str, Magic] = {
    magic.name: magic
    for magic in (
        Magic(
            "llm_load",
            "Load a model, or connect to one on a server, and make it the active one.",
            "%llm_load [MODEL] [options]",
            (
                Argument(("--name",), "Name for the loaded model, as in %%llm -m ALIAS.", "ALIAS"),
                Argument(("--keep",), "Keep the models that are already loaded.", kind="switch"),
                Argument(("--bg",), "Return at once; the next %%llm waits for the model.", kind="switch"),
            ),
            "loading",
            Argument(
                ("model",),
                "Hugging Face id, folder, .gguf file, or the name of a model on a server (-b)."
                " Default: the configured model, else the bundled SmolLM2-135M-Instruct.",
                "MODEL",
                complete="models",
            ),
            "%llm_load\n\n"
            "%llm_load Qwen/Qwen2.5-7B-Instruct -q 4bit\n\n"
            "%llm_load llama3.2 -b ollama\n\n"
            "%llm_load gpt-4o -b openai\n\n"
            "%llm_load some/model -b openai --base-url https://host/v1 --key-env MY_KEY",
        ),
        Magic(
            "llm_use",
            "Make a loaded model the active one, which answers prompts without -m.",
            "%llm_use [NAME]",
            positional=Argument(
                ("name",), "The model. Default: list the loaded models.", "NAME", complete="loaded"
            ),
        ),
        Magic(
            "llm",
            "Send a prompt to the active model and stream the answer into the cell.",
            "%%llm [options] above the prompt, or %llm [options] PROMPT",
            _ANSWER,
            "generation",
            example="%%llm -t 0 -o reply\nWhat does {df.head()} show?\n\n"
            "%%llm --over reviews -o labelled\nWhich product is this about? {text}\n\n"
            "%%llm --schema 'name, born int' -o person\nAda Lovelace was born in 1815.\n\n"
            "%llm -c colors Name a color that is not {reply}.",
            takes_prompt=True,
        ),
        Magic(
            "llm_explain",
            "Explain the last exception: its cause and a fix. Secrets are masked before anything is sent.",
            "%llm_explain [options] [QUESTION], or %%llm_explain with a question below",
            _EXPLANATION,
            "generation",
            example="%llm_explain -f code\n\n%llm_explain Why is the list empty?",
            takes_prompt=True,
        ),
        Magic(
            "llm_config",
            "Show the settings of this session, or change them for the following cells.",
            "%llm_config [NAME=VALUE ...] [--reset [NAME ...]]",
            (
                Argument(
                    ("--reset",),
                    "Restore the settings from the environment and .env: all of them, or only those named.",
                    kind="switch",
                ),
            ),
            "session",
            positional=Argument(
                ("changes",),
                "A setting to change. NAME VALUE, NAME = VALUE and the options of %%llm (-t 0.2) do the"
                " same. The value none leaves the setting to the model. NAME alone shows its value.",
                "NAME=VALUE",
                "repeated",
                complete="settings",
            ),
            example="%llm_config temperature=0.2 top_k=40\n\n"
            '%llm_config system="Answer in one sentence."\n\n'
            "%llm_config -t 0 seed=none",
        ),
        Magic("llm_status", "Show the loaded models, their devices or servers, and memory.", "%llm_status"),
        Magic(
            "llm_usage",
            "Show the tokens, seconds and reported cost of this session's answers.",
            "%llm_usage [--reset]",
            (Argument(("--reset",), "Reset the counts to 0 after showing them.", kind="switch"),),
        ),
        Magic(
            "llm_models",
            "List models: loaded, bundled, in local files, in the Hugging Face cache, or on a server.",
            "%llm_models [-b BACKEND] [--base-url URL] [--key-env NAME]",
            (
                Argument(
                    ("-b", "--backend"),
                    "Backend to list. Default: the configured one.",
                    "BACKEND",
                    complete="backends",
                ),
                Argument(
                    ("--base-url",),
                    "Server address. Default: the one in use, else the configured one.",
                    "URL",
                    complete="choices:base_url",
                ),
                Argument(
                    ("--key-env",),
                    "Environment variable that holds the API key.",
                    "NAME",
                    complete="choices:key_env",
                ),
            ),
        ),
        Magic(
            "llm_unload",
            "Unload a model and show how much memory it released.",
            "%llm_unload [NAME | --all]",
            (Argument(("--all",), "Unload every model.", kind="switch"),),
            positional=Argument(
                ("name",),
                "The model; all is the same as --all. Default: the active one.",
                "NAME",
                complete="loaded",
            ),
        ),
        Magic(
            "llm_panel",
            "Show the control panel. It displays the magic that repeats your last action.",
            "%llm_panel",
        ),
        Magic(
            "llm_help",
            "List the magics, or show the options of one.",
            "%llm_help [MAGIC]",
            positional=Argument(
                ("magic",), "Name of a magic, or an option. Default: all magics.", "MAGIC", complete="magics"
            ),
        ),
        Magic(
            "llm_doctor",
            "Check the installation, devices, caches and servers, and show a fix for each problem.",
            "%llm_doctor",
        ),
        Magic(
            "llm_jobs",
            "List background jobs, the running ones and the last 20 that have finished.",
            "%llm_jobs [JOB ... | all]",
            positional=_JOBS,
        ),
        Magic(
            "llm_stop",
            "Stop jobs, or all jobs and a load in the background. Partial answers are kept.",
            "%llm_stop [JOB ... | all]",
            positional=_JOBS,
            example="%llm_stop\n\n%llm_stop 2 3",
        ),
        Magic(
            "llm_wait",
            "Wait for background jobs, or all of them and a load. ■ ends only the wait.",
            "%llm_wait [JOB ... | all] [--timeout SECONDS]",
            (
                Argument(
                    ("--timeout",),
                    "Wait at most so long, then list what still runs. Default: no limit.",
                    "SECONDS",
                ),
            ),
            positional=_JOBS,
            example="%llm_wait\n\n%llm_wait 1 2 --timeout 60",
        ),
        Magic(
            "llm_chats",
            "List the chats of %%llm -c NAME, show one, or export and import them.",
            "%llm_chats [CHAT] [--export FILE | --import FILE] [--force]",
            (
                Argument(("--export",), "Write CHAT to a JSON file, or all chats.", "FILE"),
                Argument(("--import",), "Read CHAT, or all chats, from a JSON file.", "FILE"),
                Argument(("--force",), "Overwrite the file or the chats.", kind="switch"),
            ),
            positional=_CHAT,
        ),
        Magic(
            "llm_reset",
            "Delete a chat, all chats, or their stale turns.",
            "%llm_reset [CHAT | --all] [--stale]",
            (
                Argument(("--all",), "Delete every chat.", kind="switch"),
                Argument(("--stale",), "Delete only stale turns: of CHAT, or of all chats.", kind="switch"),
            ),
            positional=Argument(
                ("chat",),
                "Name of the chat; all is the same as --all. Default: the only chat.",
                "CHAT",
                complete="chats",
            ),
        ),
    )
}  # fmt: skip


def arguments(name: str) -> tuple[Argument, ...]:
    """Return the options of a magic, including ``--help`` and those of its option set."""
    return (*MAGICS[name].arguments, HELP, *option_arguments(MAGICS[name].options))


def option_arguments(options: OptionSet) -> tuple[Argument, ...]:
    """Return the arguments of an option set.

    Their values are checked by the option set, so that a flag, a keyword argument and a setting raise
    the same error for the same mistake.
    """
    return tuple(
        Argument(
            spec.flags,
            spec.help,
            spec.metavar,
            spec.kind,
            complete=_COMPLETION_SOURCES.get(name, f"choices:{name}"),
            option=name,
        )
        for name, spec in option_specs(options).items()
        if spec.flags
    )


def option_specs(options: OptionSet) -> Mapping[str, OptionSpec]:
    """Return the options of an option set by name, each with the backends that support it."""
    from llm_magic.backends import registry

    if not options:
        return _NO_OPTIONS
    if options == "session":
        return registry.session_specs()
    return registry.load_specs() if options == "loading" else registry.generation_specs()


_NO_OPTIONS: Mapping[str, OptionSpec] = MappingProxyType({})
# The source of values for options without fixed choices.
_COMPLETION_SOURCES = {"backend": "backends", "assistant": "models"}
