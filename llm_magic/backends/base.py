"""The contract between the manager and a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

from llm_magic.config.api_keys import ApiKeys
from llm_magic.config.commands import command, option
from llm_magic.config.option_spec import specs
from llm_magic.config.settings import (
    GenerationConfig,
    GenerationOptions,
    LoadConfig,
    ReadSettings,
)
from llm_magic.errors import ModelNotLoaded, OptionError
from llm_magic.types import (
    Chunk,
    MemoryUse,
    Message,
    ModelInfo,
    Progress,
    Score,
    Structure,
    StructureKind,
    Unloaded,
)

M = TypeVar("M")

Report = Callable[[Progress], None]
# In `Backend.details`: when and why the connection for the last answer failed.
LAST_ANSWER: Final = "last answer"
# In `Backend.option_names`: the backend does not have this option.
UNSUPPORTED: Final = ""
# The message that asks for no system prompt, not even that of a chat template.
NO_SYSTEM: Final = {"role": "system", "content": ""}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do; declared, not found out by a call that fails.

    `in_process`: models take memory of this process. `local_token_counts`: `Backend.count` sends no
    request. `stop_strings`: an answer ends before the first stop string, which is not part of it.
    `structures`: the kinds of `Structure` that an answer can be held to. `scores`: `score` returns how
    probable given texts are.
    """

    in_process: bool = False
    local_token_counts: bool = False
    stop_strings: bool = False
    structures: frozenset[StructureKind] = frozenset()
    scores: bool = False


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A load that was checked: the model exists, the options go together, it fits.

    `source` is what `Backend.load` needs, opaque to everything else; `notes` are shown to the user.
    """

    model: str
    name: str
    config: LoadConfig
    source: object
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The prompt tokens of a conversation and the context they must fit; None if unknown.

    `added_system` is the system prompt that the chat template of the model adds to the conversation.
    """

    prompt_tokens: int | None
    context_length: int | None
    added_system: str = ""


class Backend(ABC):
    """Loads models and streams answers; runs on the event-loop thread.

    A subclass that sets `name` is complete. It declares in `option_names` what it calls each
    generation option, or that the option is `UNSUPPORTED`, and in `load_config` its load options.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    option_names: ClassVar[Mapping[str, str]]
    load_config: ClassVar[type[LoadConfig]] = LoadConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise `TypeError` if a generation option is not declared."""
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        declared, options = set(cls.option_names), set(GenerationOptions.model_fields)
        if missing := options - declared:
            raise TypeError(
                f"{cls.__name__}.option_names does not declare {', '.join(sorted(missing))}."
                " Add the name that the backend uses, or UNSUPPORTED."
            )
        # `capabilities` declare the structures.
        if unknown := declared - set(GenerationConfig.model_fields):
            raise TypeError(
                f"{cls.__name__}.option_names declares {', '.join(sorted(unknown))}, which"
                f" {'is not a generation option' if len(unknown) == 1 else 'are not generation options'}."
            )

    def __init__(self, settings: ReadSettings, keys: ApiKeys) -> None:  # noqa: B027
        """Create the backend; `settings` returns the current settings."""

    @abstractmethod
    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return the models that can be loaded, from the server that `config` names if any."""

    def is_current(self, _name: str, _model: str | None, _config: LoadConfig) -> bool:
        """Return whether a load of `model` with these options would give the model that is loaded.

        False if the address or the key of a server changed outside of the options, or the files of a
        local model did.
        """
        return True

    def known(self, base_url: str | None) -> list[ModelInfo]:
        """Return the models that a server listed last, of all servers if `base_url` is None.

        Sends no request. Safe to call from any thread.
        """
        return []

    @abstractmethod
    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        """Find the model and check that it can be loaded, without changing anything.

        Loaded models are unloaded only after this and `verify` succeed. `leaving` names those whose
        memory will be free by then. A `model` of None is the configured default.
        """

    async def verify(self, plan: LoadPlan, _report: Report) -> LoadPlan:
        """Raise what would end the load of a checked model, as far as its weights are not needed for that.

        Called while no answer is generated, before models are unloaded for this one. Returns the plan
        of the load.
        """
        return plan

    @abstractmethod
    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        """Load the checked model under `name`."""

    @abstractmethod
    async def unload(self, name: str) -> Unloaded:
        """Free a model and measure the memory before and after."""

    @abstractmethod
    def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of an answer; the only way to generate.

        An empty system message means no system prompt, also none of a chat template.
        The last chunk carries `finish_reason` and `usage`. Closing the generator stops the work.
        """

    def release_threads(self) -> None:  # noqa: B027 - most backends have none
        """End the threads that the calling thread keeps and that would slow an answer down.

        Called on the thread that starts a request, before it waits.
        """

    def concurrency_of(self, _name: str) -> int:
        """Return how many answers of a loaded model are best generated at once, at most.

        A backend in this process generates exactly so many; for a server it is the upper limit.
        """
        return 1

    @abstractmethod
    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Count the tokens of a conversation as the model would read it."""

    async def score(
        self,
        _name: str,
        _messages: Sequence[Message],
        _config: GenerationConfig,
        _texts: Sequence[str],
    ) -> list[Score]:
        """Return how probable each text is as the answer to a conversation; raises `OptionError`.

        Only backends with the capability `scores` return them.
        """
        error = OptionError(f"{self.name} cannot score given texts.")
        raise error.advise(f"Load a local model: {command('load', backend='local')}.", "backend")

    def check_options(self, _name: str, config: GenerationConfig, given: Collection[str]) -> None:
        """Raise `OptionError` for an option that the backend does not support for a loaded model.

        `given` names the options of this call. Session and environment settings that the backend does
        not support are omitted from the request instead.
        """
        if config.structure is not None:
            self.check_structure(config.structure)
        known = specs(GenerationOptions)
        for name in sorted(known.keys() & given):
            spec, value = known[name], getattr(config, name)
            if self.supports(name) or spec.is_neutral(value):
                continue
            label = spec.flags[-1] if spec.flags else name
            takes_pairs = any(s.kind == "pairs" and self.supports(s.name) for s in known.values())
            # What a server sends for these is not read unless it supports the option.
            takes_pairs = takes_pairs and name != "logprobs"
            unchecked = f", or send it unchecked with -p {name}={value}" if takes_pairs else ""
            raise OptionError(f"{self.name} does not support {label}. Remove it{unchecked}.")
        if config.extra:
            self.check_extra(config)

    def sent_options(self, _name: str, config: GenerationConfig) -> GenerationConfig:
        """Return the options of a call without the defaults that a loaded model does not get."""
        return config

    @classmethod
    def supports(cls, option: str) -> bool:
        """Return whether the backend has a generation option."""
        return cls.option_names[option] != UNSUPPORTED

    def check_structure(self, structure: Structure) -> None:
        """Raise `OptionError` for a structure that the backend cannot hold an answer to."""
        if structure.kind not in self.capabilities.structures:
            raise OptionError(
                f"{self.name} cannot enforce {option(structure.option)}.{by_prompt(structure)}"
            )
        labels = structure.labels
        if structure.kind == "choice" and (
            not all(labels) or len(labels) != len({*labels}) or not labels
        ):
            raise OptionError(f"{option('choice')} needs different labels that are not empty.")

    def needs_description(self, _name: str, structure: Structure) -> bool:
        """Return whether the prompt has to describe a structure that the backend enforces.

        A model in this process gets no list of labels: that misleads small models.
        """
        return not (self.capabilities.in_process and structure.kind == "choice")

    def enforced_by(self, _name: str, _structure: Structure) -> str:
        """Return how an answer is held to a structure, in words."""
        return "constrained decoding"

    def check_extra(self, config: GenerationConfig) -> None:  # noqa: B027
        """Raise `OptionError` for a ``-p`` option that the backend does not accept."""

    def details(self, _name: str) -> dict[str, str]:
        """Return what ``%llm_status`` shows about a loaded model besides its `ModelInfo`."""
        return {}

    @abstractmethod
    def memory(self) -> MemoryUse:
        """Return the memory that this process holds now."""

    @abstractmethod
    async def aclose(self) -> None:
        """Free everything."""


def by_prompt(structure: Structure) -> str:
    """Return the advice to describe a structure in the prompt instead; a grammar cannot be checked."""
    if structure.kind == "grammar":
        return ""
    return (
        f" To describe it in the prompt and check the answer, add {option('schema_by', 'prompt')}."
    )


def find_loaded(models: Mapping[str, M], name: str) -> M:
    """Return what a backend has loaded under a name; raises `ModelNotLoaded` for any other name."""
    try:
        return models[name]
    except KeyError:
        error = ModelNotLoaded(f"{name} is no longer loaded.")
        raise error.advise(f"Run {command('load')}.") from None
