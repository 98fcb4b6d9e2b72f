"""The backends for the providers of `config.providers`: OpenAI and those that are compatible with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from llm_magic.backends.base import NO_SYSTEM, UNSUPPORTED, Capabilities, Report
from llm_magic.backends.remote.base import RemoteModel
from llm_magic.backends.remote.openai_compatible import OPTION_NAMES, OpenAICompatibleBackend
from llm_magic.backends.remote.structures import (
    Fields,
    llama_server,
    loose_response_format,
    response_format,
)
from llm_magic.config.providers import PROVIDERS, Provider
from llm_magic.config.settings import GenerationConfig, LoadConfig
from llm_magic.errors import OptionError
from llm_magic.types import Message, Structure

if TYPE_CHECKING:
    from llm_magic.backends.remote.http_client import HttpServer

_TOP_P = "top_p"
_TEMPERATURE = "temperature"


class ProviderBackend(OpenAICompatibleBackend):
    """Generates with the models of a provider."""

    provider: ClassVar[Provider]

    async def _find_model(
        self, server: HttpServer, model: str | None, config: LoadConfig, report: Report
    ) -> tuple[RemoteModel, tuple[str, ...]]:
        remote, notes = await super()._find_model(server, model, config, report)
        if self.provider.key_path:
            await server.get(f"{server.prefix}{self.provider.key_path}")
        remote.info = dataclasses.replace(remote.info, unsupported=tuple(self._missing(remote)))
        return remote, (*notes, *self._notes())

    def _notes(self) -> Iterator[str]:
        """Yield what is different about the options of the models."""
        if self.provider.is_temperature_or_top_p:
            yield "top_p is sent only if you set it: recent models accept temperature or top_p, not both."
        if self.provider.note:
            yield self.provider.note

    def _fields(self, server: HttpServer, entry: Mapping[str, Any]) -> dict[str, str]:
        fields = super()._fields(server, entry)
        # OpenRouter lists the fields that each of its models accepts.
        supported = entry.get("supported_parameters")
        if not isinstance(supported, list):
            return fields
        return {
            name: field
            for name, field in fields.items()
            if field in supported or name == "max_new_tokens"
        }

    def _set_structures(self, remote: RemoteModel, entry: Mapping[str, Any]) -> None:
        supported = entry.get("supported_parameters")
        if isinstance(supported, list) and "structured_outputs" not in supported:
            remote.structures = ()

    def needs_description(self, name: str, _structure: Structure) -> bool:
        """Return whether the provider itself does not show a schema to the model."""
        remote = self._models.get(name)
        if remote is None or not self.provider.shows_schema:
            return True
        return remote.server.address.origin != self.provider.url

    def _missing(self, remote: RemoteModel) -> list[str]:
        """Return the options that the backend has and the model does not."""
        return [name for name in self.request_fields() if name not in remote.fields]

    def check_options(self, name: str, config: GenerationConfig, given: Collection[str]) -> None:
        """Raise `OptionError` for an option that the provider or the model does not support."""
        super().check_options(name, config, given)
        remote, limit = self._find_loaded(name), self.provider.max_temperature
        for option in sorted(set(given) & set(self._missing(remote))):
            if getattr(config, option) not in (None, ()):
                raise OptionError(
                    f"{remote.model} on {self.name} does not support {option}. Remove it."
                )
        if config.temperature is not None and config.temperature > limit:
            raise OptionError(
                f"{self.name} accepts a temperature of at most {limit:g}, but it is set to"
                f" {config.temperature:g}."
            ).advise(f"Use -t {limit:g} or less.", "temperature")

    def sent_options(self, name: str, config: GenerationConfig) -> GenerationConfig:
        """Return the options of a call without the defaults that a loaded model does not get."""
        omitted = {*self._missing(self._find_loaded(name))}
        if self.provider.is_temperature_or_top_p:
            given = config.model_fields_set
            only_top_p = _TOP_P in given and _TEMPERATURE not in given
            omitted |= {_TEMPERATURE if only_top_p else _TOP_P} - given
        # An option without a value is not sent.
        return config.model_copy(update={n: () if n == "stop" else None for n in omitted})

    def body(
        self, remote: RemoteModel, messages: Sequence[Message], config: GenerationConfig
    ) -> dict[str, Any]:
        """Return the body of a request."""
        body = super().body(remote, messages, self.sent_options(remote.info.name, config))
        if self.provider.key_variable:
            # Some reject an empty system message, and none has a system prompt of its own.
            body["messages"] = [one for one in body["messages"] if one != NO_SYSTEM]
        omitted = {*self.provider.omitted} - config.extra.keys()
        return {field: value for field, value in body.items() if field not in omitted}


def _structure_fields(provider: Provider) -> Fields:
    if "grammar" in provider.structures:
        return llama_server
    return response_format if provider.is_strict else loose_response_format


def _backend(name: str) -> type[ProviderBackend]:
    """Return the backend of a provider."""
    provider = PROVIDERS[name]
    names = {**OPTION_NAMES, **provider.fields, **dict.fromkeys(provider.unsupported, UNSUPPORTED)}
    return type(
        f"{provider.title.replace(' ', '')}Backend",
        (ProviderBackend,),
        {
            "__doc__": f"{provider.title}.",
            "name": name,
            "provider": provider,
            "option_names": MappingProxyType(names),
            "start": provider.start,
            "list_path": provider.list_path,
            "resolves_aliases": provider.resolves_aliases,
            "id_prefix": provider.id_prefix,
            "capabilities": Capabilities(structures=frozenset(provider.structures)),
            "structure_fields": staticmethod(_structure_fields(provider)),
        },
    )


OpenAIBackend = _backend("openai")
AnthropicBackend = _backend("anthropic")
GeminiBackend = _backend("gemini")
MistralBackend = _backend("mistral")
GroqBackend = _backend("groq")
OpenRouterBackend = _backend("openrouter")
TogetherBackend = _backend("together")
DeepSeekBackend = _backend("deepseek")
XAIBackend = _backend("xai")
LMStudioBackend = _backend("lmstudio")
LlamaCppServerBackend = _backend("llamacpp-server")
