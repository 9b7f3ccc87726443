"""Chosen rows from passes: which tokens, pooled or not, without padding, in the order of their ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from semq_state.errors import IncompleteStateError, UnsupportedOperationError
from semq_state.hidden.spec import HiddenStates, Rule
from semq_state.snapshot import HiddenRows
from semq_state.snapshot.hidden import keys

_MOST_PIECES = 64
"""So many are kept before those that are reduced to one row a document are reduced."""


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows of one pass. Where a mean is wanted, a row is the sum of `counts` tokens of a document."""

    ids: torch.Tensor
    token_ids: torch.Tensor
    states: Mapping[str, torch.Tensor]
    counts: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])


class Collector:
    """Gathers the rows that a choice wants, pass by pass.

    Args:
        spec: the choice.
        names: of the sites, all of which each pass has.
        device: where rows are kept; where they were heard by default.
    """

    def __init__(
        self, spec: HiddenStates, names: Sequence[str], *, device: str | torch.device | None = None
    ) -> None:
        self._spec = spec
        self._device = device
        self._names = sorted(names)
        self._pieces: list[_Piece] = []
        self._none: dict[str, torch.Tensor] = {}

    def add(
        self,
        states: Mapping[str, torch.Tensor],
        documents: torch.Tensor,
        positions: torch.Tensor,
        token_ids: torch.Tensor | None,
        is_generated: torch.Tensor | None = None,
    ) -> None:
        """Takes what a pass gave.

        Args:
            states: site to `(batch, seq, dim)`.
            documents: of each row of the batch, `(batch,)` int64, on the CPU as all that follows.
            positions: of each token in its document, `(batch, seq)` int64; -1 at what is no token of one.
            token_ids: `(batch, seq)`, or None where there are none.
            is_generated: `(batch, seq)` bool; None where no token is.

        Raises:
            IncompleteStateError: a site's vectors are of another length than before.
            UnsupportedOperationError: the rule for tokens gave something else than bool `(n,)`.
        """
        if not self._none:
            self._none = {name: self._cast(states[name].flatten(0, 1)[:0]).clone() for name in self._names}
        for name, none in self._none.items():
            if states[name].shape[2] != none.shape[1]:
                raise IncompleteStateError(
                    name,
                    expected=f"vectors of {none.shape[1]} numbers, as in the passes before",
                    found=f"{states[name].shape[2]}",
                    do="name a module whose vectors are all of one length",
                )
        if token_ids is None:
            token_ids = torch.full_like(positions, -1)
        chosen = self._chosen(positions, token_ids, is_generated)
        if self._spec.pool == "mean":
            self._add_sums(states, documents, chosen)
            return
        if self._is_last and chosen.any():
            at = torch.where(chosen, positions, -1)
            chosen = chosen & (at == at.max(1, keepdim=True).values)
        where = chosen.flatten().nonzero().flatten()
        if not len(where):
            return
        seq = positions.shape[1]
        ids = torch.stack([documents[where // seq], positions.flatten()[where]], 1)
        taken = {name: self._own(states[name], where) for name in self._names}
        self._keep(_Piece(ids, token_ids.flatten()[where].to(torch.int64), taken))

    def rows(self) -> HiddenRows:
        """All that was gathered, in the order of documents and positions."""
        whole = self._whole()
        spec = self._spec
        if whole is None:
            empty = torch.zeros(0, 2, dtype=torch.int64)
            return HiddenRows(empty, empty[:, 0], self._none, spec.word, spec.pool or "")
        ids, states = whole.ids, whole.states
        if whole.counts is not None:
            dtype = spec.dtype or torch.float32
            states = {n: (t / whole.counts.to(t.device)[:, None]).to(dtype) for n, t in states.items()}
        if spec.pool:
            ids = torch.stack([ids[:, 0], torch.zeros_like(ids[:, 1])], 1)
        elif isinstance(spec.tokens, slice) and spec.needs_end:
            return _sliced(whole, spec.tokens, spec.word)
        token_ids = torch.full_like(whole.token_ids, -1) if spec.pool == "mean" else whole.token_ids
        return HiddenRows(ids, token_ids, states, spec.word, spec.pool or "")

    @property
    def _is_last(self) -> bool:
        return self._spec.tokens == "last" or self._spec.pool == "last"

    def _chosen(
        self, positions: torch.Tensor, token_ids: torch.Tensor, is_generated: torch.Tensor | None
    ) -> torch.Tensor:
        own, tokens = positions >= 0, self._spec.tokens
        if tokens == "generated":
            return own & is_generated if is_generated is not None else torch.zeros_like(own)
        if isinstance(tokens, slice) and not self._spec.needs_end:
            start, step = tokens.start or 0, tokens.step or 1
            inside = (positions >= start) & ((positions - start) % step == 0)
            return own & inside & (positions < (1 << 62 if tokens.stop is None else tokens.stop))
        if not callable(tokens):
            return own
        chosen = torch.zeros_like(own)
        for row in range(len(own)):
            at = own[row].nonzero().flatten()
            if len(at):
                chosen[row, at] = _answer(tokens, token_ids[row, at], positions[row, at])
        return chosen

    def _add_sums(self, states: Mapping[str, torch.Tensor], documents: torch.Tensor, chosen: torch.Tensor) -> None:
        counts = chosen.sum(1)
        some = counts.nonzero().flatten()
        if not len(some):
            return
        sums: dict[str, torch.Tensor] = {}
        for name in self._names:
            values, mask = states[name].float(), chosen.to(states[name].device)[..., None]
            sums[name] = values.masked_fill(~mask, 0.0).sum(1)[some.to(values.device)].to(self._device)
        ids = torch.stack([documents[some], torch.zeros_like(documents[some])], 1)
        self._keep(_Piece(ids, torch.full_like(some, -1), sums, counts[some]))

    def _own(self, states: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """These rows, in memory of our own: the model's output is the caller's to write to."""
        taken = self._cast(_take(states.flatten(0, 1), where))
        return taken.clone() if taken.data_ptr() == states.data_ptr() else taken

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._spec.dtype)

    def _keep(self, piece: _Piece) -> None:
        self._pieces.append(piece)
        if len(self._pieces) >= _MOST_PIECES and (self._is_last or piece.counts is not None):
            whole = self._whole()
            self._pieces = [] if whole is None else [whole]

    def _joined(self, name: str) -> torch.Tensor:
        tensors = [piece.states[name] for piece in self._pieces]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _whole(self) -> _Piece | None:
        """Everything in one piece, in order; reduced where one row a document is wanted."""
        if not self._pieces:
            return None
        ids = torch.cat([p.ids for p in self._pieces])
        token_ids = torch.cat([p.token_ids for p in self._pieces])
        counts = [p.counts for p in self._pieces if p.counts is not None]
        if counts:
            return _summed(ids, {name: self._joined(name) for name in self._names}, torch.cat(counts))
        at = keys(ids)
        if len(at) > 1 and not bool((at.diff() > 0).all()):
            order = at.argsort()
            ids, token_ids = ids[order], token_ids[order]
            # One site at a time, so that only one stands in memory twice more.
            states = {name: _take(self._joined(name), order, sorts=True) for name in self._names}
        else:
            states = {name: self._joined(name) for name in self._names}
        whole = _Piece(ids, token_ids, states)
        return _last_of_each(whole) if self._is_last else whole


def _answer(rule: Rule, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    try:
        answer = torch.as_tensor(rule(token_ids, positions))
        found = f"{answer.dtype} {tuple(answer.shape)}"
    except Exception as error:  # in the midst of the caller's run, which is to go on
        answer, found = torch.zeros(0), f"{type(error).__name__}: {error}"
    if answer.dtype != torch.bool or answer.shape != positions.shape:
        raise UnsupportedOperationError(
            "HiddenStates, tokens",
            expected=f"a rule that gives bool ({len(positions)},) for so many tokens",
            found=f"{found:.200}",
            do="give one answer for each token",
        )
    return answer.cpu()


def _take(flat: torch.Tensor, where: torch.Tensor, *, sorts: bool = False) -> torch.Tensor:
    """These rows; a view where that is all of them in their order."""
    return flat if len(where) == len(flat) and not sorts else flat.index_select(0, where.to(flat.device))


def _summed(ids: torch.Tensor, states: Mapping[str, torch.Tensor], counts: torch.Tensor) -> _Piece:
    documents, group = torch.unique(ids[:, 0], return_inverse=True)
    summed = {
        name: t.new_zeros(len(documents), t.shape[1]).index_add_(0, group.to(t.device), t)
        for name, t in states.items()
    }
    new = torch.stack([documents, torch.zeros_like(documents)], 1)
    total = counts.new_zeros(len(documents)).index_add_(0, group, counts)
    return _Piece(new, torch.full_like(documents, -1), summed, total)


def _last_of_each(piece: _Piece) -> _Piece:
    documents = piece.ids[:, 0]
    ends = torch.ones(len(documents), dtype=torch.bool)
    ends[:-1] = documents[1:] != documents[:-1]
    where = ends.nonzero().flatten()
    taken = {name: _take(t, where) for name, t in piece.states.items()}
    return _Piece(piece.ids[where], piece.token_ids[where], taken)


def _sliced(piece: _Piece, tokens: slice, word: str) -> HiddenRows:
    """The rows of each document that a slice counted from its end means."""
    _, lengths = torch.unique_consecutive(piece.ids[:, 0], return_counts=True)
    starts = lengths.cumsum(0) - lengths
    pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
    where = torch.tensor([start + i for start, n in pairs for i in range(*tokens.indices(n))], dtype=torch.int64)
    taken = {name: _take(t, where) for name, t in piece.states.items()}
    return HiddenRows(piece.ids[where], piece.token_ids[where], taken, word)
