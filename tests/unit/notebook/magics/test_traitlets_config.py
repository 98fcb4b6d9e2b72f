"""The generation settings as IPython's configuration sees them: one table, in step both ways."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from llm_magic.config.option_spec import specs
from llm_magic.config.settings import GenerationConfig, SessionConfig
from llm_magic.errors import OptionError
from llm_magic.notebook.magics import register, unregister
from llm_magic.notebook.magics.ask import LLMMagics
from llm_magic.session import Session
from tests.scripted import scripted_session
from tests.shell import ipython


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    with ipython() as shell:
        yield shell


@pytest.fixture
def session(shell: InteractiveShell) -> Iterator[Session]:
    with scripted_session(load=False) as (session, _):
        register(shell, session)
        yield session
        unregister(shell)


def config(shell: InteractiveShell, line: str) -> Any:
    return shell.run_line_magic("config", line)


def test_every_setting_is_a_trait_with_its_help(
    shell: InteractiveShell, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(LLMMagics.class_traits(config=True)) == sorted(SessionConfig.model_fields)
    session.generation.update(top_k=7)
    config(shell, "LLMMagics")
    page = " ".join(capsys.readouterr().out.split())
    for name, spec in specs(SessionConfig).items():
        assert f"LLMMagics.{name}=<Setting> {spec.help}" in page
    assert "1 or more, default 50; None leaves it to the model. Current: 7" in page
    config(shell, "")
    assert " LLMMagics" in capsys.readouterr().out


def test_a_trait_and_the_session_are_the_same(shell: InteractiveShell, session: Session) -> None:
    config(shell, "LLMMagics.temperature = 0.2")
    assert session.generation.temperature == 0.2
    session.generation.update(temperature=0.5)
    assert config(shell, "LLMMagics.temperature") == 0.5
    config(shell, "LLMMagics.top_k = None")
    assert session.generation.config == GenerationConfig(temperature=0.5, top_k=None)
    config(shell, "LLMMagics.stop = ['a', 'b']")
    assert session.generation.stop == ("a", "b")
    config(shell, "LLMMagics.system = 'Be brief.'")
    assert session.generation.system == "Be brief."
    shell.run_line_magic("llm_config", "--reset")
    assert config(shell, "LLMMagics.temperature") == 0.7


def test_invalid_value_is_a_config_error_and_changes_nothing(
    shell: InteractiveShell, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        config(shell, "LLMMagics.temperature = 9")
    assert caplog.messages == ["temperature=9 is out of range. It must be 0 to 2."]
    assert session.generation.changed == frozenset()


def test_reload_keeps_settings_that_config_has_set_to_another_or_an_invalid_value(
    shell: InteractiveShell, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    config(shell, "LLMMagics.temperature = 0.2")
    config(shell, "LLMMagics.top_p = 0.4")
    session.generation.reset("temperature")
    with caplog.at_level(logging.ERROR):
        config(shell, "LLMMagics.top_k = 0")
    assert len(caplog.messages) == 1
    # As %reload_ext does.
    register(shell, session)
    assert session.generation.config == GenerationConfig(top_p=0.4)
    config(shell, "LLMMagics.seed = 3")
    assert session.generation.seed == 3
    # As %unload_ext and %load_ext do.
    unregister(shell)
    with scripted_session(load=False) as (other, _):
        register(shell, other)
        assert other.generation.config == GenerationConfig(temperature=0.2, top_p=0.4, seed=3)
        unregister(shell)


def test_observer_of_a_trait_is_called(shell: InteractiveShell, session: Session) -> None:
    (magics,) = (one for one in shell.configurables if isinstance(one, LLMMagics))
    seen = []
    LLMMagics.class_traits()
    magics.observe(lambda change: seen.append((change.old, change.new)), "temperature")
    magics.set_trait("temperature", 1.0)
    magics.set_trait("temperature", 1.0)
    assert seen == [(0.7, 1.0)]


def test_the_configuration_file_is_read_when_the_extension_is_loaded(
    shell: InteractiveShell,
) -> None:
    shell.config.LLMMagics.temperature = 0.3
    shell.config.LLMMagics.top_p = 0.4
    with scripted_session(load=False) as (session, _):
        register(shell, session)
        assert session.generation.config == GenerationConfig(temperature=0.3, top_p=0.4)
        unregister(shell)


def test_invalid_value_in_the_file_registers_nothing(
    shell: InteractiveShell,
) -> None:
    shell.config.LLMMagics.temperature = 0.3
    shell.config.LLMMagics.top_k = 0
    with scripted_session(load=False) as (session, _):
        with pytest.raises(OptionError, match=r"^top_k=0 is out of range. It must be 1 or more\.$"):
            register(shell, session)
        assert session.generation.config == GenerationConfig()
        assert "llm" not in shell.magics_manager.magics["line"]
        del shell.config.LLMMagics
        register(shell, session)
        assert "llm" in shell.magics_manager.magics["line"]
        unregister(shell)
