"""The CPU time of a token on the thread that generates it, compared with Transformers' streamer.

2,000 tokens without a line break, for which ``TextIteratorStreamer`` decodes the whole line again with
every token. Both have a reader. Only the CPU time of the generating thread counts, because only that
delays the model.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.inside import folder
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds

_TOKENS = 2000
_SENTENCE = " The keeper of the lighthouse saw a whale, and it was larger than any he had seen."
_OURS, _THEIRS = "Detokenizer and ThreadBridge", "TextIteratorStreamer.put"


def measure(rounds: Rounds) -> Iterator[Row]:
    """Pass the same ids to both in turn."""
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder())
    ids = tokenizer(_SENTENCE * (_TOKENS // 10)).input_ids[:_TOKENS]
    assert len(ids) == _TOKENS
    # As `generate` passes them.
    tokens = [torch.tensor([token]) for token in ids]
    text = tokenizer.decode(ids)
    variants: dict[str, Callable[[], float]] = {
        _OURS: lambda: _ours(tokenizer, tokens, text),
        _THEIRS: lambda: _theirs(tokenizer, tokens, text),
    }
    for run in variants.values():
        run()
    taken = rounds.in_turn(variants)
    for name, values in taken.items():
        yield Row(name, "us/tok", values)
    yield ratio("ours / theirs", taken[_OURS], taken[_THEIRS], Target("<=", 0.05))


def _timed(put: Callable[[Any], None], tokens: list[Any]) -> float:
    """Return the CPU time of this thread for one token, in microseconds."""
    began = time.thread_time()
    for token in tokens:
        put(token)
    return (time.thread_time() - began) * 1e6 / len(tokens)


def _ours(tokenizer: Any, tokens: list[Any], text: str) -> float:
    from llm_magic.backends.local.generation.token_streamer import Detokenizer
    from llm_magic.backends.thread_bridge import ThreadBridge
    from llm_magic.types import Chunk

    detokenizer = Detokenizer(tokenizer)

    async def main() -> float:
        bridge: ThreadBridge[Chunk] = ThreadBridge()

        def put(token: Any) -> None:
            piece = detokenizer.step(int(token.item()))
            bridge.put(Chunk(text=piece, tokens=1, time=time.perf_counter()))

        async def read() -> str:
            texts: list[str] = []
            while not bridge.is_finished:
                texts += [chunk.text for chunk in bridge.take()]
                await bridge.wait_async()
            return "".join(texts)

        reading = asyncio.create_task(read())
        cost = await asyncio.to_thread(_timed, put, tokens)
        bridge.close()
        assert await reading + detokenizer.flush() == text
        return cost

    return asyncio.run(main())


def _theirs(tokenizer: Any, tokens: list[Any], text: str) -> float:
    from transformers import TextIteratorStreamer

    streamer: Any = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.extend(streamer))
    reader.start()
    cost = _timed(streamer.put, tokens)
    streamer.end()
    reader.join()
    assert "".join(read) == text
    return cost
