"""The child process that converts one GGUF file into a folder of bfloat16 safetensors.

`gguf.py` runs it as a script (``python -P convert_gguf.py FILE FOLDER``): it can be killed at any time,
and the kernel is neither blocked nor left with the memory that a conversion takes. It imports nothing
of `llm_magic`, so that it starts whatever the kernel's working folder and ``sys.path`` are.

It writes JSON lines to stdout: ``{"stage": …, "share": …}`` for progress, and at the end
``{"done": true}`` or ``{"error": …}``. Tracebacks and the output of libraries go to stderr.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

# Tokens that end a turn and nothing else. A file may name another token as its end of text, and the
# model would then continue as the user. gpt-oss ends its reasoning with `<|end|>`, too.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

# Vocabularies in which each digit is a token, by their names in llama.cpp.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


class ProgressWriter:
    """Writes progress for the parent process. The share never decreases."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._stage, self._start, self._end, self._share = "", 0.0, 0.0, 0.0

    def write(self, **line: object) -> None:
        """Write one line; raises BrokenPipeError once the kernel has ended, which ends this process."""
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def start_stage(self, name: str, start: float, end: float) -> None:
        """Start the stage between the shares `start` and `end` of the whole conversion."""
        self._stage, self._start, self._end = name, start, end
        self.advance(0.0)

    def advance(self, share: float) -> None:
        """Report the share of this stage that is done."""
        self._share = max(self._share, self._start + share * (self._end - self._start))
        self.write(stage=self._stage, share=round(self._share, 3))


def convert(source: Path, folder: Path, progress: ProgressWriter) -> None:
    """Write the model in `source` into `folder`, with tokenizer and generation settings.

    The shares of the stages were measured with a model of 135M parameters.
    """
    progress.start_stage("starting", 0.0, 0.2)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # import takes seconds

    _cache_gguf_reads()
    _replace_progress_bars(progress)
    progress.start_stage("reading the tokenizer", 0.2, 0.55)
    tokenizer = _tokenizer(source)
    progress.start_stage("reading the weights", 0.55, 0.95)
    model = _model(source)
    _set_stops(model.generation_config, tokenizer, source)
    progress.start_stage("saving", 0.95, 1.0)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _cache_gguf_reads() -> None:
    """Cache two functions of `gguf`, which halves the time of a conversion.

    Transformers reads the same file three times, and makes the same table of names for each module.
    """
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))


def _replace_progress_bars(progress: ProgressWriter) -> None:
    """Report the progress bars of Transformers, which it creates from ``tqdm.auto.tqdm``."""
    import tqdm.auto

    class Bar(tqdm.auto.tqdm):  # type: ignore[type-arg]  # generic in its stubs only
        monitor_interval = 0  # no thread of its own: lines must not mix

        def display(self, *args: object, **kwargs: object) -> None:
            if self.total:
                progress.advance(min(self.n / self.total, 1.0))

    tqdm.auto.tqdm = Bar


def _tokenizer(source: Path) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False
    )
    if _value(source, "tokenizer.ggml.pre") in _SINGLE_DIGITS:
        # Transformers 5.23 splits spaces before numbers by the rule of GPT-2. The correct rule is in
        # https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


def _model(source: Path) -> Any:
    """Return a model with the weights; a model that was loaded from GGUF cannot be saved."""
    import torch
    import transformers

    options: dict[str, Any] = {"output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # newer versions may not dequantize by default
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        trust_remote_code=False,
        **options,
    )
    read, info = loaded
    # Transformers only logs this, and fills the weights with random numbers.
    lacking = sorted(set(info["missing_keys"]) & dict(read.named_parameters()).keys())
    if lacking:
        raise ValueError(f"the file lacks weights, such as {lacking[0]}")
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    with torch.device("meta"):  # the weights are assigned, not copied
        plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    return plain


def _set_stops(generation: Any, tokenizer: Any, source: Path) -> None:
    """Set all tokens with which the file or the chat template ends an answer."""
    named = [_value(source, f"tokenizer.ggml.{key}") for key in _STOP_KEYS]
    template = str(tokenizer.chat_template or "")
    ends = [tokenizer.get_vocab().get(token) for token in _END_OF_TURN if token in template]
    known = generation.eos_token_id
    known = known if isinstance(known, list) else [known]
    stops = list(dict.fromkeys(stop for stop in [*known, *named, *ends] if stop is not None))
    if stops:
        generation.eos_token_id = stops if len(stops) > 1 else stops[0]
        if generation.pad_token_id is None:
            generation.pad_token_id = stops[0]


def _value(source: Path, key: str) -> Any:
    """Return one entry of the file's metadata, or None."""
    import gguf

    # The same text as in Transformers, for the cache of `GGUFReader`.
    field = gguf.GGUFReader(os.path.join(source.parent, source.name)).get_field(key)  # noqa: PTH118
    return field.contents() if field is not None else None


def _own_stdout() -> TextIO:
    """Return stdout for `ProgressWriter`, and send the output of libraries to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def main() -> int:
    """Convert the file, and report an error to the parent process; returns the exit code."""
    gc.disable()  # it would traverse the million objects of GGUFReader repeatedly
    progress = ProgressWriter(_own_stdout())
    source, folder = (Path(argument) for argument in sys.argv[1:])
    try:
        convert(source, folder, progress)
    except Exception as error:  # noqa: BLE001 - reported to the parent process
        traceback.print_exc()
        progress.write(error=traceback.format_exception_only(error)[-1].strip().rstrip("."))
        return 1
    progress.write(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
