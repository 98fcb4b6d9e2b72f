"""Backends are found through entry points: their names, their options, and packages that are broken."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_magic.backends import registry
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.backends.remote.ollama import OllamaLoadConfig
from llm_magic.config.providers import PROVIDERS
from llm_magic.config.settings import LoadConfig, ServerLoadConfig
from llm_magic.errors import BackendUnavailable, OptionError
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.arguments.help_pages import page
from tests.scripted import settings

OURS = ("local", "llamacpp", "ollama", "vllm", "instructlab", *PROVIDERS)
MODULE = """
from typing import Annotated
from llm_magic.backends.base import UNSUPPORTED, Backend
from llm_magic.config.option_spec import OptionSpec
from llm_magic.config.settings import GenerationConfig, LoadConfig

class Options(LoadConfig):
    {option}: Annotated[int, OptionSpec("A number.", ("{flag}",), "N")] = 0

class Mine(Backend):
    name = "{name}"
    load_config = Options
    option_names = dict.fromkeys(GenerationConfig.model_fields, UNSUPPORTED)
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Give a function that installs a package with a backend, as pip would."""
    monkeypatch.syspath_prepend(tmp_path)
    modules: list[str] = []

    def add(package: str, name: str, source: str, value: str = "") -> None:
        module = package.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        metadata = tmp_path / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        points = f"[{registry.GROUP}]\n{name} = {value or f'{module}:Mine'}\n"
        (metadata / "entry_points.txt").write_text(points)
        registry.refresh()

    yield add
    monkeypatch.undo()
    for module in modules:
        sys.modules.pop(module, None)
    registry.refresh()


def backend(name: str = "mine", option: str = "depth", flag: str = "--depth") -> str:
    """Return the source of a backend with one option."""
    return MODULE.format(name=name, option=option, flag=flag)


def test_own_backends_come_first() -> None:
    assert registry.names()[: len(OURS)] == OURS


def test_own_backends_are_found_with_old_metadata() -> None:
    installed = importlib.metadata.entry_points(group=registry.GROUP)
    code = (
        "import importlib.metadata, sys; importlib.metadata.entry_points = lambda **_: []\n"
        "from llm_magic.backends import registry; print(*registry.names())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(done.stdout.split()) == OURS
    assert {point.name for point in installed if point.dist and point.dist.name == "llm_magic"} <= {
        *OURS
    }


def test_names_import_no_backend() -> None:
    code = (
        "import sys; from llm_magic.backends import registry; registry.names()\n"
        "print([m for m in sys.modules if m.startswith('llm_magic.backends.') and m.count('.') > 2])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_of_all_backends_need_no_heavy_package() -> None:
    code = (
        "import sys; from llm_magic.backends import registry; registry.load_specs()\n"
        "print({'aiohttp', 'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_installed_package_adds_backend_and_options(install: Install) -> None:
    with pytest.raises(OptionError, match="There is no backend 'mine'"):
        registry.check_name("mine")
    install("llm-magic-mine", "mine", backend())
    assert registry.names() == (*OURS, "mine")
    assert registry.load_specs()["depth"].backends == ("mine",)
    parsed = parser.parse("llm_load", "x -b mine --depth 3")
    config = registry.load_config(settings(), parsed.options)
    assert config.model_dump() == {"backend": "mine", "depth": 3}
    assert "With -b mine:\n      --depth N" in page("llm_load")


def test_backend_installed_later_is_found_without_refresh(install: Install, tmp_path: Path) -> None:
    install("llm-magic-mine", "mine", backend())
    points = tmp_path / "llm_magic_mine-1.0.dist-info" / "entry_points.txt"
    points.write_text(
        f"[{registry.GROUP}]\nmine = llm_magic_mine:Mine\nother = llm_magic_mine:Mine\n"
    )
    registry.check_name("other")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import missing_package", "ModuleNotFoundError: No module named 'missing_package'"),
        ("class Other: pass", "AttributeError: module 'llm_magic_mine' has no attribute 'Mine'"),
        ("raise ValueError('no GPU')", "ValueError: no GPU"),
        (backend().replace("UNSUPPORTED)", "UNSUPPORTED) | {'x': ''}"), "TypeError: Mine.option_names"),
    ],
)  # fmt: skip
def test_package_with_errors_raises_only_when_used(
    install: Install, source: str, message: str
) -> None:
    install("llm-magic-mine", "mine", source)
    assert "mine" in registry.names()
    assert registry.load_specs()["pull"].backends == ("ollama",)
    assert isinstance(registry.load_config(settings(), {}), LocalLoadConfig)
    with pytest.raises(BackendUnavailable) as caught:
        registry.load_config(settings(), {"backend": "mine"})
    assert message in str(caught.value)
    assert "of the package llm-magic-mine cannot be imported" in str(caught.value)


@pytest.mark.parametrize("source", ["Mine = 3", "class Mine: pass", backend(name="yours")])
def test_entry_point_that_is_no_such_backend_raises(install: Install, source: str) -> None:
    install("llm-magic-mine", "mine", source)
    with pytest.raises(
        BackendUnavailable, match="of the package llm-magic-mine must be a subclass"
    ):
        registry.backend_class("mine")


def test_two_packages_with_one_name_are_both_named(install: Install) -> None:
    install("first-package", "mine", backend())
    install("second-package", "mine", backend())
    with pytest.raises(BackendUnavailable, match="first-package and second-package both have a"):
        registry.backend_class("mine")
    assert registry.load_config(settings(), {}).backend == "local"


def test_package_cannot_take_the_name_of_an_own_backend(install: Install) -> None:
    install("llm-magic-mine", "ollama", backend(name="ollama"))
    with pytest.raises(
        BackendUnavailable, match="llm_magic and llm-magic-mine both have a backend"
    ):
        registry.backend_class("ollama")


def test_flag_of_another_option_stays_with_the_first_backend(install: Install) -> None:
    install("llm-magic-mine", "mine", backend(option="depth", flag="--device"))
    assert "depth" not in registry.load_specs()
    assert parser.parse("llm_load", "--device cpu").options == {"device": "cpu"}


def test_option_of_another_backend_raises() -> None:
    with pytest.raises(
        OptionError, match=r"^--pull works only with -b ollama, not with vllm\. Rem"
    ):
        registry.load_config(settings(), {"backend": "vllm", "pull": True})
    with pytest.raises(OptionError, match="--base-url works only with -b ollama"):
        registry.load_config(settings(), {"base_url": "http://localhost:1"})
    with pytest.raises(OptionError, match=r"'pul' is not an option\. Did you mean \"pull\"\?"):
        registry.load_config(settings(), {"backend": "ollama", "pul": True})


def test_default_of_another_backend_is_accepted() -> None:
    options = {"backend": "vllm", "pull": False, "device": "auto", "quantization": "none"}
    config = registry.load_config(settings(), {**options, "revision": None})
    assert config == ServerLoadConfig(backend="vllm")


@pytest.mark.parametrize(
    ("name", "cls"),
    [("local", LocalLoadConfig), ("ollama", OllamaLoadConfig), ("vllm", ServerLoadConfig)],
)
def test_backend_has_its_own_load_config(name: str, cls: type[LoadConfig]) -> None:
    assert type(registry.load_config(settings(), {"backend": name})) is cls


def test_settings_are_the_defaults_of_a_load() -> None:
    given = settings(device="cpu", quantization="8bit", backend="local")
    config = registry.load_config(given, {"quantization": "4bit"})
    assert config == LocalLoadConfig(device="cpu", quantization="4bit")
    assert config.model_fields_set == {"quantization"}


def test_wrong_default_backend_names_its_variable() -> None:
    with pytest.raises(OptionError, match="LLM_BACKEND_TYPE: there is no backend 'olama'"):
        registry.load_config(settings(backend="olama"), {})
