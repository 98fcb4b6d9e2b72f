"""What is said about answers, models and memory: lines and tables, no output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from llm_magic.notebook.display.tables import Table
from llm_magic.text.formatting import human_bytes
from llm_magic.text.terminal import visible_line
from llm_magic.types import MemoryUse, ModelInfo, Reply, Unloaded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_magic.backends.manager import LoadResult, Status
    from llm_magic.doctor import Finding
    from llm_magic.session import Session
    from llm_magic.session.jobs import Job
    from llm_magic.session.requests import DryRun

# The line of an unload names so many of what still holds the model.
_HOLDERS_SHOWN = 3


# The longest name in a line or a table, and the most rows of a list of models.
_LONGEST_NAME = 200
_MOST_ROWS = 500


def shown_name(name: str) -> str:
    """Return the name of a model as it is displayed: in one line, and cut where it is too long."""
    return first_characters(visible_line(name), _LONGEST_NAME)


def ending(reply: Reply) -> str:
    """Return how an answer ended, where it did not simply end, and what it was not told."""
    limit = reply.usage.completion_tokens
    how = {
        "stop": "",
        "length": f"cut off{f' at {limit} tokens' if limit else ''} (--max-new-tokens)",
        "cancelled": "stopped by you; not whole",
        "truncated": "broken off; not whole",
    }[reply.finish_reason]
    return " · ".join(part for part in (how, trimmed(reply.dropped_turns)) if part)


def trimmed(turns: int) -> str:
    """Return how many turns of its chat ``--trim`` left out, if any."""
    what = "the oldest turn was" if turns == 1 else f"the {turns} oldest turns were"
    return f"{what} left out (--trim)" if turns else ""


def footer(reply: Reply, size: int | None) -> str:
    """Return the muted line: model, tokens, first token, speed, memory, and how it ended."""
    usage, timing = reply.usage, reply.timing
    parts = [shown_name(reply.model)]
    if usage.prompt_tokens is not None and usage.completion_tokens is not None:
        reused = f" ({usage.cached_tokens} reused)" if usage.cached_tokens else ""
        parts.append(f"{usage.prompt_tokens}{reused} → {usage.completion_tokens} tokens")
    if timing.first_token_s is not None:
        parts.append(f"first after {timing.first_token_s:.2f} s")
    if timing.tokens_per_s is not None:
        digits = 0 if timing.tokens_per_s >= 10 else 1
        parts.append(f"{timing.tokens_per_s:.{digits}f} tokens/s")
    if size:
        parts.append(human_bytes(size))
    label = ending(reply)
    return " · ".join([*parts, *([label] if label else [])])


def ready_lines(result: LoadResult) -> list[str]:
    """Return what ``%llm_load`` says at the end: one line, and one for each model that went."""
    info = result.info
    gone = [unloaded_line(unloaded) for unloaded in result.unloaded]
    if result.already:
        return [f"{model_line(info)} · already loaded", *gone]
    took = f"ready in {info.load_s:.1f} s" if info.load_s is not None else "ready"
    return [f"{model_line(info)} · {took}", *result.notes, *gone]


def model_line(info: ModelInfo) -> str:
    """Return a model in one line: ``SmolLM2 · local cpu bf16 · 269 MB · 8192 ctx``."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    kind = info.quantization if info.quantization != "none" else short.get(info.dtype, info.dtype)
    where = info.server or info.device
    parts = [shown_name(info.name), " ".join(p for p in (info.backend, where, kind) if p)]
    if info.size:
        parts.append(human_bytes(info.size))
    if info.context_length:
        parts.append(f"{info.context_length} ctx")
    return " · ".join(parts)


def reasoning_line(reasoning: str) -> str:
    """Return what stands for the thoughts of a model where they are not shown."""
    return f"Reasoning · {len(reasoning):,} characters (reply.reasoning)"


def unloaded_line(unloaded: Unloaded) -> str:
    """Return what an unload gave back, by the process's own figures."""
    if unloaded.note:
        return f"Unloaded {shown_name(unloaded.name)} · {unloaded.note}"
    text = f"Unloaded {unloaded.name} ({human_bytes(unloaded.size)})"
    changes = [_change("process", unloaded.before.process, unloaded.after.process)]
    before = dict(unloaded.before.devices)
    changes += [
        _change(device, before.get(device, held), held)
        for device, held in unloaded.after.devices
        if before.get(device, held) != held
    ]
    text += f" · {', '.join(changes)}"
    if unloaded.holders:
        text += f" · still held by {', '.join(unloaded.holders[:_HOLDERS_SHOWN])}"
        if (more := len(unloaded.holders) - _HOLDERS_SHOWN) > 0:
            text += f" and {more} more"
    return text


def _change(what: str, before: int, after: int) -> str:
    return f"{what} {human_bytes(before)} → {human_bytes(after)}"


def status_table(status: Status) -> Table:
    """Return ``%llm_status``."""
    rows = [["status", status.status]]
    if status.progress is not None:
        share = "" if status.progress.share is None else f" {status.progress.share:.0%}"
        rows.append(["loading", f"{status.progress.stage}{share}"])
    rows += [
        ["backend", status.backend_type],
        ["active model", shown_name(status.active_model or "none")],
    ]
    for info in status.models:
        rows.append(["loaded", model_line(info)])
    rows += [[name, shown_name(value)] for name, value in status.backend_details.items()]
    rows += _memory_rows(status.memory)
    if status.last_error:
        rows.append(["last error", status.last_error])
    return Table(("", ""), rows)


def _memory_rows(memory: MemoryUse | None) -> list[list[str]]:
    if memory is None:
        return []
    devices = [[f"memory on {name}", human_bytes(held)] for name, held in memory.devices]
    return [["memory of this process", human_bytes(memory.process)], *devices]


def models_table(models: list[ModelInfo], loaded: tuple[ModelInfo, ...]) -> Table:
    """Return ``%llm_models``."""
    found = [*(("loaded", i) for i in loaded), *((_where(i), i) for i in models)]
    # A name from a server could hold a line end and so look like another row.
    rows = [[where, shown_name(i.name), _size(i), _tokens(i)] for where, i in found[:_MOST_ROWS]]
    note = "" if rows else "There is none here. %llm_load MODEL fetches one from the hub."
    if len(found) > len(rows):
        note = (
            f"… and {len(found) - len(rows):,} more. Type the beginning of a name after %llm_load"
            " and press Tab to find one."
        )
    return Table(("where", "model", "size", "context"), rows, note)


_PLACES = {"folder": "local folder", "gguf": "GGUF file", "cache": "hub cache"}


def place(info: ModelInfo) -> str:
    """Return where a model is: its server, or how it was found on this machine."""
    return info.server or _PLACES.get(info.where, info.where)


def _where(info: ModelInfo) -> str:
    """Return the place of a model, and the memory it takes there if it is in it now."""
    taken = f", in memory: {human_bytes(info.memory_bytes)}" if info.memory_bytes else ""
    return f"{place(info)}{taken}"


def _size(info: ModelInfo) -> str:
    return human_bytes(info.size) if info.size else ""


def _tokens(info: ModelInfo) -> str:
    return f"{info.context_length:,}" if info.context_length else ""


def dry_run_table(dry: DryRun) -> Table:
    """Return ``--dry-run``: the exact messages, the token count, the share of the context."""
    rows = [[message.role, message.content] for message in dry.messages]
    tokens, context = dry.count.prompt_tokens, dry.count.context_length
    note = f"{dry.model} · {_counted(tokens)}"
    if tokens is not None and context:
        note += f" · {tokens / context:.1%} of {context:,}"
    if dry.dropped_turns:
        note += f" · {trimmed(dry.dropped_turns)}"
    note += " · " + ", ".join(_options(dry))
    return Table(("role", "content"), rows, note + " · nothing was called")


def _options(dry: DryRun) -> Iterator[str]:
    """Yield the options that are sent, and then those of ``-p``, each with its value."""
    from llm_magic.backends.registry import generation_specs

    known = generation_specs()
    for name, value in dry.config.model_dump(exclude={"stop", "extra"}).items():
        if value is not None and known[name].works_on(dry.backend):
            yield f"{name} {value}"
    if dry.config.stop:
        yield f"stop {' '.join(map(_json, dry.config.stop))}"
    for name, value in dry.config.extra.items():
        yield f"{visible_line(name)} {_json(value)}"


def _json(value: object) -> str:
    """Return a value as on the line of a cell; in Python it may be of any type."""
    try:
        return visible_line(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        return visible_line(repr(value))


def _counted(tokens: int | None) -> str:
    return f"{tokens} tokens" if tokens is not None else "tokens unknown: the server counts later"


def jobs_table(jobs: Iterable[Job]) -> Table:
    """Return ``%llm_jobs``: what was begun in the background, how far it is, what was asked."""
    rows = [
        [
            str(job.id), job.state, shown_name(job.model), "" if job.tokens is None else str(job.tokens),
            f"{job.seconds:.1f}", first_words(job.prompt),
        ]
        for job in jobs
    ]  # fmt: skip
    note = "" if rows else "There is none. %%llm --bg begins one."
    return Table(("job", "state", "model", "tokens", "seconds", "prompt"), rows, note)


def first_words(text: str, most: int = 48) -> str:
    """Return the beginning of a text as one line."""
    line = " ".join(text[: 4 * most].split())
    return first_characters(line, most)


def first_characters(text: str, most: int) -> str:
    """Return a text, cut where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def error_line(error: BaseException) -> str:
    """Return an error as one line, as a failed cell shows it."""
    return f"{type(error).__name__}: {visible_line(' '.join(str(error).split()))}"


def config_table(session: Session) -> Table:
    """Return ``%llm_config``: every setting with its value, range and meaning."""
    from llm_magic.config.option_spec import specs
    from llm_magic.config.settings import GenerationConfig

    config, changed = session.generation.config, session.generation.changed
    rows = []
    for name, spec in specs(GenerationConfig).items():
        value = getattr(config, name)
        shown = "none" if value is None or value in ((), {}) else str(value)
        rows.append([name, f"{shown} *" if name in changed else shown, spec.range, spec.help])
    note = "* changed in this session; %llm_config --reset restores." if changed else ""
    return Table(("setting", "value", "range", "meaning"), rows, note)


def doctor_table(findings: Sequence[Finding]) -> Table:
    """Return ``%llm_doctor``: each finding, and what to type where something is not well."""
    rows = [[found.state, found.name, found.text, found.fix] for found in findings]
    bad = [(kind, sum(f.state == kind for f in findings)) for kind in ("problem", "warn")]
    names = {"problem": "problem", "warn": "warning"}
    counts = [f"{n} {names[kind]}{'s' if n > 1 else ''}" for kind, n in bad if n]
    note = f"{', '.join(counts)}." if counts else "Everything is well."
    return Table(("", "what", "found", "to mend it"), rows, note)
