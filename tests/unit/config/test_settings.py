"""Every option's range, its error in one line, and where defaults come from."""

from __future__ import annotations

import concurrent.futures
import copy
import math
import multiprocessing
import pickle
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from llm_magic.backends import registry
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.backends.registry import LoadOptions
from llm_magic.config.option_spec import OptionModel, specs
from llm_magic.config.settings import GenerationConfig, GenerationOptions, Settings
from llm_magic.errors import LLMMagicError, OptionError, SettingsError
from llm_magic.session.generation_settings import GenerationSettings
from llm_magic.session.requests import AskOptions, TypeOptions
from llm_magic.types import Structure
from tests.scripted import scripted_session

RANGES: dict[str, tuple[list[Any], list[Any], str]] = {
    "max_new_tokens": ([1, 10**6, "512"], [0, -1, 1.5, "many", ""], "1 or more"),
    "temperature": ([0, 2, "0.2", 1e-9], [-0.001, 2.001, "hot", math.nan, math.inf], "0 to 2"),
    "top_p": ([0, 1, "0.9"], [-0.1, 1.1, "nan", "inf", []], "0 to 1"),
    "top_k": ([1, "40"], [0, "-3", 2.5], "1 or more"),
    "repetition_penalty": ([1, 1.15, "2"], [0.99, "no", math.inf, "nan"], "1 or more"),
    "seed": ([0, 2**32 - 1, "7"], [-1, 2**32, "x", 0.5], "0 to 4294967295"),
    "logprobs": ([0, 20, "5"], [-1, 21, "x", 0.5], "0 to 20"),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for info in Settings.model_fields.values():
        monkeypatch.delenv(str(info.validation_alias), raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", RANGES)
def test_value_in_its_range_is_accepted_also_as_text(name: str) -> None:
    for value in RANGES[name][0]:
        accepted = getattr(GenerationConfig().replace(**{name: value}), name)
        assert accepted == pytest.approx(float(value)), value


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, wrong, _) in RANGES.items() for value in wrong]
)
def test_wrong_value_raises_one_line_with_name_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        GenerationConfig().replace(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value} is ")
    assert RANGES[name][2] in message
    assert "\n" not in message


@pytest.mark.parametrize("value", ["many", 1.5, "1.5"])
def test_fraction_for_a_whole_number_raises(value: Any) -> None:
    with pytest.raises(OptionError, match=r"is not a whole number\. It must be 1 or more"):
        GenerationConfig().replace(top_k=value)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("word", ["none", "None", " NONE ", None])
def test_none_leaves_an_option_to_the_model(name: str, word: str | None) -> None:
    assert getattr(GenerationConfig().replace(**{name: word}), name) is None


@pytest.mark.parametrize(
    ("given", "stored"),
    [("END", ("END",)), (["a", "b"], ("a", "b")), ("none", ()), (None, ()), (("x",), ("x",))],
)
def test_stop_is_one_text_or_several(given: Any, stored: tuple[str, ...]) -> None:
    assert GenerationConfig().replace(stop=given).stop == stored


def test_unknown_name_suggests_the_nearest_one() -> None:
    with pytest.raises(
        OptionError, match=r"'temprature' is not a[a-z ]*\. Did you mean \"temperature\"\?"
    ):
        GenerationConfig().replace(temprature=0.1)
    with pytest.raises(OptionError, match='Did you mean "quantization"'):
        LocalLoadConfig().replace(quantisation="4bit")


def test_nothing_changes_if_one_of_several_is_wrong() -> None:
    config = GenerationConfig()
    with pytest.raises(OptionError, match="top_k=0"):
        config.replace(temperature=0.1, top_k=0)
    assert config == GenerationConfig()


@pytest.mark.parametrize(
    ("field", "good", "bad", "allowed"),
    [
        ("device", ["auto", "cpu", "mps", "cuda", "cuda:3"], ["gpu", "cuda:", "cuda:x", "CPU"],
         "auto, cpu, cuda, cuda:N or mps"),
        ("quantization", ["none", "8bit", "bnb-4bit"], ["2bit", ""],
         "none, 8bit, 4bit, bnb-8bit or bnb-4bit"),
        ("dtype", ["auto", "bfloat16", "float32"], ["int8", "bf17"],
         "auto, float32, bfloat16 or float16"),
    ],
)  # fmt: skip
def test_wrong_load_option_raises_with_its_choices(
    field: str, good: list[str], bad: list[str], allowed: str
) -> None:
    for value in good:
        assert getattr(LocalLoadConfig().replace(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(OptionError) as caught:
            LocalLoadConfig().replace(**{field: value})
        assert str(caught.value) == f"{field}={value} is invalid. Use {allowed}."


@pytest.mark.parametrize(
    ("short", "long"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_short_names_of_number_formats(short: str, long: str) -> None:
    assert LocalLoadConfig().replace(dtype=short).dtype == long


def test_option_sets_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        GenerationConfig().temperature = 1.0  # type: ignore[misc]


def test_every_generation_option_has_a_flag_and_a_help() -> None:
    for name, spec in {**specs(GenerationOptions), **registry.load_specs()}.items():
        assert spec.flags, name
        assert spec.help.endswith("."), name


CONFIGS = [
    GenerationConfig(),
    GenerationConfig(temperature=0.2, stop=("a", "\n"), extra={"a": [1, {"b": 2}]}),
    GenerationConfig().replace(top_k=None, seed=3),
    GenerationConfig(structure=Structure("regex", "[0-9]+")),
    LocalLoadConfig(device="cpu", dtype="bfloat16"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_config_pickles(config: OptionModel, protocol: int) -> None:
    copied = pickle.loads(pickle.dumps(config, protocol))
    assert copied == config
    assert copied.model_fields_set == config.model_fields_set
    assert repr(copied) == repr(config)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_can_be_copied(config: OptionModel) -> None:
    for copied in (copy.copy(config), copy.deepcopy(config), copy.deepcopy([config])[0]):
        assert copied == config
        assert copied.model_fields_set == config.model_fields_set


def test_config_reaches_another_process() -> None:
    config = GenerationConfig(temperature=0.2, extra={"a": 1})
    # As a pool does it: the class is found by its name there.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_changed, config).result(60) == config.replace(top_k=5)


def _changed(config: GenerationConfig) -> GenerationConfig:
    return config.replace(top_k=5)


def test_extra_of_a_pickled_config_cannot_be_changed() -> None:
    copied = pickle.loads(pickle.dumps(GenerationConfig(extra={"a": 1})))
    with pytest.raises(TypeError):
        copied.extra["a"] = 2


# -- settings ---------------------------------------------------------------------------------


def test_defaults_are_those_of_the_field() -> None:
    assert Settings.read().defaults(GenerationConfig) == GenerationConfig(
        max_new_tokens=512, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.15
    )
    assert Settings.read().defaults(LocalLoadConfig) == LocalLoadConfig()


def test_environment_precedes_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text(
        "DEFAULT_LLM_TEMPERATURE=0.1\nDEFAULT_LLM_TOP_K=none\nDEFAULT_LLM_TOP_P=0.5\n"
        "LLM_DEVICE=cpu\nUNKNOWN=1\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("DEFAULT_LLM_TOP_P", "0.3")  # the environment precedes the file
    monkeypatch.setenv("DEFAULT_LLM_QUANTIZATION", "4bit")
    monkeypatch.setenv("DEFAULT_LLM_MAX_NEW_TOKENS", "")  # empty is not set
    monkeypatch.setenv("DEFAULT_MODEL_NAME_OR_PATH", "org/model")
    monkeypatch.setenv("LLM_IDLE_TIMEOUT", "7")
    monkeypatch.setenv("LLM_BACKEND_TYPE", "ollama")
    monkeypatch.setenv("INSTRUCTLAB_BASE_URL", "http://host:1")
    monkeypatch.setenv("DEFAULT_LLM_REPETITION_PENALTY", "1.3")
    read = Settings.read()
    config = read.defaults(GenerationConfig)
    assert (config.temperature, config.top_k, config.top_p) == (0.1, None, 0.3)
    assert config.max_new_tokens == 512
    assert read.model == "org/model"
    assert read.defaults(LocalLoadConfig) == LocalLoadConfig(
        backend="ollama", device="cpu", quantization="4bit"
    )
    assert (read.idle_timeout, read.instructlab_base_url) == (7, "http://host:1")
    assert config.repetition_penalty == 1.3


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "DEFAULT_LLM_TEMPERATURE",
            "3",
            "DEFAULT_LLM_TEMPERATURE=3 is out of range. It must be 0 to 2.",
        ),
        (
            "DEFAULT_LLM_TEMPERATURE",
            "hot",
            "DEFAULT_LLM_TEMPERATURE=hot is not a number. It must be 0 to 2.",
        ),
        ("DEFAULT_LLM_TOP_P", "nan", "DEFAULT_LLM_TOP_P=nan is out of range. It must be 0 to 1."),
        ("DEFAULT_LLM_TOP_K", "0", "DEFAULT_LLM_TOP_K=0 is out of range. It must be 1 or more."),
        (
            "DEFAULT_LLM_MAX_NEW_TOKENS",
            "x",
            "DEFAULT_LLM_MAX_NEW_TOKENS=x is not a whole number. It must be 1 or more.",
        ),
        ("LLM_DEVICE", "gpu", "LLM_DEVICE=gpu is invalid. Use auto, cpu, cuda, cuda:N or mps."),
        (
            "DEFAULT_LLM_QUANTIZATION",
            "3bit",
            "DEFAULT_LLM_QUANTIZATION=3bit is invalid. Use none, 8bit, 4bit, bnb-8bit or bnb-4bit.",
        ),
        ("LLM_MAGIC_STREAM", "maybe", "LLM_MAGIC_STREAM=maybe is invalid. Use on or off."),
    ],
)
def test_wrong_setting_raises_with_variable_value_and_range(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        GenerationSettings()
    assert str(caught.value) == message


def test_wrong_line_of_the_file_raises_with_variable_value_and_range() -> None:
    Path(".env").write_text("DEFAULT_LLM_TOP_K=0\n", encoding="utf-8")
    with pytest.raises(
        SettingsError, match=r"DEFAULT_LLM_TOP_K=0 is out of range\. It must be 1 or more"
    ):
        Settings.read()


def test_call_precedes_session_precedes_settings_precedes_model() -> None:
    with scripted_session(temperature=0.1, top_k=10, top_p=0.1) as (session, backend):
        session.generation.update(temperature=0.2, top_k=20)
        session.generate("?", temperature=0.3)
        config = backend.requests[-1].config
        assert (config.temperature, config.top_k, config.top_p) == (0.3, 20, 0.1)
        assert config.seed is None  # not set anywhere: the model's own default
        session.generate("?", temperature=None)
        assert backend.requests[-1].config.temperature is None
        session.generate("?")
        assert backend.requests[-1].config.temperature == 0.2  # a call changes nothing for the next


def test_keyword_arguments_are_the_fields_of_the_option_sets() -> None:
    assert get_type_hints(LoadOptions).keys() == registry.load_specs().keys()
    fields = GenerationOptions.model_fields.keys() | {"model", "system", "chat", "trim"}
    assert AskOptions.__annotations__.keys() == fields | TypeOptions.__annotations__.keys()


def test_wrong_type_raises_an_error_of_this_package() -> None:
    assert GenerationConfig().replace() == GenerationConfig()
    with pytest.raises(LLMMagicError):
        GenerationConfig().replace(extra="no mapping")
    with pytest.raises(LLMMagicError):
        LocalLoadConfig().replace(dtype=["float32"])
