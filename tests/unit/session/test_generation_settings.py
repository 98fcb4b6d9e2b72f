"""The generation settings change all at once or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_magic.config.settings import GenerationConfig, SessionConfig
from llm_magic.errors import OptionError
from llm_magic.session.generation_settings import GenerationSettings
from tests.scripted import scripted_session, settings


def test_update_overrides_settings() -> None:
    generation = GenerationSettings(settings(temperature=0.1))
    assert generation.config.temperature == 0.1
    assert generation.update(temperature="0.2", top_k=7).temperature == 0.2
    assert (generation.config.temperature, generation.config.top_k) == (0.2, 7)
    assert generation.config.top_p == 0.9


def test_one_wrong_value_changes_nothing() -> None:
    generation = GenerationSettings(settings())
    generation.update(temperature=0.3)
    with pytest.raises(OptionError, match="top_p=2"):
        generation.update(temperature=0.5, top_p=2)
    with pytest.raises(OptionError, match="'top' is not an option"):
        generation.update(temperature=0.5, top=2)
    assert generation.config == GenerationConfig(temperature=0.3)


def test_changed_lists_options_that_differ_from_settings() -> None:
    generation = GenerationSettings(settings())
    assert generation.changed == frozenset()
    generation.update(temperature=0.2, top_k=50)  # 50 is the default
    assert generation.changed == {"temperature"}
    generation.update(temperature=0.7)
    assert generation.changed == frozenset()


def test_none_counts_as_change() -> None:
    generation = GenerationSettings(settings())
    generation.update(top_k="none")
    assert generation.config.top_k is None
    assert generation.changed == {"top_k"}


def test_reset_of_an_unknown_option_is_an_error_and_changes_nothing() -> None:
    generation = GenerationSettings(settings())
    generation.update(temperature=0.2)
    with pytest.raises(
        OptionError, match=r"^'temprature' is not an option\. Did you mean \"temperature\"\?$"
    ):
        generation.reset("top_k", "temprature")
    assert generation.changed == {"temperature"}


def test_reset_reads_environment_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEFAULT_LLM_TOP_K", "5")
    generation = GenerationSettings()
    generation.update(temperature=0.2)
    monkeypatch.setenv("DEFAULT_LLM_TOP_K", "6")
    assert generation.config.top_k == 5  # not before the reset
    assert generation.reset().top_k == 6
    assert generation.config.temperature == 0.7
    assert generation.changed == frozenset()


def test_failed_reset_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    generation = GenerationSettings()
    generation.temperature = 0.2
    monkeypatch.setenv("DEFAULT_LLM_TOP_K", "many")
    with pytest.raises(OptionError, match="DEFAULT_LLM_TOP_K"):
        generation.reset()
    assert generation.temperature == 0.2


def test_reset_of_one_setting_keeps_the_others() -> None:
    generation = GenerationSettings(settings())
    generation.update(temperature=0.3, top_k=7, system="Be brief.")
    values = generation.reset("temperature", "system")
    assert (values.top_k, values.system, generation.changed) == (7, None, frozenset({"top_k"}))


def test_reset_keeps_settings_that_were_passed_in() -> None:
    generation = GenerationSettings(settings(temperature=0.1))
    generation.update(temperature=0.2)
    assert generation.reset().temperature == 0.1


def test_attributes_read_and_change_the_config() -> None:
    generation = GenerationSettings(settings())
    generation.temperature = 0.3
    assert generation.temperature == generation.config.temperature == 0.3
    generation.update(temperature=0.4)
    assert generation.temperature == 0.4
    with pytest.raises(OptionError, match=r"temperature=9 is out of range. It must be 0 to 2"):
        generation.temperature = 9
    assert repr(generation) == repr(generation.values)
    assert set(dir(generation)) >= {*SessionConfig.model_fields, "update", "reset", "changed"}


def test_the_system_prompt_is_a_setting_and_not_an_option_of_an_answer() -> None:
    generation = GenerationSettings(settings())
    assert generation.values.system is None
    generation.update(system="Be brief.", temperature=0.2)
    assert (generation.system, generation.config) == (
        "Be brief.",
        GenerationConfig(temperature=0.2),
    )
    assert generation.config.model_fields_set == {"temperature"}
    assert generation.changed == {"system", "temperature"}
    with pytest.raises(OptionError, match=r"top_k=0 is out of range. It must be 1 or more"):
        generation.update(system="Be long.", top_k=0)
    assert generation.system == "Be brief."
    for nothing in ("", "  ", "none", None):
        generation.system = nothing
        assert generation.system is None
    generation.system = "Be brief."
    generation.reset()
    assert generation.values.system is None
    assert generation.changed == frozenset()
    with pytest.raises(OptionError, match="system=5 is invalid"):
        generation.system = 5


def test_no_option_is_hidden_by_a_method() -> None:
    assert not set(dir(GenerationSettings)) & set(SessionConfig.model_fields)


def test_extra_cannot_be_changed_in_place() -> None:
    generation = GenerationSettings(settings())
    with pytest.raises(TypeError, match="does not support item assignment"):
        generation.extra["a"] = 1
    with pytest.raises(TypeError):
        generation.update(extra={"a": 1}).extra["a"] = 2  # type: ignore[index]
    assert generation.extra == {"a": 1}
    assert generation.config.model_dump()["extra"] == {"a": 1}
    assert "extra={'a': 1}" in repr(generation)


def test_unknown_attribute_raises() -> None:
    generation = GenerationSettings(settings())
    with pytest.raises(OptionError, match='Did you mean "temperature"'):
        generation.temprature = 0.3
    with pytest.raises(AttributeError, match="temprature"):
        _ = generation.temprature


def test_session_reports_its_generation_settings() -> None:
    with scripted_session(load=False) as (session, _):
        session.generation.temperature = 0.3
        assert session.generation.update(top_k=9).top_k == 9
        assert session.status().generation_config == GenerationConfig(temperature=0.3, top_k=9)
