"""How one row ended: an answer, a cut answer, an error, or a missing value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llm_magic.errors import LLMMagicException
from llm_magic.text import visible_line
from llm_magic.types import FinishReason, Message, Reply, Timing, TokenLogprob, Usage

if TYPE_CHECKING:
    from llm_magic.errors import InvalidReply
    from llm_magic.session.schemas import AnswerType, InvalidValue

State = Literal["done", "cut", "failed", "missing"]
_NO_USAGE = Usage()
_LONGEST_ERROR = 1_000


@dataclass(slots=True, eq=False)
class Outcome:
    """How one row ended.

    Attributes:
        text: The answer, "" if there is none.
        finish_reason: Why the answer ended; None if there is none.
        usage: The token counts and the cost of the answer.
        seconds: How long the answer took.
        reasoning: The reasoning of the model, "" if there is none.
        error: The error in one line, "" if the row did not fail.
        messages: What was sent, of a row that failed: it can be sent again.
        key: The key of a row that failed.
        probabilities: The labels of a choice with their probabilities, if they are known.
        retry: What was wrong with the first answer, if this is the second one.
        tokens: The tokens of the text with their probabilities; None if they were not requested.
    """

    text: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage = _NO_USAGE
    seconds: float = 0.0
    reasoning: str = ""
    error: str = ""
    messages: tuple[Message, ...] = ()
    key: bytes = b""
    probabilities: tuple[tuple[str, float], ...] = ()
    retry: str = ""
    tokens: tuple[TokenLogprob, ...] | None = None

    @property
    def state(self) -> State:
        """``done``, ``cut`` for an answer without its end, ``failed``, or ``missing``."""
        if self.error:
            return "failed"
        if self.finish_reason is None:
            return "missing"
        return "done" if self.finish_reason == "stop" else "cut"

    def checked(self, answer_type: AnswerType | None) -> tuple[Any, InvalidValue | None]:
        """Return the value of a typed answer, and why it has none; None and None for other outcomes."""
        if answer_type is None or self.finish_reason is None or self.error:
            return None, None
        return answer_type.checked(self.text, self.finish_reason)

    def reply(
        self, model: str, backend: str, answer_type: AnswerType | None = None
    ) -> Reply | None:
        """Return the answer as a reply of a model, with its value; None if there is none."""
        if self.finish_reason is None or self.error:
            return None
        requested: Any = {"tokens": self.tokens} if self.tokens is not None else {}
        return Reply(
            self.text,
            model=model,
            backend=backend,
            finish_reason=self.finish_reason,
            usage=self.usage,
            timing=Timing(None, self.seconds, None),
            messages=(),
            reasoning=self.reasoning,
            probabilities=dict(self.probabilities),
            value=self.checked(answer_type)[0],
            retry=self.retry,
            **requested,
        )

    def error_of(self, answer_type: AnswerType | None) -> InvalidReply | None:
        """Return the error of an answer without a value of its type, None for other outcomes."""
        _, problem = self.checked(answer_type)
        if answer_type is None or problem is None:
            return None
        reply = self.reply("", "")
        return None if reply is None else answer_type.error(reply, problem)


# The outcome of every row with a missing value: it is not sent.
MISSING = Outcome()


def failure(
    error: BaseException,
    messages: tuple[Message, ...] = (),
    key: bytes = b"",
    seconds: float = 0.0,
) -> Outcome:
    """Return the outcome of a row that failed."""
    text = visible_line(next(iter(str(error).splitlines()), ""))
    if not isinstance(error, LLMMagicException) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return Outcome(error=text[:_LONGEST_ERROR], messages=messages, key=key, seconds=seconds)


def name_row(error: BaseException, label: object) -> None:
    """Append the label of its row to the message of an error of this package."""
    if isinstance(error, LLMMagicException):
        error.append(f"This is the error of row {visible_line(str(label))}.")
