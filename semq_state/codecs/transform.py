"""The transform codec: calibrated components of keys and values, one step for all of them, entropy coded.

The numbers that a token has in all layers are one vector. A calibration scales it so that an error of one matters
the same everywhere (the square root of the Fisher information), subtracts what the token ids tell, and turns it
into uncorrelated components. Rounding all of them with one step and coding the result near its entropy is then the
best division of bits among them (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3):
there is nothing to allocate and no scale to store.

Tokens matter differently: the calibration predicts from a token's own components how much, and the step of each
token follows, in thirds of an octave. Keys are coded as they are before rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import torch

from semq_state.calibration import Calibration, LayerSet, step_for_bits, step_for_kl
from semq_state.calibration.artifact import TELLING
from semq_state.codecs.symbolic import Symbolic, Symbols, damaged
from semq_state.rotary import Rotary

CLASSES = 13
"""Sizes of steps, a third of an octave apart; the middle one is the step itself."""

_MIDDLE = CLASSES // 2
_ROUND = 0.45  # the quotient that is rounded up to 1: less than half, for zeros are cheap
_SHRINK = 0.05  # values are denser towards zero, so they are put back a little nearer to it
_POWER = 0.6  # of the importance that the steps follow; 1 would be right if the prediction were
_Where = tuple[int, slice]  # a row, and a run of its tokens
_RUN = 4096  # tokens whose symbols are one stream
_SPAN = 512  # tokens at a time, so that what is made of them stays in the cache
_MOST = 32_000
_OUTLIER = 16  # a symbol that is never left out
_RARE = 12  # where fewer than one symbol in so many is not zero, a coarser step elsewhere costs less
_OUTLYING = 6.0  # standard deviations beyond which a component tells no more
_FAR = 1024  # tokens away beyond which distance tells no more


@final
@dataclass(frozen=True, eq=False)
class Tokens:
    """What the transform is told of the tokens: their features, and where they stand.

    Args:
        features: `(batch, seq, n_features)` float32, from the calibration's tables.
        positions: `(batch, seq)` int64, as the rotary embedding counts them.
        n_after: how many tokens follow the last of them in the state.
    """

    features: torch.Tensor
    positions: torch.Tensor
    n_after: int = 0


@final
@dataclass(frozen=True, eq=False)
class Transform:
    """The calibrated codec at one quality; exactly one of `kl`, `ratio` and `step` says which.

    Args:
        calibration: of the model whose states are coded.
        kl: the mean KL divergence, exact to decoded, of the next token, in nats.
        ratio: how many times smaller than 16 bits a value the coded tokens shall be.
        step: of the quantiser itself, in units of importance.

    Raises:
        CalibrationError: its calibration has no measured curve for `kl` or `ratio`.

    Example:
        >>> sq.save(snapshot, "chat.safetensors", codec=sq.Transform(calibration, kl=0.002))  # doctest: +SKIP
    """

    id: ClassVar[str] = "transform"
    calibration: Calibration
    kl: float | None = None
    ratio: float | None = None
    step: float = 0.0

    def __post_init__(self) -> None:
        wanted = [name for name in ("kl", "ratio", "step") if getattr(self, name)]
        if len(wanted) != 1 or not 0 < getattr(self, wanted[0]) < float("inf"):
            raise ValueError(f"one positive number of `kl`, `ratio` and `step`, got {wanted or 'none'}")
        if self.kl:
            object.__setattr__(self, "step", step_for_kl(self.calibration, self.kl))
        if self.ratio:
            object.__setattr__(self, "step", step_for_bits(self.calibration, 16 / self.ratio))

    def encode(self, layers: LayerSet, keys: torch.Tensor, values: torch.Tensor, tokens: Tokens) -> Symbolic:
        """Codes the keys and values of a layer set.

        Args:
            layers: the calibrated transform.
            keys: float32 `(n_layers, batch, kv_heads, seq, key_dim)`, as cached; all finite.
            values: the same with `value_dim`.
            tokens: what is known of the tokens.
        """
        forward = _Forward(layers)
        classes, spans = [torch.empty(0, dtype=torch.uint8)], [torch.empty(0, layers.n_components).short()]
        for where, features in _spans(tokens):
            components = forward(gathered(layers, keys, values, tokens, where), features)
            components.nan_to_num_(nan=torch.finfo(torch.float32).max)  # of sums that overflow, which are clipped
            steps = _classes(layers, components, features, tokens, where)
            components /= (self.step * _sizes(steps))[:, None]
            rounded = components.abs().add_(_ROUND).floor_().clamp_(max=_MOST).copysign_(components)
            classes.append(steps)
            spans.append(rounded[:, forward.order].short())
        steps, table = torch.cat(classes), torch.cat(spans)
        symbols, lowest = {"steps": Symbols(steps, 0, CLASSES - 1)}, []
        for i, rows in enumerate(_runs(len(steps))):
            stream, low = _streamed(table[rows], steps[rows], layers.bands[forward.order])
            most = max(1, int(stream.abs().max())) if len(stream) else 1
            symbols[f"components.{i}"] = Symbols(stream.to(torch.int8) if most < 128 else stream, -most, most)
            lowest.append(low)
        return Symbolic(symbols, params={"step": self.step, "shrink": _SHRINK, "lowest": lowest})


def decode(
    layers: LayerSet, symbolic: Symbolic, tokens: Tokens, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `Transform.encode`: keys and values as they were cached, in `dtype`.

    Raises:
        IntegrityError: symbols or parameters are not what `encode` makes.
    """
    steps, streams = _checked(symbolic, tokens)
    step, shrink, lowest = (symbolic.params[name] for name in ("step", "shrink", "lowest"))
    batch, seq = tokens.positions.shape
    shape = (len(layers.layers), batch, layers.n_heads, seq)
    keys = torch.empty((*shape, layers.key_dim), dtype=dtype)
    values = torch.empty((*shape, layers.value_dim), dtype=dtype)
    bands, order = layers.bands.sort(descending=True, stable=True)
    features, flat = tokens.features.flatten(0, 1), tokens.positions.flatten()
    inverse: _Inverse | None = None
    for stream, run, low in zip(streams, _runs(len(steps)), lowest, strict=True):
        table = _table(stream, steps[run], bands, low)
        inverse = inverse or _Inverse(
            layers, order, shrink, torch.float32 if dtype.itemsize > 2 else torch.bfloat16
        )
        # Tokens by rising class: the coarser the step, the fewer components there are to multiply.
        by_class = run.start + torch.argsort(steps[run], stable=True)
        for at in range(0, len(by_class), _SPAN):
            some = by_class[at : at + _SPAN]
            width = int((bands >= low + int(steps[some[0]])).sum()) if len(table) else 0
            sizes = step * _sizes(steps[some])
            vectors = inverse(table[:width, at : at + _SPAN], sizes, features[some])
            _put(layers, vectors, some, flat[some], keys, values)
    return keys, values


def clipped(layers: LayerSet, symbolic: Symbolic, tokens: Tokens) -> torch.Tensor | None:
    """The tokens that lie further out than symbols reach, `(batch, seq)`; None where there are none."""
    streams = [i for i in range(len(symbolic.symbols) - 1) if symbolic.symbols[f"components.{i}"].highest >= _MOST]
    if not streams:
        return None
    steps = symbolic.symbols["steps"].values
    bands = layers.bands.sort(descending=True, stable=True).values
    found = torch.zeros(len(steps), dtype=torch.bool)
    for i in streams:
        rows = _runs(len(steps))[i]
        stream = symbolic.symbols[f"components.{i}"].values
        table = _unstreamed(stream, steps[rows], bands, symbolic.params["lowest"][i])
        found[rows] = (table.abs() >= _MOST).any(dim=1)
    return found.view(tokens.positions.shape)


def components_of(layers: LayerSet, scaled: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The components of vectors that are scaled already, `(n_tokens, n_components)`."""
    return _Forward(layers).of_scaled(scaled, features)


class _Forward:
    """Vectors to components, in the calibration's order."""

    def __init__(self, layers: LayerSet) -> None:
        self._layers = layers
        self._tells = layers.tells.float() * layers.tells_scale[:, None]
        self._heads = [head.float() for head in layers.heads]
        self._tails = [t.float() * s for t, s in zip(layers.tails, layers.tails_scale, strict=True)]
        self._mix = layers.mix.float()
        self.order = torch.argsort(layers.bands, descending=True, stable=True)

    def __call__(self, vectors: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.of_scaled(vectors * self._layers.scale, features)

    def of_scaled(self, scaled: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        scaled = (scaled - self._layers.mean).addmm_(features, self._tells, alpha=-1.0)
        blocks = scaled.split_with_sizes([len(head) for head in self._heads], dim=1)
        heads = torch.cat([b @ head for b, head in zip(blocks, self._heads, strict=True)], dim=1)
        return torch.cat([heads @ self._mix, *(b @ t for b, t in zip(blocks, self._tails, strict=True))], dim=1)


class _Inverse:
    """Symbols of some components to vectors, in the precision that the cache's dtype asks for.

    In bfloat16 a product's operands are rounded to 8 bits, as the decoded numbers themselves are in the end.

    Args:
        layers: the calibrated transform.
        order: which component each column of the symbols is.
        shrink: by how much small symbols are put back nearer to zero.
        precision: of the matrix products.
    """

    def __init__(self, layers: LayerSet, order: torch.Tensor, shrink: float, precision: torch.dtype) -> None:
        self._layers, self._shrink, self._precision = layers, shrink, precision
        edges = [0, layers.mix.shape[1]]
        for tail in layers.tails:
            edges.append(edges[-1] + tail.shape[1])
        # The columns of the mixed components, then of each block's tail, those of the widest spread first.
        self._columns = [((order >= begin) & (order < end)).nonzero().flatten() for begin, end in pairwise(edges)]
        self._mix = layers.mix.index_select(1, order[self._columns[0]]).to(precision)
        tells = layers.tells.float() * layers.tells_scale[:, None] / layers.scale
        self._mean = layers.mean / layers.scale
        self._blocks, begin = [], 0
        bases = zip(layers.heads, layers.tails, layers.tails_scale, strict=True)
        for (head, tail, scale), columns, first in zip(bases, self._columns[1:], edges[1:], strict=False):
            own, end = order[columns] - first, begin + len(head)
            basis = torch.cat([head.float(), tail.index_select(1, own).float() * scale[own]], dim=1)
            basis /= layers.scale[begin:end, None]
            # What is multiplied whatever the width comes first, so that a narrow product takes the first rows.
            parts = [basis[:, : head.shape[1]].T, tells[:, begin:end], basis[:, head.shape[1] :].T]
            self._blocks.append(torch.cat(parts).to(precision))
            begin = end

    def __call__(self, symbols: torch.Tensor, steps: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Vectors of tokens, float32 `(n_tokens, n_dims)`.

        Args:
            symbols: `(n, n_tokens)`, of the first `n` components in order.
            steps: of each token.
            features: of each token.
        """
        kept = [columns[: int((columns < len(symbols)).sum())] for columns in self._columns]
        # Component by component, so that picking some of them copies whole rows.
        whole = symbols.index_select(0, torch.cat(kept))
        values = whole.to(self._precision).sub_(whole.clamp_(-1, 1), alpha=self._shrink)
        values *= steps.to(self._precision)
        features = features.T.to(self._precision)
        mixed, *tails = values.split_with_sizes([len(columns) for columns in kept])
        heads = (self._mix[:, : len(mixed)] @ mixed).split_with_sizes([h.shape[1] for h in self._layers.heads])
        vectors = torch.empty(len(steps), self._layers.n_dims)
        begin = 0
        for head, tail, block in zip(heads, tails, self._blocks, strict=True):
            end, rows = begin + block.shape[1], torch.cat([head, features, tail])
            torch.add(rows.T @ block[: len(rows)], self._mean[begin:end], out=vectors[:, begin:end])
            begin = end
        return vectors


def gathered(
    layers: LayerSet, keys: torch.Tensor, values: torch.Tensor, tokens: Tokens, where: _Where
) -> torch.Tensor:
    """The vectors of some tokens, `(n_tokens, n_dims)`: by layer and head, keys before rotary embedding, values."""
    row, span = where
    width = layers.key_dim + layers.value_dim
    vectors = torch.empty(span.stop - span.start, len(layers.layers), layers.n_heads, width)
    positions = tokens.positions[row, span]
    for i, (states, part) in enumerate(_parts(layers, keys, values)):
        for rotary, which in _turning(layers, i):
            some = states[which, row, :, span].float()
            some = some if rotary is None else rotary.undo(some, positions)
            vectors[:, which, :, part] = some.permute(2, 0, 1, 3)
    return vectors.flatten(1)


def _put(
    layers: LayerSet,
    vectors: torch.Tensor,
    which: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """The inverse of `gathered`, into `keys` and `values`, of tokens in any order, counted through all rows."""
    split = vectors.view(len(vectors), len(layers.layers), layers.n_heads, -1)
    row, at = which // keys.shape[3], which % keys.shape[3]
    rows = [(r, row == r) for r in sorted(set(row.tolist()))] if len(keys[0]) > 1 else [(0, slice(None))]
    for i, (states, part) in enumerate(_parts(layers, keys, values)):
        for rotary, of in _turning(layers, i):
            some = split[:, of, :, part].permute(1, 2, 0, 3)
            some = (some if rotary is None else rotary.redo(some, positions)).to(states.dtype)
            for r, own in rows:
                if isinstance(of, slice):
                    states[of, r].index_copy_(2, at[own], some[:, :, own])
                else:
                    for layer, one in zip(of, some, strict=True):
                        states[layer, r].index_copy_(1, at[own], one[:, own])


def _parts(layers: LayerSet, keys: torch.Tensor, values: torch.Tensor) -> list[tuple[torch.Tensor, slice]]:
    """Keys and values, each with its place in a head's part of a vector."""
    return [(keys, slice(0, layers.key_dim)), (values, slice(layers.key_dim, None))]


def _turning(layers: LayerSet, part: int) -> Iterator[tuple[Rotary | None, slice | list[int]]]:
    """Each rotary embedding with the layers, counted within the set, that have it."""
    rotaries = [pair[part] for pair in layers.rotaries]
    for rotary in dict.fromkeys(rotaries):
        which = [i for i, each in enumerate(rotaries) if each == rotary]
        yield rotary, slice(0, len(which)) if len(which) == len(layers.layers) else which


def _spans(tokens: Tokens) -> Iterator[tuple[_Where, torch.Tensor]]:
    """A row and a run of its tokens at a time, with their features."""
    batch, seq = tokens.positions.shape
    for row in range(batch):
        for start in range(0, seq, _SPAN):
            span = slice(start, min(start + _SPAN, seq))
            yield (row, span), tokens.features[row, span]


def _runs(n_tokens: int) -> list[slice]:
    """The tokens whose symbols make one stream."""
    return [slice(at, min(at + _RUN, n_tokens)) for at in range(0, n_tokens, _RUN)]


def matters(layers: LayerSet, components: torch.Tensor, features: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """What the importance of tokens is predicted from, `(n_tokens, n)`.

    Args:
        layers: for the spread of the components.
        components: of the tokens.
        features: of the tokens.
        left: how many tokens of the state follow each, itself included, and how many precede it: `(n_tokens, 2)`.
    """
    after, before = left.float().clamp(1, _FAR).log2().unbind(-1)
    n = min(TELLING, layers.mix.shape[1])
    relative = components[:, :n] * torch.exp2(-layers.bands[:n].float() / 3.0)
    where = torch.stack([after, after**2, after**3, before, before**2], dim=1)
    return torch.cat([where, relative.clamp(-_OUTLYING, _OUTLYING), features], dim=1)


def _classes(
    layers: LayerSet, components: torch.Tensor, features: torch.Tensor, tokens: Tokens, where: _Where
) -> torch.Tensor:
    """Which size of step each token gets: coarser where it matters less."""
    row, span = where
    positions = tokens.positions[row]
    last = int(positions[-1]) + tokens.n_after
    left = torch.stack([last - positions[span] + 1, positions[span] + 1], dim=1)
    told = matters(layers, components, features, left)
    log_importance = told @ layers.matters[:-1] + layers.matters[-1]
    return (_MIDDLE - 1.5 * _POWER * log_importance).round().clamp(0, CLASSES - 1).to(torch.uint8)


def _sizes(classes: torch.Tensor) -> torch.Tensor:
    return torch.exp2((classes.float() - _MIDDLE) / 3.0)


def _blocks(classes: torch.Tensor, bands: torch.Tensor) -> list[tuple[int, slice, slice]]:
    """Which runs of tokens, sorted by class, and of components, sorted by band, are coded one after the other.

    A step that is a class coarser sees a component like one that is a band lower; so blocks of like `band - class`
    are of like spread, and come together, widest first.
    """
    of_class = torch.bincount(classes.long(), minlength=CLASSES).cumsum(0).tolist()
    levels, counts = torch.unique_consecutive(bands, return_counts=True)
    ends = counts.cumsum(0).tolist()
    blocks = []
    for band, end, count in zip(levels.tolist(), ends, counts.tolist(), strict=True):
        for c, stop in enumerate(of_class):
            start = of_class[c - 1] if c else 0
            if stop > start:
                blocks.append((band - c, slice(start, stop), slice(end - count, end)))
    return sorted(blocks, key=lambda block: -block[0])


def _streamed(table: torch.Tensor, classes: torch.Tensor, bands: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The symbols of a table of tokens and components in the order of `_blocks`, down to the lowest `band - class`
    at which enough of them are not zero, or one is far from it; and that."""
    table = table[torch.argsort(classes, stable=True)].T.contiguous()
    blocks = _blocks(classes, bands)
    pieces = [table[columns, rows].reshape(-1) for _, rows, columns in blocks]
    filled: dict[int, list[int]] = {}
    for (level, _, _), piece in zip(blocks, pieces, strict=True):
        counts = filled.setdefault(level, [0, 0])
        counts[0] += int(torch.count_nonzero(piece))
        counts[1] += len(piece)
    kept = [level for level, (n_nonzero, n) in filled.items() if n_nonzero * _RARE > n]
    for (level, _, _), piece in zip(blocks, pieces, strict=True):
        if level not in kept and int(piece.abs().max()) >= _OUTLIER:
            kept.append(level)
    lowest = min(kept, default=0)
    pieces = [piece for piece, block in zip(pieces, blocks, strict=True) if kept and block[0] >= lowest]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=table.dtype), lowest


def _unstreamed(stream: torch.Tensor, classes: torch.Tensor, bands: torch.Tensor, lowest: int) -> torch.Tensor:
    """The inverse of `_streamed`, without the columns that are zero throughout.

    Raises:
        IntegrityError: the stream is not as long as the blocks.
    """
    table = _table(stream, classes, bands, lowest).T
    unsorted = torch.empty_like(table)
    unsorted[torch.argsort(classes, stable=True)] = table
    return unsorted


def _table(stream: torch.Tensor, classes: torch.Tensor, bands: torch.Tensor, lowest: int) -> torch.Tensor:
    """The same, one component below the other, with the tokens still sorted by class."""
    blocks = [block for block in _blocks(classes, bands) if block[0] >= lowest] if len(stream) else []
    sizes = [(rows.stop - rows.start) * (columns.stop - columns.start) for _, rows, columns in blocks]
    if sum(sizes) != len(stream):
        raise damaged(Transform.id, f"{sum(sizes)} symbols", str(len(stream)))
    width = max((columns.stop for _, _, columns in blocks), default=0)
    table = torch.zeros(width, len(classes), dtype=stream.dtype)
    for (_, rows, columns), piece in zip(blocks, stream.split_with_sizes(sizes), strict=True):
        table[columns, rows] = piece.view(-1, rows.stop - rows.start)
    return table


def _checked(symbolic: Symbolic, tokens: Tokens) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The steps and the streams of what may not be trusted, with the parameters proved."""
    params, symbols, n_tokens = symbolic.params, symbolic.symbols, tokens.positions.numel()
    runs = range(len(_runs(n_tokens)))
    if params.keys() != {"step", "shrink", "lowest"} or symbolic.exact:
        raise damaged(Transform.id, "step, shrink and lowest", sorted(params))
    if symbols.keys() != {"steps", *(f"components.{i}" for i in runs)}:
        raise damaged(Transform.id, f"steps and {len(runs)} streams of components", sorted(symbols))
    step, shrink, lowest = params["step"], params["shrink"], params["lowest"]
    if not (type(step) is float and 1e-30 < step < 1e30 and type(shrink) is float and 0 <= shrink < 1):
        raise damaged(Transform.id, "a step, and less than one to shrink by", f"{step!r:.40}, {shrink!r:.40}")
    if type(lowest) is not list or len(lowest) != len(runs) or not all(type(low) is int for low in lowest):
        raise damaged(Transform.id, f"the lowest bands of {len(runs)} streams", lowest)
    steps, streams = symbols["steps"], [symbols[f"components.{i}"].values for i in runs]
    if steps.values.dtype != torch.uint8 or steps.highest >= CLASSES or steps.values.shape != (n_tokens,):
        raise damaged(Transform.id, f"{n_tokens} steps of {CLASSES} sizes", f"{tuple(steps.values.shape)}")
    if not all(stream.ndim == 1 and stream.dtype != torch.uint8 for stream in streams):
        raise damaged(Transform.id, "streams of signed symbols", [str(stream.dtype) for stream in streams])
    return steps.values, streams
