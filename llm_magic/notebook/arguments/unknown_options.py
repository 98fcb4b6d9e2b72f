"""Advice about options that do not exist, or that were pasted from a text with other dashes and quotes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from llm_magic.errors import did_you_mean
from llm_magic.notebook.arguments.magic_options import MAGICS, Magic, arguments

# Names that other tools use.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "--literal": ("raw",),
    "--bg": ("background", "no-wait", "async"),
    "-f json": ("json", "json-mode", "json-output"),
    "-f text": ("text", "txt", "no-markdown"),
    "-f code": ("code", "python"),
    "-f markdown": ("md", "markdown"),
    "--max-new-tokens": ("max-tokens", "max-length", "num-predict", "n-predict", "tokens", "length"),
    "--temperature": ("temp",),
    "--repetition-penalty": ("repeat-penalty", "frequency-penalty"),
    "--system": ("system-prompt", "instructions"),
    "--stop": ("stop-sequence", "stop-sequences"),
    "--output": ("out", "var", "variable"),
    "--over": ("batch", "map", "rows", "data", "each", "foreach"),
    "--workers": ("concurrency", "num-workers", "parallel"),
    "--retry-failed": ("retry", "retries"),
    "--chat": ("conversation", "history", "session"),
    "--schema": ("json-schema", "response-format", "response-model", "type", "output-type", "fields"),
    "--choice": ("choices", "labels", "options", "enum", "classes"),
    "--regex": ("pattern", "regexp"),
    "--quiet": ("silent", "no-footer"),
    "--dry-run": ("preview", "show-prompt"),
    "--base-url": ("url", "host", "endpoint", "server", "api-base"),
    "--device": ("gpu", "cuda"),
    "--quantization": ("quant", "bits"),
    "-q 4bit": ("4bit", "load-in-4bit"),
    "-q 8bit": ("8bit", "load-in-8bit"),
    "--attn": ("attn-implementation", "flash-attention"),
}  # fmt: skip
_OURS = {other: ours for ours, others in _OTHER_NAMES.items() for other in others}
_MANY = "A call has one answer. To send a prompt for each row of your data, use --over DATA."
_NOT_YET: Mapping[str, str] = {
    **dict.fromkeys(("image", "images", "audio"), "A prompt is text; images cannot be sent."),
    **dict.fromkeys(("tool", "tools"), "The model cannot call functions."),
    "cache": "Answers are not cached; -o VAR stores the Reply.",
    "template": "The cell itself is a template: {name} is replaced with the value of name.",
    "stream": "Answers are streamed unless the environment has LLM_MAGIC_STREAM=off.",
    "no-stream": "LLM_MAGIC_STREAM=off in the environment shows answers when they are complete.",
    "n": f"To limit the answer, use --max-new-tokens NUMBER. {_MANY}",
    **dict.fromkeys(("best-of", "num-return-sequences"), _MANY),
    **dict.fromkeys(
        ("file", "context", "input", "attach"),
        'Read the file into a variable, text = open("…").read(), and write {text} in the prompt.',
    ),
    "prompt": "The prompt is the text below %%llm, or after the options of %llm.",
}  # fmt: skip

# Options of other magics, and what to do instead.
_FORCE = ("force", "f", "now")
_NOT_HERE: Mapping[str, Mapping[str, str]] = {
    "llm_unload": dict.fromkeys(
        _FORCE, "%llm_unload waits for the jobs of the model. To stop them first, run %llm_stop."
    ),
    "llm_load": dict.fromkeys(
        (*_FORCE, "reload"),
        "To load a model again, run %llm_unload first. To stop jobs, run %llm_stop.",
    ),
    "llm_chats": dict.fromkeys(
        ("delete", "remove", "clear", "reset"), "%llm_reset CHAT deletes the turns of a chat."
    ),
    "llm_stop": {"all": "%llm_stop stops all jobs, %llm_stop JOB only one."},
    "llm_wait": {"all": "%llm_wait waits for all jobs, %llm_wait JOB for one."},
    "llm_jobs": dict.fromkeys(
        ("all", "clear"), "%llm_jobs lists the running jobs and the last 20 that have finished."
    ),
}

# What a word processor makes of a hyphen, and of quotes.
DASHES = ("\u2013", "\u2014", "\u2212")
_CURLY_QUOTES = "\u201c\u201d\u201e\u2018\u2019"
_OPERATORS = frozenset(("+", "-", "*", "/", "//", "%", "|", "&", "==", "and", "or", "if", "in"))
# Options whose values may have spaces.
_TEXTS = frozenset({"-s", "--system", "-c", "--chat", "--stop", "--name"})
# Options whose values may be lists with a space after a comma.
_LISTS = frozenset({"--schema", "--choice"})


def with_hyphen(word: str, names: Collection[str]) -> str:
    """Return which option a word would be with a hyphen for its dash, or an empty string."""
    name = word.lstrip("".join(DASHES) + "-").partition("=")[0]
    option = next((option for option in (f"-{name}", f"--{name}") if option in names), "")
    return option and f"{word} starts with a dash. Options start with a hyphen: {option}."


def in_quotes(magic: Magic, tokens: Sequence[str], unexpected: str) -> str:
    """Return the advice to put a value in quotes if an unexpected word may be its end."""
    end = max((i for i, token in enumerate(tokens) if token.split(" ")[0] == unexpected), default=0)
    start = next((i for i in range(end, 0, -1) if tokens[i - 1].startswith("-")), 0)
    names_chat = magic.positional is not None and magic.positional.complete == "chats"
    option = tokens[start - 1] if start else f"%{magic.name}" if names_chat else ""
    if end > start and option in {"-o", "--output"}:
        name = "_".join(tokens[start : end + 1])
        if "," in name:
            return f"One variable stores the answer: {option} {name.partition(',')[0]}."
        return f"The name of a variable has no spaces: {option} {name}."
    if end > start and option == "--over" and unexpected in _OPERATORS:
        return (
            'Put an expression with spaces in quotes, --over "a + b", or assign it to a variable.'
        )
    is_list = option in _LISTS and tokens[end - 1].endswith(",")
    if end == start or not option or (start and option not in _TEXTS and not is_list):
        return ""
    last = next((i for i in range(end, len(tokens)) if tokens[i].startswith("-")), len(tokens))
    value = " ".join(tokens[start:last]).strip(_CURLY_QUOTES)
    quotes = "straight quotes" if tokens[start][0] in _CURLY_QUOTES else "quotes"
    return f'Put a value with spaces in {quotes}: {option} "{value}".'


def of_server(names: Collection[str], unexpected: str) -> str:
    """Return the option that an unexpected word is a value of: an address, or the name of a backend."""
    if "--base-url" not in names:
        return ""
    from llm_magic.backends import registry

    if unexpected.startswith(("http://", "https://")):
        return "Write --base-url before the address of a server."
    return f"Use -b {unexpected}." if unexpected in registry.names() else ""


def equivalent(magic: Magic, option: str) -> str:
    """Return what replaces an unknown option of a magic, or an empty string if nothing does."""
    names = {name for argument in arguments(magic.name) for name in argument.names}
    text = option.lstrip("-")
    ours = option.swapcase() if option.swapcase() in names else _OURS.get(text, "")
    if ours.partition(" ")[0] in names:
        return f'Did you mean "{ours}"?'
    if advice := _NOT_HERE.get(magic.name, {}).get(text):
        return advice
    if magic.options == "generation" and text in _NOT_YET:
        return _NOT_YET[text]
    # Compared without dashes, which all options share.
    return did_you_mean(text, [name[2:] for name in names if name[1] == "-"], prefix="--").strip()


def owner(option: str) -> str:
    """Return the magic that has an option, or an empty string."""
    first = ("llm_load", "llm")
    for name in dict.fromkeys((*first, *MAGICS)):
        if any(option in argument.names for argument in arguments(name)):
            return name
    return ""


def for_session(magic: str, option: str) -> str:
    """Return how to set an option of a prompt for the session, or an empty string."""
    found = next(one for one in arguments(magic) if option in one.names)
    if magic != "llm" or not found.option:
        return ""
    return f" To set it for all prompts, run %llm_config {found.option}={found.metavar}."
