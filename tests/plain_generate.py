"""The reference for local answers: plain Transformers on the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class PlainGenerate:
    """A model in float32 and its tokenizer, used as the documentation of Transformers shows it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.prompt_tokens = 0
        self.new: list[int] = []

    def answer(self, prompt: str, seed: int = 0, **options: Any) -> str:
        """Return the text of the answer; `new` and `prompt_tokens` are its tokens afterwards."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        self.prompt_tokens = ids.shape[1]
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        self.new = made[0, self.prompt_tokens :].tolist()
        return str(self.tokenizer.decode(self.new, skip_special_tokens=True))
