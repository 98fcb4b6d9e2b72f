"""The session's settings change all at once or not at all, through one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import OptionError
from llm_magic.session.generation_settings import Config, Options
from tests.scripted import scripted_session, settings


def test_changes_lie_over_the_settings() -> None:
    options = Options(settings(temperature=0.1))
    assert options.current.temperature == 0.1
    assert options.change(temperature="0.2", top_k=7).temperature == 0.2
    assert (options.current.temperature, options.current.top_k) == (0.2, 7)
    assert options.current.top_p == 0.9


def test_one_wrong_value_changes_nothing() -> None:
    options = Options(settings())
    options.change(temperature=0.3)
    with pytest.raises(OptionError, match="top_p=2"):
        options.change(temperature=0.5, top_p=2)
    with pytest.raises(OptionError, match="no option 'top'"):
        options.change(temperature=0.5, top=2)
    assert options.current == GenerationConfig(temperature=0.3)


def test_only_what_differs_from_the_settings_counts_as_changed() -> None:
    options = Options(settings())
    assert options.changed == frozenset()
    options.change(temperature=0.2, top_k=50)  # 50 is what it was
    assert options.changed == {"temperature"}
    options.change(temperature=0.7)
    assert options.changed == frozenset()


def test_none_is_a_change_like_any_other() -> None:
    options = Options(settings())
    options.change(top_k="none")
    assert options.current.top_k is None
    assert options.changed == {"top_k"}


def test_reset_goes_back_and_reads_the_environment_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEFAULT_LLM_TOP_K", "5")
    options = Options()
    options.change(temperature=0.2)
    monkeypatch.setenv("DEFAULT_LLM_TOP_K", "6")
    assert options.current.top_k == 5  # not behind the user's back
    assert options.reset().top_k == 6
    assert options.current.temperature == 0.7
    assert options.changed == frozenset()


def test_given_settings_stay_at_a_reset() -> None:
    options = Options(settings(temperature=0.1))
    options.change(temperature=0.2)
    assert options.reset().temperature == 0.1


def test_the_attributes_of_config_read_and_change_the_session() -> None:
    options = Options(settings())
    config = Config(options)
    config.temperature = 0.3
    assert config.temperature == options.current.temperature == 0.3
    options.change(temperature=0.4)
    assert config.temperature == 0.4
    with pytest.raises(OptionError, match=r"temperature=9 must be 0 to 2"):
        config.temperature = 9
    assert repr(config) == repr(options.current)
    assert set(dir(config)) == set(GenerationConfig.model_fields)


def test_what_is_passed_on_is_changed_as_a_whole_or_not_at_all() -> None:
    options = Options(settings())
    config = Config(options)
    with pytest.raises(TypeError, match="does not support item assignment"):
        config.extra["a"] = 1
    with pytest.raises(TypeError):
        options.change(extra={"a": 1}).extra["a"] = 2  # type: ignore[index]
    assert config.extra == {"a": 1}
    assert options.current.model_dump()["extra"] == {"a": 1}
    assert "extra={'a': 1}" in repr(config)


def test_an_unknown_attribute_is_an_error() -> None:
    config = Config(Options(settings()))
    with pytest.raises(OptionError, match="Did you mean temperature"):
        config.temprature = 0.3
    with pytest.raises(AttributeError, match="temprature"):
        _ = config.temprature


def test_the_session_hands_its_options_out_in_both_ways() -> None:
    with scripted_session(load=False) as (session, _):
        session.config.temperature = 0.3
        assert session.configure(top_k=9).top_k == 9
        assert session.status().generation_config == GenerationConfig(temperature=0.3, top_k=9)
