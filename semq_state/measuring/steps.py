"""The steps of a calibration, one after the other."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch

from semq_state.calibration import Calibration, LayerSet, Measured
from semq_state.codecs import Pco, Transform, transform
from semq_state.codecs.transform import Tokens, gathered
from semq_state.content import raw_bytes, spec_of
from semq_state.errors import CalibrationError
from semq_state.fingerprint import model_name
from semq_state.generation.undisturbed import undisturbed
from semq_state.measuring import contexts, features, fitting, observing
from semq_state.measuring.calibrate import Progress
from semq_state.measuring.fitting import Sample
from semq_state.measuring.observing import Kept
from semq_state.measuring.rotary_of import rotary_of
from semq_state.snapshot import CacheState

N_TOKENS = 1024
"""Tokens of a text after which its cache is looked at."""

_NEXT = 256  # tokens that follow
_NATURAL = 160  # of them are fed to see what the next words depend on, and as many as _COPIED of the text again
_COPIED = 128
_COPY_SKIPS = 16  # before a model has noticed that it is copying
_SINKS = 4
_HELD_OUT = 3
_DRAWS = 2
_SHARE = 0.19  # of the size of the model that a calibration takes at most
_FEATURES = (160, 48)
_FEATURES_SHARE = 0.05
_MEMORY = 2 << 30  # bytes of observed vectors that are kept
_COPIED_AT_MOST = 1 << 31  # parameters of a model of which a copy in float32 is made
_KL = (1e-4, 6e-4, 3e-3, 1.5e-2)  # expected ones, at which the curve is measured


@dataclass(frozen=True, eq=False)
class _Seen:
    """A text's tokens in one set: ids, the number of the first, and vectors, keys before rotary embedding."""

    ids: torch.Tensor
    first: int
    vectors: torch.Tensor


def _precise(model: Any) -> Any:
    """The model in float32, in whose rounding small divergences are not lost; itself where that is too large."""
    if model.dtype not in (torch.bfloat16, torch.float16) or model.num_parameters() > _COPIED_AT_MOST:
        return model
    return copy.deepcopy(model).float()


@contextlib.contextmanager
def _without_gradients(model: Any) -> Iterator[None]:
    """Parameters take no gradients inside; those of the cache alone are wanted."""
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


def calibrated(
    model: Any, tokenizer: Any, texts: list[str], n_contexts: int, n_gradients: int, seed: int, tell: Progress
) -> Calibration:
    """A calibration of `model`; the arguments are those of `semq_state.measuring.calibrate`."""
    with _without_gradients(precise := _precise(model)), undisturbed(precise):
        return _measured(precise, tokenizer, texts, n_contexts, n_gradients, seed, tell)


def _measured(
    model: Any, tokenizer: Any, texts: list[str], n_contexts: int, n_gradients: int, seed: int, tell: Progress
) -> Calibration:
    n, length = n_contexts + _HELD_OUT, N_TOKENS + _NEXT
    tell("texts", 0, 1)
    runs = contexts.pieces(tokenizer, texts, n, length) if texts else contexts.samples(model, n, length, seed=seed)
    tell("texts", 1, 1)
    fit, held_out = runs[:n_contexts], runs[n_contexts:]
    rotations = rotary_of(model, n_tokens=N_TOKENS)
    first = observing.prefilled(model, fit[0][:, :N_TOKENS])
    kept = observing.kept(first)
    if not kept:
        raise CalibrationError(
            f"{model.config.model_type} model",
            expected="layers with keys and values along the sequence",
            found="none",
            do="its states are saved exactly, or by codecs without a calibration",
        )
    bare = [_bare(each, rotations) for each in kept]
    n_values = sum((each.seq - _skipped(each)) * layers.n_dims for each, layers in zip(kept, bare, strict=True))
    squares, seen = _watched(model, fit, kept, bare, n_gradients, seed, tell)
    weights, tokens_matter = _importance(squares, kept)
    # In these units a step s is expected to lead to KL = s²: N p s² / 24 without them.
    unit = (n_values / 24) ** 0.5
    scaled = [_with_scale(layers, w, unit) for layers, w in zip(bare, weights, strict=True)]
    seen = [[_in_units(s, layers) for s in own] for own, layers in zip(seen, scaled, strict=True)]
    n_bytes = sum(p.numel() for p in model.parameters()) * 2
    n_vocab = int(model.get_input_embeddings().weight.shape[0])
    share = min(1.0, _FEATURES_SHARE * n_bytes / (n_vocab * sum(_FEATURES)))
    tell("what tokens tell", 0, 1)
    samples = [[(s.ids, s.first, s.vectors) for s in runs_] for runs_ in seen]
    tables = features.fitted(model, samples, *(int(count * share) for count in _FEATURES))
    tell("what tokens tell", 1, 1)
    most = int(_SHARE * n_bytes) - tables.now.numel() - tables.before.numel() - sum(t.numel() for t in tables.tells)
    dims = sum(layers.n_dims for layers in scaled)
    sets = []
    for i, (layers, runs_) in enumerate(zip(scaled, seen, strict=True)):
        tell("components", i, len(scaled))
        known = replace(layers, tells=tables.tells[i], tells_scale=tables.scales[i])
        own = [Sample(s.vectors, tables.of(s.ids, s.first)) for s in runs_]
        known = fitting.with_components(known, own, most * layers.n_dims // dims)
        full = own[:n_gradients]
        places = [_places(s.first, len(s.vectors)) for s in runs_[:n_gradients]]
        matter = [each[i][-len(s.vectors) :] for each, s in zip(tokens_matter, runs_, strict=False)]
        sets.append(fitting.with_importance(known, full, places, matter))
        tell("components", i + 1, len(scaled))
    about = {
        "texts": len(texts),
        "n_contexts": n_contexts,
        "n_tokens": n_contexts * N_TOKENS,
        "n_gradients": n_gradients,
        "seed": seed,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("semq-state", "torch", "transformers")},
    }
    plain = Calibration("", model_name(model), tuple(sets), tables.now, tables.before, (), about)
    return replace(plain, curve=_curve(model, plain, kept, held_out, tell))


def _bare(kept: Kept, rotations: Sequence[dict[str, Any]]) -> LayerSet:
    """A set that only knows its shape, so that vectors can be gathered with it."""
    n_dims = len(kept.layers) * kept.n_heads * (kept.key_dim + kept.value_dim)
    of = [rotations[i] if i < len(rotations) else {} for i in kept.layers]
    none = torch.zeros(0)
    return LayerSet(
        layers=kept.layers,
        n_heads=kept.n_heads,
        key_dim=kept.key_dim,
        value_dim=kept.value_dim,
        rotaries=tuple((each.get("keys"), each.get("values")) for each in of),
        scale=torch.ones(n_dims),
        mean=torch.zeros(n_dims),
        tells=torch.zeros(0, n_dims, dtype=torch.int8),
        tells_scale=none,
        heads=(),
        tails=(),
        tails_scale=(),
        mix=none,
        bands=none,
        matters=none,
    )


def _with_scale(layers: LayerSet, weights: torch.Tensor, unit: float) -> LayerSet:
    """The set with the importance of each number, from `(n_layers, 2, kv_heads)` mean squares of gradients."""
    sound = weights.clamp_min(float(weights.max()) * 1e-6 or 1.0).sqrt() * unit
    keys, values = sound[:, 0, :, None], sound[:, 1, :, None]
    scale = torch.cat([keys.expand(-1, -1, layers.key_dim), values.expand(-1, -1, layers.value_dim)], dim=2)
    return replace(layers, scale=scale.flatten().float().contiguous())


def _watched(
    model: Any,
    runs: Sequence[torch.Tensor],
    kept: Sequence[Kept],
    layers: Sequence[LayerSet],
    n_gradients: int,
    seed: int,
    tell: Progress,
) -> tuple[list[list[torch.Tensor]], list[list[_Seen]]]:
    """Of the first texts the squares of gradients of each set; and of each set the vectors of all texts, as many
    tokens as memory is set aside for."""
    squares: list[list[torch.Tensor]] = []
    seen: list[list[_Seen]] = [[] for _ in kept]
    n_numbers = sum((each.seq - _skipped(each)) * own.n_dims for each, own in zip(kept, layers, strict=True))
    share = min(1.0, _MEMORY / (2 * n_numbers * len(runs)))
    for at, ids in enumerate(runs):
        tell("states and gradients" if at < n_gradients else "states", at, len(runs))
        state = observing.prefilled(model, ids[:, :N_TOKENS])
        if at < n_gradients:
            squares.append(_squares(model, state, ids, kept, seed + at))
        for found, each, own in zip(seen, kept, layers, strict=True):
            skipped = _skipped(each)
            if at >= n_gradients and share < 1.0:
                skipped = each.seq - int((each.seq - skipped) * share)
            begin = N_TOKENS - each.seq
            tokens = _tokens(own, begin, each.seq)
            vectors = gathered(own, *observing.stacked(state, each), tokens, (0, slice(skipped, each.seq)))
            most = torch.finfo(torch.float16).max
            found.append(_Seen(ids[0, :N_TOKENS], begin + skipped, vectors.clamp_(-most, most).half()))
    tell("states", len(runs), len(runs))
    return squares, seen


def _squares(
    model: Any, state: CacheState, ids: torch.Tensor, kept: Sequence[Kept], seed: int
) -> list[torch.Tensor]:
    """Of each set how much the next words depend on each token, `(n_layers, 2, kv_heads, seq)`: mean squares of
    gradients, half of them where the text goes on, half where it repeats a part of itself."""
    place = int(torch.randint(0, N_TOKENS - _COPIED, (1,), generator=torch.Generator().manual_seed(seed)))
    ways = ((ids[:, N_TOKENS : N_TOKENS + _NATURAL], 0), (ids[:, place : place + _COPIED], _COPY_SKIPS))
    sums = [torch.zeros(len(each.layers), 2, each.n_heads, each.seq) for each in kept]
    for continuation, skip in ways:
        for drawn in observing.gradients(model, state, continuation, skip=skip, draws=_DRAWS, seed=seed):
            for total, each in zip(sums, kept, strict=True):
                for kind, tensor in enumerate(observing.stacked(drawn, each)):
                    if tensor.shape[-1]:
                        total[:, kind] += tensor[:, 0].square().mean(dim=3) / (_DRAWS * len(ways))
    return sums


def _importance(
    squares: Sequence[Sequence[torch.Tensor]], kept: Sequence[Kept]
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Of each set by head, `(n_layers, 2, kv_heads)`; and of each text, of each set by token, in shares of the
    average."""
    weights, relative = [], [[torch.empty(0)] * len(kept) for _ in squares]
    for i, each in enumerate(kept):
        skipped = _skipped(each)
        whole = torch.stack([sums[i][..., skipped:] for sums in squares])
        mean = whole.mean(dim=(0, 4))
        weights.append(mean)
        share = mean.new_tensor([each.key_dim, each.value_dim])
        for at, own in enumerate(whole):
            by_token = (own / mean.clamp_min(float(mean.max()) * 1e-6 or 1.0)[..., None]).mean(dim=(0, 2))
            relative[at][i] = (by_token * share[:, None]).sum(dim=0) / share.sum()
    return weights, relative


def _in_units(seen: _Seen, layers: LayerSet) -> _Seen:
    """The same, scaled."""
    return _Seen(seen.ids, seen.first, (seen.vectors.float() * layers.scale).half())


def _curve(
    model: Any, calibration: Calibration, kept: Sequence[Kept], runs: Sequence[torch.Tensor], tell: Progress
) -> tuple[Measured, ...]:
    """What steps lead to, on texts that nothing was fitted to."""
    sums = torch.zeros(len(_KL), 2)
    coder = Pco()
    for at, ids in enumerate(runs):
        tell("curve", at, len(runs))
        state = observing.prefilled(model, ids[:, :N_TOKENS])
        continuation = ids[:, N_TOKENS : N_TOKENS + _NEXT]
        exact = observing.next_words(model, state, continuation)
        for i, expected in enumerate(_KL):
            other, n_bits, n_values = state, 0, 0
            for layers, each in zip(calibration.sets, kept, strict=True):
                begin, skipped = N_TOKENS - each.seq, _skipped(each)
                keys, values = observing.stacked(state, each)
                tokens = _tokens(layers, begin + skipped, each.seq - skipped, calibration, ids[0])
                body = (keys[..., skipped:, :], values[..., skipped:, :])
                made = Transform(calibration, step=expected**0.5).encode(layers, *body, tokens)
                for symbols in made.symbols.values():
                    n_bits += 8 * coder.encode(raw_bytes(symbols.values), spec_of(symbols.values)).n_bytes
                n_values += sum(part.numel() for part in body)
                decoded = transform.decode(layers, made, tokens, torch.float32)
                whole = [
                    torch.cat([p[..., :skipped, :], d], dim=-2)
                    for p, d in zip((keys, values), decoded, strict=True)
                ]
                other = observing.with_bodies(other, each, *whole)
            found = observing.next_words(model, other, continuation)
            sums[i, 0] += n_bits / n_values
            sums[i, 1] += float((exact.exp() * (exact - found)).sum(dim=-1).mean())
    tell("curve", len(runs), len(runs))
    means = (sums / len(runs)).tolist()
    return tuple(Measured(kl**0.5, bits, found) for kl, (bits, found) in zip(_KL, means, strict=True))


def _tokens(
    layers: LayerSet, begin: int, seq: int, calibration: Calibration | None = None, ids: torch.Tensor | None = None
) -> Tokens:
    """What the transform is told of `seq` tokens of one text, the first of them number `begin`."""
    positions = torch.arange(begin, begin + seq)[None]
    if calibration is None or ids is None:
        return Tokens(torch.zeros(1, seq, len(layers.tells)), positions)
    now = calibration.now[ids[begin : begin + seq]].float()
    before = calibration.before[ids[begin - 1 : begin - 1 + seq]].float()
    return Tokens(torch.cat([now, before], dim=1)[None], positions)


def _skipped(kept: Kept) -> int:
    """Tokens at the begin that are sinks; none where a window has dropped them."""
    return _SINKS if kept.seq == N_TOKENS else 0


def _places(first: int, n: int) -> torch.Tensor:
    at = torch.arange(first, first + n)
    return torch.stack([N_TOKENS - at, at + 1], dim=1)
