"""The child process that turns one GGUF file into a folder of bf16 safetensors.

`gguf.py` runs it as a script (``python -P convert_gguf.py FILE FOLDER``), so that it can be killed at
any moment, and the kernel neither blocks nor keeps the memory it takes. It imports nothing of
`llm_magic`: the script starts whatever the kernel's working folder and ``sys.path`` are.

It says how far it is in JSON lines on stdout, ``{"stage": …, "share": …}``, and ends with
``{"done": true}`` or ``{"error": …}``. Tracebacks and whatever libraries print go to stderr.
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

# Marks that only ever end a turn. A file may name another token as its end of text, and the model
# would then talk on as the user. `<|end|>` is not here: gpt-oss ends its thoughts with it as well.
_ENDS_OF_A_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

# Vocabularies that were learned with every digit on its own, by the name llama.cpp gives them.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


class Voice:
    """Tells the parent how far this process is; the share only ever grows."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._stage, self._begin, self._end, self._share = "", 0.0, 0.0, 0.0

    def say(self, **line: object) -> None:
        """Write one line; raises BrokenPipeError when the kernel is gone, and all ends then."""
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def stage(self, words: str, begin: float, end: float) -> None:
        """Begin a stage that takes from `begin` to `end` of the whole way."""
        self._stage, self._begin, self._end = words, begin, end
        self.within(0.0)

    def within(self, share: float) -> None:
        """Tell the share of this stage that is done."""
        self._share = max(self._share, self._begin + share * (self._end - self._begin))
        self.say(stage=self._stage, share=round(self._share, 3))


def convert(source: Path, folder: Path, voice: Voice) -> None:
    """Write the model in `source` into `folder`, with tokenizer and generation settings.

    The shares of the stages are those of a model of 135M parameters.
    """
    voice.stage("starting", 0.0, 0.2)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # takes seconds

    _read_only_once()
    _report_bars(voice)
    voice.stage("reading the tokenizer", 0.2, 0.55)
    tokenizer = _tokenizer(source)
    voice.stage("reading the weights", 0.55, 0.95)
    model = _model(source)
    _set_stops(model.generation_config, tokenizer, source)
    voice.stage("saving", 0.95, 1.0)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _read_only_once() -> None:
    """Keep what transformers would ask `gguf` for again and again: half of the time.

    It reads the same file three times and makes the same table of names once per module.
    """
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))


def _report_bars(voice: Voice) -> None:
    """Turn the progress bars of transformers into lines; it makes them from ``tqdm.auto.tqdm``."""
    import tqdm.auto

    class Bar(tqdm.auto.tqdm):  # type: ignore[type-arg]  # generic in its stubs only
        monitor_interval = 0  # no thread that draws on its own: lines must not mix

        def display(self, *args: object, **kwargs: object) -> None:
            if self.total:
                voice.within(min(self.n / self.total, 1.0))

    tqdm.auto.tqdm = Bar


def _tokenizer(source: Path) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False
    )
    if _value(source, "tokenizer.ggml.pre") in _SINGLE_DIGITS:
        # transformers 5.23 takes GPT-2's rule for these, and cuts blanks before numbers wrongly:
        # https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp has the right one.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


def _model(source: Path) -> Any:
    """Read the weights into a plain model: one that came from GGUF refuses to be saved."""
    import torch
    import transformers

    options: dict[str, Any] = {"output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # newer ones may keep the blocks packed otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        trust_remote_code=False,
        **options,
    )
    read, info = loaded
    # Transformers would only log this, and leave noise in the place of the weights.
    lacking = sorted(set(info["missing_keys"]) & dict(read.named_parameters()).keys())
    if lacking:
        raise ValueError(f"the file lacks weights, such as {lacking[0]}")
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    with torch.device("meta"):  # the weights are taken over, not copied
        plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    return plain


def _set_stops(generation: Any, tokenizer: Any, source: Path) -> None:
    """Let answers end at every token the file or the chat template ends them with."""
    named = [_value(source, f"tokenizer.ggml.{key}") for key in _STOP_KEYS]
    template = str(tokenizer.chat_template or "")
    ends = [tokenizer.get_vocab().get(mark) for mark in _ENDS_OF_A_TURN if mark in template]
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

    # The same text as transformers passes, so that the file is not read once more.
    field = gguf.GGUFReader(os.path.join(source.parent, source.name)).get_field(key)  # noqa: PTH118
    return field.contents() if field is not None else None


def _own_stdout() -> TextIO:
    """Keep stdout for the lines of `Voice`, and send what libraries print there to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def main() -> int:
    """Convert, and report a failure as data: this is the edge of the process."""
    gc.disable()  # it would walk the million small objects of GGUFReader again and again
    voice = Voice(_own_stdout())
    source, folder = (Path(argument) for argument in sys.argv[1:])
    try:
        convert(source, folder, voice)
    except Exception as error:  # noqa: BLE001  # anything at all; nobody else can report it
        traceback.print_exc()  # behind what the libraries have said about it
        voice.say(error=traceback.format_exception_only(error)[-1].strip().rstrip("."))
        return 1
    voice.say(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
