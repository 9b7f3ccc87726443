"""bf16 values given a guess of each: the whole steps between guess and value, and the bits below a step.

A channel has a step, a power of two of about a sixth of what its guesses are off by. A value's magnitude in whole
steps, `~` of it for negative values, less the guess's is a small integer whose distribution is much the same in all
channels: a symbol of one byte, which zstandard's Huffman coder codes. A magnitude of `q` whole steps has
`floor(log2 q)` bits of its significand settled, and the other `7 - floor(log2 q)` are noise and stored as they are.
Below one step the exponent is stored too; what is far off (or NaN, or infinite) is stored whole.

Arithmetic is done in single IEEE operations on arrays (never a sum whose order is open), so that encoder and
decoder agree on every machine.
"""

from __future__ import annotations

from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt
import zstandard

from semq_state.codecs.symbolic import damaged
from semq_state.content import Bytes

Words: TypeAlias = npt.NDArray[np.uint16]
Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int32]

_HEADER = np.dtype("<u4")
_N_PARTS = 4
_FAR = -128  # the symbol of a value that is stored whole
_MOST_STEPS = np.float32(1 << 15)
_FARTHEST = np.float32(1 << 20)  # a guess, in steps
_STEPS = 64  # exponents of steps lie within ±64, so that no float below becomes denormal or infinite
_BELOW_ONE = 8  # what `_free_bits` finds for no whole step
_SAMPLE = 128  # rows whose errors decide the steps


def least_bytes(channels: int) -> int:
    """What a block takes at least."""
    return _N_PARTS * _HEADER.itemsize + channels


@final
class Residuals:
    """Codes blocks one after the other; one thread at a time."""

    def __init__(self) -> None:
        # As in `planes.py`: matches of 7 bytes through a table of 64 entries are never found, which leaves Huffman.
        parameters = zstandard.ZstdCompressionParameters(
            window_log=17,
            chain_log=6,
            hash_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
            strategy=zstandard.STRATEGY_FAST,
        )
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, values: Words, exact: Floats, guess: Floats) -> bytes:
        """Codes bit patterns of bf16 `(rows, channels)`.

        Args:
            values: any bit patterns, C-contiguous.
            exact: the same as float32.
            guess: finite, of the same shape; nothing but the size of the payload depends on how good they are.
        """
        exponents = _exponents(exact, guess)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = np.abs(exact)
            scaled *= _powers(-exponents)
            np.fmin(scaled, _MOST_STEPS, out=scaled)
        offsets = scaled.astype(np.int32)
        offsets ^= values.view(np.int16) >> 15
        offsets -= _whole_steps(guess, exponents)
        free = _free_bits(scaled)
        symbols = offsets.astype(np.int8)
        offsets += 127
        far = offsets.view(np.uint32) > 254
        if scaled.size and scaled.max() >= _MOST_STEPS:
            far |= scaled >= _MOST_STEPS
        at_far = np.flatnonzero(far)
        symbols.reshape(-1)[at_far] = _FAR
        flat_free = free.reshape(-1)
        flat_free[at_far] = 0
        small = np.flatnonzero(flat_free == _BELOW_ONE)
        flat_free[small] = 7
        flat = values.reshape(-1)
        parts = (
            self._squeezed(symbols.view(np.uint8).reshape(-1)),
            self._squeezed(((flat[small] >> 7) & 255).astype(np.uint8)),
            flat[at_far].astype("<u2").tobytes(),
            _packed(values.astype(np.uint8), free),
        )
        sizes = np.array([len(part) for part in parts], _HEADER)
        return b"".join((sizes.tobytes(), exponents.tobytes(), *parts))

    def decode(self, payload: Bytes, guess: Floats) -> tuple[Words, int]:
        """The values of the block that the payload begins with, and how many bytes it takes.

        Raises:
            IntegrityError: the payload is damaged.
        """
        rows, channels = guess.shape
        start = least_bytes(channels)
        if len(payload) < start:
            raise damaged("residual", f"{start} bytes before the symbols", len(payload))
        sizes = payload[: start - channels].view(_HEADER).astype(np.int64)
        exponents = payload[start - channels : start].view(np.int8)
        if not -_STEPS <= exponents.min() <= exponents.max() <= _STEPS:
            raise damaged("residual", f"exponents within ±{_STEPS}", exponents.tolist())
        first, second, third, end = (start + np.cumsum(sizes)).tolist()
        if end > len(payload):
            raise damaged("residual", "parts that lie within the payload", sizes.tolist())
        symbols = self._expanded(payload[start:first], rows * channels).view(np.int8).reshape(rows, channels)
        steps = _whole_steps(guess, exponents)
        steps += symbols
        signs = steps >> 31
        steps ^= signs
        magnitudes = steps.astype(np.float32)
        free = _free_bits(magnitudes)
        at_far = np.flatnonzero(symbols == _FAR)
        flat_free = free.reshape(-1)
        flat_free[at_far] = 0
        small = np.flatnonzero(flat_free == _BELOW_ONE)
        flat_free[small] = 7
        magnitudes *= _powers(exponents)
        bits = magnitudes.view(np.int32)
        bits >>= 16
        signs &= 0x8000
        bits |= signs
        values = bits.astype(np.uint16)
        flat = values.reshape(-1)
        values |= _unpacked(payload[third:end], free)
        flat[small] |= self._expanded(payload[first:second], len(small)).astype(np.uint16) << 7
        whole = payload[second:third]
        if len(whole) != 2 * len(at_far):
            raise damaged("residual", f"{len(at_far)} values stored whole", f"{len(whole)} bytes")
        flat[at_far] = whole.view("<u2")
        return values, end

    def _squeezed(self, symbols: Bytes) -> bytes:
        return self._compressor.compress(symbols.data) if len(symbols) else b""

    def _expanded(self, piece: Bytes, n_bytes: int) -> Bytes:
        """The inverse of `_squeezed`."""
        if not n_bytes and not len(piece):
            return np.empty(0, np.uint8)
        try:
            declared = zstandard.frame_content_size(piece.data)
            if declared != n_bytes:
                raise damaged("residual", f"a zstd frame of {n_bytes} bytes", f"one that declares {declared}")
            return np.frombuffer(self._decompressor.decompress(piece.data, allow_extra_data=False), np.uint8)
        except zstandard.ZstdError as error:
            raise damaged("residual", "a whole zstd frame", str(error)) from error


def floats(values: Words) -> Floats:
    """bf16 bit patterns as float32."""
    wide = values.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _exponents(exact: Floats, guess: Floats) -> npt.NDArray[np.int8]:
    """log2 of each channel's step: between 1/4 and 1/8 of the standard deviation, were the errors Gaussian."""
    every = slice(None, None, max(1, len(exact) // _SAMPLE))
    with np.errstate(over="ignore", invalid="ignore"):
        errors = np.abs(exact[every] - guess[every])
        errors[~(errors < np.float32(1e30))] = 0
    spread = np.maximum(errors.mean(axis=0, dtype=np.float64), 1e-30) * 1.25
    exponents: npt.NDArray[np.int8] = np.clip(np.floor(np.log2(spread)) - 2, -_STEPS, _STEPS).astype(np.int8)
    return exponents


def _powers(exponents: npt.NDArray[np.int8]) -> Floats:
    return np.ldexp(np.float32(1), exponents.astype(np.int32)).astype(np.float32)


def _whole_steps(guess: Floats, exponents: npt.NDArray[np.int8]) -> Ints:
    with np.errstate(over="ignore"):
        scaled = guess * _powers(-exponents)
    np.minimum(scaled, _FARTHEST, out=scaled)
    np.maximum(scaled, -_FARTHEST, out=scaled)
    steps: Ints = np.floor(scaled, out=scaled).astype(np.int32)
    return steps


def _free_bits(magnitudes: Floats) -> Bytes:
    """How many bits of each significand the whole steps leave open; `_BELOW_ONE` where there is no step."""
    exponents = (magnitudes.view(np.uint32) >> 23).astype(np.uint8)
    np.clip(exponents, 126, 134, out=exponents)
    return np.subtract(134, exponents, out=exponents)


def _packed(low: Bytes, free: Bytes) -> bytes:
    """The lowest `free` bits of each byte, `(rows, channels)`, channel after channel without gaps, least first."""
    at, n_bytes = _places(free)
    shifted = (low & _masks(free)).astype(np.uint16)
    shifted <<= (at & 7).astype(np.uint16)
    at >>= 3
    # Bits do not overlap, so that sums are unions; what reaches into the next byte is moved there.
    sums = np.bincount(at.reshape(-1), shifted.reshape(-1), minlength=n_bytes).astype(np.uint16)
    found = sums & 255
    found[1:] |= sums[:-1] >> 8
    return found[:n_bytes].astype(np.uint8).tobytes()


def _unpacked(packed: Bytes, free: Bytes) -> Bytes:
    """The inverse of `_packed`."""
    at, n_bytes = _places(free)
    if len(packed) != n_bytes:
        raise damaged("residual", f"{n_bytes} bytes of free bits", len(packed))
    wide = np.zeros(n_bytes + 2, np.uint16)
    wide[:n_bytes] = packed
    wide[:-1] |= wide[1:] << 8
    shifts = (at & 7).astype(np.uint16)
    at >>= 3
    low = wide.take(at)
    low >>= shifts
    return low.astype(np.uint8) & _masks(free)


def _places(free: Bytes) -> tuple[npt.NDArray[np.int64], int]:
    """Where the bits of each value begin, and how many bytes all of them take."""
    ends = np.cumsum(free, axis=0, dtype=np.int64)
    by_channel = np.cumsum(ends[-1])
    ends += by_channel - ends[-1]
    ends -= free
    return ends, -(-int(by_channel[-1]) // 8)


def _masks(free: Bytes) -> Bytes:
    return np.left_shift(np.uint8(1), free) - np.uint8(1)
