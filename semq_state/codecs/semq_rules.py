"""SEMQ's three operators, rule revision 0: unit rows to symbols to packed bytes, and back.

An independent implementation from the public description (the `contracts.md` and `file-format.md` pages of
The-SEMQ-Group/semq); not affiliated with or endorsed by its owner. Which arithmetic decides a symbol:

* `quant` float32 throughout, `(m * bins) / M` as two roundings;
* `phase` float64, the two inner steps of `P` fused (one rounding each), its last product not;
* `orbit` float64: the product, then half to even.

Symbols and packed bytes are the same on every machine; decoded values are promised only up to a few units in the
last place. numpy does all of it, so that an array never depends on the number of threads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from semq_state.errors import UnsupportedOperationError

MAX_DIM = 65_536
SEMQ_RANGE = 2.0
"""SEMQ's own `c` of `quant`: the range ends at twice the root mean square coordinate of a unit row."""

BEST_RANGE = {2: 1.99, 3: 2.345, 4: 2.68, 5: 3.01, 6: 3.33, 7: 3.64}
"""The `c` of least error for Gaussian coordinates, by the bits of a symbol (a power of two of them)."""

TINY = np.float32(2.0**-126)
"""Smaller magnitudes are `+0.0` to every operator."""

UNIT_TOLERANCE = 2.0**-10
"""How far the squared norm of a row may be from 1."""

_BLOCK = 1 << 15  # values worked on at a time, so that temporaries stay in the cache
_C1, _C3, _C5 = 0.9947660466480732, -0.28543420102605926, 0.07606631777543432
_NEAR = 1e-3  # of a sector: well above what float32 can be off by, so that only there float64 is needed

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]


class AbstractOperator(ABC):
    """A rule from rows of `dim` float32 to symbols.

    A unit, one coordinate or a pair of them, becomes one symbol of `n_bits`. `encode` checks rows as SEMQ does,
    `symbols` applies the rule alone; `representatives` `(n_symbols, values per unit)` is what symbols decode to.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    dim: int

    @property
    @abstractmethod
    def parameter(self) -> int: ...

    @property
    @abstractmethod
    def n_symbols(self) -> int: ...

    @property
    @abstractmethod
    def n_units(self) -> int: ...

    @property
    @abstractmethod
    def n_bits(self) -> int: ...

    @abstractmethod
    def representatives(self) -> Floats: ...

    @abstractmethod
    def _rule(self, rows: Floats) -> Bytes: ...

    @property
    def n_bytes(self) -> int:
        """Bytes of a packed row."""
        return -(-self.n_units * self.n_bits // 8)

    def encode(self, rows: Floats) -> Bytes:
        """Symbols of unit rows.

        Args:
            rows: float32 `(n, dim)`.

        Returns:
            uint8 `(n, n_units)`.

        Raises:
            UnsupportedOperationError: another dtype or shape, NaN or infinity, or a row whose squared norm is
                further than 2^-10 from 1.
        """
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != self.dim:
            raise _refused(
                "rows",
                f"float32 of shape (n, {self.dim})",
                f"{rows.dtype} {rows.shape}",
                "convert the vectors",
            )
        check_unit_rows(rows)
        return self.symbols(rows)

    def symbols(self, rows: Floats) -> Bytes:
        """Symbols of rows `(n, dim)` that need not have norm 1 but must be finite."""
        symbols = np.empty((len(rows), self.n_units), np.uint8)
        for block in blocks(rows):
            symbols[block] = self._rule(rows[block])
        return symbols

    def decode(self, symbols: Bytes) -> Floats:
        """float32 `(n, dim)`, not normalised, of symbols `(n, n_units)`; symbols outside the alphabet give 0."""
        table, flat = _table(self), symbols.reshape(-1)
        if len(table) > 256:
            flat = _padded(flat[None], 2).view("<u2")[0]
        values = np.empty((flat.size, 2), np.float32)
        items = values.view(np.uint64)[:, 0]
        for start in range(0, flat.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            table.take(flat[block], out=items[block], mode="clip")
        return values.reshape(-1)[: len(symbols) * self.dim].reshape(-1, self.dim)

    def pack(self, symbols: Bytes) -> Bytes:
        """uint8 `(n, n_bytes)` of symbols `(n, n_units)`, least significant bit first."""
        rows = np.empty((len(symbols), self.n_bytes), np.uint8)
        for block in blocks(symbols):
            rows[block] = _packed(symbols[block], self.n_bits)[:, : self.n_bytes]
        return rows

    def unpack(self, rows: Bytes) -> Bytes:
        """The inverse of `pack`.

        Raises:
            UnsupportedOperationError: a row is not canonical: a symbol outside the alphabet, a padding bit set.
        """
        symbols = np.empty((len(rows), self.n_units), np.uint8)
        for block in blocks(rows):
            symbols[block] = _unpacked(rows[block], self.n_bits)[:, : self.n_units]
        used = 8 - (8 * self.n_bytes - self.n_units * self.n_bits)
        if used < 8 and (rows[:, -1] >> used).any():
            raise _refused("rows", "padding bits of zero", "ones", "use another copy")
        if self.n_symbols < 1 << self.n_bits and symbols.size and symbols.max() >= self.n_symbols:
            raise _refused("rows", f"symbols below {self.n_symbols}", str(symbols.max()), "use another copy")
        return symbols


@final
@dataclass(frozen=True)
class Quant(AbstractOperator):
    """Sign and magnitude bin of each coordinate: a mid-rise uniform quantiser over `±c / sqrt(dim)`.

    Args:
        dim: 1 to 65,536.
        bins: of each sign, 2 to 64.
        c: the range in root mean square coordinates, 1/16 to 256; SEMQ's is 2.
    """

    name: ClassVar[str] = "quant"
    code: ClassVar[int] = 2
    dim: int
    bins: int = 8
    c: float = SEMQ_RANGE

    def __post_init__(self) -> None:
        _check(self.name, "dim", self.dim, 1, MAX_DIM)
        _check(self.name, "bins", self.bins, 2, 64)
        if not (isinstance(self.c, float) and 1 / 16 <= self.c <= 256):
            raise _refused("quant", "`c` a float of 1/16 to 256", repr(self.c), "choose another")

    @property
    def parameter(self) -> int:
        return self.bins

    @property
    def n_symbols(self) -> int:
        return 2 * self.bins

    @property
    def n_units(self) -> int:
        return self.dim

    @property
    def n_bits(self) -> int:
        return (2 * self.bins - 1).bit_length()

    @property
    def max_magnitude(self) -> np.float32:
        """`M`, where the last bin ends."""
        return np.float32(self.c / math.sqrt(self.dim))

    def representatives(self) -> Floats:
        magnitudes = (np.arange(self.bins) + 0.5) * float(self.max_magnitude) / self.bins
        return np.concatenate([-magnitudes, magnitudes]).astype(np.float32)[:, None]

    def _rule(self, rows: Floats) -> Bytes:
        scaled = np.abs(rows)
        with np.errstate(over="ignore"):  # of values far out of range
            scaled *= np.float32(self.bins)
            scaled /= self.max_magnitude
        # `m >= M` needs no test of its own: the quotient is then at least the float32 below `bins`.
        np.minimum(scaled, np.float32(self.bins - 1), out=scaled)
        symbols = scaled.astype(np.uint8)
        positive = (rows > -TINY).view(np.uint8)
        positive *= np.uint8(self.bins)
        symbols += positive
        return symbols


@final
@dataclass(frozen=True)
class Phase(AbstractOperator):
    """The angle of each pair of neighbouring coordinates; the pair's radius is discarded.

    Args:
        dim: 2 to 65,536, even; divisible by 4 for at most 16 sectors.
        sectors: 2 to 256.
    """

    name: ClassVar[str] = "phase"
    code: ClassVar[int] = 1
    dim: int
    sectors: int = 16

    def __post_init__(self) -> None:
        _check(self.name, "dim", self.dim, 1, MAX_DIM)
        _check(self.name, "sectors", self.sectors, 2, 256)
        if self.dim % (4 if self.sectors <= 16 else 2):
            raise _refused(
                "phase",
                "`dim` divisible by 4" if self.sectors <= 16 else "an even `dim`",
                str(self.dim),
                "append zeros to the vectors, or use quant, which takes every dim",
            )

    @property
    def parameter(self) -> int:
        return self.sectors

    @property
    def n_symbols(self) -> int:
        return self.sectors

    @property
    def n_units(self) -> int:
        return self.dim // 2

    @property
    def n_bits(self) -> int:
        return 4 if self.sectors <= 16 else 8

    def representatives(self) -> Floats:
        return _directions(self.sectors)

    def _rule(self, rows: Floats) -> Bytes:
        pairs = rows.reshape(-1, 2)
        turns = _quick_turns(pairs, self.sectors)
        # Few angles are this near to a border or undefined; these are measured as the rule says.
        near = np.abs(turns - np.rint(turns)) < _NEAR
        near |= np.isnan(turns)
        open_pairs = np.flatnonzero(near)
        turns[open_pairs] = np.trunc(_turns(pairs[open_pairs], self.sectors))
        np.clip(turns, 0, self.sectors - 1, out=turns)
        return turns.astype(np.uint8).reshape(len(rows), -1)


@final
@dataclass(frozen=True)
class Orbit(AbstractOperator):
    """The sign and digital root of each coordinate's multiple of `1 / scale`: beyond 9 of these it aliases.

    Args:
        dim: 1 to 65,536.
        scale: 1 to 2^30.
    """

    name: ClassVar[str] = "orbit"
    code: ClassVar[int] = 0
    dim: int
    scale: int = 50

    def __post_init__(self) -> None:
        _check(self.name, "dim", self.dim, 1, MAX_DIM)
        _check(self.name, "scale", self.scale, 1, 1 << 30)

    @property
    def parameter(self) -> int:
        return self.scale

    @property
    def n_symbols(self) -> int:
        return 19

    @property
    def n_units(self) -> int:
        return self.dim

    @property
    def n_bits(self) -> int:
        return 8

    def representatives(self) -> Floats:
        roots = np.arange(1, 10)
        return (np.concatenate([[0], roots, -roots]) / self.scale).astype(np.float32)[:, None]

    def _rule(self, rows: Floats) -> Bytes:
        scaled = rows.astype(np.float64)
        scaled *= self.scale
        multiples = np.rint(scaled, out=scaled).astype(np.int32)
        sizes = np.abs(multiples)
        # 0 leaves as 0, n > 0 as 1 + (n - 1) mod 9.
        nines = sizes - (sizes > 0)
        nines //= 9
        nines *= 9
        sizes -= nines
        symbols = sizes.astype(np.uint8)
        symbols += (multiples < 0).view(np.uint8) * np.uint8(9)
        return symbols


OPERATORS: dict[str, type[Quant] | type[Phase] | type[Orbit]] = {
    Quant.name: Quant,
    Phase.name: Phase,
    Orbit.name: Orbit,
}


def best_range(bins: int) -> float:
    """The `c` of least error for Gaussian coordinates: `BEST_RANGE`, and between its entries by interpolation."""
    bits = math.log2(2 * bins)
    return round(float(np.interp(bits, list(BEST_RANGE), list(BEST_RANGE.values()))), 3)


def check_unit_rows(rows: Floats) -> None:
    """Refuses rows that SEMQ would not take.

    Raises:
        UnsupportedOperationError: NaN or infinity, or a squared norm, summed in float64 in index order, further
            than 2^-10 from 1.
    """
    n, dim = rows.shape
    # A float32 sum is off by less than this, whatever its order; only rows that it leaves open are summed again.
    slack = dim * 2.0**-22
    per_block = max(1, _BLOCK // dim)
    for start in range(0, n, per_block):
        block = rows[start : start + per_block]
        with np.errstate(all="ignore"):
            off = np.abs(np.einsum("ij,ij->i", block, block) - np.float32(1))
            open_rows = np.flatnonzero(~(off <= UNIT_TOLERANCE - slack))
            if not len(open_rows):
                continue
            values = block[open_rows].astype(np.float64)
            values[np.abs(values) < TINY] = 0
            sums = np.add.accumulate(values * values, axis=1)[:, -1]
            wrong = ~(np.abs(sums - 1) <= UNIT_TOLERANCE)
        if wrong.any():
            row = int(np.argmax(wrong))
            finite = np.isfinite(sums[row])
            raise _refused(
                f"row {start + int(open_rows[row])}",
                "a norm of 1 (its square within 2^-10)" if finite else "finite values",
                f"a squared norm of {sums[row]:.6g}" if finite else "NaN or infinity",
                "normalise the vectors" if finite else "remove or replace the vector",
            )


def arc(t: Doubles) -> Doubles:
    """`P(t)`, SEMQ's polynomial for the arc tangent on 0 to 1, with its two fused steps exact."""
    square = t * t
    inner = _fused(np.full_like(t, _C5), square, np.full_like(t, _C3))
    value: Doubles = _fused(inner, square, np.full_like(t, _C1)) * t
    return value


def _arc(t: NDArray[Any]) -> NDArray[Any]:
    """`P(t)` with every step rounded, in the dtype of `t`."""
    square = np.square(t)
    value = square * _C5
    value += _C3
    value *= square
    value += _C1
    value *= t
    return np.asarray(value)


def _turns(pairs: Floats, sectors: int) -> Doubles:
    """The angle of each pair in sectors, 0 to `sectors`, counted from the negative x axis."""
    pairs = np.where(np.abs(pairs) < TINY, np.float32(0), pairs)
    x, y = pairs[:, 0].astype(np.float64), pairs[:, 1].astype(np.float64)
    ax, ay = np.abs(x), np.abs(y)
    longer = np.maximum(np.maximum(ax, ay), TINY)  # a zero pair has angle 0
    angle = arc(np.minimum(ax, ay) / longer)
    angle = np.where(ay > ax, math.pi / 2 - angle, angle)
    angle = np.where(x < 0, math.pi - angle, angle)
    angle = np.where(y < 0, -angle, angle)
    turns: Doubles = (angle + math.pi) * (sectors / (2 * math.pi))
    return turns


def _quick_turns(pairs: Floats, sectors: int) -> Floats:
    """`_turns` in float32, without a branch: within 1e-4 of it, and NaN for a zero pair."""
    x, y = pairs[:, 0], pairs[:, 1]
    ax, ay = np.abs(x), np.abs(y)
    longer = np.maximum(ax, ay)
    zero = longer < TINY
    if zero.any():
        longer[zero] = np.nan
    angle = _arc(np.minimum(ax, ay) / longer)
    # Each reflection turns the sign of the distance from its axis.
    for axis, side in ((math.pi / 4, ax - ay), (math.pi / 2, x), (0.0, y)):
        np.subtract(axis, angle, out=angle)
        _flip(angle, side)
        np.subtract(axis, angle, out=angle)
    angle += math.pi
    angle *= sectors / (2 * math.pi)
    return angle


def _flip(values: Floats, by: Floats) -> None:
    """Turns the sign of values where `by` is negative."""
    signs = np.ascontiguousarray(by).view(np.uint32) & np.uint32(1 << 31)
    bits = values.view(np.uint32)
    bits ^= signs


@lru_cache(maxsize=16)
def _table(operator: AbstractOperator) -> NDArray[np.uint64]:
    """Two float32 as one item: of each phase symbol, or of each two neighbouring symbols of the other rules."""
    values = np.zeros((256, operator.dim // operator.n_units), np.float32)
    values[: operator.n_symbols] = operator.representatives()
    if values.shape[1] == 1:
        values = np.stack([np.tile(values[:, 0], 256), np.repeat(values[:, 0], 256)], axis=1)
    items: NDArray[np.uint64] = np.ascontiguousarray(values).view(np.uint64)[:, 0]
    return items


def _directions(sectors: int) -> Floats:
    """Unit directions whose angle, as the rule measures it, is the middle of each sector: `(sectors, 2)`."""
    angle = -math.pi + (np.arange(sectors) + 0.5) * 2 * math.pi / sectors
    below, angle = angle < 0, np.abs(angle)
    left, angle = angle > math.pi / 2, np.minimum(angle, math.pi - angle)
    steep, angle = angle > math.pi / 4, np.minimum(angle, math.pi / 2 - angle)
    low, high = np.zeros(sectors), np.ones(sectors)
    for _ in range(60):
        middle = (low + high) / 2
        beyond = _arc(middle) > angle
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    tangent = (low + high) / 2
    x, y = np.where(steep, tangent, 1.0), np.where(steep, 1.0, tangent)
    pairs = np.stack([np.where(left, -x, x), np.where(below, -y, y)], axis=1)
    directions: Floats = (pairs / np.hypot(x, y)[:, None]).astype(np.float32)
    return directions


def blocks(rows: NDArray[Any]) -> Iterator[slice]:
    """Slices of a few rows each, small enough for the cache."""
    per_block = max(1, _BLOCK // max(1, rows.shape[1]))
    return (slice(start, start + per_block) for start in range(0, len(rows), per_block))


def _packed(symbols: Bytes, n_bits: int) -> Bytes:
    """Symbols at `n_bits` each, with eight symbols' worth of padding at most."""
    if n_bits == 8:
        return symbols
    words = _padded(symbols, 8).view("<u8")
    for width, step in zip((8, 16, 32), (n_bits, 2 * n_bits, 4 * n_bits), strict=True):
        # Two neighbours of `step` bits, `width` apart, become one of twice as many.
        neighbours = words >> np.uint64(width - step)
        neighbours &= _lanes(width, step, step)
        words = words & _lanes(width, step)
        words |= neighbours
    if n_bits in (2, 4):
        packed: Bytes = np.ascontiguousarray(words.view(f"<u{n_bits}")[:, :: 8 // n_bits]).view(np.uint8)
        return packed
    return words.view(np.uint8).reshape(len(words), -1, 8)[:, :, :n_bits].reshape(len(words), -1)


def _unpacked(rows: Bytes, n_bits: int) -> Bytes:
    """The inverse of `_packed`, with padding."""
    if n_bits == 8:
        return rows
    groups = _padded(rows, n_bits)
    if n_bits in (2, 4):
        words = groups.view(f"<u{n_bits}").astype("<u8")
    else:
        words = _padded(groups.reshape(-1, n_bits), 8).view("<u8")
    for width, step in zip((32, 16, 8), (4 * n_bits, 2 * n_bits, n_bits), strict=True):
        neighbours = words & _lanes(width, step, step)
        neighbours <<= np.uint64(width - step)
        words &= _lanes(width, step)
        words |= neighbours
    return words.view(np.uint8).reshape(len(rows), -1)


@lru_cache(maxsize=64)
def _lanes(width: int, n_bits: int, at: int = 0) -> np.uint64:
    """`n_bits` ones at bit `at` of every `2 * width` bits."""
    return np.uint64(sum(((1 << n_bits) - 1) << (start + at) for start in range(0, 64, 2 * width)))


def _padded(rows: Bytes, multiple: int) -> Bytes:
    """Rows with zeros up to a multiple of so many columns, contiguous."""
    n, width = rows.shape
    if width % multiple == 0:
        return np.ascontiguousarray(rows)
    padded = np.zeros((n, width + -width % multiple), np.uint8)
    padded[:, :width] = rows
    return padded


def _fused(a: Doubles, b: Doubles, c: Doubles) -> Doubles:
    """`a * b + c` with one rounding (Boldo and Melquiond 2008, figure 9), far from overflow and underflow."""
    upper, lower = _product(a, b)
    high, low = _sum(c, lower)
    head, rest = _sum(upper, high)
    tail, error = _sum(low, rest)
    # Rounded to odd: an inexact even number steps towards what was lost.
    bits = tail.view(np.int64)
    step = np.where((error > 0) == (tail > 0), 1, -1)
    bits += np.where((error != 0) & (bits & 1 == 0), step, 0)
    return head + tail


def _product(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    """`a * b` and its rounding error, both exact (Dekker 1971)."""
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    product = a * b
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def _halves(a: Doubles) -> tuple[Doubles, Doubles]:
    scaled = a * 134_217_729.0  # 2^27 + 1
    upper = scaled - (scaled - a)
    return upper, a - upper


def _sum(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    """`a + b` and its rounding error, both exact (Knuth)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _check(operator: str, name: str, value: object, lowest: int, highest: int) -> None:
    if type(value) is not int or not lowest <= value <= highest:
        raise _refused(operator, f"`{name}` an int of {lowest} to {highest}", f"{value!r:.80}", "choose another")


def _refused(where: str, expected: str, found: str, do: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(where, expected=expected, found=found, do=do)
