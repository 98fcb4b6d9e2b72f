"""Chat templates of the common families of models, and tokenizers that have their special tokens.

The templates are those of the models' repositories, without their branches for tools and documents.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import CHATML

Kind = Literal["byte level", "prepended", "metaspace", "unigram"]
KINDS: tuple[Kind, ...] = ("byte level", "prepended", "metaspace", "unigram")


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and the tokens that are added without being special.

    `strips` are special tokens that take the white space after them.
    """

    template: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    strips: frozenset[str] = field(default_factory=frozenset)

    @property
    def control(self) -> tuple[str, ...]:
        """Every token that only the template may write."""
        return (*self.special, *(token for token in self.added if "|" in token or "｜" in token))


_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)
_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    + _ALTERNATE + "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)  # fmt: skip
_LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    + _ALTERNATE + "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)  # fmt: skip
_MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)  # fmt: skip
_MISTRAL_3 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)
_MISTRAL_7 = (
    "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{- '[INST]' + message['content'] + '[/INST]' }}{%- elif message['role'] == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}"
    "{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('Only user, system and assistant roles are supported!') }}"
    "{%- endif %}{%- endfor %}"
)
_PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI_4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_PHI_4_MINI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
_QWEN_3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith(\
'<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split(\
'<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + \
'\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
_DEEPSEEK_R1 = (
    "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}"
    "{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
_GRANITE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}"
    "{%- set system_message = 'You are Granite, developed by IBM. You are a helpful AI assistant.' %}"
    "{%- set loop_messages = messages %}{%- endif %}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}"
    "{%- for message in loop_messages %}"
    "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content']"
    " + '<|end_of_text|>\n' }}{%- if loop.last and add_generation_prompt %}"
    "{{- '<|start_of_role|>assistant' }}{{- '<|end_of_role|>' }}{%- endif %}{%- endfor %}"
)
_GPT_OSS = (
    "{{- '<|start|>system<|message|>' }}{{- 'You are ChatGPT, a large language model trained by OpenAI.'"
    " + '\n' }}{{- 'Reasoning: medium\n\n' }}"
    "{{- '# Valid channels: analysis, commentary, final. Channel must be included for every message.' }}"
    "{{- '<|end|>' }}{%- if messages[0].role == 'system' %}"
    "{%- set developer_message = messages[0].content %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set developer_message = '' %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- if developer_message %}{{- '<|start|>developer<|message|>' }}"
    "{{- '# Instructions\n\n' }}{{- developer_message }}{{- '<|end|>' }}{%- endif %}"
    "{%- for message in loop_messages -%}{%- if message.role == 'assistant' -%}"
    "{%- if '<|channel|>analysis<|message|>' in message.content or"
    " '<|channel|>final<|message|>' in message.content %}"
    "{{- raise_exception('You have passed a message containing <|channel|> tags in the content') }}"
    "{%- endif %}{%- if loop.last and not add_generation_prompt %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}{%- else %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{%- endif %}"
    "{%- elif message.role == 'user' -%}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"
)
_COMMAND_R = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% if system_message != false %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endif %}{% for message in loop_messages %}" + _ALTERNATE
    + "{% set content = message['content'] %}{% if message['role'] == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)  # fmt: skip
_ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
_TURN = ("<|im_start|>", "<|im_end|>")

FAMILIES: dict[str, Family] = {
    "ChatML": Family(CHATML, _TURN, eos="<|im_end|>"),
    "Llama 2": Family(_LLAMA_2, ("<s>", "</s>"), bos="<s>", eos="</s>"),
    "Llama 3": Family(
        _LLAMA_3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<|reserved_special_token_1|>", "<|reserved_special_token_10|>"),
        bos="<|begin_of_text|>", eos="<|eot_id|>",
    ),
    "Gemma": Family(
        _GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("\n\n", "<table>"),
        bos="<bos>", eos="<eos>",
    ),
    # Its [INST] is no token: a pasted one cannot be distinguished from that of the template.
    "Mistral v1": Family(_MISTRAL_1, ("<s>", "</s>"), bos="<s>", eos="</s>"),
    "Mistral v3": Family(_MISTRAL_3, ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", eos="</s>"),
    "Mistral v7": Family(
        _MISTRAL_7,
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), bos="<s>", eos="</s>",
    ),
    "Phi-3": Family(
        _PHI_3, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        strips=frozenset({"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}),
    ),
    "Phi-4": Family(_PHI_4, (*_TURN, "<|im_sep|>"), eos="<|im_end|>"),
    "Phi-4-mini": Family(
        _PHI_4_MINI, ("<|endoftext|>", "<|end|>"), ("<|system|>", "<|user|>", "<|assistant|>"),
        eos="<|endoftext|>",
    ),
    "Qwen 3": Family(
        _QWEN_3, ("<|endoftext|>", *_TURN),
        ("<|fim_prefix|>", "<think>", "</think>", "<tool_call>", "<tool_response>"),
        eos="<|im_end|>",
    ),
    "DeepSeek R1": Family(
        _DEEPSEEK_R1, ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁outputs▁begin｜>", "<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>",
    ),
    "Granite": Family(
        _GRANITE, ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        eos="<|end_of_text|>",
    ),
    "gpt-oss": Family(
        _GPT_OSS, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        eos="<|return|>",
    ),
    "Command-R": Family(
        _COMMAND_R, ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>",
    ),
    # Its <|user|> is no token either.
    "Zephyr": Family(_ZEPHYR, ("<s>", "</s>"), bos="<s>", eos="</s>"),
}  # fmt: skip


def family_tokenizer(family: Family, kind: Kind) -> PreTrainedTokenizerFast:
    """Return a small tokenizer of a kind with the special tokens and the template of a family."""
    raw = _RAW[kind](family.special)
    for token in (*family.special, *family.added):
        special = token in family.special
        strips = token in family.strips
        added = AddedToken(token, special=special, normalized=False, rstrip=strips)
        if special:
            raw.add_special_tokens([added])
        else:
            raw.add_tokens([added])
    names: dict[str, Any] = {"bos_token": family.bos, "eos_token": family.eos}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, **{name: token for name, token in names.items() if token}
    )
    tokenizer.chat_template = family.template
    return tokenizer


def _byte_level(_special: tuple[str, ...]) -> Tokenizer:
    """As Llama 3, Qwen and GPT-2 have it."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("<", "|"), ("|", ">"), ("i", "m"), (">", "Ċ")]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    raw = Tokenizer(models.BPE(vocab=_numbered(symbols), merges=merges))
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}|[^\s\p{L}\p{N}]+| ?\p{L}+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    raw.decoder = decoders.ByteLevel()
    return raw


def _sentencepiece(special: tuple[str, ...]) -> Tokenizer:
    """As converted from SentencePiece: the special tokens are in its vocabulary, </s> with merges."""
    merges = [
        ("▁", "t"),
        ("▁t", "h"),
        ("▁th", "e"),
        ("<", "/"),
        ("s", ">"),
        ("</", "s>"),
        ("<", "s>"),
    ]
    letters = {*"▁<>/|[]_\n.,:;!?'", *map(chr, range(48, 58)), *map(chr, range(65, 91)),
               *map(chr, range(97, 123))}  # fmt: skip
    merged = [a + b for a, b in merges]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = dict.fromkeys(["<unk>", *special, *pieces, *sorted(letters), *merged])
    return Tokenizer(
        models.BPE(
            vocab=_numbered(list(vocabulary)), merges=merges, byte_fallback=True, unk_token="<unk>"
        )
    )


def _prepended(special: tuple[str, ...]) -> Tokenizer:
    """As Llama 2 has it: a blank in front of every text between two special tokens."""
    raw = _sentencepiece(special)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = _blanks()
    return raw


def _metaspace(special: tuple[str, ...]) -> Tokenizer:
    """As Mistral v3 has it: a blank in front of the whole text."""
    raw = _sentencepiece(special)
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = _blanks()
    return raw


def _unigram(special: tuple[str, ...]) -> Tokenizer:
    """Pieces with a score, among them the special tokens: the likeliest way to write a text."""
    pieces = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁"]
    pieces += sorted({*"<>/|[]_\n.,:;!?'", *map(chr, range(48, 58)), *map(chr, range(65, 91)),
                      *map(chr, range(97, 123))})  # fmt: skip
    scored = [(piece, -1.0 - len(piece) / 100) for piece in dict.fromkeys(pieces)]
    raw = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    raw.decoder = _blanks()
    return raw


def _blanks() -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps)


def _numbered(pieces: list[str]) -> dict[str, int]:
    return dict(zip(pieces, itertools.count(), strict=False))


_RAW = {
    "byte level": _byte_level,
    "prepended": _prepended,
    "metaspace": _metaspace,
    "unigram": _unigram,
}
