"""A backend declares what it calls each generation option, or that it does not support it."""

from __future__ import annotations

from abc import ABC

import pytest

from llm_magic.backends import registry
from llm_magic.backends.base import UNSUPPORTED, Backend
from llm_magic.config.settings import GenerationConfig, GenerationOptions
from llm_magic.errors import OptionError
from llm_magic.types import Structure
from tests.generation_options import EVERY
from tests.scripted import ScriptedBackend

NAMES = {name: name for name in GenerationOptions.model_fields}


@pytest.mark.parametrize("name", registry.names())
def test_backend_declares_every_generation_option(name: str) -> None:
    assert registry.backend_class(name).option_names.keys() == GenerationOptions.model_fields.keys()


def test_every_generation_option_has_a_test_value() -> None:
    assert EVERY.keys() | {"extra"} == GenerationOptions.model_fields.keys()
    defaults = GenerationConfig()
    assert all(getattr(GenerationConfig(**EVERY), n) != getattr(defaults, n) for n in EVERY)


def test_class_without_an_option_cannot_be_defined() -> None:
    without = {name: name for name in NAMES if name not in {"seed", "top_k"}}
    with pytest.raises(TypeError, match=r"Mine\.option_names does not declare seed, top_k\. Add"):
        type("Mine", (ScriptedBackend,), {"name": "mine", "option_names": without})


def test_class_with_an_unknown_option_cannot_be_defined() -> None:
    with pytest.raises(TypeError, match=r"declares min_q, which is not a generation option\."):
        type("Mine", (ScriptedBackend,), {"name": "mine", "option_names": {**NAMES, "min_q": "q"}})


def test_base_class_without_name_is_not_checked() -> None:
    class Shared(Backend, ABC):
        """What several backends share."""

    assert not hasattr(Shared, "name")


class Limited(ScriptedBackend):
    """Supports no `top_k` and no ``-p``."""

    name = "limited"
    option_names = NAMES | {"top_k": UNSUPPORTED, "repetition_penalty": UNSUPPORTED, "extra": ""}


def check(backend: Backend, **options: object) -> None:
    """Check the options of a call."""
    Backend.check_options(backend, "", GenerationConfig().replace(**options), options.keys())


def test_unsupported_option_raises() -> None:
    with pytest.raises(OptionError, match=r"^limited does not support --top-k\. Remove it\.$"):
        check(Limited(), top_k=5)
    with pytest.raises(OptionError, match="limited does not support --param"):
        check(Limited(), extra={"a": 1})


def test_structure_that_the_backend_cannot_hold_an_answer_to_raises() -> None:
    with pytest.raises(OptionError, match=r"^limited cannot enforce --schema\."):
        check(Limited(), structure=Structure("json_schema", "{}"))
    with pytest.raises(OptionError, match=r"^limited cannot enforce --choice\."):
        check(Limited(), structure=Structure.choice(["a", "b"]))
    check(Limited(), structure=None)


def test_value_that_requests_nothing_is_accepted() -> None:
    check(Limited(), top_k=None, repetition_penalty=1, extra={}, seed=3)


def test_unsupported_setting_of_the_session_is_accepted() -> None:
    Backend.check_options(Limited(), "", GenerationConfig(top_k=5), {"seed"})
