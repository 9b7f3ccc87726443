"""A state's tensors to symbols, and symbols to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from semq_state.codecs.symbolic import AbstractVectorCodec, AbstractWeightedCodec, Symbolic, Symbols, damaged
from semq_state.content import DTYPES
from semq_state.snapshot import SectionError
from semq_state.symbolic.groups import Group, Stack

Tensors = Mapping[str, torch.Tensor]
Encode = Callable[[list[torch.Tensor]], tuple[Symbolic, torch.Tensor | None]]
"""Bodies, float32 and finite, to symbols; and, if any, the tokens `(batch, seq)` that are too far out for them."""
Decode = Callable[[Symbolic, Sequence[tuple[int, ...]]], list[torch.Tensor]]
"""Symbols and the shapes of the bodies to the bodies."""


@dataclass(frozen=True, eq=False)
class CodedGroup:
    """A group, the tensors that a file holds of it by their names without the group's prefix, and its errors."""

    group: Group
    tensors: Tensors
    errors: Mapping[str, SectionError]


def bodies_of(stacks: Sequence[Stack], tensors: Tensors, start: int, stop: int) -> list[torch.Tensor]:
    """The coded tokens of each stack, `(n_tensors, …, seq, dim)`, in their own dtype."""
    return [torch.stack([tensors[name][..., start:stop, :] for name in stack.names]).cpu() for stack in stacks]


def finite(
    bodies: Sequence[torch.Tensor], late: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """The bodies as float32, with zeros in place of vectors that no codec takes: those with NaN, infinity or values
    out of float32's range, and those of `late`; and by number of the body which vectors those are, flat."""
    values, escaped = [], {}
    for i, body in enumerate(bodies):
        floats = body.to(torch.float32)
        bad = None
        if late is not None:
            between = floats.ndim - 4  # axes between rows and tokens
            bad = late.view(1, len(late), *(1,) * between, late.shape[1]).expand(floats.shape[:-1])
        # A sum is finite only where all its terms are, and is much cheaper than a look at each.
        if not torch.isfinite(floats.sum(dtype=torch.float64)):
            odd = ~torch.isfinite(floats).all(-1)
            bad = odd if bad is None else bad | odd
        if bad is not None and bad.any():
            floats = floats.masked_fill(bad[..., None], 0.0)
            escaped[i] = bad.flatten().nonzero().flatten()
        values.append(floats)
    return values, escaped


def coded(
    tensors: Tensors,
    stacks: Sequence[Stack],
    span: tuple[int, int],
    codec: str,
    encode: Encode,
    decode: Decode,
    late: torch.Tensor | None = None,
) -> CodedGroup:
    """Codes stacks of tensors, and measures the error by decoding what was coded.

    Args:
        tensors: the state's tensors by name.
        stacks: what to code together.
        span: the coded tokens, from and to.
        codec: the id under which a file names the codec.
        encode: bodies to symbols.
        decode: the inverse.
        late: `(batch, seq)`, coded tokens that stay exact all the same: sinks of rows that begin with padding.
    """
    start, stop = span
    bodies = bodies_of(stacks, tensors, start, stop)
    values, escaped = finite(bodies, late)
    symbolic, beyond = encode(values)
    if beyond is not None:
        values, escaped = finite(bodies, beyond if late is None else beyond | late)
        symbolic, _ = encode(values)
    group = Group(
        codec=codec,
        stacks=tuple(stacks),
        start=start,
        stop=stop,
        params=symbolic.params,
        alphabets={name: (s.lowest, s.highest) for name, s in symbolic.symbols.items()},
        exact=tuple(symbolic.exact),
        escaped=tuple(escaped),
    )
    parts: dict[str, torch.Tensor] = {f"symbols.{name}": s.values for name, s in symbolic.symbols.items()}
    parts |= {f"exact.{name}": t for name, t in symbolic.exact.items()}
    for name, (i, begin, end) in group.kept().items():
        parts[name] = torch.stack([tensors[n][..., begin:end, :] for n in stacks[i].names]).cpu()
    for i, at in escaped.items():
        parts[f"escaped.{i}"] = bodies[i].flatten(0, -2)[at]
        parts[f"escaped_at.{i}"] = at
    errors: dict[str, SectionError] = {}
    shapes = [group.body(stack) for stack in stacks]
    for i, (stack, body) in enumerate(zip(stacks, decode(symbolic, shapes), strict=True)):
        restored = _cast(body, DTYPES[stack.spec.dtype])
        if i in escaped:
            restored.view(-1, restored.shape[-1])[escaped[i]] = 0
        errors |= dict(zip(stack.names, _errors(values[i], restored), strict=True))
    return CodedGroup(group, {name: parts[name] for name in group.parts()}, errors)


def decoded(group: Group, parts: Tensors, decode: Decode) -> dict[str, torch.Tensor]:
    """The inverse of `coded`: the tensors of a group, from its parts, which are not trusted.

    Raises:
        IntegrityError: a part has another dtype, shape or symbol than the group says.
    """
    symbolic = Symbolic(
        {
            name: Symbols(_in_alphabet(group, name, parts[f"symbols.{name}"], bounds), *bounds)
            for name, bounds in group.alphabets.items()
        },
        {name: parts[f"exact.{name}"] for name in group.exact},
        group.params,
    )
    shapes = [group.body(stack) for stack in group.stacks]
    kept = group.kept()
    tensors: dict[str, torch.Tensor] = {}
    for i, (stack, body) in enumerate(zip(group.stacks, decode(symbolic, shapes), strict=True)):
        dtype = DTYPES[stack.spec.dtype]
        values = _cast(body, dtype)
        if i in group.escaped:
            _put_back(group, i, values, parts)
        pieces = {name: parts[name] for name, (j, _, _) in kept.items() if j == i}
        for name, piece in pieces.items():
            _, begin, end = kept[name]
            *leading, _, dim = values.shape
            if piece.dtype != dtype or piece.shape != (*leading, end - begin, dim):
                raise damaged(group.codec, f"{(*leading, end - begin, dim)} exact tokens", f"{tuple(piece.shape)}")
        whole = [pieces[f"first.{i}"]] if f"first.{i}" in pieces else []
        whole += [values, *([pieces[f"last.{i}"]] if f"last.{i}" in pieces else [])]
        for j, name in enumerate(stack.names):
            tensors[name] = torch.cat([piece[j] for piece in whole], dim=-2)
    return tensors


def vectors(codec: AbstractVectorCodec, importance: torch.Tensor | None = None) -> tuple[Encode, Decode]:
    """`encode` and `decode` of a codec that knows one body only; those that weigh errors are told what matters."""

    def encode(bodies: list[torch.Tensor]) -> tuple[Symbolic, None]:
        if importance is not None and isinstance(codec, AbstractWeightedCodec):
            return codec.encode(bodies[0], importance), None
        return codec.encode(bodies[0]), None

    return encode, lambda made, shapes: [codec.decode(made, shapes[0])]


def _errors(values: torch.Tensor, restored: torch.Tensor) -> list[SectionError]:
    """Tensor by tensor of a stack."""
    errors = []
    for before, after in zip(values, restored, strict=True):
        a, b = before.flatten().double(), after.flatten().double()
        norm, other = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b))
        lost = float(torch.linalg.vector_norm(a - b))
        cosine = float(torch.dot(a, b)) / (norm * other) if norm and other else float(norm == other)
        errors.append(SectionError(lost / norm if norm else float(lost > 0), cosine))
    return errors


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the tensor's own dtype; what rounds beyond its range becomes its largest value."""
    most = torch.finfo(dtype).max
    return values.to(dtype).clamp(-most, most).contiguous()


def _put_back(group: Group, i: int, values: torch.Tensor, parts: Tensors) -> None:
    at, vectors_ = parts[f"escaped_at.{i}"], parts[f"escaped.{i}"]
    flat = values.view(-1, values.shape[-1])
    sound = (
        at.dtype == torch.int64
        and at.ndim == 1
        and vectors_.dtype == values.dtype
        and vectors_.shape == (len(at), flat.shape[-1])
        and (not len(at) or (int(at.min()) >= 0 and int(at.max()) < len(flat)))
    )
    if not sound:
        raise damaged(
            group.codec, "escaped vectors and their places", f"{tuple(vectors_.shape)}, {tuple(at.shape)}"
        )
    flat[at] = vectors_


def _in_alphabet(group: Group, name: str, symbols: torch.Tensor, bounds: tuple[int, int]) -> torch.Tensor:
    if symbols.dtype not in (torch.int8, torch.uint8, torch.int16):
        raise damaged(group.codec, f"symbols {name!r:.80} of 8 or 16 bits", str(symbols.dtype))
    if symbols.numel():
        low, high = int(symbols.min()), int(symbols.max())
        if low < bounds[0] or high > bounds[1]:
            raise damaged(group.codec, f"symbols {name!r:.80} from {bounds[0]} to {bounds[1]}", f"{low} to {high}")
    return symbols
