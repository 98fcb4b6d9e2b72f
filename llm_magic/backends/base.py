"""The one contract between the manager and whatever generates text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass

from llm_magic.config.option_spec import refuse_foreign
from llm_magic.config.settings import GenerationConfig, LoadConfig
from llm_magic.types import Chunk, MemoryUse, Message, ModelInfo, Progress, State, Unloaded

Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A load that was checked: the model is there, the options go together, it fits.

    `source` is what the backend needs to carry it out, opaque to everybody else; `notes` is what
    the user should know about how it was prepared.
    """

    model: str
    name: str
    config: LoadConfig
    source: object
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenCount:
    """What a conversation costs: prompt tokens, and the context they have to fit; None if unknown."""

    prompt_tokens: int | None
    context_length: int | None


class Backend(ABC):
    """Something that holds models and streams answers; lives on the loop thread.

    `loading` is the state while one is made ready; `counts_here` says that `count` asks nobody.
    """

    name: str
    loading: State = "Loading"
    counts_here = False

    @abstractmethod
    async def models(self, config: LoadConfig) -> list[ModelInfo]:
        """Return the models that could be loaded, from the server that `config` names if any."""

    def is_current(self, _name: str, _config: LoadConfig) -> bool:
        """Return whether a load with these options, now, would find what is resident already.

        False where a server's address or key was changed meanwhile, outside of the options.
        """
        return True

    def known(self, base_url: str | None) -> list[ModelInfo]:
        """Return the models that a server named when it was last asked; asks nobody.

        Of all servers, if no `base_url` is given. May be called from any thread.
        """
        return []

    @abstractmethod
    async def check(
        self, model: str | None, config: LoadConfig, report: Report, leaving: Sequence[str]
    ) -> LoadPlan:
        """Find the model and see that it can be loaded, without changing anything.

        A load comes in two steps so that bad input loses nothing: the resident models go only
        after this succeeded. `leaving` names those whose memory will be free by then. None
        stands for the configured default.
        """

    @abstractmethod
    async def load(self, plan: LoadPlan, name: str, report: Report) -> ModelInfo:
        """Bring the checked model into memory and call it `name`."""

    @abstractmethod
    async def unload(self, name: str) -> Unloaded:
        """Free a model and measure what came back."""

    @abstractmethod
    def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Answer; the only way to generate.

        The last chunk carries `finish_reason` and `usage`. Closing the generator stops the work.
        """

    def release_threads(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what the calling thread holds that would slow an answer down.

        Called on the thread that asks, before it waits.
        """

    @abstractmethod
    async def count(self, name: str, messages: Sequence[Message]) -> TokenCount:
        """Count the tokens of a conversation as the model would read it."""

    def check_options(self, config: GenerationConfig, given: Collection[str]) -> None:
        """Raise `OptionError` for an option that cannot be honored here.

        `given` are the names of the options of this call. Settings that cannot be honored are
        omitted from the request, like defaults.
        """
        refuse_foreign(config, given, self.name, " (-p {name}={value} sends it all the same.)")
        self.check_extra(config)

    @abstractmethod
    def check_extra(self, config: GenerationConfig) -> None:
        """Raise `OptionError` for a ``-p`` option that cannot be passed on."""

    def details(self, _name: str) -> dict[str, str]:
        """Return what ``%llm_status`` says about a resident model besides its `ModelInfo`."""
        return {}

    @abstractmethod
    def memory(self) -> MemoryUse:
        """Return what this process holds now."""

    @abstractmethod
    async def aclose(self) -> None:
        """Free everything."""
