"""What packed and quantized weights are worth on this CPU: speed, memory traffic, and how exact they are.

Two models: the bundled one, whose tokens are short, and one with the shape of Llama's with 1.0 billion
random weights, for which a token means reading 2 GB. Plain ``generate`` multiplies bf16 weights as
Transformers loads them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.inside import folder, load_bare, loaded_model
from tests.benchmarks.notebook import ask, bare, bare_kernel, loaded_kernel
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.kernels import ROOT

_TOKENS, _WARM_UP_TOKENS = 48, 4
_PLAIN, _PACKED = "generate", "%%llm"
_LOADS = {_PACKED: "", "-q 8bit": "-q 8bit", "-q 4bit": "-q 4bit"}
_SMALL = {_PACKED: Target(">=", 1.5), "-q 8bit": None, "-q 4bit": None}
_LARGE = {_PACKED: Target(">=", 1.8), "-q 8bit": Target(">=", 2.0), "-q 4bit": Target(">=", 3.8)}
_KL = {_PACKED: 0.002, "-q 8bit": 0.006, "-q 4bit": 0.045}
_PERPLEXITY = Target("<=", 1.05)
_BANDWIDTH = Target(">=", 0.85)
# Layers of the 1B shape, with SmolLM2's vocabulary.
_LAYERS, _HIDDEN, _INTERMEDIATE, _HEADS, _KEY_HEADS = 20, 2048, 5632, 32, 8
_TEXT, _TEXT_TOKENS = ROOT / "docs" / "explanation" / "speed.md", 700
# So many tokens at a time as a step of speculative decoding has: few enough for the kernels of single rows.
_STEP = 4


def measure_small(rounds: Rounds) -> Iterator[Row]:
    """The bundled model: tokens per second of each, and how far its predictions are from float32."""
    yield from _speeds(folder(), _SMALL, rounds)
    for name, options in _LOADS.items():
        with loaded_kernel(f"%llm_load {options}") as kernel:
            kernel.ok(
                "from tests.benchmarks import weights\nfound = weights.quality()", timeout=600
            )
            divergence, perplexity = kernel.value("found")
        yield Row(f"{name}: KL to float32", "", (divergence,), Target("<=", _KL[name]))
        yield Row(f"{name}: perplexity / float32", "x", (perplexity,), _PERPLEXITY)


def measure_large(rounds: Rounds) -> Iterator[Row]:
    """The 1B shape: tokens per second of each, and what share of the memory's bandwidth packed bf16 uses."""
    with tempfile.TemporaryDirectory(prefix="llm_magic-bench-") as temporary:
        path = Path(temporary) / "one-billion"
        write_llama(path)
        yield from _speeds(path, _LARGE, rounds)


def _speeds(path: Path, targets: Mapping[str, Target | None], rounds: Rounds) -> Iterator[Row]:
    with ExitStack() as kernels:
        plain = kernels.enter_context(bare_kernel(path))
        ways: dict[str, Callable[[int], float]] = {
            _PLAIN: lambda n: bare(plain, f"inside.generate(model, tokenizer, {n})", n)
        }
        opened = {}
        for name, options in _LOADS.items():
            opened[name] = kernels.enter_context(loaded_kernel(f"%llm_load {path} {options}"))
            ways[name] = partial(ask, opened[name])
        for way in ways.values():
            way(_WARM_UP_TOKENS)
        packed, decoding = opened[_PACKED], list[float]()

        def timed() -> float:
            rate = ask(packed, _TOKENS)
            decoding.append(packed.value("reply.timing.tokens_per_s"))
            return rate

        turns: dict[str, Callable[[], float]] = {n: partial(w, _TOKENS) for n, w in ways.items()}
        turns[_PACKED] = timed
        rates = rounds.in_turn(turns)
        packed.ok("from tests.benchmarks import weights\nread = weights.bytes_a_token()")
        read = packed.value("read")
        bandwidth = rounds.run(lambda: {"": packed.value("weights.bandwidth()")})[""]
    for name, values in rates.items():
        yield Row(name, "tok/s", values)
    for name, target in targets.items():
        yield ratio(f"{name} / {_PLAIN}", rates[name], rates[_PLAIN], target)
    is_large = targets[_PACKED] == _LARGE[_PACKED]
    for name, speeds, target in (
        ("share of the bandwidth", rates[_PACKED], _BANDWIDTH if is_large else None),
        ("share of the bandwidth, without the prompt", decoding, None),
    ):
        shares = tuple(rate * read / best for rate, best in zip(speeds, bandwidth, strict=False))
        yield Row(f"{_PACKED}: {name}", "x", shares, target)


# --- what runs in the kernels ---


def write_llama(path: Path) -> None:
    """Write a model of the 1B shape with random weights, and the tokenizer of the bundled one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN,
        intermediate_size=_INTERMEDIATE,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KEY_HEADS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def bytes_a_token() -> int:
    """Return how many bytes of weights of the loaded model a token reads.

    Those of the input embedding only if the output head is the same matrix.
    """
    model = loaded_model().model
    embedding, head = (
        m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    is_read = head is embedding
    return sum(p.nbytes for p in model.parameters() if is_read or p is not embedding)


def bandwidth() -> float:
    """Return the bytes a second of the fastest of five sums over 1 GiB."""
    import time

    import torch

    numbers = torch.zeros(1 << 28, dtype=torch.float32)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        taken.append(time.perf_counter() - began)
    return numbers.nbytes / min(taken)


def quality() -> tuple[float, float]:
    """Return the mean KL divergence of the loaded model's predictions from those of float32, and the
    quotient of the perplexities, on real text, a few tokens at a time."""
    import torch

    exact, tokenizer = load_bare(dtype="float32")
    ids = tokenizer(_TEXT.read_text("utf-8"), return_tensors="pt").input_ids[:, :_TEXT_TOKENS]
    expected, got = (_log_probabilities(model, ids) for model in (exact, loaded_model().model))
    divergence = (expected.exp() * (expected - got)).sum(-1).mean()
    following = ids[0, 1:, None]
    losses = [-p[:-1].gather(-1, following).mean() for p in (expected, got)]
    return float(divergence), float(torch.exp(losses[1] - losses[0]))


def _log_probabilities(model: Any, ids: Any) -> Any:
    """Return the logarithms of the probabilities after each token, of shape (tokens, vocabulary)."""
    import torch

    from llm_magic.backends.local import transformers_compat as compat

    cache, parts = {compat.cache_name(model): compat.new_cache(model)}, []
    with torch.inference_mode():
        for start in range(0, ids.shape[1], _STEP):
            step = ids[:, start : start + _STEP]
            logits = model(step, **cache, use_cache=True).logits[0]
            parts.append(logits.float().log_softmax(-1))
    return torch.cat(parts)
