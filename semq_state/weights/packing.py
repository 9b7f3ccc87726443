"""Symbols of a few bits as planes of bytes, and back."""

from __future__ import annotations

import torch

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of a symbol to the widths of its planes, lowest bits first: no symbol crosses a byte."""


def packed(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 symbols of any shape as `(n_bytes,)` uint8: each plane after the other, filled up with zeros."""
    flat, planes, low = symbols.flatten(), [], 0
    for width in _PLANES[bits]:
        each = 8 // width
        part = torch.nn.functional.pad((flat >> low) & (2**width - 1), (0, -len(flat) % each)).view(-1, each)
        plane = part[:, 0].clone()
        for i in range(1, each):
            plane |= part[:, i] << (i * width)
        planes.append(plane)
        low += width
    return torch.cat(planes)


def unpacked(data: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `packed`."""
    n, at, low = torch.Size(shape).numel(), 0, 0
    symbols: torch.Tensor | None = None
    for width in _PLANES[bits]:
        each = 8 // width
        n_bytes = -(-n // each)
        plane = data[at : at + n_bytes]
        part = torch.empty(n_bytes, each, dtype=torch.uint8, device=data.device)
        for i in range(each):
            part[:, i] = (plane >> (i * width)) & (2**width - 1)
        found = part.view(-1)[:n] << low
        symbols = found if symbols is None else symbols.bitwise_or_(found)
        at, low = at + n_bytes, low + width
    assert symbols is not None
    return symbols.view(shape)


def n_packed(bits: int, n: int) -> int:
    """Bytes that `n` symbols take packed."""
    return sum(-(-n // (8 // width)) for width in _PLANES[bits])
