"""Symbols of a few bits as planes of bytes, and back.

Whole words are folded onto their lowest bytes by shifts, as fast as memory is read. In which order the symbols of a
byte stand depends on the machine, so packed symbols are for memory only.
"""

from __future__ import annotations

import torch

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of a symbol to the widths of its planes, lowest bits first: no symbol crosses a byte."""

_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""Width of a plane to the word whose bytes become one byte."""


def packed(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 symbols of any shape as `(n_bytes,)` uint8: each plane after the other, filled up with zeros."""
    flat, planes, low = symbols.flatten(), [], 0
    for width in _PLANES[bits]:
        each = 8 // width
        part = flat if width == 8 else (flat >> low).bitwise_and_(2**width - 1)
        if len(part) % each:
            part = torch.nn.functional.pad(part, (0, -len(part) % each))
        if width == 8:
            planes.append(part)
        else:
            word = part.view(_WORDS[width])
            folded = word.clone()
            for i in range(1, each):
                folded |= word >> (i * (8 - width))
            planes.append(folded.bitwise_and_(0xFF).to(torch.uint8))
        low += width
    return planes[0] if len(planes) == 1 else torch.cat(planes)


def unpacked(data: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `packed`."""
    n, at, low = torch.Size(shape).numel(), 0, 0
    symbols: torch.Tensor | None = None
    for width in _PLANES[bits]:
        each = 8 // width
        n_bytes = -(-n // each)
        plane = data[at : at + n_bytes]
        if width == 8:
            found = plane.clone()
        else:
            word = plane.to(_WORDS[width])
            spread = word.clone()
            for i in range(1, each):
                spread |= word << (i * (8 - width))
            spread &= sum((2**width - 1) << (8 * i) for i in range(each))
            found = spread.view(torch.uint8)[:n] << low
        symbols = found if symbols is None else symbols.bitwise_or_(found)
        at, low = at + n_bytes, low + width
    assert symbols is not None
    return symbols.view(shape)


def n_packed(bits: int, n: int) -> int:
    """Bytes that `n` symbols take packed."""
    return sum(-(-n // (8 // width)) for width in _PLANES[bits])
