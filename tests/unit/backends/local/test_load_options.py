"""The options of a load: device, dtype, attention and quantization, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llm_magic.backends.local import cpu_quantized, memory
from llm_magic.backends.local.files.gguf import converted_folder, embedded_file
from llm_magic.errors import DeviceUnavailable, MissingDependency, OptionError
from llm_magic.session import Session
from tests.local_models import SMOLLM2_BYTES, listening, local_session
from tests.tiny_models import tiny_llama

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
# torch/utils/mkldnn.py, which bitsandbytes leads to, is compiled in a way that torch deprecates;
# Python shows such warnings only to the authors of the code.
mkldnn = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
QUESTION = "What is the capital of Germany?"


@pytest.fixture(scope="module")
def session(model_cache: Path) -> Iterator[Session]:
    with local_session(temperature=0, max_new_tokens=8) as session:
        yield session


@pytest.fixture(autouse=True)
def no_noise(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fail if a library logs or prints a warning."""
    with listening() as noise:
        yield
    assert noise == []
    lines = capfd.readouterr().err.splitlines()
    # The tests build their models with Transformers' own bars.
    assert [line for line in lines if "Writing model shards" not in line] == []


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Report a torch without the kernels for quantized weights."""
    with monkeypatch.context() as patch:
        patch.delattr(torch, "_weight_int8pack_mm")
        cpu_quantized.quantized_class.cache_clear()
        yield
    cpu_quantized.quantized_class.cache_clear()


@no_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_missing_gpu_is_an_error(session: Session, llama: Path, device: str) -> None:
    session.load(str(llama), device="cpu")
    with pytest.raises(DeviceUnavailable, match=r"^CUDA is not available: .*\. Use -d cpu\.$"):
        session.load(str(llama), device=device)
    assert session.status().active_model == "llama"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU here")
def test_missing_apple_gpu_is_an_error(session: Session, llama: Path) -> None:
    with pytest.raises(
        DeviceUnavailable, match=r"No Apple GPU \(mps\) is available\. Use -d cpu\.$"
    ):
        session.load(str(llama), device="mps")


def test_unknown_device_is_an_error(session: Session, llama: Path) -> None:
    with pytest.raises(
        OptionError, match=r"device=tpu is invalid\. Use auto, cpu, cuda, cuda:N or mps"
    ):
        session.load(str(llama), device="tpu")


@pytest.mark.parametrize(
    ("requested", "dtype", "width"),
    [("auto", "float32", 4), ("float32", "float32", 4), ("bf16", "bfloat16", 2), ("fp16", "float16", 2)],
)  # fmt: skip
def test_weights_have_the_requested_dtype(
    session: Session, llama: Path, requested: str, dtype: str, width: int
) -> None:
    info = session.load(str(llama), device="cpu", dtype=requested)
    assert (info.device, info.dtype) == ("cpu", dtype)
    assert info.size == pytest.approx(108_112 * width, rel=0.001)
    assert session.generate("x", max_new_tokens=2).usage.completion_tokens


@pytest.mark.parametrize(
    ("quantization", "size", "dtype"),
    [
        ("none", SMOLLM2_BYTES, "bfloat16"),
        ("8bit", 191_582_848, "bfloat16"),
        ("4bit", 151_458_688, "bfloat16"),
    ],
)
def test_quantized_model_answers(
    session: Session, quantization: str, size: int, dtype: str
) -> None:
    info = session.load(device="cpu", quantization=quantization)
    assert info.size == pytest.approx(size, rel=0.001)
    assert (info.quantization, info.dtype) == (quantization, dtype)
    reply = session.generate(QUESTION)
    assert "Berlin" in reply.text
    file = embedded_file()
    assert file is not None
    # The estimate before the load.
    folder = converted_folder(file)
    estimate = memory.weight_bytes(folder, "auto", quantization)
    if quantization != "none":
        estimate += memory.head_copy_bytes(folder, "auto")
    assert estimate == pytest.approx(size, rel=0.01)


@mkldnn
@pytest.mark.parametrize(
    ("quantization", "requested", "dtype"),
    [("bnb-8bit", "auto", "float16"), ("bnb-8bit", "bfloat16", "bfloat16"), ("bnb-4bit", "auto", "bfloat16"),
     ("8bit", "auto", "bfloat16"), ("4bit", "float32", "float32"), ("8bit", "float16", "float16")],
)  # fmt: skip
def test_quantized_model_has_the_requested_dtype(
    session: Session, llama: Path, quantization: str, requested: str, dtype: str
) -> None:
    info = session.load(str(llama), device="cpu", quantization=quantization, dtype=requested)
    assert (info.quantization, info.dtype) == (quantization, dtype)
    assert session.generate("x").usage.completion_tokens


@mkldnn
def test_bitsandbytes_quantizes_where_torch_has_no_kernel(
    session: Session, llama: Path, no_kernel: None
) -> None:
    info = session.load(str(llama), device="cpu", quantization="4bit")
    assert info.quantization == "bnb-4bit"
    assert session.generate("x").usage.completion_tokens


def test_missing_package_is_named(
    session: Session, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as if it were not installed
    with pytest.raises(MissingDependency) as caught:
        session.load(str(llama), name="another")
    assert str(caught.value) == (
        'Local models need accelerate. To install, run: pip install "llm_magic[local]"'
    )


@pytest.mark.parametrize("quantization", ["8bit", "bnb-4bit"])
def test_quantization_without_bitsandbytes_gives_the_command(
    session: Session,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_kernel: None,
    quantization: str,
) -> None:
    session.load(str(llama))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(MissingDependency) as caught:
        session.load(str(llama), device="cpu", quantization=quantization)
    assert str(caught.value) == (
        f"-q {quantization} needs bitsandbytes. Run: pip install bitsandbytes"
    )
    assert session.status().active_model == "llama"


def test_kernels_of_torch_need_no_bitsandbytes(
    session: Session, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    assert session.load(str(llama), device="cpu", quantization="4bit").quantization == "4bit"
