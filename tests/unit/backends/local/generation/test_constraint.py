"""An answer with a structure has its form, and is otherwise the answer of the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import AwareDatetime, BaseModel, NaiveDatetime, TypeAdapter
from tokenizers import AddedToken
from transformers import AutoTokenizer

from llm_magic.backends.local.generation import generate, grammar
from llm_magic.backends.local.generation.constraint import Constraint, Grammars
from llm_magic.backends.local.generation.cuda_graph import StaticDecoder
from llm_magic.backends.schema_variants import closed
from llm_magic.errors import GenerationStopped, InvalidReply, MissingDependency, OptionError
from llm_magic.session import Session
from llm_magic.session.requests import Request
from llm_magic.types import Reply, Structure
from tests.local_models import forward_sizes, local_model, local_session
from tests.tiny_models import Architecture, tiny, tiny_llama

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "married": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "married", "tags"],
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
    {"enum": ["red", "green", 3, None]},
    {"anyOf": [{"type": "integer", "maximum": 99, "minimum": 0}, {"type": "null"}]},
    {"type": "string", "format": "date"},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
            }
        },
        "$ref": "#/$defs/node",
    },
    {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "a"}, "x": {"type": "null"}},
                "required": ["kind", "x"],
            },
            {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]},
        ]
    },
]


class Mood(Enum):
    JOY = "joy"
    FEAR = "fear"


PROMPT = "Describe Ada Lovelace, who was 36 years old."
ANYTHING = Structure("regex", r"(?s:.*)")


def schema(value: dict[str, Any]) -> Structure:
    """Return the structure of a schema whose objects are closed, as those of typed answers are."""
    return Structure("json_schema", json.dumps(closed(value)))


def reply_of(session: Session, prompt: str, structure: Structure, **options: Any) -> Reply:
    """Return an answer with a structure, also one that was cut; the prompt does not describe it."""
    options = {"repetition_penalty": 1, **options, "structure": structure}
    return session.ask(Request(prompt, options=options)).result()


def text_of(session: Session, prompt: str, structure: Structure, **options: Any) -> str:
    reply = reply_of(session, prompt, structure, **options)
    assert reply.finish_reason in {"stop", "length"}
    return str(reply)


@pytest.fixture(scope="module")
def smollm(model_cache: Path) -> Iterator[Session]:
    """A session with the bundled model."""
    with local_session(max_new_tokens=96) as session:
        session.load(dtype="float32")
        yield session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(max_new_tokens=64, repetition_penalty=1) as session:
        yield session


@pytest.fixture
def llama(session: Session, tmp_path: Path) -> Session:
    """A session with a random model, which writes anything that it may."""
    session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
    return session


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answer_of_the_bundled_model_has_its_form(smollm: Session, temperature: float) -> None:
    about = {"temperature": temperature, "seed": 3}
    reply = smollm.generate(PROMPT, schema=PERSON, **about)  # type: ignore[arg-type]
    assert reply.finish_reason == "stop"
    jsonschema.validate(reply.json(), PERSON)
    assert reply.startswith('{"name": "')
    pattern = r"(Yes|No), [a-z ]{3,20}\."
    assert re.fullmatch(pattern, smollm.generate("Is it late?", regex=pattern, **about))  # type: ignore[arg-type]
    lark = 'start: "Year " NUMBER\nNUMBER: /[0-9]{4}/'
    year = smollm.generate("When?", grammar=lark, **about)  # type: ignore[arg-type]
    assert re.fullmatch("Year [0-9]{4}", year)


@pytest.mark.parametrize("value", SCHEMAS, ids=json.dumps)
@pytest.mark.parametrize("temperature", [0, 0.7, 1.5])
def test_answer_of_a_random_model_is_valid(
    llama: Session, value: dict[str, Any], temperature: float
) -> None:
    about: dict[str, Any] = {"structure": schema(value), "temperature": temperature}
    for seed in range(3):
        reply = reply_of(llama, "x", **about, seed=seed, max_new_tokens=200)
        if reply.finish_reason == "stop":
            jsonschema.validate(reply.json(), value)
        else:
            assert value in SCHEMAS[1:2] + SCHEMAS[6:7], "only lists of objects may take so long"


@pytest.mark.parametrize("seed", range(3))
def test_times_have_a_zone_or_none(smollm: Session, seed: int) -> None:
    class Flight(BaseModel):
        start: NaiveDatetime
        end: AwareDatetime
        call: datetime

    about: dict[str, Any] = {"temperature": 1.5, "seed": seed, "max_new_tokens": 200}
    flight = smollm.generate("When is the next flight?", schema=Flight, **about).value
    assert flight.start.tzinfo is None
    assert flight.end.tzinfo is not None


@pytest.mark.parametrize("keys", [int, date, Literal["joy", "fear"], Mood])
def test_keys_of_a_dict_are_of_their_type(smollm: Session, keys: Any) -> None:
    about: dict[str, Any] = {"temperature": 1.5, "seed": 2, "max_new_tokens": 400}
    found = smollm.generate("Count them.", schema=dict[keys, Literal[1, 2]], **about).value
    TypeAdapter(dict[keys, int]).validate_python(found, strict=True)


@pytest.mark.parametrize("about", [{"temperature": 0}, {"temperature": 0.9, "seed": 5}])
def test_form_that_allows_everything_changes_nothing(
    smollm: Session, about: dict[str, Any]
) -> None:
    free = smollm.generate(PROMPT, **about, repetition_penalty=1, max_new_tokens=24)
    assert text_of(smollm, PROMPT, ANYTHING, **about, max_new_tokens=24) == free


def test_default_repetition_penalty_is_not_applied(smollm: Session) -> None:
    options: dict[str, Any] = {"temperature": 0, "regex": ANYTHING.source, "max_new_tokens": 24}

    def text(**about: Any) -> str:
        with pytest.raises(InvalidReply):
            smollm.generate(PROMPT, **options, **about)
        return str(smollm.last)

    assert text(repetition_penalty=1) == text()
    assert text(repetition_penalty=2) != text()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_forced_text_saves_passes_and_changes_nothing(
    smollm: Session, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    about: dict[str, Any] = {"structure": schema(PERSON), "temperature": temperature, "seed": 1}
    with forward_sizes(smollm) as sizes:
        reply = reply_of(smollm, PROMPT, **about)
    tokens = reply.usage.completion_tokens
    assert tokens is not None
    assert len(sizes) < tokens * 0.8
    monkeypatch.setattr(generate, "drafter", lambda *_: None)
    with forward_sizes(smollm) as sizes:
        assert reply_of(smollm, PROMPT, **about) == reply
    assert len(sizes) == tokens


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3_text", "lfm2"])
def test_speculative_tokens_change_nothing(
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: Architecture,
) -> None:
    session.load(str(tiny(tmp_path / "m", architecture)), dtype="float32")
    cases = [(schema(value), seed) for value in SCHEMAS for seed in range(2)]
    expected = [text_of(session, "x", s, seed=seed) for s, seed in cases]
    monkeypatch.setattr(generate, "drafter", lambda *_: None)
    assert [text_of(session, "x", s, seed=seed) for s, seed in cases] == expected


def test_assistant_changes_nothing(session: Session, tmp_path: Path) -> None:
    large = tiny_llama(tmp_path / "large", layers=4)
    twin = tiny_llama(tmp_path / "twin", layers=4)
    other = tiny(tmp_path / "other", "gemma3_text", layers=2, seed=3)
    texts = []
    for assistant in (None, str(twin), str(other)):
        session.load(str(large), dtype="float32", assistant=assistant)
        texts.append(
            [
                text_of(session, "x", schema(value), seed=seed, temperature=temperature)
                for value in SCHEMAS[:3]
                for seed, temperature in ((1, 0), (2, 1.0))
            ]
        )
    assert texts[0] == texts[1] == texts[2]


def test_steps_of_fixed_shape_change_nothing(llama: Session) -> None:
    def texts() -> list[str]:
        return [text_of(llama, "x", schema(v), temperature=0) for v in SCHEMAS]

    usual = texts()
    loaded = local_model(llama)
    loaded.static_decoder = StaticDecoder(loaded.model, compiled=False, forced=True)
    assert texts() == usual
    # The graph of another answer is not the one with a mask.
    free = llama.generate("x", temperature=0)
    loaded.static_decoder = StaticDecoder(loaded.model, compiled=False)
    assert llama.generate("x", temperature=0) == free


def test_answer_from_a_cached_prefix_is_the_same(smollm: Session) -> None:
    local_model(smollm).prefill_chunk_size.tokens = 16
    about: dict[str, Any] = {"structure": schema(PERSON), "temperature": 0}
    first = reply_of(smollm, f"{PROMPT} Use JSON.", **about)
    again = reply_of(smollm, f"{PROMPT} Use JSON.", **about)
    assert again == first
    assert again.usage.cached_tokens


def test_answer_that_reaches_the_limit_is_an_error_with_its_text(smollm: Session) -> None:
    with pytest.raises(InvalidReply) as caught:
        smollm.generate(PROMPT, schema=PERSON, max_new_tokens=5, temperature=0)
    assert str(caught.value).startswith(
        "The answer does not fit the schema: it is not complete. It was cut off at the token limit: use a"
        " higher --max-new-tokens."
    )
    assert isinstance(caught.value.reply, Reply)
    assert caught.value.reply.startswith('{"name": "')
    assert smollm.last == caught.value.reply


def test_stop_text_inside_the_form_is_an_error(smollm: Session) -> None:
    with pytest.raises(
        InvalidReply, match="The answer does not fit the schema: it is not complete"
    ):
        smollm.generate(PROMPT, schema=PERSON, stop=['"age"'])
    pattern = Structure("regex", "one( two( three)?)?")
    assert text_of(smollm, "Count.", pattern, stop=[" two"]) in {"one", "one "}


def test_cancelled_answer_is_no_error_of_the_form(llama: Session) -> None:
    chunks = llama.stream("x", regex=ANYTHING.source)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert llama.last is not None
    assert llama.last.finish_reason == "cancelled"
    assert not isinstance(llama.last, GenerationStopped)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (schema({"not": {"type": "string"}}), "schema cannot be used: not cannot be enforced"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems cannot be enforced"),
        (schema({"type": "strin"}), "Invalid type: strin"),
        (schema({"type": "string", "format": "song"}), "Unknown format: song"),
        (schema({"type": "integer", "minimum": 5, "maximum": 1}), "Unsatisfiable schema"),
        (schema({"type": "integer", "minimum": "5"}), "Expected"),
        (schema({"type": "integer", "exclusiveMaximum": [1]}), "Expected"),
        (schema({"$ref": "https://example.com/a.json"}), "is not present in a registry"),
        (Structure("json_schema", "{"), "it is not valid JSON"),
        (Structure("json_schema", "[1]"), "it is no JSON object"),
        (Structure("regex", "(a"), "regex cannot be used: unclosed group"),
        (Structure("regex", r"(?=a)b"), "look-around"),
        (Structure("grammar", "start: other"), 'unknown name: "other"'),
        (Structure("grammar", 'root ::= "a"'), "grammar cannot be used"),
        (Structure.choice([]), "choice needs different labels"),
        (Structure.choice(["a", "a"]), "choice needs different labels"),
    ],
    ids=repr,
)
def test_form_that_cannot_be_enforced_is_an_error_before_the_call(
    llama: Session, structure: Structure, message: str
) -> None:
    with forward_sizes(llama) as sizes, pytest.raises(OptionError) as caught:
        text_of(llama, "x", structure)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sizes == []


def nested(depth: int) -> Structure:
    opened = '{"type": "object", "properties": {"a": '
    return Structure("json_schema", opened * depth + "{}" + "}}" * depth)


UNION = [
    {"type": "object", "properties": {f"a{n}{m}": {"type": "null"}}} for n in range(4) for m in "xy"
]


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (nested(10_000), "schema cannot be used: it has"),
        (nested(5_000), "it is nested too deeply"),
        (nested(200), "it is nested too deeply"),
        (schema({"enum": ["x" * 1_000_000]}), "characters, of at most"),
        (schema({"properties": {f"a{n}": {} for n in range(5000)}}), "more than 1,000 properties"),
        (schema({"anyOf": [{} for _ in range(20_000)]}), "more than 10,000 schemas"),
        (
            schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
            "it starts with an endless text: an object requires itself",
        ),
        (
            schema(
                {"allOf": [{"type": "string", "pattern": f"a.{{{n},400}}c"} for n in range(30)]}
            ),
            "it combines more than 4 patterns by allOf",
        ),
        (
            schema({"$defs": {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(900)}}),
            "more than 400 references",
        ),
        (Structure("grammar", "start: " + "r " * 10_000), "more than 16,384 characters"),
        (schema({"allOf": [{"anyOf": UNION} for _ in range(8)]}), "schema too large"),
    ],
    ids=[
        "deep",
        "deep json",
        "deep schema",
        "1 MB",
        "properties",
        "union",
        "endless",
        "patterns",
        "chain",
        "grammar",
        "product",
    ],
)
def test_hostile_schema_is_refused(llama: Session, structure: Structure, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        text_of(llama, "x", structure)


def test_missing_package_is_named(llama: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependency, match=r"--regex of a local model needs llguidance\."):
        llama.generate("x", regex="never compiled before")


# -- reasoning --------------------------------------------------------------------------------


def constraint_of(model_cache: Path, *, tokens: bool, opened: bool) -> tuple[Any, Constraint]:
    """Return a tokenizer, with tokens around reasoning or without, and a constraint."""
    (folder,) = (path.parent for path in model_cache.glob("**/SmolLM2*/tokenizer.json"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if tokens:
        tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>")])
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    return tokenizer, grammars.constraint(schema(PERSON), in_reasoning=opened)


VALID = '{"name": "Ada", "age": 36, "married": true, "tags": []}'


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize(
    ("opened", "text"),
    [
        (True, 'I think of {"name": 5}, or </th>.\n</think>\n\n' + VALID),
        (True, "</think>" + VALID),
        (False, "<think>\nHm.\n</think>\n\n" + VALID),
        (False, VALID),
    ],
)
def test_reasoning_is_free_and_the_answer_has_its_form(
    model_cache: Path, tokens: bool, opened: bool, text: str
) -> None:
    tokenizer, constraint = constraint_of(model_cache, tokens=tokens, opened=opened)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not tokens and not opened and text != VALID:
        # This model has no reasoning.
        assert constraint.valid(ids) == []
        return
    assert constraint.valid(ids) == ids
    for token in ids[:-1]:
        constraint.append(token)
        assert not constraint.is_over
    constraint.append(ids[-1])
    assert constraint.is_over
    assert constraint.is_complete


def test_reasoning_alone_is_no_answer(model_cache: Path) -> None:
    tokenizer, constraint = constraint_of(model_cache, tokens=True, opened=True)
    for token in tokenizer("It ends: " + VALID, add_special_tokens=False).input_ids:
        constraint.append(token)
    assert not constraint.is_complete
    excluded = constraint.excluded(len(tokenizer) + 3)
    assert excluded[tokenizer.eos_token_id]
    assert not excluded[tokenizer.convert_tokens_to_ids("</think>")]
    # Scores without a token, which some models have.
    assert excluded[-3:].all()
