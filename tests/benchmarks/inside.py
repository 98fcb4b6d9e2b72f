"""What the benchmarks run in their kernels: other ways to generate, and the measurement of times.

Times are measured in the kernel, around the whole cell, so that they do not include the client. The
other ways are written as their documentation shows them.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython
from IPython.core.interactiveshell import InteractiveShell

if TYPE_CHECKING:
    from llm_magic.backends.local.backend import LocalTransformersBackend
    from llm_magic.backends.local.local_model import LocalModel

PROMPT = "Write a long story about a lighthouse keeper and a whale. Tell every detail."


def shell() -> InteractiveShell:
    """Return the shell of this kernel."""
    found = get_ipython()
    assert isinstance(found, InteractiveShell)
    return found


class Stopwatch:
    """Measures every cell; while a cell runs, `seconds` is the duration of the one before it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = time.perf_counter()
        events = shell().events
        events.register("pre_run_cell", self._start)
        events.register("post_run_cell", self._stop)

    def _start(self, _info: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, _result: object) -> None:
        self.seconds = time.perf_counter() - self._began


class FirstToken:
    """Records when the first token of an answer was generated, received and sent to the frontend."""

    def __init__(self) -> None:
        from llm_magic.notebook.display import answer_view

        views: Any = answer_view.RichView
        publisher: Any = shell().display_pub
        self._publish, self._draw = publisher.publish, views.draw
        publisher.publish = self._published
        views.draw = lambda view: self._drawn(view)
        self.reset()

    def reset(self) -> None:
        """Discard the times of the answer before."""
        self.produced = self.received = self.sent = 0.0
        self.display = 0
        self._displays = 0

    def _drawn(self, view: Any) -> None:
        from llm_magic import llm

        for response in llm.answering:
            if response.has_text and not self.produced:
                first_s = response.timing.first_token_s or 0.0
                self.produced = response.prepared.request.started + first_s
                self.received = time.perf_counter()
        self._draw(view)

    def _published(self, *args: Any, **kwargs: Any) -> None:
        self._publish(*args, **kwargs)
        self._displays += 1
        if self.produced and not self.sent:
            self.sent, self.display = time.perf_counter(), self._displays

    def times(self) -> tuple[float, float, float, int]:
        """Return when it was generated, received and sent, by `time.monotonic`, and in which display."""
        to_monotonic = time.monotonic() - time.perf_counter()
        moments = [t + to_monotonic for t in (self.produced, self.received, self.sent)]
        return moments[0], moments[1], moments[2], self.display


class Entered:
    """Records the functions of the package that are entered, on this and on every new thread."""

    def __init__(self) -> None:
        import llm_magic

        self._root = f"{Path(llm_magic.__file__).parent}{os.sep}"
        self._entered: set[CodeType] = set()
        # Threads that exist already cannot be profiled before Python 3.12.
        threading.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(self._root):
            self._entered.add(frame.f_code)

    def start(self) -> None:
        """Record the next cell."""
        shell().events.register("pre_run_cell", self._start_cell)

    def _start_cell(self, _info: object) -> None:
        shell().events.unregister("pre_run_cell", self._start_cell)
        shell().events.register("post_run_cell", self._end)
        self._entered.clear()
        sys.setprofile(self._profile)

    def _end(self, _result: object) -> None:
        sys.setprofile(None)
        shell().events.unregister("post_run_cell", self._end)
        self._found = sorted(
            (code.co_filename.removeprefix(self._root), code.co_qualname)
            for code in self._entered
            # Not the comprehensions, which Python 3.12 no longer calls.
            if not code.co_name.startswith("<") or code.co_name == "<lambda>"
        )

    def functions(self) -> list[tuple[str, str]]:
        """Return the file and the qualified name of each function."""
        return self._found


def backend() -> LocalTransformersBackend:
    """Return the local backend of the session."""
    from llm_magic import llm

    local: Any = llm.loaded_model().backend
    return local  # type: ignore[no-any-return]


def loaded_model() -> LocalModel:
    """Return the loaded model of the session."""
    from llm_magic import llm

    return backend().local_model(llm.loaded_model().name)


def folder() -> Path:
    """Return where the bundled model was converted to."""
    from llm_magic.backends.local.files import gguf

    file = gguf.embedded_file()
    assert file is not None
    return gguf.converted_folder(file)


def load_bare(path: str | Path | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """Load the bundled model, or the one in a folder, with nothing but Transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = path or folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    return model, tokenizer


def load_bare_and_drop() -> float:
    """Return the seconds of a load without this package, without the time to free the model."""
    began = time.perf_counter()
    pair = load_bare()
    seconds = time.perf_counter() - began
    del pair
    gc.collect()
    return seconds


def generate(
    model: Any, tokenizer: Any, tokens: int, streamer: Any = None, prompt: str = PROMPT
) -> int:
    """Answer with ``model.generate`` and the settings of the streamed call; returns the token count."""
    from llm_magic.backends.local.generation.parameters import generate_options
    from llm_magic.config.settings import GenerationConfig

    config = GenerationConfig(max_new_tokens=tokens, temperature=0)
    turn = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    output = model.generate(**inputs, streamer=streamer, **generate_options(model, config, None))
    new = output[0, inputs["input_ids"].shape[1] :]
    tokenizer.decode(new, skip_special_tokens=True)
    return len(new)


def read(model: Any, tokenizer: Any, prompt: str) -> float:
    """Return the seconds of ``model.generate`` for a prompt and one token."""
    began = time.perf_counter()
    generate(model, tokenizer, 1, prompt=prompt)
    return time.perf_counter() - began


class Pipeline:
    """Runs ``pipeline("text-generation")`` as its documentation shows it; it does not stream."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from transformers import pipeline

        self._pipe: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)

    def __call__(self, tokens: int) -> int:
        """Answer with the settings of the streamed call; returns the number of tokens."""
        from llm_magic.backends.local.generation.parameters import generate_options
        from llm_magic.config.settings import GenerationConfig

        config = GenerationConfig(max_new_tokens=tokens, temperature=0)
        options = generate_options(self._pipe.model, config, None)
        turn = [{"role": "user", "content": PROMPT}]
        (answer,) = self._pipe(turn, return_full_text=False, **options)
        return len(self._pipe.tokenizer(answer["generated_text"]).input_ids)


class OpenAIClient:
    """Streams with the `openai` client as its documentation shows it, in a cell."""

    def __init__(self, url: str) -> None:
        import openai

        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

    def __call__(self, model: str, prompt: str, tokens: int) -> str | None:
        """Print a greedy answer as it comes; returns the finish reason."""
        reason: str | None = None
        chunks = self._client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=tokens,
            temperature=0,
            stream=True,
        )
        for chunk in chunks:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="")
                reason = choice.finish_reason or reason
        return reason


def generate_here(tokens: int) -> int:
    """Generate with the loaded model on the main thread, as a cell of a user does."""
    loaded = loaded_model()
    return generate(loaded.model, loaded.tokenizer, tokens)


def generate_on_its_thread(tokens: int) -> int:
    """Generate with the loaded model on the thread that also answers ``%%llm``."""
    loaded = loaded_model()

    def work(_cancel: threading.Event) -> int:
        return generate(loaded.model, loaded.tokenizer, tokens)

    future, _cancel = backend().inference.submit(work, _translate)
    return future.result()


def _translate(error: BaseException) -> Any:
    from llm_magic.errors import GenerationFailed

    return GenerationFailed(f"{type(error).__name__}: {error}")


def generate_as_documented(model: Any, tokenizer: Any, tokens: int) -> int:
    """Stream as the documentation of Transformers shows it, with a thread for each call."""
    from transformers import TextIteratorStreamer

    streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    count: list[int] = []
    thread = threading.Thread(
        target=lambda: count.append(generate(model, tokenizer, tokens, streamer))
    )
    thread.start()
    for text in streamer:
        print(text, end="")
    thread.join()
    return count[0]
