"""The tables of the documentation about hosted providers, made from `llm_magic.config.providers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from llm_magic.backends.base import Backend
from llm_magic.backends.registry import backend_class
from llm_magic.backends.remote.base import RemoteBackend
from llm_magic.backends.remote.token_logprobs import TOP, requested
from llm_magic.config.providers import PROVIDERS, Provider
from llm_magic.config.settings import GenerationOptions
from llm_magic.types import Structure

_FORMS = (
    Structure("json_schema", '{"type": "object", "properties": {}}'),
    Structure.choice(("yes", "no")),
    Structure("regex", "a"),
    Structure("grammar", "a"),
)
_OPTIONS = [name for name in GenerationOptions.model_fields if name != "extra"]


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(*rows: Iterable[str]) -> str:
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "| --- " * (head.count(" | ") + 1) + "|", *others, ""])


def _differences(provider: Provider) -> Iterator[str]:
    """Yield where a provider differs from OpenAI, besides the options that it does not have."""
    for option, field in provider.fields.items():
        if field not in _OPTIONS:
            yield f"`{option}` is sent as `{field}`"
    if provider.max_temperature < 2:
        yield f"a temperature above {provider.max_temperature:g} is an error"
    if provider.is_temperature_or_top_p:
        yield "`top_p` is sent only if you set it"
    if provider.key_path:
        yield "the options differ by model"
    if provider.note:
        yield "[thinking](#deepseek)"


def _addresses() -> str:
    rows = [
        (_code(p.name), f"[{p.title}]({p.page})", _code(p.url), _code(p.key_variable))
        for p in PROVIDERS.values()
    ]
    return _table(("`-b`", "provider", "address", "key"), *rows)


def _options() -> str:
    rows = [
        (
            _code(p.name),
            ", ".join(map(_code, p.unsupported)),
            "; ".join(_differences(p)),
        )
        for p in PROVIDERS.values()
    ]
    return _table(("`-b`", "no such option", "what is different"), *rows)


def _fields() -> str:
    rows = [
        [_code(name), *_cells(name)]
        for name in ("local", "ollama", "vllm", "instructlab", *PROVIDERS)
    ]
    return _table(("backend", *map(_code, _OPTIONS)), *rows)


def _cells(name: str) -> Iterator[str]:
    backend = backend_class(name)
    for option in _OPTIONS:
        yield _code(backend.option_names[option]) if backend.supports(option) else "no"


def _structures() -> str:
    names = ("local", "llamacpp", "ollama", "vllm", "instructlab", *PROVIDERS)
    rows = [[_code(name), *_enforced(backend_class(name))] for name in names]
    return _table(("backend", *(_code(f"--{kind.option}") for kind in _FORMS)), *rows)


def _enforced(backend: type[Backend]) -> Iterator[str]:
    """Yield how a backend enforces each form."""
    for form in _FORMS:
        if form.kind not in backend.capabilities.structures:
            yield "" if form.kind == "grammar" else "`--schema-by prompt`"
        elif backend.name == "instructlab" and form.kind in {"regex", "grammar"}:
            yield "`structured_outputs`, on vLLM"
        elif issubclass(backend, RemoteBackend):
            yield ", ".join(map(_code, backend.structure_fields(form)))
        else:
            yield "while it generates"


def _logprobs() -> str:
    names = ("local", "llamacpp", "ollama", "vllm", "instructlab", *PROVIDERS)
    rows = [[_code(name), _reported(backend_class(name))] for name in names]
    return _table(("backend", "`--logprobs`"), *rows)


def _reported(backend: type[Backend]) -> str:
    """Return how a backend reports the probabilities of tokens."""
    if not backend.supports("logprobs"):
        return "no"
    if not issubclass(backend, RemoteBackend):
        return "while it generates"
    return ", ".join(map(_code, requested({TOP: 1})))


def _settings() -> str:
    rows = [(_code(p.url_variable), _code(p.url), _code(p.name)) for p in PROVIDERS.values()]
    return _table(("variable", "default", "backend"), *rows)


PROVIDER_TABLES: Mapping[str, Callable[[], str]] = {
    "addresses": _addresses,
    "options": _options,
    "fields": _fields,
    "settings": _settings,
    "structures": _structures,
    "logprobs": _logprobs,
}
