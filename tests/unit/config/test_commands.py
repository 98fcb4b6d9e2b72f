"""Tests of the commands and options in messages."""

from __future__ import annotations

import pytest

from llm_magic.backends.registry import load_specs
from llm_magic.config.commands import command, either, option, use_magics


def test_magics_are_named_where_they_are_loaded() -> None:
    server = {"backend": "openai", "base_url": "http://host/v1", "key_env": None}
    line = "%llm_load tiny -b openai --base-url http://host/v1 --pull"
    assert command("load", "tiny", **server, pull=True) == line
    assert (command("unload"), option("key_env", "NAME")) == ("%llm_unload", "--key-env NAME")
    assert (option("base_url"), either("magics", "calls")) == ("--base-url", "magics")


def test_programs_get_calls() -> None:
    use_magics(False)
    call = 'llm.load("a\\"b", backend="openai", pull=True)'
    assert command("load", 'a"b', backend="openai", base_url=None, pull=True) == call
    assert (command("unload"), option("key_env", "NAME")) == ("llm.unload()", 'key_env="NAME"')
    assert (option("base_url"), either("magics", "calls")) == ("base_url", "calls")


@pytest.mark.parametrize(
    "name", ["backend", "base_url", "device", "key_env", "quantization", "pull"]
)
def test_flags_are_those_of_the_options(name: str) -> None:
    assert option(name) in load_specs()[name].flags
