"""How a live model's cached keys turn with the position, found by trying it rather than by knowing its class.

A single token attends to nothing but itself, so with another position every layer computes the same again, and only
the rotation of its keys differs. A model that takes no positions is given one token many times over: attention is
a mean of equal values then, and again only the rotation tells the tokens apart.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from semq_state.caches.cache import dump_cache, mark_cache
from semq_state.generation.seams import base_model
from semq_state.generation.undisturbed import put_back, undisturbed
from semq_state.measuring.rotary_fit import FIXED, Found, fit
from semq_state.rotary import Rotary

TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Relative errors of a pair of channels that the rounding of keys, cosines and sines of a dtype explains."""

NO_CACHE = "it has no cache that grows with the sequence"
TOO_FEW = "it keeps the keys of one token only"

_Keys = list[dict[str, dict[int, torch.Tensor]]]
"""By layer: name of a tensor to position to keys, `(vectors, head_dim)`."""
_Run = Callable[[Any, list[int]], _Keys]

_LOOSEST = max(TOLERANCES.values())
_GAPS = (1, 3, 17, 101, 631)  # so that each tells which full turn the next one is in
_FIRST = 1  # recurrent layers begin anew at position 0
_LONGEST = 6007  # farther, float32 angles differ from exact ones by more than the tolerance
_TOKENS = (77, 101, 131, 179)
_MOST_TOGETHER = 200
_MOST_PAIRS = 1 << 12
_LENGTHS = (
    "max_position_embeddings", "original_max_position_embeddings", "max_target_positions", "n_positions", "n_ctx",
    "max_seq_len", "seq_length", "max_sequence_length",
)  # fmt: skip
_CHANGING = ("dynamic", "longrope")


@dataclass(frozen=True)
class Measured:
    """What a trial found.

    Args:
        layers: by layer, in the order of `CacheState.all_layers()`: each tensor that grows with the sequence.
        reason: why there are none: what the model said to the trial.
    """

    layers: tuple[Mapping[str, Found], ...] = ()
    reason: str = ""

    def any(self) -> bool:
        """Whether a rotation was found anywhere."""
        return any(found.rotary for layer in self.layers for found in layer.values())

    def is_fixed(self) -> bool:
        """Whether nothing in the cache depends on the position."""
        return all(found.reason == FIXED for layer in self.layers for found in layer.values())


def rotary_of(model: Any, *, n_tokens: int = 0) -> tuple[dict[str, Rotary], ...]:
    """How the cached tensors of each layer turn with the position.

    A few forward passes of one token; the model, its modules' tables and the random state are left as they were.

    Args:
        model: a transformers model.
        n_tokens: the length of the sequences that are meant. It matters where the frequencies depend on it
            (`dynamic`, `longrope`) and is not looked at elsewhere.

    Returns:
        One entry a layer, in the order of `CacheState.all_layers()`: name of a tensor to its rotation. That is
        `keys` most of the time; latent attention has its rotated part cached as `values`, and an indexer keeps
        keys of its own. Empty for a layer without any. No entries where the model has no cache or does not run so.

    Raises:
        UnsupportedModelError: it is no model that generates.
    """
    layers = measured(model, n_tokens=n_tokens).layers
    return tuple({n: found.rotary for n, found in layer.items() if found.rotary is not None} for layer in layers)


def measured(model: Any, *, n_tokens: int = 0) -> Measured:
    """Like `rotary_of`, with every tensor that grows with the sequence, and the reason where no rotation was found.

    Raises:
        UnsupportedModelError: it is no model that generates.
    """
    inner = base_model(model)
    positions = _positions(inner, n_tokens)
    with undisturbed(inner):
        alone = _tried(inner, _one_token, positions)
        if alone.any():
            return alone
        together = _tried(inner, _equal_tokens, positions)
        # To a model that swallows positions without a look, nothing seems to depend on them.
        is_blind = not alone.layers or (alone.is_fixed() and not _names_positions(inner))
        return together if together.any() or is_blind else alone


def _tried(model: Any, run: _Run, positions: list[int]) -> Measured:
    try:
        layers = run(model, positions)
    except Exception as error:  # whatever a model says to inputs that do not suit it
        return Measured(reason=f"{type(error).__name__}: {error}"[:300])
    tables = _tables(model)
    if not any(layers):
        return Measured(reason=NO_CACHE)
    return Measured(tuple({name: _fit(samples, tables) for name, samples in layer.items()} for layer in layers))


def _fit(samples: dict[int, torch.Tensor], tables: list[torch.Tensor]) -> Found:
    if len(samples) < 2:
        return Found(reason=TOO_FEW)
    first = next(iter(samples.values()))
    own = [t for t in tables if 2 * len(t) <= first.shape[-1]]
    return fit(samples, own, TOLERANCES.get(first.dtype, _LOOSEST))


def _one_token(model: Any, positions: list[int]) -> _Keys:
    """Keys of a first token that is told to be at each position."""
    ids = _tokens(model)
    layers: _Keys = []
    # The farthest first: tables that grow with the length have grown then, and stay for the others.
    for position in sorted(positions, reverse=True):
        state = _run(model, input_ids=ids, position_ids=torch.full_like(ids, position))
        layers = layers or [{name: {} for name in layer} for layer in state]
        for samples, layer in zip(layers, state, strict=True):
            for name, keys in layer.items():
                samples[name][position] = _vectors(keys[..., -1, :])
    return layers


def _equal_tokens(model: Any, positions: list[int]) -> _Keys:
    """Keys of one token many times over, as far as layers keep them."""
    gaps = [0, *(gap for gap in _GAPS if gap < min(max(positions), _MOST_TOGETHER))]
    n_tokens = gaps[-1] + 1
    ids = _tokens(model)
    many = ids.expand(-1, n_tokens)
    given = (
        {"input_ids": ids, "decoder_input_ids": many} if model.config.is_encoder_decoder else {"input_ids": many}
    )
    return [{name: _along(keys, n_tokens, gaps) for name, keys in layer.items()} for layer in _run(model, **given)]


def _along(keys: torch.Tensor, n_tokens: int, gaps: list[int]) -> dict[int, torch.Tensor]:
    n_kept = keys.shape[-2]
    start = max(n_tokens - n_kept, 0)
    return {start + gap: _vectors(keys[..., gap, :]) for gap in gaps if gap < n_kept}


def _run(model: Any, **inputs: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The tensors of each layer that grow, after one forward pass: `(rows, heads, seq, head_dim)` most of them."""
    # Some models keep recurrent states as attributes of modules: each pass has to be a first one. Tables stay, as
    # those that have grown with the length serve for all positions.
    passing = [m for m in model.modules() if not any("freq" in name for name in (*m._buffers, *vars(m)))]
    with put_back(passing):
        cache = model(**inputs, use_cache=True, return_dict=True).get("past_key_values")
    if cache is None and getattr(model.config, "use_cache", False):
        cache = DynamicCache(config=model.config)
        with put_back(passing):
            model(**inputs, past_key_values=cache, use_cache=True)
    state = dump_cache(mark_cache(cache, model.config.model_type))
    return [
        {n: t for n, t in x.tensors.items() if x.layout.of(n).token_axis == -2 and t.is_floating_point()}
        for x in state.all_layers()
    ]


def _vectors(keys: torch.Tensor) -> torch.Tensor:
    return keys.detach().to("cpu", copy=True).flatten(0, -2)


def _tokens(model: Any) -> torch.Tensor:
    """A few ordinary tokens, one a row."""
    embeddings = model.get_input_embeddings()
    ids = torch.tensor(_TOKENS, device=getattr(getattr(embeddings, "weight", None), "device", model.device))
    n_known = getattr(model.config.get_text_config(decoder=True), "vocab_size", 0) or max(_TOKENS) + 1
    return (ids % n_known)[:, None]


def _names_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _positions(model: Any, n_tokens: int) -> list[int]:
    """Where keys are looked at: all within what the model was made for, or all beyond where `n_tokens` is."""
    config = model.config.get_text_config(decoder=True)
    fields = config.to_dict()
    limit = min([_LONGEST + 1, *_limits(fields)], default=0)
    if n_tokens > limit and any(word in str(fields) for word in _CHANGING):
        start, end = max(limit, n_tokens - 1 - _MOST_TOGETHER), max(limit + 1, n_tokens - 1)
        return sorted({start, end, *(start + gap for gap in _GAPS if start + gap < end)})
    # One that is no multiple of the others, so that a wrong turn shows.
    return sorted({_FIRST, limit - 1, *(_FIRST + gap for gap in _GAPS if _FIRST + gap < limit)})


def _limits(fields: Any) -> Iterator[int]:
    """Every maximal length that a configuration names, in itself and in what it says of rotary embeddings."""
    for name, value in fields.items():
        if name in _LENGTHS and type(value) is int and value > 1:
            yield value
        elif name.startswith("rope") or name in ("sliding_attention", "full_attention"):
            yield from _limits(value if isinstance(value, dict) else {})


def _tables(model: Any) -> list[torch.Tensor]:
    """The inverse frequencies that modules hold as buffers, then those that are plain attributes; each once."""
    named = [x for m in model.modules() for x in m.named_buffers(recurse=False)]
    named += [x for m in model.modules() for x in vars(m).items()]
    tables: dict[bytes, torch.Tensor] = {}
    for name, value in named:
        if "freq" in name and isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_meta:
            table = value.detach().to("cpu", torch.float32).flatten()
            if 0 < len(table) <= _MOST_PAIRS and bool((table.abs() <= math.pi).all()):
                tables.setdefault(table.numpy().tobytes(), table)
    return list(tables.values())
