"""The lines and tables that magics and the panel show about answers, models, jobs and chats."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from llm_magic.errors import OptionError
from llm_magic.notebook.display.tables import Table
from llm_magic.session.chats import spelled
from llm_magic.session.jobs import Job, continuing
from llm_magic.session.requests import limit_note
from llm_magic.session.response import Response
from llm_magic.text import counted, dollars, human_bytes, visible_line
from llm_magic.types import FinishReason, ModelInfo, Reply, Unloaded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_magic.backends.manager import LoadResult, Status
    from llm_magic.config.settings import SessionConfig
    from llm_magic.doctor import Finding
    from llm_magic.session import Session
    from llm_magic.session.chats import Chat, Context
    from llm_magic.session.requests import DryRun
    from llm_magic.session.usage import ModelUsage, SessionUsage
    from llm_magic.types import TokenLogprob

_MAX_HOLDERS = 3  # in the line of an unload
_MAX_NAME = 200  # characters of a model name in a line or a table
_MAX_ANSWERS = 20  # that are being generated, in %llm_status
_MAX_ROWS = 500  # in a list of models
_TURN_CHARACTERS = 60  # of a prompt or an answer in the table of a chat
_MAX_DROPPED = 5  # turns that are named in a dry run
_SHORT_S = 0.05  # of a load, which the line below an answer omits
_SYSTEM_CHARACTERS = 40  # of the system prompt of the session in the line below an answer
_PROBLEM_CHARACTERS = 120  # of what was wrong with the first of two tries
_OUTSIDE_CHARACTERS = 80  # of the text around JSON
_UNKNOWN = "-"
_LIMIT = "--max-new-tokens"
_RETRY = "Run the cell again."
CONTEXT_FULL = "the context is full"
FIRST_WORD = "before the first word"
# While the unload waits, no other cell runs.
STOP_HINT = " · ■ ends the wait; then %llm_stop stops the answer."
_STALE = (
    "Stale: an earlier turn has changed, or a cell was deleted. A stale turn is not sent until its cell"
    " runs again; %llm_reset CHAT --stale deletes it."
)


def shown_name(name: str) -> str:
    """Return the name of a model for display: in one line, shortened if it is long."""
    line = visible_line(name)
    return line if len(line) <= _MAX_NAME else shortened(line, _MAX_NAME)


def ending(reply: Reply, limit: str = _LIMIT) -> str:
    """Return why an answer is incomplete and how many turns were dropped, or an empty string."""
    limit = CONTEXT_FULL if reply.context_full else limit
    tokens, has_text = reply.usage.completion_tokens, bool(reply or reply.reasoning)
    reason = incomplete_label(reply.finish_reason, tokens, limit, is_empty=not (has_text or tokens))
    if not reply.dropped_turns:
        return reason
    return " · ".join(filter(None, (reason, trimmed(reply.dropped_turns))))


def incomplete_label(
    reason: FinishReason,
    tokens: int | None = None,
    limit: str = _LIMIT,
    *,
    is_empty: bool = False,
) -> str:
    """Return why an answer of so many tokens is incomplete, or an empty string.

    `limit` is what the limit of tokens is called where the answer is shown, or `CONTEXT_FULL`. An empty
    answer has no text and no reasoning.
    """
    if is_empty and reason == "cancelled":
        return f"stopped {FIRST_WORD}"
    return {
        "stop": "",
        "length": f"cut off{f' at {counted(tokens)}' if tokens else ''} ({limit})",
        "cancelled": "stopped by you; incomplete",
        "truncated": "ended early; incomplete",
    }[reason]


def ending_notes(response: Response, retry: str = _RETRY) -> list[str]:
    """Return how an answer ended and how to `retry`, and what its chat lacked."""
    notes = [
        early_end(response, retry),
        _empty_answer(response),
        _unchecked(response),
        _without_probabilities(response),
    ]
    context = response.prepared.context
    if context is not None and response.turns_before:
        keys = {turn.key for turn in context.turns}
        notes += (_without_turn(turn, context, keys) for turn in response.turns_before)
        notes += chat_notes(context)
    return [note for note in notes if note]


def _unchecked(response: Response) -> str:
    """Return what nothing has checked about a typed answer, or an empty string."""
    answer_type = response.prepared.request.answer_type
    if (
        answer_type is None
        or answer_type.is_checked
        or answer_type.by != "prompt"
        or response.error is not None
    ):
        return ""
    return "Only that the answer is JSON was checked. A class, such as a pydantic model, checks its fields."


def shown_tokens(response: Response) -> tuple[TokenLogprob, ...]:
    """Return the tokens of an answer that has ended, if their probabilities were requested."""
    is_requested = response.reply is not None and response.prepared.config.logprobs is not None
    return response.reply.tokens if response.reply is not None and is_requested else ()


def _without_probabilities(response: Response) -> str:
    """Return that the requested probabilities of tokens cannot be shown, or an empty string."""
    if response.prepared.config.logprobs is None or not response.has_text or response.failure:
        return ""
    tokens, name = shown_tokens(response), shown_name(response.model)
    if not tokens:
        return f"{name} sent no token probabilities."
    if "".join(token.text for token in tokens) == response.text:
        return ""
    return (
        f"The tokens that {name} sent do not make up the answer, so they are only in reply.tokens."
    )


def _without_turn(turn: Response, context: Context, sent: Collection[str]) -> str:
    """Return that an earlier turn has no complete answer, or an empty string."""
    own, state = turn.prepared.context, turn.state
    is_sent = own is not None and own.key in sent
    if state == "done" or (is_sent and state == "failed"):
        return ""
    how = {"stopped": "was stopped", "incomplete": "ended early"}.get(state, "failed")
    effect = "its incomplete answer was sent" if is_sent else "this prompt was sent without it"
    return f"{_job_name(turn)}, an earlier turn of chat {context.chat!r}, {how}: {effect}."


def early_end(response: Response, retry: str = _RETRY) -> str:
    """Return that a server did not send the end of an answer, and how to `retry`, or an empty string.

    A response that failed has an error, which reports the same.
    """
    reply, server = response.reply, response.info.server
    if (
        reply is None
        or reply.finish_reason != "truncated"
        or response.error is not None
        or not server
    ):
        return ""
    what = "sent no answer" if response.is_empty else "did not send the end of the answer"
    return f"{visible_line(server)} {what}. {retry}"


def _empty_answer(response: Response) -> str:
    """Return that a model ended its answer before the first word, or an empty string."""
    reply = response.reply
    if reply is None or reply.finish_reason != "stop" or reply.strip() or reply.reasoning:
        return ""
    empty = f"The answer of {shown_name(reply.model)} is empty"
    if not (stop := response.prepared.config.stop):
        return f"{empty}. Change the prompt."
    one = "the stop text" if len(stop) == 1 else "one of the stop texts"
    texts = ", ".join(map(_json, stop))
    return (
        f"{empty}: it begins with {one} {texts}, or the model ended it at once. Change --stop or the"
        " prompt."
    )


def trimmed(turns: int) -> str:
    """Return how many turns of the chat ``--trim`` dropped."""
    return f"{'oldest turn' if turns == 1 else f'{turns} oldest turns'} dropped (--trim)"


def footer(
    reply: Reply,
    model: ModelInfo | None = None,
    session_system: str | None = None,
    context: Context | None = None,
    stop: Iterable[str] = (),
    limit: str = _LIMIT,
) -> str:
    """Return the line below an answer: model, tokens, times, speed, memory, cost, how it ended.

    `session_system` is the system prompt of the session, if it was sent; `context` precedes the reply, if
    it is a turn of a chat; one of the texts in `stop` may have ended it; `limit` is as in
    `incomplete_label`.
    """
    usage, timing = reply.usage, reply.timing
    parts = [shown_name(reply.model)]
    if usage.prompt_tokens is not None and usage.completion_tokens is not None:
        reused = f" ({usage.cached_tokens:,} reused)" if usage.cached_tokens else ""
        parts.append(f"{usage.prompt_tokens:,}{reused} → {counted(usage.completion_tokens)}")
    if timing.first_token_s is not None:
        first_s = timing.first_token_s - timing.load_s
        load = f" and {timing.load_s:.1f} s for the load" if timing.load_s >= _SHORT_S else ""
        parts.append(f"first after {first_s:.2f} s{load}")
    if timing.tokens_per_s is not None:
        digits = 0 if timing.tokens_per_s >= 10 else 1
        parts.append(f"{timing.tokens_per_s:,.{digits}f} tokens/s")
    if model is not None and model.size and not model.server:
        parts.append(human_bytes(model.size))
    if usage.cost is not None:
        parts.append(dollars(usage.cost))
    if session_system:
        parts.append(system_label(session_system))
    if context is not None:
        parts += _turn_labels(context)
    if stop and reply.finish_reason == "stop":
        parts.append(f"stop {' '.join(map(_json, stop))}")
    label = ending(reply, limit)
    return " · ".join([*parts, *_second_try(reply), *([label] if label else [])])


def _second_try(reply: Reply) -> Iterator[str]:
    """Yield what was wrong with the first answer, if there were two."""
    if reply.retry:
        problem = shortened(reply.retry, _PROBLEM_CHARACTERS).rstrip(".")
        yield f"second try (invalid at first: {problem})"


def _turn_labels(context: Context) -> Iterator[str]:
    """Yield the chat of an answer with the number of its turn, and how many turns became stale.

    A chat begins anew where the kernel has no earlier turn, whatever the notebook shows above.
    """
    number = len(context.turns) + context.stale + 1
    is_new = number == 1 and not context.replaces
    yield f"{'new ' if is_new else ''}chat {spelled(context.chat)}, turn {number}"
    if context.is_stale:
        yield "stale"
    if below := context.below:
        yield f"{counted(below, 'later turn')} became stale"


def not_loaded_note(failed: str, answers: str | None) -> str:
    """Return the note that another model answers, because the last load failed."""
    return f"{failed} was not loaded; {answers} answers."


def activity(response: Response) -> str:
    """Return what a response without text does: ``reading the prompt (512 of 1,900 tokens)``."""
    if response.awaits_load:
        return "queued until the model is loaded"
    if response.is_queued:
        return _queued(response)
    if response.progress is not None:
        return f"{response.progress.stage} ({response.progress.detail})"
    if response.has_reasoning:
        return f"thinking, {counted(len(response.reasoning), 'character')} so far"
    return response.notice or f"waiting for the first token{_beside(response)}"


def _beside(response: Response) -> str:
    """Return how many other answers a server generates, which may process them one after another."""
    count, server = len(response.ahead), response.info.server
    return f" ({counted(count, 'earlier prompt')} at {server})" if count and server else ""


def _queued(response: Response) -> str:
    """Return behind which other response a response is queued, and behind how many."""
    if turns := tuple(response.awaited_turns.values()):
        more = "" if len(turns) == 1 else f" and {len(turns) - 1} more of its chat"
        return f"queued behind {_job_name(turns[-1])}, the turn before{more}"
    ahead, server = response.ahead, response.info.server
    if not ahead:
        return f"queued at {server}" if server else "queued"
    first = f"{_job_name(ahead[0])} ({shown_name(ahead[0].model)})"
    return f"queued behind {first}{f' and {len(ahead) - 1} more' if len(ahead) > 1 else ''}"


def _job_name(response: Response) -> str:
    number = response.number
    return "the answer of another cell" if number is None else f"job {number}"


def system_label(system: str) -> str:
    """Return the part of a line that shows the system prompt of the session."""
    return f"system: {visible_line(shortened(system, _SYSTEM_CHARACTERS))} (%llm_config)"


def ready_lines(
    result: LoadResult, jobs: Sequence[Job] = (), values: SessionConfig | None = None
) -> list[str]:
    """Return the lines of a finished load: the model, notes, and each model that was unloaded.

    `jobs` are those that run. A note lists the settings in `values` that the model does not get.
    """
    info = result.info
    unloaded_lines = list(_unloaded_lines(result, jobs))
    if result.was_loaded:
        return [f"{model_line(info)} · already loaded", *unloaded_lines]
    took = f"ready in {info.load_s:.1f} s" if info.load_s is not None else "ready"
    return [
        f"{model_line(info)} · {took}",
        *result.notes,
        *_unsent_line(info, values),
        *unloaded_lines,
    ]


def _unloaded_lines(result: LoadResult, jobs: Sequence[Job]) -> Iterator[str]:
    """Yield a line for each model that was unloaded; one of the same name at another server is replaced."""
    info = result.info
    for unloaded in result.unloaded:
        if not info.server or not unloaded.server or unloaded.name != info.name:
            yield unloaded_line(unloaded, jobs)
        elif unloaded.server != info.server:
            replaced = f"Replaces {shown_name(unloaded.name)} on {unloaded.server}"
            going_on = continuing(job for job in jobs if job.model == unloaded.name)
            yield " · ".join(filter(None, (replaced, going_on)))


def _unsent_line(info: ModelInfo, values: SessionConfig | None) -> Iterator[str]:
    """Yield a line about settings that the user chose, and that a model or its backend does not support."""
    from llm_magic.backends.registry import session_specs

    if values is None:
        return
    default = type(values)()
    names = [n for n in session_specs() if getattr(values, n) != getattr(default, n)]
    for owner in (info.backend, shown_name(info.name)):
        if omitted := [name for name in names if _omits(info, name) == owner]:
            yield f"Not sent, because {owner} does not support them: {', '.join(omitted)}."


def _omits(info: ModelInfo | None, name: str) -> str:
    """Return what does not support a setting: the backend of a model or the model; "" if it is sent."""
    from llm_magic.backends.registry import session_specs

    if info is None or not session_specs()[name].works_on(info.backend):
        return "" if info is None else info.backend
    return shown_name(info.name) if name in info.unsupported else ""


def loading_line(model: str) -> str:
    """Return the line of a load that continues in the background."""
    return f"Loading {model} · %llm_status shows the progress; %%llm waits for the model."


def model_line(info: ModelInfo) -> str:
    """Return a model in one line: ``SmolLM2 · local cpu bf16 · 269 MB · 8,192 ctx``."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    kind = info.quantization if info.quantization != "none" else short.get(info.dtype, info.dtype)
    where = info.server or info.device
    parts = [shown_name(info.name), " ".join(p for p in (info.backend, where, kind) if p)]
    if info.size:
        parts.append(human_bytes(info.size))
    if info.context_length:
        parts.append(f"{info.context_length:,} ctx")
    return " · ".join(parts)


def reasoning_line(reasoning: str) -> str:
    """Return the line that replaces hidden reasoning."""
    return f"Reasoning · {counted(len(reasoning), 'character')} (reply.reasoning)"


def outside_json_line(text: str) -> str:
    """Return the line with the text that ``-f json`` leaves out of the value."""
    return f"Text outside the JSON: {shortened(text, _OUTSIDE_CHARACTERS)}"


def waiting_line(jobs: Iterable[Job], seconds: float) -> str:
    """Return the progress of the first running job, or an empty string."""
    running = [job for job in jobs if not job.done]
    if not running:
        return ""
    first, more = running[0], f" and {len(running) - 1} more" if len(running) > 1 else ""
    if isinstance(first, Response) and not first.has_text:
        state = activity(first)
    else:
        state = f"running, {first.amount}"
    return f"Waiting for {first.short_name} ({state}){more} … {seconds:.0f} s"


def unloaded_line(unloaded: Unloaded, jobs: Sequence[Job] = ()) -> str:
    """Return the memory of the process and its devices before and after an unload.

    Of the running `jobs`, those that a server answers continue without the model.
    """
    if unloaded.note:
        what = continuing(job for job in jobs if job.model == unloaded.name)
        return " · ".join(
            filter(None, (f"Unloaded {shown_name(unloaded.name)}", unloaded.note, what))
        )
    before = dict(unloaded.before.devices)
    changed = [
        (device, before[device], held)
        for device, held in unloaded.after.devices
        if before.get(device, held) != held
    ]
    changes = ", ".join(
        f"{what} {human_bytes(old)} → {human_bytes(new)}"
        for what, old, new in (
            ("process", unloaded.before.process, unloaded.after.process),
            *changed,
        )
    )
    text = f"Unloaded {unloaded.name} ({human_bytes(unloaded.size)}) · {changes}"
    if unloaded.holders:
        text += f" · still held by {', '.join(unloaded.holders[:_MAX_HOLDERS])}"
        if (more := len(unloaded.holders) - _MAX_HOLDERS) > 0:
            text += f" and {more} more"
    return text


def status_table(status: Status, answering: Sequence[Job] = ()) -> Table:
    """Return ``%llm_status``; `answering` are the jobs and other answers that are being generated."""
    rows = [["status", status.status]]
    if (progress := status.progress) is not None:
        share = "" if progress.share is None else f" {progress.share:.0%}"
        rows.append(["loading", f"{progress.stage}{share}"])
    rows.append(["backend", _backend(status)])
    active = status.active
    none = "none" if progress is not None else "none · %llm_load loads one"
    rows.append(["active model", none if active is None else model_line(active)])
    others = [info for info in status.models if info is not active]
    rows += [["" if i else "also loaded", model_line(info)] for i, info in enumerate(others)]
    rows += [
        [name, shown_name(value)]
        for name, value in status.backend_details.items()
        # The line of a model on a server has its name.
        if (name, value) != ("source", status.active_model)
    ]
    if (memory := status.memory) is not None:
        rows.append(["memory of this process", human_bytes(memory.process)])
        rows += [[f"memory on {name}", human_bytes(held)] for name, held in memory.devices]
    rows += [
        [one.short_name, f"{shown_name(one.model)} · {_job_progress(one)}"]
        for one in answering[:_MAX_ANSWERS]
    ]
    if more := answering[_MAX_ANSWERS:]:
        rows.append(["", f"and {counted(len(more), 'more answer')}"])
    if status.last_error:
        failed = status.failed_model or ""
        # Most errors name it.
        model = "" if failed in status.last_error else f"{shown_name(failed)} "
        rows.append(["last load", f"{model}failed: {status.last_error}"])
    return Table(("", ""), rows)


def _backend(status: Status) -> str:
    """Return the backend of the active model or of the settings, or why there is none of that name."""
    from llm_magic.backends.registry import check_name

    try:
        check_name(status.backend_type, status.backend_type)
    except OptionError as error:
        return str(error)
    return status.backend_type


def use_table(status: Status) -> Table:
    """Return ``%llm_use``: the loaded models, and which one is active."""
    rows = [
        ["active" if info.name == status.active_model else "", model_line(info)]
        for info in status.models
    ]
    return Table(("", ""), rows, "" if rows else "No model is loaded. Run %llm_load.")


def models_table(models: list[ModelInfo], loaded: tuple[ModelInfo, ...]) -> Table:
    """Return ``%llm_models``."""
    found = [*(("loaded", info) for info in loaded)]
    for info in models:
        used = f", in memory: {human_bytes(info.memory_bytes)}" if info.memory_bytes else ""
        found.append((f"{model_location(info)}{used}", info))
    rows = [
        [
            where,
            # A line break in a name from a server would look like another row.
            shown_name(info.name),
            human_bytes(info.size) if info.size else "",
            f"{info.context_length:,}" if info.context_length else "",
        ]
        for where, info in found[:_MAX_ROWS]
    ]
    note = "" if rows else "No models found. %llm_load MODEL downloads one from Hugging Face."
    if len(found) > len(rows):
        note = (
            f"… and {len(found) - len(rows):,} more. Type the start of a name after %llm_load and"
            " press Tab."
        )
    return Table(("where", "model", "size", "context"), rows, note)


_LOCATIONS = {"folder": "local folder", "gguf": "GGUF file", "cache": "hub cache"}


def model_location(info: ModelInfo) -> str:
    """Return the server of a model, or where it is on this machine."""
    return info.server or _LOCATIONS.get(info.where, info.where)


def dry_run_table(dry: DryRun) -> Table:
    """Return the table of ``--dry-run``: the messages, their token count, the share of the context."""
    rows = [[message.role, message.content] for message in dry.messages if message.content]
    rows += _type_rows(dry)
    added = dry.count.added_system
    if added:
        rows.insert(0, ["system", added])
    if dry.dropped:
        first = 1 if rows[0][0] == "system" else 0
        rows.insert(first, ["not sent", "\n".join(_dropped_lines(dry))])
    tokens, context = dry.count.prompt_tokens, dry.count.context_length
    parts = [dry.model or "no model is loaded: tokens are not counted"]
    if tokens is None and dry.model is not None:
        parts.append("token count unknown until the server answers")
        parts += [f"context {context:,}"] if context else []
    elif tokens is not None:
        parts.append(counted(tokens))
        parts += [f"{_share(tokens, context)} of {context:,}"] if context else []
    parts += [system_label(dry.session_system)] if dry.session_system else []
    parts += ['system: of the chat template (-s "" omits it)'] if added else []
    note = " · ".join([*parts, "nothing was sent"])
    return Table(("", ""), rows, f"{note}\n{', '.join(_options(dry))}", verbatim=True)


def _type_rows(dry: DryRun) -> Iterator[list[str]]:
    """Yield the type of the answer and how it is enforced, with what the messages do not describe."""
    answer_type = dry.answer_type
    if answer_type is None:
        return
    how = "requested in the prompt, and checked" if answer_type.by == "prompt" else ""
    if dry.model is not None and answer_type.by == "backend":
        how = f"enforced by {dry.enforced_by}"
    # The name of a type that has none of its own, such as "the schema", repeats the option.
    name = "" if answer_type.name.startswith("the ") else answer_type.name
    source = answer_type.compact_source
    shown = "" if source in dry.messages[-1].content else source
    text = "\n".join(filter(None, [" · ".join(filter(None, [name, how])), shown]))
    yield [answer_type.structure.option, text or answer_type.name.removeprefix("the ")]


def _share(tokens: int, context: int) -> str:
    share = tokens / context
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"


def _dropped_lines(dry: DryRun) -> Iterator[str]:
    """Yield how many turns ``--trim`` drops, then the start of each question."""
    yield trimmed(len(dry.dropped))
    for turn in dry.dropped[:_MAX_DROPPED]:
        yield f"  {shortened(turn.question.content, _TURN_CHARACTERS)}"
    if (more := len(dry.dropped) - _MAX_DROPPED) > 0:
        yield f"  … and {more} more"


def _options(dry: DryRun) -> Iterator[str]:
    """Yield each option that is sent, and each one of ``-p``, with its value."""
    from llm_magic.backends.registry import generation_specs

    for name, spec in generation_specs().items():
        value = getattr(dry.config, name)
        if value in (None, (), {}) or not spec.works_on(dry.backend):
            continue
        if spec.kind == "pairs":
            yield from (f"{visible_line(key)} {_json(one)}" for key, one in value.items())
        else:
            yield f"{name} {' '.join(map(_json, value)) if spec.kind == 'repeated' else value}"


def _json(value: object) -> str:
    """Return a value as JSON, or its repr if it has no JSON form."""
    try:
        return visible_line(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        return visible_line(repr(value))


def jobs_table(jobs: Iterable[Job], older: int = 0) -> Table:
    """Return ``%llm_jobs``: each background job with its state, progress and prompt.

    A note counts the `older` ones, which are not listed.
    """
    rows = [
        [
            str(job.number), job.state, shown_name(job.model), _job_progress(job), f"{job.seconds:.1f}",
            job.view.origin if job.view is not None else "panel", shortened(job.prompt),
        ]
        for job in jobs
    ]  # fmt: skip
    note = f"… and {older:,} older; the variables of -o still have them." if older else ""
    note = note if rows else "No jobs. %%llm --bg starts one."
    return Table(("job", "state", "model", "answer", "seconds", "from", "prompt"), rows, note)


def _job_progress(job: Job) -> str:
    """Return how much of its answer a job has and why it failed, or what a job without text does."""
    if job.failure:
        return " · ".join(filter(None, (job.amount, shortened(job.failure, _MAX_NAME))))
    if not isinstance(job, Response):
        return job.amount
    if job.state == "stopped" and job.is_empty:
        return FIRST_WORD
    return job.amount if job.done or job.has_text else activity(job)


def usage_table(usage: SessionUsage) -> Table:
    """Return ``%llm_usage``: the answers of each model and of all together, their tokens and cost."""
    rows = [*usage.models, *([usage.total] if len(usage.models) > 1 else [])]
    if not rows:
        return Table(("",), [], "No answers yet.")
    columns = [name for name in _USAGE_COLUMNS if _is_shown(name, rows)]
    table = [
        [shown_name(row.model or "all"), row.backend, _answers(row)]
        + [_sum(row, name) for name in columns]
        for row in rows
    ]
    cells = [cell for line in table for cell in line[3:]]
    notes = {
        "≥ is a lower bound: some answers reported no number.": any(c[0] == "≥" for c in cells),
        f"{_UNKNOWN} is unknown: no answer reported it.": _UNKNOWN in cells,
        "No server reported a cost.": "cost" not in columns
        and any(row.backend not in {"local", "llamacpp"} for row in usage.models),
    }
    heads = ["model", "backend", "answers", *(_USAGE_COLUMNS[name] for name in columns)]
    return Table(heads, table, " ".join(note for note, holds in notes.items() if holds))


_USAGE_COLUMNS = {
    "prompt_tokens": "prompt tokens", "cached_tokens": "reused", "completion_tokens": "generated tokens",
    "reasoning_tokens": "reasoning", "seconds": "seconds", "cost": "cost",
}  # fmt: skip


def _is_shown(name: str, rows: Sequence[ModelUsage]) -> bool:
    """Return whether a column is shown: always, or where a number of it is known."""
    is_always = name in {"prompt_tokens", "completion_tokens", "seconds"}
    return is_always or any(getattr(row, name) is not None for row in rows)


def _answers(usage: ModelUsage) -> str:
    """Return the number of answers, and how many of them were stopped or failed."""
    endings = {"stopped": usage.stopped, "failed": usage.failed}
    of_these = ", ".join(f"{count} {how}" for how, count in endings.items() if count)
    return f"{usage.answers:,}{f' ({of_these})' if of_these else ''}"


def _sum(usage: ModelUsage, name: str) -> str:
    value = getattr(usage, name)
    if value is None:
        return _UNKNOWN
    bound = "≥\u00a0" if name in usage.lower_bounds else ""
    if name == "cost":
        return f"{bound}{dollars(value)}"
    return f"{bound}{value:,.1f}" if name == "seconds" else f"{bound}{value:,}"


def shortened(text: str, most: int = 48) -> str:
    """Return the start of a text as one line of at most `most` characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def error_line(error: BaseException) -> str:
    """Return an error as one line, as a failed cell shows it."""
    return f"{type(error).__name__}: {visible_line(' '.join(str(error).split()))}"


def config_table(session: Session, names: Collection[str] = ()) -> Table:
    """Return ``%llm_config``: the settings, or those of these names, with their ranges and meanings.

    Those that the active model does not get are marked.
    """
    from llm_magic.backends.registry import session_specs

    values, changed = session.generation.values, session.generation.changed
    active, rows, symbols = session.status().active, [], {"*": "", "†": ""}
    for name, spec in session_specs().items():
        if names and name not in names:
            continue
        shown = _setting(getattr(values, name))
        if name in changed:
            shown += " *"
            symbols["*"] = "changed in this session. %llm_config --reset restores it."
        if omits := _omits(active, name):
            shown += " †"
            symbols["†"] = f"not sent: {omits} does not support it."
        rows.append([name, shown, spec.range, spec.help])
    note = " ".join(f"{symbol} {text}" for symbol, text in symbols.items() if text)
    if not changed and not names:
        note = " ".join(filter(None, (note, "To change one: %llm_config temperature=0.2")))
    return Table(("setting", "value", "range", "meaning"), rows, note)


def changes_table(
    before: SessionConfig, after: SessionConfig, names: Iterable[str], active: ModelInfo | None
) -> Table:
    """Return a change by ``%llm_config``: the old and the new value of the settings of these names.

    Notes list what the `active` model does not support.
    """
    from llm_magic.backends.registry import session_specs

    rows, unsupported, changed = [], [], frozenset(names)
    for name in session_specs():
        if name not in changed:
            continue
        old, new = _setting(getattr(before, name)), _setting(getattr(after, name))
        rows.append([name, f"{old} → {new}" if old != new else f"{new} (unchanged)"])
        if _omits(active, name):
            unsupported.append(name)
    notes = [] if rows else ["No setting has changed."]
    if active is not None and unsupported:
        owner = " and ".join(dict.fromkeys(_omits(active, name) for name in unsupported))
        notes.append(f"Not supported by {owner}, so not sent: {', '.join(unsupported)}.")
    if "max_new_tokens" in changed:
        notes.append(limit_note(after.max_new_tokens, active))
    return Table(("", ""), rows, " ".join(filter(None, notes)))


def _setting(value: object) -> str:
    """Return the value of a setting in one line."""
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, tuple):
        return " ".join(map(_json, value))
    if isinstance(value, Mapping):
        return " ".join(f"{visible_line(key)}={_json(one)}" for key, one in value.items())
    return shortened(value, _MAX_NAME) if isinstance(value, str) else str(value)


def doctor_table(findings: Sequence[Finding]) -> Table:
    """Return ``%llm_doctor``: each check with its result and, for a problem, its fix."""
    rows = [[found.state, found.name, found.text, found.fix] for found in findings]
    states = [found.state for found in findings]
    counts = [
        counted(states.count(state), name)
        for state, name in (("problem", "problem"), ("warn", "warning"))
        if state in states
    ]
    note = f"{', '.join(counts)}." if counts else "No problems found."
    return Table(("", "check", "result", "fix"), rows, note)


def chats_table(session: Session) -> Table:
    """Return ``%llm_chats``: every chat with its turns and tokens."""
    chats, active = session.chats.all(), session.status().active
    context = active.context_length if active is not None else None
    rows = []
    for chat in chats:
        turns, stale = len(chat.turns), len(chat.turns) - len(chat.fresh)
        tokens, share = session.chat_tokens(chat.name), _UNKNOWN
        if tokens is not None and context:
            share = f"{tokens / context:.1%}"
        count = _UNKNOWN if tokens is None else f"{tokens:,}"
        rows.append([chat.name, str(turns), str(stale or ""), count, share])
    note = _STALE if any(row[2] for row in rows) else ""
    return Table(
        ("chat", "turns", "stale", "tokens", "of context"),
        rows,
        note if rows else "No chats. %%llm -c NAME starts one.",
    )


def chat_table(chat: Chat, session_system: str | None) -> Table:
    """Return ``%llm_chats NAME``: one row for each turn, and the system prompt of the next one."""
    rows = [
        [
            str(number),
            shortened(turn.question.content, _TURN_CHARACTERS),
            shortened(turn.answer.content, _TURN_CHARACTERS),
            "stale" if turn.stale else "",
        ]
        for number, turn in enumerate(chat.turns, 1)
    ]
    system, whose = chat.system, ""
    if system is None:
        system, whose = session_system, " of the session"
    notes = [f"System prompt{whose}: {shortened(system, _TURN_CHARACTERS)}"] if system else []
    notes += [_STALE] if len(chat.fresh) < len(chat.turns) else []
    return Table(("turn", "prompt", "answer", ""), rows, " · ".join(notes))


def running_note(turns: Sequence[Response], chat: str) -> str:
    """Return that the messages of a dry run lack the turns that are being answered."""
    names = " and ".join(_job_name(turn) for turn in turns)
    are, s, their = ("is", "", "its") if len(turns) == 1 else ("are", "s", "their")
    return (
        f"{names}, {'an ' if not s else ''}earlier turn{s} of chat {chat!r}, {are} not complete:"
        f" {their} messages are not shown. The prompt would wait for {'it' if not s else 'them'}."
    )


def chat_notes(context: Context) -> tuple[str, ...]:
    """Return the notes about the turns and the system prompt of a chat."""
    notes = []
    if stale := context.stale:
        notes.append(
            f"{counted(stale, 'turn')} of chat {context.chat!r} {'is' if stale == 1 else 'are'} stale and not"
            " sent. Run the cells above from the top, or delete the stale turns with"
            f" %llm_reset {spelled(context.chat)} --stale."
        )
    if context.changes_system:
        notes.append(f"-s changes the system prompt of chat {context.chat!r} from this turn on.")
    return tuple(notes)


def same_text_note(context: Context, *, in_terminal: bool = False) -> str:
    """Return that a cell without an id replaces a turn of the same text, or an empty string.

    `in_terminal`: there is no cell that could run again.
    """
    below, effect = context.below, ", and replaces its turn"
    if not below and not (context.replaces and in_terminal):
        return ""
    if below:
        effect = f": {counted(below, 'turn')} below it {'is' if below == 1 else 'are'} now stale"
    return (
        "this frontend sends no cell ids, so this cell counts as the earlier cell with the same"
        f" text, run again{effect}."
    )
