"""From scaled vectors to a layer set: what tokens tell, the principal components, and which tokens matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from semq_state.calibration import LayerSet
from semq_state.codecs.transform import components_of, matters

_BLOCK = 1600  # dimensions whose components are found together; decoding costs as much more as it is larger
_MIXED = 1800  # strongest components of all blocks that are turned once more, together
_FINEST = 0.005  # components below this spread are dropped; a step of KL 0.0004 is four times as large
_BANDS = 3.0  # an octave
_RIDGE = 300.0


@dataclass(frozen=True, eq=False)
class Sample:
    """One text's tokens in a set.

    Args:
        vectors: `(n, n_dims)`, of any floating dtype, scaled.
        features: `(n, n_features)` float32.
    """

    vectors: torch.Tensor
    features: torch.Tensor


def blocks_of(n_layers: int, n_heads: int, head: int) -> list[int]:
    """The sizes of the blocks of a vector: whole layers, or whole heads where a layer is too wide."""
    layer = n_heads * head
    if layer <= _BLOCK:
        n = -(-n_layers // (_BLOCK // layer))
        return [layer * len(part) for part in torch.arange(n_layers).tensor_split(n)]
    n = -(-n_heads // max(1, _BLOCK // head))
    return [head * len(part) for part in torch.arange(n_heads).tensor_split(n)] * n_layers


def with_components(layers: LayerSet, samples: Sequence[Sample], most_bytes: int) -> LayerSet:
    """The set with its mean and its components, weak ones dropped until its bases take at most `most_bytes`.

    Args:
        layers: with scale and features; the rest is found here.
        samples: of all texts.
    """
    tells = layers.tells.float() * layers.tells_scale[:, None]
    n = sum(len(sample.vectors) for sample in samples)
    total = sum((sample.vectors.sum(dim=0, dtype=torch.float32) for sample in samples), torch.zeros(layers.n_dims))
    told = sum((sample.features.sum(dim=0) for sample in samples), torch.zeros(len(tells)))
    mean = (total - told @ tells) / n
    sizes = blocks_of(len(layers.layers), layers.n_heads, layers.key_dim + layers.value_dim)
    n_head = max(1, min(_MIXED // len(sizes), min(sizes)))
    squares = [torch.zeros(size, size) for size in sizes]
    for sample in samples:
        for square, block in zip(
            squares, (_left(sample, tells) - mean).split_with_sizes(sizes, dim=1), strict=True
        ):
            square.addmm_(block.T, block)
    heads, tails, spreads = [], [], []
    for square in squares:
        spread, vectors = _principal(square / n)
        heads.append(vectors[:, :n_head])
        tails.append(vectors[:, n_head:])
        spreads.append(spread[n_head:])
    mixing = torch.zeros(n_head * len(sizes), n_head * len(sizes))
    for sample in samples:
        blocks = (_left(sample, tells) - mean).split_with_sizes(sizes, dim=1)
        strong = torch.cat([block @ head for block, head in zip(blocks, heads, strict=True)], dim=1)
        mixing.addmm_(strong.T, strong)
    mixed_spread, mix = _principal(mixing / n)
    left = most_bytes - 2 * (layers.n_dims * n_head + mix.numel())
    threshold = _threshold(spreads, sizes, left)
    kept = [int((spread >= threshold).sum()) for spread in spreads]
    coarse = [_coarse(tail[:, :count]) for tail, count in zip(tails, kept, strict=True)]
    spread = torch.cat([mixed_spread, *(s[:count] for s, count in zip(spreads, kept, strict=True))])
    return replace(
        layers,
        mean=mean,
        heads=tuple(head.to(torch.float16).contiguous() for head in heads),
        tails=tuple(tail for tail, _ in coarse),
        tails_scale=tuple(scale for _, scale in coarse),
        mix=mix.to(torch.float16).contiguous(),
        bands=(_BANDS * spread.clamp_min(1e-9).log2()).floor().to(torch.int16),
    )


def with_importance(
    layers: LayerSet, samples: Sequence[Sample], places: Sequence[torch.Tensor], importance: Sequence[torch.Tensor]
) -> LayerSet:
    """The set with a ridge regression of the logarithm of a token's importance on what its components tell.

    Args:
        layers: with components.
        samples: of the texts whose importance was measured.
        places: of each text `(n, 2)`: tokens from each to the end, and from the first to it.
        importance: of each text `(n,)`, positive.
    """
    told = torch.cat(
        [
            matters(layers, components_of(layers, s.vectors.float(), s.features), s.features, place)
            for s, place in zip(samples, places, strict=True)
        ]
    )
    target = torch.cat(list(importance)).clamp_min(1e-12).log2()
    mean, spread = told.mean(dim=0), told.std(dim=0).clamp_min(1e-6)
    relative = (told - mean) / spread
    square = relative.T @ relative + _RIDGE * torch.eye(relative.shape[1])
    slope = torch.linalg.solve(square, relative.T @ (target - target.mean())) / spread
    # The mean is left out: the step itself stands for the average token.
    return replace(layers, matters=torch.cat([slope, -(slope @ mean)[None]]))


def _left(sample: Sample, tells: torch.Tensor) -> torch.Tensor:
    """What the tokens do not tell."""
    return sample.vectors.float().addmm(sample.features, tells, alpha=-1.0)


def _principal(square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard deviations and directions, widest first."""
    values, vectors = torch.linalg.eigh(square)
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def _threshold(spreads: Sequence[torch.Tensor], sizes: Sequence[int], most_bytes: int) -> float:
    """The spread from which components are kept, so that they fit; one costs its block's size, and a scale."""
    spread = torch.cat(list(spreads))
    cost = torch.cat([torch.full((len(s),), float(size + 6)) for s, size in zip(spreads, sizes, strict=True)])
    order = spread.argsort(descending=True)
    fitting = int((cost[order].cumsum(0) <= most_bytes).sum())
    dropped = float(spread[order[fitting]]) if fitting < len(spread) else 0.0
    return max(_FINEST, dropped * 1.000001)


def _coarse(basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions as int8, and the step of each."""
    step = basis.abs().amax(dim=0).clamp_min(1e-30) / 127 if basis.numel() else basis.new_zeros(basis.shape[1])
    return (basis / step).round().to(torch.int8).contiguous(), step
