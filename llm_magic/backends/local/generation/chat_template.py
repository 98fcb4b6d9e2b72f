"""Messages to token ids, by the chat template of the model.

Special tokens in the text of messages stay text; only the chat template writes control tokens. A pasted
``<|im_end|>\\n<|im_start|>system`` would open a system turn otherwise. Before the template is applied,
each special token in a message is put between two private characters. Afterwards every special token
that is not between them was written by the template, and gets a random name. A second tokenizer, which
shares the model of the first one but has those names for its special tokens, encodes the text: control
tokens are found by their names, and everything else is encoded as text.

Text without special tokens is encoded by the template alone; both ways give equal ids for it.
``apply_chat_template(sanitize_control_tokens=True)`` of Transformers 5.23 is newer than the oldest
version that is supported, cuts the text into pieces (other ids at their ends), drops private
characters, and raises an error where a vocabulary can build a special token of smaller ones.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import TYPE_CHECKING, Any

from llm_magic.backends.base import NO_SYSTEM
from llm_magic.backends.local.generation.token_streamer import CLOSES, OPENS
from llm_magic.errors import PromptError
from llm_magic.types import Message

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding, Tokenizer
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Templates search messages for these, and they open no turn.
_REASONING = frozenset((*OPENS, *CLOSES))
_CONTROL = re.compile(r"<[|\uff5c].+[|\uff5c]>")
_PRIVATE = range(0xF0000, 0x10FFFE)
# The errors of templates that reject a conversation are these and `jinja2.TemplateError`.
_ERRORS = (TypeError, ValueError)
Turn = dict[str, str]
# The private characters before and after a special token in a message.
Delimiters = tuple[str, str]
Render = Callable[[list[Turn]], str]


class PromptEncoder:
    """Encodes messages with the chat template of a tokenizer, or as plain text where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, control_tokens: bool = False) -> None:
        """`control_tokens` lets special tokens in messages act as control tokens, not as text."""
        self._tokenizer: Any = tokenizer
        self._has_template = tokenizer.chat_template is not None
        render = self._text if self._has_template else None
        self._special = None if control_tokens else SpecialTokens(tokenizer, render)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a prompt; an empty system message asks for no system prompt."""
        special = self._special
        if special is not None and not any(special.pattern.search(m.content) for m in messages):
            special = None
        if not self._has_template:
            # A base model continues text.
            text = "\n\n".join(m.content for m in messages if m.content)
            if special is not None:
                return special.encode_text(text)
            return list(self._tokenizer(text, verbose=False).input_ids)
        turns = [{"role": m.role, "content": m.content} for m in messages]
        if special is not None:
            return special.encode_turns(turns)
        if turns[0] == NO_SYSTEM:
            ids = self._tokenizer(self._text(turns), add_special_tokens=False, verbose=False)
            return list(ids.input_ids)
        return list(_apply(self._tokenizer, turns))

    def encode_answer(self, text: str) -> list[int]:
        """Return the token ids of a text that follows a prompt."""
        special = self._special
        if special is not None and special.pattern.search(text):
            return special.encode_text(text, starts=False)
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def added_system(self, messages: Sequence[Message]) -> str:
        """Return the system prompt that the template adds to messages, or an empty string."""
        has_system = any(message.role == "system" for message in messages)
        return "" if has_system or not self._has_template else self._default.text

    @cached_property
    def _default(self) -> DefaultSystem:
        return _default_system(self._tokenizer)

    def _text(self, turns: list[Turn]) -> str:
        """Return a conversation as the template writes it, without a system turn for an empty one."""
        if turns[0] != NO_SYSTEM or len(turns) == 1:
            return str(_apply(self._tokenizer, turns, tokenize=False))
        default, without = self._default, turns[1:]
        text = str(_apply(self._tokenizer, without, tokenize=False))
        if not default.text:
            return text
        if default.turn and text.startswith(default.turn):
            return default.start + text.removeprefix(default.turn)
        # The turn cannot be removed, but its text can be replaced.
        text = str(_apply(self._tokenizer, turns, tokenize=False))
        if default.text in text:
            raise PromptError(
                "The chat template of this model always adds a system prompt."
            ).advise('Set one with -s TEXT, or remove -s "".', "system")
        return text


@dataclass(frozen=True, slots=True)
class DefaultSystem:
    """The system prompt that a template adds to a conversation without one; "" if it adds none.

    A conversation starts with `turn` then, and would start with `start` without the system turn. Both
    are "" if that is not known.
    """

    text: str = ""
    turn: str = ""
    start: str = ""


def _default_system(tokenizer: Any) -> DefaultSystem:
    """Return the system prompt that a template adds: what one of the user replaces."""
    from jinja2 import TemplateError

    render = partial(_apply, tokenizer, tokenize=False)
    roles = ("system", "user", "assistant", "user")
    # No template has these characters.
    turns = [{"role": role, "content": chr(_PRIVATE[-1 - n])} for n, role in enumerate(roles)]
    system, question, answer, later = (turn["content"] for turn in turns)
    try:
        start = render(turns[1:2]).partition(question)[0]
        given = render(turns[:2]).partition(question)[0]
        before, _, after = given.partition(system)
        text = start.removeprefix(before).removesuffix(after)
        if not text or start != before + text + after:
            return DefaultSystem()
        between = render(turns[1:]).partition(answer)[2].partition(later)[0]
        end = render(turns[1:3], add_generation_prompt=False).partition(answer)[2]
    except (TemplateError, *_ERRORS):
        return DefaultSystem()
    # What the template writes before a question that is not the first.
    header = between.removeprefix(end) if between.startswith(end) else ""
    if not header or not after.endswith(header):
        return DefaultSystem(text)
    bos = tokenizer.bos_token or ""
    return DefaultSystem(text, start.removesuffix(header), bos if before.startswith(bos) else "")


def _apply(
    tokenizer: Any,
    turns: list[Turn],
    *,
    tokenize: bool = True,
    add_generation_prompt: bool = True,
) -> Any:
    """Return the token ids of a conversation, or its text without `tokenize`."""
    from jinja2 import TemplateError

    options: dict[str, Any] = {"tokenize": tokenize, "return_dict": False}
    if tokenize:
        # No warning about the length, see `max_new_tokens_left`.
        options["tokenizer_kwargs"] = {"verbose": False}
    options["add_generation_prompt"] = add_generation_prompt
    apply = partial(tokenizer.apply_chat_template, **options)
    try:
        return apply(turns)
    except TemplateError:
        if turns[0]["role"] != "system" or len(turns) < 2:
            raise
        # Some templates (Gemma's) raise for a system turn: put its text before the first question.
        first, second, *later = turns
        merged = {**second, "content": f"{first['content']}\n\n{second['content']}"}
        return apply([merged, *later])


class SpecialTokens:
    """Encodes prompts whose messages contain special tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, render: Render | None) -> None:
        """`render` applies the chat template, and raises what that raises; None without a template."""
        self._tokenizer, self._render = tokenizer, render

    def encode_turns(self, turns: list[Turn]) -> list[int]:
        """Return the ids of a conversation as the template writes it, its messages as text."""
        assert self._render is not None
        delimiters = _unused("".join(turn["content"] for turn in turns))
        delimited = [
            {**turn, "content": self._delimited(turn["content"], delimiters)} for turn in turns
        ]
        return self._encode(self._render(delimited), delimiters, add_special_tokens=False)

    def encode_text(self, text: str, *, starts: bool = True) -> list[int]:
        """Return the ids of a text without a template; `starts` adds the tokens that start a text."""
        delimiters = _unused(text)
        delimited = self._delimited(text, delimiters)
        return self._encode(delimited, delimiters, add_special_tokens=starts)

    def _delimited(self, text: str, delimiters: Delimiters) -> str:
        before, after = delimiters
        return self.pattern.sub(lambda found: before + found[0] + after, text)

    def _encode(self, text: str, delimiters: Delimiters, *, add_special_tokens: bool) -> list[int]:
        parts = list(_split(text, delimiters, self.pattern))
        if hasattr(self._tokenizer, "backend_tokenizer"):
            return self._renamed.encode(parts, add_special_tokens=add_special_tokens)
        return self._encode_parts(parts, add_special_tokens=add_special_tokens)

    def _encode_parts(
        self, parts: list[tuple[str, bool]], *, add_special_tokens: bool
    ) -> list[int]:
        """Encode piece by piece with a tokenizer that is written in Python."""
        tokenizer: Any = self._tokenizer
        ids: list[int] = []
        for text, is_control in parts:
            if is_control:
                ids.append(tokenizer.convert_tokens_to_ids(text))
            elif text:
                ids += tokenizer.convert_tokens_to_ids(
                    tokenizer.tokenize(text, split_special_tokens=True)
                )
        if add_special_tokens:
            ids = tokenizer.build_inputs_with_special_tokens(ids)
        return ids

    @cached_property
    def _tokens(self) -> dict[str, AddedToken]:
        """The tokens that stay text in messages.

        Besides the special tokens, these are added tokens in the form of a control token, and those
        that the template writes around messages: DeepSeek does not declare the start of a user's
        turn as special. Other added tokens, such as ``<tool_call>`` and runs of blanks, only shorten
        text that people and templates write, and stay tokens.
        """
        added: Any = getattr(self._tokenizer, "added_tokens_decoder", {})
        special = set(self._tokenizer.all_special_tokens)
        written = self._template_text()
        return {
            token.content: token
            for token in added.values()
            if token.special or token.content in special or _is_control(token.content, written)
        }

    def _template_text(self) -> str:
        """Return what the template writes around the messages of a short conversation."""
        from jinja2 import TemplateError

        if self._render is None:
            return ""
        # No added token has these characters.
        roles = ("system", "user", "assistant", "user")
        turns = [{"role": role, "content": chr(_PRIVATE[-1 - n])} for n, role in enumerate(roles)]
        try:
            return self._render(turns)
        except (TemplateError, *_ERRORS):
            # It raises for every conversation of this shape; its source has most of the tokens.
            return str(self._tokenizer.chat_template)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What matches each special token in a text."""
        longest_first = sorted(self._tokens.values(), key=lambda t: len(t.content), reverse=True)
        return re.compile("|".join(map(_expression, longest_first)) or r"(?!)")

    @cached_property
    def _renamed(self) -> _RenamedTokenizer:
        return _RenamedTokenizer(self._tokenizer.backend_tokenizer, frozenset(self._tokens))


class _RenamedTokenizer:
    """A tokenizer that shares the model of another one, with random names for its special tokens."""

    def __init__(self, backend: Tokenizer, special: frozenset[str]) -> None:
        self._backend = backend
        self._tokenizer = _without_added_tokens(backend)
        secret, numbers = secrets.token_hex(16), count()
        self._names: dict[str, str] = {}
        ids: dict[str, int] = {}
        for number, token in sorted(backend.get_added_tokens_decoder().items()):
            name = f"<{secret}-{next(numbers)}>" if token.content in special else token.content
            if token.content in special:
                self._names[token.content] = name
            ids[name] = number
            self._add(_with_name(token, name), special=token.special)
        # The second tokenizer numbers added tokens in its own way.
        self._ids = {self._tokenizer.token_to_id(name): number for name, number in ids.items()}
        self._special = frozenset(ids[name] for name in self._names.values())

    def _add(self, token: AddedToken, *, special: bool) -> None:
        if special:
            self._tokenizer.add_special_tokens([token])
        else:
            self._tokenizer.add_tokens([token])

    def encode(self, parts: list[tuple[str, bool]], *, add_special_tokens: bool) -> list[int]:
        """Return the ids, in the numbers of the original tokenizer, of texts and control tokens."""
        text = "".join(self._names[part] if is_control else part for part, is_control in parts)
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return list(self._original(encoding))

    def _original(self, encoding: Encoding) -> Iterator[int]:
        for number, is_added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if is_added:  # such as the first token of every text
                yield number
            elif number in self._ids:
                yield self._ids[number]
            elif number in self._special:
                # A vocabulary such as Llama 2's can build </s> from smaller tokens.
                yield from self._spelled(number)
            else:
                yield number

    def _spelled(self, number: int) -> Iterator[int]:
        """Yield the text of a special token as the longest other tokens of the vocabulary."""
        whole = remaining = str(self._backend.id_to_token(number))
        find = self._backend.model.token_to_id
        while remaining:
            heads = (remaining[:n] for n in range(min(len(remaining), len(whole) - 1), 0, -1))
            head = next((h for h in heads if find(h) not in {None, *self._special}), None)
            if head is None:
                raise PromptError(
                    f"This model cannot read {whole} as text. Remove it from the prompt,"
                    " or load the model with --special-tokens."
                )
            yield find(head)
            remaining = remaining[len(head) :]


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    """Return a tokenizer with the model and the steps of another one, without its added tokens."""
    from tokenizers import Tokenizer

    made = Tokenizer(backend.model)
    for step in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(backend, step) is not None:
            setattr(made, step, getattr(backend, step))
    # Added tokens are numbered from the size of the vocabulary on, which may have gaps.
    vocabulary = made.get_vocab(with_added_tokens=False)
    gap = max(vocabulary.values(), default=-1) + 1 - len(vocabulary)
    made.add_tokens([f"<{secrets.token_hex(16)}>" for _ in range(gap)])
    return made


def _with_name(token: AddedToken, name: str) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _expression(token: AddedToken) -> str:
    text = re.escape(token.content)
    return rf"(?<!\w){text}(?!\w)" if token.single_word else text


def _is_control(token: str, written: str) -> bool:
    """Return whether an added token has the form of a control token or is `written` as one."""
    text = token.strip()
    # Ordinary words and runs of blanks may be added tokens, too.
    if text in _REASONING or not text or text[0].isalnum():
        return False
    return _CONTROL.fullmatch(text) is not None or token in written


def _split(
    text: str, delimiters: Delimiters, pattern: re.Pattern[str]
) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text in order, each with whether it is a control token."""
    before, after = delimiters
    without_delimiters = str.maketrans("", "", before + after)
    end = 0
    for found in pattern.finditer(text):
        if text[found.start() - 1 : found.start()] == before and text.startswith(
            after, found.end()
        ):
            continue
        yield text[end : found.start()].translate(without_delimiters), False
        yield found[0], True
        end = found.end()
    yield text[end:].translate(without_delimiters), False


def _unused(text: str) -> Delimiters:
    """Return two private characters that do not occur in a text."""
    used = set(text)
    unused = (character for character in map(chr, _PRIVATE) if character not in used)
    return next(unused), next(unused)
