"""Helpers of the tests of the local backend: sessions, edited model folders, recorded log records."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from llm_magic.backends.local.backend import LocalTransformersBackend
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.session import Session
from tests.scripted import settings
from tests.tiny_models import Options, tiny_llama

# The bytes of the weights of SmolLM2-135M in bf16.
SMOLLM2_BYTES = 269_030_272


@contextlib.contextmanager
def local_session(**changes: object) -> Iterator[Session]:
    """Yield a session on the local backend, without settings of the environment."""
    session = Session(settings(**changes))
    try:
        yield session
    finally:
        session.close()


def local_backend(session: Session) -> LocalTransformersBackend:
    """Return the backend of the active model."""
    backend = session.loaded_model().backend
    assert isinstance(backend, LocalTransformersBackend)
    return backend


def local_model(session: Session, name: str | None = None) -> LocalModel:
    """Return a loaded model with its PyTorch module; the active one without a name."""
    return local_backend(session).local_model(session.loaded_model(name).name)


@contextlib.contextmanager
def forward_sizes(session: Session) -> Iterator[list[int]]:
    """Collect how many tokens each forward pass of the active model reads."""
    sizes: list[int] = []
    handle = local_model(session).model.register_forward_pre_hook(
        lambda _model, _args, named: sizes.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield sizes
    finally:
        handle.remove()


def edited(folder: Path, file: str, **changes: object) -> Path:
    """Change keys of a JSON file in a model folder; returns the folder."""
    path = folder / file
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes, indent=2))
    return folder


def reweighted(folder: Path, *, drop: str = "", add: Mapping[str, Tensor] | None = None) -> Path:
    """Remove a tensor from the weights, or add some; returns the folder."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if name != drop}
    save_file(tensors | dict(add or {}), file, metadata={"format": "pt"})
    return folder


def parrot(folder: Path, text: str, *, ends: bool = True, **changes: Unpack[Options]) -> Path:
    """Make a model that answers `text` to each prompt, once or repeatedly.

    Each token determines the next one, so no token may occur twice in `text`. The first one follows
    a line break, with which the prompt of a chat ends.
    """
    options: Options = {"layers": 1, "hidden": 288, **changes}
    tiny_llama(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text).input_ids
    (line_break,) = tokenizer("\n").input_ids
    chain = [line_break, *tokens, tokenizer.eos_token_id if ends else tokens[0]]
    assert len({*chain[:-1]}) == len(chain) - 1, "a token occurs twice"
    tensors = load_file(folder / "model.safetensors")
    size = len(tokenizer)
    tensors["model.embed_tokens.weight"] = torch.eye(size, 288)
    tensors["lm_head.weight"] = torch.zeros(size, 288)
    for token, following in itertools.pairwise(chain):
        tensors["lm_head.weight"][following, token] = 9.0
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class _Recorder(logging.Handler):
    def __init__(self, records: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(f"{record.name}: {record.getMessage()}")


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Yield the warnings and errors that libraries log, which would appear in the cell."""
    records: list[str] = []
    handler = _Recorder(records)
    # Records of the two libraries do not reach the root logger.
    loggers = [logging.getLogger(name) for name in (None, "transformers", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield records
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
