"""The hosted providers and server programs with an OpenAI-compatible API: the one table of them.

Backends, key checks, messages, completion, ``%llm_doctor`` and the tables of the documentation are
made from the entries. Each entry follows the page of the provider that `page` names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from llm_magic.types import StructureKind

# In names as people write them: gpt4, claude3-haiku.
_NO_HYPHEN = re.compile(r"^(gpt(?=[3-9](?!all))|(claude|gemini|grok)(?=\d))")


def _fields(**names: str) -> Mapping[str, str]:
    return MappingProxyType(names)


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider, and where its API differs from that of OpenAI.

    Attributes:
        name: The name of the backend.
        title: The name that people use.
        url: The address of the API.
        page: The documentation of the API.
        key_variable: The environment variable of the key; a server program has none.
        start: How to start a server program.
        fields: The request fields of options that differ from those of OpenAI.
        unsupported: The options that the API does not have, or ignores.
        structures: The kinds of `Structure` that the API enforces.
        is_strict: Whether a schema has to name every field of every object.
        shows_schema: Whether the API shows a schema to the model at its own address.
        max_temperature: The highest temperature that the API does not cut.
        is_temperature_or_top_p: Whether models accept only one of these options.
        omitted: Fields of a request that the API rejects.
        list_headers: Headers of requests for the list of models; ``{key}`` stands for the key, which
            is not sent as a bearer token then.
        list_path: The path of the list of models.
        resolves_aliases: Whether a request for an alias of a model returns the model.
        id_prefix: The prefix of the names in the list, which requests must not have.
        key_path: A path that only a valid key can read, where the list of models is public.
        models: The names of models that only this provider has.
        other_names: Other names of the backend, which messages translate.
        note: What to know about its models, shown by ``%llm_load``.
    """

    name: str
    title: str
    url: str
    page: str
    key_variable: str = ""
    start: str = ""
    fields: Mapping[str, str] = field(default_factory=_fields)
    unsupported: tuple[str, ...] = ()
    structures: tuple[StructureKind, ...] = ("json_schema", "choice")
    is_strict: bool = True
    shows_schema: bool = False
    max_temperature: float = 2.0
    is_temperature_or_top_p: bool = False
    omitted: tuple[str, ...] = ()
    list_headers: Mapping[str, str] = field(default_factory=_fields)
    list_path: str = "/models"
    resolves_aliases: bool = False
    id_prefix: str = ""
    key_path: str = ""
    models: str = r"(?!)"
    other_names: tuple[str, ...] = ()
    note: str = ""

    @property
    def url_variable(self) -> str:
        """The environment variable that overrides the address."""
        return f"{self.name.upper().replace('-', '_')}_BASE_URL"

    @property
    def key_note(self) -> str:
        """The key variable in parentheses, and whether it is set; empty for a server program."""
        if not self.key_variable:
            return ""
        state = "" if os.environ.get(self.key_variable) else ", not set"
        return f" (key: {self.key_variable}{state})"

    def api_name(self, model: str) -> str:
        """Return the name of a model in the API of the provider, "" if the model is not its own."""
        found = re.fullmatch(self.models, _NO_HYPHEN.sub(r"\1-", model))
        return found["name"] if found else ""


_SAMPLING = ("top_k", "repetition_penalty")

PROVIDERS: Mapping[str, Provider] = MappingProxyType({
    provider.name: provider
    for provider in (
        Provider(
            "openai",
            "OpenAI",
            "https://api.openai.com",
            "https://platform.openai.com/docs/api-reference/chat",
            "OPENAI_API_KEY",
            unsupported=_SAMPLING,
            shows_schema=True,
            models=r"(openai[/:])?(?P<name>(gpt-[3-9]|chatgpt-|o[1-9](-|$)).*)",
            other_names=("gpt", "chatgpt", "openai-compatible", "openai-api", "compatible"),
        ),
        Provider(
            "anthropic",
            "Anthropic",
            "https://api.anthropic.com/v1",
            "https://docs.anthropic.com/en/api/openai-sdk",
            "ANTHROPIC_API_KEY",
            unsupported=(*_SAMPLING, "seed", "logprobs"),
            # This API ignores response_format.
            structures=(),
            max_temperature=1.0,
            is_temperature_or_top_p=True,
            list_headers=_fields(**{"x-api-key": "{key}", "anthropic-version": "2023-06-01"}),
            list_path="/models?limit=1000",
            resolves_aliases=True,
            models=r"(anthropic[/:])?(?P<name>claude-.+)",
            other_names=("claude",),
        ),
        Provider(
            "gemini",
            "Google Gemini",
            "https://generativelanguage.googleapis.com/v1beta/openai",
            "https://ai.google.dev/gemini-api/docs/openai",
            "GEMINI_API_KEY",
            unsupported=(*_SAMPLING, "seed", "logprobs"),
            id_prefix="models/",
            models=r"((google|models|gemini)[/:])?(?P<name>gemini-.+)",
            other_names=("google",),
        ),
        Provider(
            "mistral",
            "Mistral AI",
            "https://api.mistral.ai/v1",
            "https://docs.mistral.ai/api/",
            "MISTRAL_API_KEY",
            fields=_fields(seed="random_seed"),
            unsupported=(*_SAMPLING, "logprobs"),
            max_temperature=1.5,
            omitted=("stream_options",),
            models=(
                r"(mistral/)?(?P<name>(mistral-(tiny|small|medium|large)|codestral|pixtral-large"
                r"|(devstral|magistral)-(small|medium)|ministral-\d+b)(-latest|-\d{4})?)"
            ),
            other_names=("mistralai", "mistral-ai"),
        ),
        Provider(
            "groq",
            "Groq",
            "https://api.groq.com/openai/v1",
            "https://console.groq.com/docs/openai",
            "GROQ_API_KEY",
            unsupported=(*_SAMPLING, "logprobs"),
            models=r"(groq[/:])?(?P<name>llama-[\d.]+-\d+b-(versatile|instant))",
        ),
        Provider(
            "openrouter",
            "OpenRouter",
            "https://openrouter.ai/api/v1",
            "https://openrouter.ai/docs/api_reference/parameters",
            "OPENROUTER_API_KEY",
            fields=_fields(top_k="top_k", repetition_penalty="repetition_penalty"),
            key_path="/key",
            models=r"openrouter[/:](?P<name>.+)",
        ),
        Provider(
            "together",
            "Together AI",
            "https://api.together.ai/v1",
            "https://docs.together.ai/docs/openai-api-compatibility",
            "TOGETHER_API_KEY",
            fields=_fields(top_k="top_k", repetition_penalty="repetition_penalty"),
            # Its replies have another format.
            unsupported=("logprobs",),
            models=r"(together[/:])?(?P<name>.+-Instruct-Turbo(-Free)?)",
            other_names=("togetherai", "together-ai"),
        ),
        Provider(
            "deepseek",
            "DeepSeek",
            "https://api.deepseek.com",
            "https://api-docs.deepseek.com/api/create-chat-completion",
            "DEEPSEEK_API_KEY",
            unsupported=("top_p", *_SAMPLING, "seed"),
            # It makes JSON of any form.
            structures=(),
            models=r"(deepseek[/:])?(?P<name>deepseek-(chat|reasoner|v\d+-(flash|pro)))",
            note=(
                "While a DeepSeek model thinks, which is its default, temperature has no effect."
                ' -p thinking={"type":"disabled"} turns thinking off.'
            ),
        ),
        Provider(
            "xai",
            "xAI",
            "https://api.x.ai/v1",
            "https://docs.x.ai/docs/api-reference",
            "XAI_API_KEY",
            list_path="/language-models",
            unsupported=_SAMPLING,
            models=r"((x-ai|xai)[/:])?(?P<name>grok-(\d|beta|code).*)",
            other_names=("grok", "x-ai"),
        ),
        Provider(
            "lmstudio",
            "LM Studio",
            "http://localhost:1234",
            "https://lmstudio.ai/docs/developer/openai-compat/chat-completions",
            start="To start one, run: lms server start",
            unsupported=("logprobs",),
            is_strict=False,
            fields=_fields(top_k="top_k", repetition_penalty="repeat_penalty"),
            other_names=("lm-studio",),
        ),
        Provider(
            "llamacpp-server",
            "llama.cpp's server",
            "http://localhost:8080",
            "https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",
            start="To start one, run: llama-server -m FILE.gguf",
            structures=("json_schema", "choice", "grammar"),
            is_strict=False,
            fields=_fields(top_k="top_k", repetition_penalty="repeat_penalty"),
            other_names=("llama-server",),
        ),
    )
})  # fmt: skip


# As other programs name its models: ollama/llama3.2
_OLLAMA_PREFIX = re.compile(r"ollama[/:](?=\w)", re.IGNORECASE)
# The models of Ollama that people load by name, and any name with a tag: a hub id has no colon.
_OLLAMA_MODEL = re.compile(
    r"(llama|qwen|gemma|phi)\d(\.\d)?|mistral|mixtral|deepseek-r1|gpt-oss|[\w.-]{2,}:[\w.-]+"
)


def ollama_name(model: str) -> str:
    """Return the name in Ollama of a model, "" if the name can be one of the hub."""
    if prefixed := _OLLAMA_PREFIX.match(model):
        return model[prefixed.end() :]
    return model if _OLLAMA_MODEL.fullmatch(model) else ""


def named(other_name: str) -> str:
    """Return the name of the backend that people also call `other_name`, or ""."""
    folded = other_name.casefold()
    return next((p.name for p in PROVIDERS.values() if folded in p.other_names), "")


def of_variable(name: str) -> Provider | None:
    """Return the provider that a key variable belongs to, None for any other variable."""
    return next((p for p in PROVIDERS.values() if name and p.key_variable == name), None)


def of_model(model: str) -> Provider | None:
    """Return the provider that has models of this name, None if the name can be that of a file."""
    return next((p for p in PROVIDERS.values() if p.api_name(model)), None)
