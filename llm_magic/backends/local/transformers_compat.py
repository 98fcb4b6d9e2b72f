"""The parts of Transformers that are not public API, or that differ between its versions.

No other module of this package uses them. Each function that needs such a part states in its
docstring which one. `missing_parts` checks all of them when a model is loaded. Where one is
missing, the public `generate` answers instead of the decoding loop of this package: slower, without
prefix cache, drafts and batches, and with the same tokens.

The tests in `tests/versions` run on the oldest, the pinned and the newest supported version.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch.nn.functional import pad
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    StaticCache,
)
from transformers import cache_utils as caches

# Names of the cache among the arguments of `forward`, and in its output. Since 5.24 it is `cache`
# everywhere; before, state space models had a name of their own.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# Arguments of `prepare_inputs_for_generation`.
_PREPARE_ARGUMENTS = ("next_sequence_length", "is_first_iteration")
# Arguments of `forward` that have an entry for each token.
_BY_POSITION = ("position_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
# Only newer versions have layers without keys and values.
_DUMMY_LAYER: type | None = getattr(caches, "DummyLayer", None)
# Has a state that each token overwrites.
_STATE_LAYER = caches.LinearAttentionCacheLayerMixin
_PLAIN_LAYERS = (caches.DynamicLayer, caches.DynamicSlidingWindowLayer, _DUMMY_LAYER)
_STATES = ("conv_states", "recurrent_states")
# The tensors of a batch have at most so many free columns before its tokens, and so many after them;
# and one free row for so many rows.
_SPARE_COLUMNS, _SPARE_ROWS = 64, 4


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What decides how a model is decoded; found once, when it is loaded.

    `fallback_reason` is why the public `generate` has to answer; None if it need not. `cache_name` is
    the name of the cache among the arguments of `forward`. `longest_reuse` is the longest text whose
    cache another prompt can start from, `shortest_window` the shortest attention window, in tokens;
    both may be infinite. `can_batch`: sequences can join a cache and leave it. `masks_single_tokens`:
    their attention is faster with a mask that has 4 dimensions. `shares_prefix`: the sequences of a
    batch can share the keys and values of the prefix that they start with.
    """

    fallback_reason: str | None
    cache_name: str = ""
    longest_reuse: float = 0
    shortest_window: float = 0
    can_batch: bool = False
    masks_single_tokens: bool = False
    shares_prefix: bool = False


def traits(model: PreTrainedModel) -> ModelTraits:
    """Return the traits of a model."""
    reason = _fallback_reason(model)
    if reason is not None:
        return ModelTraits(reason)
    shortest_window = min(map(_window, new_cache(model).layers), default=math.inf)
    return ModelTraits(
        None,
        cache_name(model),
        _longest_reuse(model),
        shortest_window,
        _can_batch(model),
        shortest_window == math.inf and _masks_single_tokens(model),
        shortest_window == math.inf and _shares_prefix(model),
    )


def _fallback_reason(model: PreTrainedModel) -> str | None:
    missing = missing_parts()
    if missing is not None:
        return f"Transformers {transformers.__version__} {missing}"
    name = type(model).__name__
    supports: Any = getattr(type(model), "_supports_default_dynamic_cache", None)
    if not cache_name(model) or (supports is not None and not supports()):
        return f"{name} keeps a custom state"
    if _changes_arguments(model):
        return f"{name} changes its arguments from token to token"
    has_state = any(isinstance(layer, _STATE_LAYER) for layer in new_cache(model).layers)
    if has_state and not _STATES_CONTINUE:
        return f"Transformers {transformers.__version__} reads a prompt of {name} in one piece only"
    return None


def missing_parts() -> str | None:
    """Return which part of Transformers is missing or behaves differently; None for none.

    Runs each check on tensors of a few bytes: about a millisecond in total.
    """
    for text, check in _CHECKS.items():
        try:
            passed = check()
        except Exception:  # noqa: BLE001 - whatever the changed part raises, it cannot be used
            passed = False
        if not passed:
            return f"has no {text}"
    return None


# --- arguments and outputs of models ---


def cache_name(model: PreTrainedModel) -> str:
    """Return the name of the cache among the arguments of `forward`; "" without one."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "")


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache as `generate` makes it."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def prepare_inputs(
    model: PreTrainedModel, ids: torch.Tensor, new: int, arguments: dict[str, Any], *, first: bool
) -> dict[str, Any]:
    """Return the inputs of a forward pass over the last `new` tokens of `ids`.

    Uses `prepare_inputs_for_generation(next_sequence_length=…, is_first_iteration=…)`.
    """
    # It comes from a mixin that the annotations of models do not show.
    method: Any = model.prepare_inputs_for_generation
    prepare = partial(method, ids, is_first_iteration=first)
    inputs: dict[str, Any] = prepare(next_sequence_length=new, **arguments)
    name = next((name for name in CACHE_NAMES if arguments.get(name) is not None), None)
    if name is not None and inputs.get(name) is None:
        # Phi-3 drops the cache where it needs another scale of positions. Old versions then read
        # only the new tokens.
        inputs = prepare(next_sequence_length=None, **arguments)
    return inputs


def resized(arguments: dict[str, Any], length: int) -> dict[str, Any]:
    """Return the arguments of a model for a text of `length` tokens, which they are cut or extended to.

    Extends them as `_update_model_kwargs_for_generation` does for decoders.
    """
    sized = dict(arguments)
    for name in _BY_POSITION:
        value = arguments.get(name)
        if value is None:
            continue
        count = length - value.shape[-1]
        if count <= 0:
            sized[name] = value[..., :length]
            continue
        last = value[..., -1:]
        more = last.expand(*last.shape[:-1], count)
        if name == "position_ids":
            more = more + torch.arange(1, count + 1, device=value.device, dtype=value.dtype)
        elif name == "attention_mask":
            more = torch.ones_like(more)
        elif name == "mm_token_type_ids":
            more = torch.zeros_like(more)
        sized[name] = torch.cat([value, more], dim=-1)
    return sized


def _changes_arguments(model: PreTrainedModel) -> bool:
    """Return whether a model overrides `_update_model_kwargs_for_generation`; see `resized`."""
    name = "_update_model_kwargs_for_generation"
    return getattr(type(model), name, None) is not getattr(GenerationMixin, name, None)


# --- positions ---


def rope_parameters(model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings of the rotary embeddings of a model; empty without them."""
    found = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    return found if isinstance(found, dict) else {}


def _longest_reuse(model: PreTrainedModel) -> float:
    """Return the longest text whose keys stay valid in a longer one.

    LongRoPE (Phi-3) has one set of position factors for texts up to this length, and another one for
    longer texts: the cache of one is wrong for the other.
    """
    rope = rope_parameters(model)
    if rope.get("rope_type") != "longrope":
        return math.inf
    config: Any = model.config.get_text_config(decoder=True)
    own = getattr(config, "original_max_position_embeddings", None)
    return own or rope.get("original_max_position_embeddings") or math.inf


# --- layers of caches ---


def _window(layer: Any) -> float:
    """Return how many tokens back a layer sees; infinity for all."""
    return getattr(layer, "sliding_window", None) or math.inf


def can_be_cropped(cache: Cache) -> bool:
    """Return whether tokens can be removed from the end of a cache that records no past.

    A state space has only its last state, and a full window has dropped what was before it.
    """
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, _STATE_LAYER):
            return False
        window = getattr(layer, "sliding_window", None)
        if window is not None and layer.get_seq_length() >= window:
            return False
    return _is_croppable(cache)


def can_roll_back(cache: Cache) -> bool:
    """Return whether tokens that were read as a draft can be removed again.

    A window that is full can do so only in versions with `activate_past_recording`.
    """
    records = hasattr(cache, "activate_past_recording")
    return _is_croppable(cache) and (records or min(map(_window, cache.layers)) == math.inf)


def _is_croppable(cache: Cache) -> bool:
    """Return what `Cache.is_croppable` states.

    Versions without it can remove tokens from layers of keys and values only.
    """
    stated = getattr(cache, "is_croppable", None)
    return _has_plain_layers(cache) if stated is None else bool(stated)


def is_recording(cache: Cache) -> bool:
    """Return whether any layer keeps what it would drop (`record_past`)."""
    return any(getattr(layer, "record_past", False) for layer in cache.layers)


def start_recording(cache: Cache) -> None:
    """Let all layers keep what they would drop, so that the next `crop` can remove tokens."""
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()


def stop_recording(cache: Cache) -> None:
    """Let all layers drop what they do not need."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False


def fork(cache: DynamicCache) -> DynamicCache:
    """Return an independent cache of the same content, without copying keys and values.

    Layers of keys and values grow by making new tensors, so both caches can hold the same ones.
    States are written in place, and are copied.
    """
    twin = copy.copy(cache)
    twin.layers = [_forked(layer) for layer in cache.layers]
    return twin


def _forked(layer: Any) -> Any:
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, {key: _copied(item) for key, item in value.items()})
        elif name in _STATES:
            setattr(twin, name, _copied(value))
    return twin


def _copied(item: Any) -> Any:
    return item.clone() if isinstance(item, torch.Tensor) else item


def tensors(cache: Cache) -> Iterator[torch.Tensor]:
    """Yield every tensor that a cache holds."""
    for layer in cache.layers:
        for value in vars(layer).values():
            for item in value.values() if isinstance(value, dict) else (value,):
                if isinstance(item, torch.Tensor):
                    yield item


# --- caches of several sequences ---


def _can_batch(model: PreTrainedModel) -> bool:
    """Return whether the cache of a model can hold sequences that join and leave.

    Reads `_is_stateful`, which models set that carry more than keys and values.
    """
    if getattr(type(model), "_is_stateful", False) or _longest_reuse(model) < math.inf:
        return False
    if model.generation_config.cache_implementation not in {None, "dynamic", "hybrid"}:
        return False
    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        return False
    # States cannot be padded, and chunked attention counts its chunks from the first column.
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return "chunked_attention" not in kinds and _has_plain_layers(new_cache(model))


def _has_plain_layers(cache: Cache) -> bool:
    """Return whether all layers hold keys and values only."""
    return all(type(layer) in _PLAIN_LAYERS for layer in cache.layers)


def repeated(cache: DynamicCache, count: int) -> DynamicCache:
    """Return a cache with `count` sequences, each with the content of the one in `cache`."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    twin.batch_repeat_interleave(count)
    return twin


def drop_columns(cache: Cache, columns: int) -> None:
    """Remove the first `columns` positions of all sequences; windows may have dropped some."""
    layer: Any
    for layer in filter(_holds_keys, cache.layers):
        if isinstance(layer, InPlaceLayer):
            layer.drop_columns(columns)
            continue
        dropped = layer.get_seq_length() - layer.keys.shape[-2]
        if isinstance(layer, caches.DynamicSlidingWindowLayer):
            layer.cumulative_length -= columns
        start = max(0, columns - dropped)
        layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]


def prepend_columns(cache: Cache, prefix: Cache, start: int, end: int) -> None:
    """Add the columns from `start` to `end` of a cache with one sequence before those of all sequences."""
    layer: Any
    other: Any
    for layer, other in zip(cache.layers, prefix.layers, strict=True):
        rows = layer.keys.shape[0]
        added = (x[:, :, start:end].expand(rows, -1, -1, -1) for x in (other.keys, other.values))
        keys, values = added
        layer.keys, layer.values = (
            torch.cat([keys, layer.keys], dim=-2),
            torch.cat([values, layer.values], dim=-2),
        )
        if isinstance(layer, InPlaceLayer):
            layer.reallocate(*_rows_and_columns(layer.keys))


def in_place(cache: DynamicCache) -> DynamicCache:
    """Return a cache with a copy of the content, to which steps and sequences are added in place.

    Layers with a window, which drop a column in each step, stay as they are.
    """
    twin = copy.copy(cache)
    twin.layers = [
        InPlaceLayer.copied(layer)
        if type(layer) is caches.DynamicLayer and _holds_keys(layer)
        else layer
        for layer in cache.layers
    ]
    return twin


class InPlaceLayer(caches.DynamicLayer):
    """Keys and values of a batch, which are views of larger tensors.

    A step writes one column. A sequence that joins is written into a free row, and one of the last rows
    replaces each that leaves. The tensors are replaced only when they are full.
    """

    keys: torch.Tensor
    values: torch.Tensor
    _tensors: list[torch.Tensor]
    _start: int
    _end: int

    @classmethod
    def copied(cls, layer: Any) -> InPlaceLayer:
        """Return a layer with the content of another one."""
        own = cls()
        own.lazy_initialization(layer.keys, layer.values)
        own.keys, own.values = layer.keys, layer.values
        own.reallocate(*_rows_and_columns(layer.keys))
        return own

    def reallocate(self, rows: int, columns: int) -> None:
        """Replace the tensors by larger ones, for so many rows and columns and some more."""
        own_rows, own_columns = _rows_and_columns(self.keys)
        self._start = -columns % _SPARE_COLUMNS
        self._end = self._start + columns
        capacity = rows + rows // _SPARE_ROWS
        self._tensors = []
        for old in (self.keys, self.values):
            heads, size = old.shape[1], old.shape[3]
            new = old.new_empty((capacity, heads, self._end + _SPARE_COLUMNS, size))
            new[:own_rows, :, self._end - own_columns : self._end] = old
            self._tensors.append(new)
        self._set_views(own_rows)

    def _set_views(self, rows: int) -> None:
        self.keys, self.values = (x[:rows, :, self._start : self._end] for x in self._tensors)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the columns of a step; returns all keys and values."""
        rows, new = _rows_and_columns(key_states)
        if self._end + new > self._tensors[0].shape[-2]:
            self.reallocate(*_rows_and_columns(self.keys))
        for stored, states in zip(self._tensors, (key_states, value_states), strict=True):
            stored[:rows, :, self._end : self._end + new] = states
        self._end += new
        self._set_views(rows)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only; copies those that change their place."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        if len(moved):
            for states in (self.keys, self.values):
                states[moved] = states[indices[moved]]
        self._set_views(len(indices))

    def drop_columns(self, columns: int) -> None:
        """Remove the first columns."""
        self._start += columns
        self._set_views(len(self.keys))

    def join(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add rows; the shorter ones, of these or of the others, are padded with zeros.

        A mask gives padding the weight 0, and 0 times what was there before may not be a number.
        """
        (own, columns), (new, new_columns) = map(_rows_and_columns, (self.keys, keys))
        longest = max(columns, new_columns)
        if own + new > len(self._tensors[0]) or self._end < longest:
            self.reallocate(own + new, longest)
        start, end = self._end - longest, self._end
        for stored, states in zip(self._tensors, (keys, values), strict=True):
            stored[:own, :, start : end - columns] = 0
            stored[own : own + new, :, start : end - new_columns] = 0
            stored[own : own + new, :, end - new_columns : end] = states
        self._start = start
        self._set_views(own + new)


def _rows_and_columns(states: torch.Tensor) -> tuple[int, int]:
    return states.shape[0], states.shape[-2]


def join(cache: Cache, other: Cache) -> None:
    """Add the sequences of `other` to `cache`, padded on the left; empties `other`."""
    layer: Any
    added: Any
    for layer, added in zip(cache.layers, other.layers, strict=True):
        if not _holds_keys(layer):
            continue
        if isinstance(layer, InPlaceLayer):
            layer.join(added.keys, added.values)
            added.keys = added.values = None
            continue
        stored = max(layer.keys.shape[-2], added.keys.shape[-2])
        if isinstance(layer, caches.DynamicSlidingWindowLayer):
            layer.cumulative_length = max(layer.cumulative_length, added.cumulative_length)
        layer.keys = torch.cat([_padded(layer.keys, stored), _padded(added.keys, stored)])
        layer.values = torch.cat([_padded(layer.values, stored), _padded(added.values, stored)])
        added.keys = added.values = None


def _holds_keys(layer: Any) -> bool:
    """Return whether a layer holds keys and values; some use those of another layer."""
    return isinstance(layer, caches.DynamicLayer) and layer.keys is not None


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    return pad(states, (0, 0, length - states.shape[-2], 0))


# --- caches of fixed length ---


def can_compile(model: PreTrainedModel) -> bool:
    """Return whether the forward pass has no decisions in Python (`_can_compile_fullgraph`)."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def attention(model: PreTrainedModel) -> str | None:
    """Return the name of the attention implementation (`config._attn_implementation`)."""
    name = getattr(model.config, "_attn_implementation", None)
    return None if name is None else str(name)


def _masks_single_tokens(model: PreTrainedModel) -> bool:
    """Return whether a mask with 4 dimensions makes the attention of single tokens faster.

    With one, Transformers packs the heads of queries that share keys. Without one it lets torch group
    them, whose kernel on a CPU takes 5 times as long in 16 bits. All layers get the same mask, so that
    none may have a window.
    """
    config: Any = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)
    is_grouped = (getattr(config, "num_key_value_heads", None) or heads) < heads
    is_on_cpu = model.device.type == "cpu" and model.dtype.itemsize == 2
    return is_grouped and is_on_cpu and attention(model) == "sdpa"


def _shares_prefix(model: PreTrainedModel) -> bool:
    """Return whether the attention of a model can be replaced by one that reads a shared prefix.

    Reads `_supports_attention_backend`, which models set whose attention is called by name.
    """
    dispatches = getattr(type(model), "_supports_attention_backend", False)
    is_sdpa = model.device.type == "cpu" and attention(model) == "sdpa"
    return bool(dispatches) and is_sdpa and _returns_sums()


def attention_with_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention on a CPU, and the logarithms of the sums of the exponentiated scores.

    `scaled_dot_product_attention` calls the same function of torch, and drops the sums.
    """
    compute: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attended: tuple[torch.Tensor, torch.Tensor] = compute(
        query, key, value, attn_mask=mask, scale=scale
    )
    return attended


def _returns_sums() -> bool:
    """Return whether this version of torch has what `attention_with_sums` uses."""
    query, key = torch.ones(2, 1, 3, 8), torch.zeros(2, 1, 4, 8)
    mask = torch.zeros(2, 1, 1, 4)
    mask[..., 0] = torch.finfo(mask.dtype).min
    try:
        attended, sums = attention_with_sums(query, key, key + 2, mask, None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    expected = torch.full((2, 1, 3), math.log(3))
    return torch.allclose(attended, query + 1) and torch.allclose(sums, expected)


@contextlib.contextmanager
def attention_replaced(model: PreTrainedModel, name: str, function: Any) -> Iterator[None]:
    """Let a model that `shares_prefix` call `function` in its layers, registered under `name`.

    Sets `config._attn_implementation`, as `set_attn_implementation` does, which takes longer.
    """
    config: Any = model.config
    before = config._attn_implementation
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def attention_of_torch() -> Any:
    """Return the function of Transformers that calls `scaled_dot_product_attention`."""
    return AttentionInterface()["sdpa"]


def fill_static(static: StaticCache, cache: Cache, length: int) -> None:
    """Copy the first `length` tokens of a dynamic cache into one of fixed length."""
    layer: Any
    other: Any
    for layer, other in zip(static.layers, cache.layers, strict=True):
        if not layer.is_initialized:
            layer.lazy_initialization(other.keys, other.values)
        layer.keys[:, :, :length] = other.keys[:, :, :length]
        layer.values[:, :, :length] = other.values[:, :, :length]
        layer.cumulative_length.fill_(length)


def from_static(static: StaticCache, length: int) -> DynamicCache:
    """Return a dynamic cache with a copy of the first `length` tokens of a fixed one."""
    cache = DynamicCache()
    layer: Any
    for layer in static.layers:
        own = caches.DynamicLayer()
        own.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone())
        cache.layers.append(own)
    return cache


# --- checks ---


def _states(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2)


def _generate_takes_loop() -> bool:
    return "custom_generate" in inspect.signature(GenerationMixin.generate).parameters


def _prepare_takes_length() -> bool:
    found = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return found.keys() >= set(_PREPARE_ARGUMENTS)


def _layers_crop() -> bool:
    layer: Any = caches.DynamicLayer()
    layer.update(*_states(4))
    layer.crop(-1)
    return bool(layer.get_seq_length() == 3) and tuple(layer.keys.shape) == (1, 1, 3, 2)


def _windows_count() -> bool:
    layer: Any = caches.DynamicSlidingWindowLayer(sliding_window=4)
    layer.update(*_states(6))
    counted = (layer.cumulative_length, layer.sliding_window, layer.keys.shape[-2])
    return bool(counted == (6, 4, 3))


def _sequences_join() -> bool:
    one, other = DynamicCache(), DynamicCache()
    one.update(*_states(3), layer_idx=0)
    other.update(*_states(2), layer_idx=0)
    three = in_place(repeated(one, 2))
    join(three, other)
    three.batch_select_indices(torch.tensor([0, 2]))
    keys, values = (states.expand(2, -1, -1, -1) for states in _states(1))
    three.update(keys, values, layer_idx=0)
    layer: Any = three.layers[0]
    padded = [[[[1, 1]] * 4], [[[0, 0], *[[1, 1]] * 3]]]
    return torch.equal(layer.keys, torch.tensor(padded, dtype=layer.keys.dtype))


def _fixed_lengths_fill() -> bool:
    cache, layer = DynamicCache(), caches.StaticLayer(max_cache_len=8)
    cache.update(*_states(3), layer_idx=0)
    static: Any = DynamicCache()
    static.layers = [layer]
    fill_static(static, cache, 2)
    return int(layer.get_seq_length()) == 2 and from_static(static, 2).get_seq_length() == 2


_CHECKS: dict[str, Callable[[], bool]] = {
    "custom_generate of generate": _generate_takes_loop,
    "next_sequence_length of prepare_inputs_for_generation": _prepare_takes_length,
    "DynamicLayer that can be cropped": _layers_crop,
    "DynamicSlidingWindowLayer that counts its tokens": _windows_count,
    "DynamicCache whose sequences can be joined": _sequences_join,
    "StaticLayer that can be filled": _fixed_lengths_fill,
}
# Versions that cannot record the past of a state read several tokens only into an empty one.
_STATES_CONTINUE = hasattr(_STATE_LAYER, "activate_past_recording")
