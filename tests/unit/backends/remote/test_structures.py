"""Typed answers on servers: what is sent, what comes back, and answers that are not what was requested."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, field_validator

from llm_magic.config.providers import PROVIDERS
from llm_magic.errors import InvalidReply, OptionError, RequestFailed
from llm_magic.session import Session
from tests.fault_server import CHAT, FaultServer
from tests.http_server import HttpServer
from tests.ollama_server import OllamaServer
from tests.provider_server import APIS, KEY, ProviderServer
from tests.remote_sessions import OLLAMA_CHAT, questions, session_on
from tests.wire import error_answer, ndjson, sse_words


class Person(BaseModel):
    name: str
    age: int = 0


class Adult(Person):
    @field_validator("age")
    @classmethod
    def _is_adult(cls, age: int) -> int:
        if age < 18:
            raise ValueError("too young")
        return age


class Color(Enum):
    RED = "red"
    GREEN = "green"


OBJECT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"title": "Name", "type": "string"},
        "age": {"title": "Age", "type": "integer"},
    },
    "required": ["name", "age"],
    "title": "Person",
    "additionalProperties": False,
}
# As pydantic describes it: the default is optional.
LOOSE = {
    **OBJECT,
    "properties": {**OBJECT["properties"], "age": {**OBJECT["properties"]["age"], "default": 0}},
    "required": ["name"],
}
ENUM = {"type": "string", "enum": ["red", "green"]}
ADA = '{"name": "Ada", "age": 36}'


def wrapped(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": {"answer": schema}, "required": ["answer"],
        "additionalProperties": False,
    }  # fmt: skip


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def loose(schema: dict[str, Any]) -> dict[str, Any]:
    named = {"name": "answer", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def answer(server: HttpServer, *texts: str, finish: str = "stop") -> None:
    """Let a server give these answers, one after the other, in two pieces each."""
    for text in texts:
        middle = len(text) // 2
        if isinstance(server, OllamaServer):
            pieces = [
                {"model": "m", "message": {"role": "assistant", "content": part}, "done": False}
                for part in (text[:middle], text[middle:])
            ]
            server.will(OLLAMA_CHAT, *ndjson(*pieces, {"done": True, "done_reason": finish}))
        else:
            server.will(
                CHAT, *sse_words(text[:middle], text[middle:], finish=finish, prompt_tokens=7)
            )


def last_prompt(server: HttpServer) -> str:
    return str(questions(server)[-1].json["messages"][-1]["content"])


# -- what is sent -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "options", "text", "fields", "value"),
    [
        ("vllm", {"schema": Person}, ADA,
         {"structured_outputs": {"json": LOOSE}}, Person(name="Ada", age=36)),
        ("vllm", {"schema": list[int]}, "[1, 2]",
         {"structured_outputs": {"json": {"items": {"type": "integer"}, "type": "array"}}}, [1, 2]),
        ("vllm", {"choice": Color}, "red", {"structured_outputs": {"choice": ["red", "green"]}}, Color.RED),
        ("vllm", {"regex": r"\d{4}"}, "1815", {"structured_outputs": {"regex": r"\d{4}"}}, "1815"),
        ("vllm", {"grammar": "root ::= \"a\"\n"}, "a",
         {"structured_outputs": {"grammar": "root ::= \"a\"\n"}}, "a"),
        ("openai", {"schema": Person}, ADA, strict(OBJECT), Person(name="Ada", age=36)),
        ("openai", {"schema": Color}, '{"answer": "red"}',
         strict(wrapped({**ENUM, "title": "Color"})), Color.RED),
        ("openai", {"choice": "red,green"}, '{"answer": "green"}', strict(wrapped(ENUM)), "green"),
        ("llamacpp-server", {"schema": Person}, ADA, loose(LOOSE), Person(name="Ada", age=36)),
        ("llamacpp-server", {"choice": ["red", "gr\"een"]}, "red",
         {"grammar": r'root ::= "red" | "gr\"een"'}, "red"),
        ("llamacpp-server", {"grammar": "root ::= \"a\"\n"}, "a", {"grammar": "root ::= \"a\"\n"}, "a"),
        ("lmstudio", {"choice": "red,green"}, '{"answer": "red"}', loose(wrapped(ENUM)), "red"),
        ("instructlab", {"schema": Person}, ADA,
         {"response_format": {"type": "json_object", "schema": LOOSE}}, Person(name="Ada", age=36)),
        ("instructlab", {"choice": "red,green"}, '"red"',
         {"response_format": {"type": "json_object", "schema": ENUM}}, "red"),
    ],
)  # fmt: skip
def test_server_gets_structure_and_reply_gets_value(
    server: FaultServer,
    backend: str,
    options: dict[str, Any],
    text: str,
    fields: dict[str, Any],
    value: object,
) -> None:
    answer(server, text)
    with session_on(server, backend) as session:
        reply = session.generate("Who?", **options)
    assert (reply.value, type(reply.value)) == (value, type(value))
    assert reply.text == text
    assert fields.items() <= questions(server)[-1].json.items()


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Owner(BaseModel):
    kind: Literal["owner"]
    cat: Cat = Field(description="the oldest one")


class Found(BaseModel):
    what: Annotated[Cat | Owner, Field(discriminator="kind")]


def test_strict_schema_has_no_keyword_that_openai_rejects(server: FaultServer) -> None:
    answer(server, '{"what": {"kind": "owner", "cat": {"kind": "cat", "lives": 9}}}')
    with session_on(server, "openai") as session:
        reply = session.generate("Who?", schema=Found)
    assert reply.value.what.cat.lives == 9
    text = json.dumps(questions(server)[-1].json["response_format"])
    assert not {"oneOf", "discriminator", "default", "allOf"} & set(re.findall(r"\w+", text))
    assert '{"anyOf": [{"$ref": "#/$defs/Cat"}], "description": "the oldest one"}' in text


@pytest.mark.parametrize(
    ("options", "text", "format", "value"),
    [
        ({"schema": Person}, ADA, LOOSE, Person(name="Ada", age=36)),
        (
            {"schema": "name, age int"},
            ADA,
            {**OBJECT, "title": "Answer"},
            {"name": "Ada", "age": 36},
        ),
        ({"choice": Color}, '"green"', ENUM, Color.GREEN),
    ],
)
def test_ollama_gets_format(
    options: dict[str, Any], text: str, format: dict[str, Any], value: object
) -> None:
    with OllamaServer() as server, session_on(server, "ollama") as session:
        answer(server, text)
        assert session.generate("Who?", **options).value == value
        assert questions(server)[-1].json["format"] == format


def test_instructlab_on_vllm_gets_fields_of_vllm() -> None:
    with FaultServer({"tiny": {"owned_by": "vllm"}}) as server:
        answer(server, "1815")
        with session_on(server, "instructlab") as session:
            session.generate("When?", regex=r"\d+")
        assert questions(server)[-1].json["structured_outputs"] == {"regex": r"\d+"}


def test_prompt_ends_with_compact_schema_and_chat_does_not_keep_it(server: FaultServer) -> None:
    answer(server, ADA, ADA)
    with session_on(server) as session:
        reply = session.generate("Who?", schema=Person, chat="c")
        session.generate("And who else?", chat="c")
    first, second = (question.json["messages"] for question in questions(server))
    schema = (
        '{"properties":{"name":{"type":"string"},"age":{"type":"integer"}},"required":["name"],'
        '"type":"object"}'
    )
    assert first[-1]["content"] == f"Who?\n\nAnswer only with JSON that fits this schema: {schema}"
    assert reply.messages[-1].content == first[-1]["content"]
    assert [m["content"] for m in second] == ["Who?", ADA, "And who else?"]


def test_default_penalty_is_not_sent_with_a_type(server: FaultServer) -> None:
    answer(server, ADA, ADA, ADA)
    with session_on(server) as session:
        session.generate("Who?", schema=Person)
        assert questions(server)[-1].json["repetition_penalty"] == 1
        session.generate("Who?", schema=Person, repetition_penalty=1.3)
        assert questions(server)[-1].json["repetition_penalty"] == 1.3
        session.generation.repetition_penalty = 1.2
        session.generate("Who?", schema=Person)
        assert questions(server)[-1].json["repetition_penalty"] == 1.2


def test_prompt_ends_with_labels(server: FaultServer) -> None:
    answer(server, "red")
    with session_on(server) as session:
        session.generate("Which?", choice=Color)
    assert last_prompt(server) == "Which?\n\nAnswer only with one of: red, green"


@pytest.fixture(scope="module")
def providers() -> Iterator[ProviderServer]:
    with ProviderServer() as running:
        yield running


@pytest.fixture
def at_provider(providers: ProviderServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    providers.received.clear()
    for name, value in providers.environment().items():
        monkeypatch.setenv(name, value)
    made = Session()
    yield made
    made.close()


@pytest.mark.parametrize("name", [n for n, p in PROVIDERS.items() if p.structures])
def test_provider_accepts_schema(
    at_provider: Session, providers: ProviderServer, name: str
) -> None:
    assert KEY
    at_provider.load(next(iter(APIS[name].models)), backend=name)
    providers.will(providers.chat(name), *sse_words(ADA))
    if name == "openrouter":
        # Its list names the parameters of each model, and structured_outputs is not among them.
        with pytest.raises(OptionError, match="cannot enforce --schema"):
            at_provider.generate("Who?", schema=Person)
        return
    assert at_provider.generate("Who?", schema=Person).value == Person(name="Ada", age=36)
    sent = providers.requests_to(providers.chat(name))[-1].json
    assert sent["response_format"]["type"] == "json_schema"
    assert providers.silently_changed == []


# -- errors before the call -------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, p in PROVIDERS.items() if not p.structures])
def test_provider_without_schemas_is_an_error_before_the_call(
    at_provider: Session, providers: ProviderServer, name: str
) -> None:
    at_provider.load(next(iter(APIS[name].models)), backend=name)
    with pytest.raises(OptionError, match="add --schema-by prompt"):
        at_provider.generate("Who?", schema=Person)
    assert providers.requests_to(providers.chat(name)) == []


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("openai", {"regex": "a+"}, "openai cannot enforce --regex."),
        ("openai", {"grammar": "start: \"a\"\n"}, "openai cannot enforce --grammar."),
        ("openai", {"schema": dict[str, int]}, "cannot enforce an object with any fields"),
        ("openai", {"schema": Person, "extra": {"response_format": {}}},
         "-p response_format is set by --schema."),
        ("instructlab", {"regex": "a+"}, "tiny on instructlab cannot enforce --regex."),
        ("vllm", {"schema": Person, "extra": {"structured_outputs": {}}}, "-p structured_outputs is set by"),
    ],
)  # fmt: skip
def test_impossible_structure_is_an_error_before_the_call(
    server: FaultServer, backend: str, options: dict[str, Any], message: str
) -> None:
    with session_on(server, backend) as session, pytest.raises(OptionError) as caught:
        session.generate("Who?", **options)
    assert message in str(caught.value)
    assert questions(server) == []


def test_server_that_rejects_the_field_is_named_with_the_way_around(server: FaultServer) -> None:
    server.will(CHAT, *error_answer(400, "Unsupported parameter: response_format"))
    with session_on(server, "openai") as session, pytest.raises(RequestFailed) as caught:
        session.generate("Who?", schema=Person)
    assert "add --schema-by prompt" in str(caught.value)


# -- answers that are not what was requested --------------------------------------------------

DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": 3}', "The answer does not fit Person: name: Input should be a valid string."),
        ('{"name": "Ada", "age": "old"}', "age: Input should be a valid integer"),
        ("{}", "name: Field required."),
        (f"Sure! Here it is: {ADA}", "it is not JSON:"),
        (f"{ADA} I hope this helps.", "it is not JSON: there is text after the value"),
        ('{"name": "Ada', "it is not JSON: a string is not closed"),
        ('{"name": "Ada", "age": NaN}', "NaN is not JSON"),
        ('{"name": "Ada", "age": 1e999}', "1e999 is too large"),
        (f'{{"name": "Ada", "age": {"9" * 5000}}}', "it is not JSON: Exceeds the limit"),
        (DEEP, "it is nested too deeply"),
        ('{"name": "\\ud800"}', "Invalid JSON: unexpected end of hex escape"),
        (json.dumps({"name": ["x" * 100_000]}), "name: Input should be a valid string"),
        ('{"\x1b[2Jname": 1}', "it is not JSON: invalid control character"),
    ],
)  # fmt: skip
def test_hostile_answer_is_an_error_that_keeps_the_text(
    server: FaultServer, text: str, problem: str
) -> None:
    answer(server, text)
    with session_on(server) as session:
        with pytest.raises(InvalidReply) as caught:
            session.generate("Who?", schema=Person)
        assert session.last == text
    message = str(caught.value)
    assert problem in message
    assert "The text is in llm.last." in message
    assert len(message) < 1_000
    assert "\x1b" not in message
    assert caught.value.reply is not None
    assert caught.value.reply.text == text
    assert caught.value.reply.value is None


def test_empty_answer_is_an_error(server: FaultServer) -> None:
    answer(server, "")
    with session_on(server) as session, pytest.raises(InvalidReply) as caught:
        session.generate("Who?", schema=Person)
    assert "it is not JSON" in str(caught.value)
    assert "llm.last" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"choice": "red,green"}, "blue"),
        ({"choice": "red,green"}, "red, I think"),
        ({"regex": r"\d{4}"}, "18155"),
    ],
)
def test_answer_that_is_no_label_and_no_match_is_an_error(
    server: FaultServer, options: dict[str, Any], text: str
) -> None:
    answer(server, text)
    with session_on(server) as session, pytest.raises(InvalidReply, match="does not fit the"):
        session.generate("Which?", **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schema": Person}, '{"name": "Ad'),
        ({"schema": int}, "12"),
        ({"choice": ["red", "red wine"]}, "red"),
        ({"regex": r"\d+"}, "12"),
        ({"grammar": "start: /a+/\n"}, "aa"),
    ],
)
def test_cut_answer_is_an_error_with_the_reason(
    server: FaultServer, options: dict[str, Any], text: str
) -> None:
    answer(server, text, finish="length")
    with session_on(server) as session, pytest.raises(InvalidReply) as caught:
        session.generate("Who?", **options)
    assert "it is not complete. It was cut off at the token limit" in str(caught.value)
    assert caught.value.reply == text


def test_whole_json_at_the_limit_is_valid(server: FaultServer) -> None:
    answer(server, ADA, finish="length")
    with session_on(server) as session:
        assert session.generate("Who?", schema=Person).value == Person(name="Ada", age=36)


def test_stream_raises_for_invalid_answer(server: FaultServer) -> None:
    answer(server, "{}")
    with session_on(server) as session, pytest.raises(InvalidReply, match="name: Field required"):
        for _ in session.stream("Who?", schema=Person):
            pass


# -- schema_by="prompt" -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["vllm", "openai"])
def test_invalid_answer_gets_one_second_try_with_the_problem(
    server: FaultServer, backend: str
) -> None:
    answer(server, "Ada is 12.", ADA)
    with session_on(server, backend) as session:
        reply = session.generate("Who?", schema=Person, schema_by="prompt")
        assert session.usage().total.answers == 1
    first, second = (question.json for question in questions(server))
    assert not first.keys() & {"structured_outputs", "response_format"}
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == "Ada is 12."
    complaint = second["messages"][2]["content"]
    assert complaint.startswith("This is invalid: it is not JSON:")
    assert "Answer only with JSON that fits this schema" in complaint
    assert (reply.text, reply.value) == (ADA, Person(name="Ada", age=36))
    assert reply.retry.startswith("it is not JSON")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (14, 4)


def test_second_invalid_answer_is_an_error(server: FaultServer) -> None:
    answer(server, "no", '{"name": "Ada", "age": 7}')
    with session_on(server) as session, pytest.raises(InvalidReply) as caught:
        session.generate("Who?", schema=Adult, schema_by="prompt")
    assert "age: Value error, too young" in str(caught.value)
    assert len(questions(server)) == 2


@pytest.mark.parametrize(
    ("options", "text", "value"),
    [
        ({"schema": Person}, f"Here:\n```json\n{ADA}\n```\n", Person(name="Ada", age=36)),
        ({"schema": {"type": "object"}}, 'Sure: {"a": [1]}', {"a": [1]}),
        ({"choice": Color}, " **Red**. ", Color.RED),
        ({"regex": r"\d{4}"}, '"1815"', "1815"),
    ],
)
def test_usual_wrappings_of_an_answer_are_removed(
    server: FaultServer, options: dict[str, Any], text: str, value: object
) -> None:
    answer(server, text)
    with session_on(server) as session:
        reply = session.generate("Who?", **options, schema_by="prompt")
    assert (reply.value, reply.retry, len(questions(server))) == (value, "", 1)


def test_cut_answer_gets_no_second_try(server: FaultServer) -> None:
    answer(server, '{"name": "Ad', finish="length")
    with session_on(server) as session, pytest.raises(InvalidReply, match="not complete"):
        session.generate("Who?", schema=Person, schema_by="prompt")
    assert len(questions(server)) == 1


def test_grammar_cannot_be_described_in_the_prompt(server: FaultServer) -> None:
    with session_on(server) as session, pytest.raises(OptionError, match="cannot check --grammar"):
        session.generate("?", grammar='start: "a"\n', schema_by="prompt")


def test_prompt_that_waits_for_its_model_is_checked_again(server: FaultServer) -> None:
    answer(server, ADA)
    with session_on(server) as session:
        session.load_later("big", backend="openai", base_url=server.url)
        assert session.generate("Who?", schema=Person).value == Person(name="Ada", age=36)
        session.load_later("tiny", backend="openai", base_url=server.url)
        with pytest.raises(OptionError, match="cannot enforce --regex"):
            session.generate("Who?", regex="a")
