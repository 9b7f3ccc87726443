"""What the ids of a token and of the one before it tell of its keys and values: a linear map from their embeddings.

The keys and values of the first layer follow from the token alone, those of later layers in good part, and the ids
are in every file anyway. The map has a low rank (reduced-rank regression, Izenman 1975), so that what a token tells
is a few numbers from a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WIDEST = 768  # directions of the embedding that are looked at
_RIDGE = 30.0  # in tokens: as if so many had told nothing
_ROWS = 1 << 16


@dataclass(frozen=True, eq=False)
class Tables:
    """Features of tokens, and what they tell of each set's vectors.

    Args:
        now: `(n_vocab, n_now)` int8.
        before: `(n_vocab, n_before)` int8.
        tells: of each set `(n_now + n_before, n_dims)` int8.
        scales: of each set `(n_now + n_before,)` float32.
    """

    now: torch.Tensor
    before: torch.Tensor
    tells: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...]

    def of(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """Features of the tokens from number `first` on, float32; `ids` is `(n,)`."""
        before = torch.cat([torch.zeros(1, self.before.shape[1]), self.before[ids[:-1]].float()])
        return torch.cat([self.now[ids].float(), before], dim=1)[first:]


def fitted(
    model: Any, samples: Sequence[Sequence[tuple[torch.Tensor, int, torch.Tensor]]], n_now: int, n_before: int
) -> Tables:
    """The tables that tell most of the scaled vectors.

    Args:
        model: for its embeddings.
        samples: of each set, of each text: its ids `(n,)`, the number of the first token, and the scaled vectors
            from it on, `(m, n_dims)`.
        n_now: features of a token.
        n_before: features of the token before it.
    """
    embedding = _embedding(model)
    n_vocab = len(embedding) if embedding is not None else int(model.config.get_text_config().vocab_size)
    if embedding is None or n_now + n_before == 0:
        dims = [runs[0][2].shape[1] for runs in samples]
        none = torch.zeros(n_vocab, 0, dtype=torch.int8)
        return Tables(none, none, tuple(none.new_zeros(0, n) for n in dims), tuple(torch.zeros(0) for _ in dims))
    basis = _basis(embedding, torch.cat([ids for ids, _, _ in samples[0]]))
    narrow = torch.cat([_normal(rows) @ basis for rows in embedding.tensor_split(-(-n_vocab // _ROWS))])
    width = basis.shape[1]
    maps, spread = [], torch.zeros(2 * width, 2 * width)
    for runs in samples:
        square = torch.zeros(2 * width + 1, 2 * width + 1)
        product = torch.zeros(2 * width + 1, runs[0][2].shape[1])
        for ids, first, vectors in runs:
            rows = _rows(narrow, ids)[first:]
            square += rows.T @ rows
            product.addmm_(rows.T, vectors.float())
        ridge = _RIDGE * square.diagonal().mean() / square[-1, -1]
        maps.append(torch.linalg.solve(square + ridge * torch.eye(len(square)), product)[:-1])
        mean = square[-1, :-1] / square[-1, -1]
        spread += square[:-1, :-1] - torch.outer(mean, mean) * square[-1, -1]
    parts = []
    for begin, rank in ((0, n_now), (width, n_before)):
        own = slice(begin, begin + width)
        parts.append(_reduced(torch.cat([each[own] for each in maps], dim=1), spread[own, own], min(rank, width)))
    tables, columns = zip(*(_coarse(narrow @ inner) for inner, _ in parts), strict=True)
    outer = torch.cat([out for _, out in parts])
    step = torch.cat(columns)
    tells, scales = [], []
    for part in outer.split_with_sizes([each.shape[1] for each in maps], dim=1):
        most = part.abs().amax(dim=1).clamp_min(1e-30) / 127
        tells.append((part / most[:, None]).round().to(torch.int8))
        scales.append(most * step)
    return Tables(tables[0], tables[1], tuple(tells), tuple(scales))


def _reduced(whole: torch.Tensor, spread: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of the map of low rank whose results are nearest to those of `whole`."""
    values, vectors = torch.linalg.eigh(spread)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    results = root @ whole
    # The right singular vectors of the results, from the small side.
    sizes, left = torch.linalg.eigh(results @ results.T)
    outer = (left[:, -rank:].T @ results) / sizes[-rank:].clamp_min(1e-30).sqrt()[:, None]
    return whole @ outer.T, outer


def _coarse(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table as int8, and the step of each column."""
    step = table.abs().amax(dim=0).clamp_min(1e-30) / 127
    return (table / step).round().to(torch.int8), step


def _rows(narrow: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    own = narrow[ids]
    before = torch.cat([torch.zeros(1, own.shape[1]), own[:-1]])
    return torch.cat([own, before, torch.ones(len(own), 1)], dim=1)


def _embedding(model: Any) -> torch.Tensor | None:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return weight.detach().cpu()
    return None


def _normal(rows: torch.Tensor) -> torch.Tensor:
    """Rows as the first norm of a decoder makes them."""
    rows = rows.float()
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)


def _basis(embedding: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The principal directions of the embeddings of these tokens."""
    rows = _normal(embedding[ids])
    vectors: torch.Tensor = torch.linalg.eigh(rows.T @ rows)[1]
    return vectors.flip(1)[:, :_WIDEST]
