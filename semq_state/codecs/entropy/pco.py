"""The entropy coder for symbols: streams of nearly one distribution, each coded with pco (the package `pcodec`).

pco bins the numbers, codes the bins with tANS and the place within a bin as plain bits
(https://github.com/pcodec/pcodec/blob/main/docs/format.md). Decoding is integer arithmetic, the same everywhere.
We use its wrapped format: counts and lengths stand in our parameters, and nothing that pco reads can make it
allocate more than a table of 2¹⁴ entries, once the two features that could (delta coding, other modes) are refused.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

import numpy as np
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec.wrapped import FileCompressor, FileDecompressor

from semq_state.codecs.base import MAX_EXPANSION, AbstractCodec, Encoded
from semq_state.codecs.entropy.streams import Symbols, cuts
from semq_state.content import Bytes, TensorSpec
from semq_state.errors import IntegrityError

DTYPES: Mapping[str, str] = {"I8": "i8", "U8": "u8", "I16": "i16"}
"""Our names of the dtypes that can be coded, and pco's."""

_LENGTHS: Mapping[str, int] = {"zeros": 0, "pco": 1, "sparse": 3}  # of a stream, after its coding and its count
_RUN = 1024  # symbols of a tensor without rows between which it may be cut
_LONGEST = 1 << 24  # the most that one chunk of pco may hold
_SPARSE = 8  # a sparse stream has at most one non-zero symbol in so many
_LARGE = 1 << 17  # a stream from which on one symbol in 16 decides how it is coded; below, both ways are tried
_MAJOR = 4  # of the version of pco's format whose chunks we can judge before we decode them


@final
@dataclass(frozen=True)
class Pco(AbstractCodec):
    """Symbols within about 1 % of their entropy, for int8, uint8 and int16.

    Args:
        level: pco's effort, 0 to 12; decoders need not know it.
    """

    id: ClassVar[str] = "pco"
    level: int = 9

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 12:
            raise ValueError(f"`level` must be from 0 to 12, got {self.level!r}")

    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        if spec.dtype not in DTYPES:
            raise ValueError(f"the dtype must be one of {', '.join(DTYPES)}, got {spec.dtype!r}")
        symbols = data.view(_little(spec)).astype(_native(spec), copy=False)
        coder = FileCompressor()
        pieces: list[bytes | Bytes] = []
        streams: list[list[Any]] = []
        bounds = cuts(symbols, spec.shape[-1] if len(spec.shape) > 1 else _RUN) if len(symbols) else [0]
        for start, stop in pairwise(bounds):
            for at in range(start, stop, _LONGEST):
                stream = symbols[at : min(at + _LONGEST, stop)]
                coding, coded, lengths = self._stream(coder, stream)
                pieces += coded
                streams.append([coding, len(stream), *lengths])
        padding = -(-len(data) // MAX_EXPANSION) - sum(len(piece) for piece in pieces)
        if padding > 0:
            pieces.append(bytes(padding))
        return Encoded(tuple(pieces), {"version": list(coder.write_header()), "streams": streams})

    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        if params.keys() != {"version", "streams"} or spec.dtype not in DTYPES:
            raise _damaged(f"a version and streams of {', '.join(DTYPES)}", reprlib.repr(dict(params)))
        coder = _reader(params["version"])
        target = out.view(_little(spec))
        symbols = target
        if not (target.dtype.isnative and target.flags.aligned):
            symbols = np.empty(len(target), _native(spec))
        at = done = 0
        for coding, n, *lengths in _streams(params["streams"], len(symbols), len(payload)):
            stream = symbols[done : done + n]
            done += n
            if coding == "zeros":
                stream.fill(0)
            elif coding == "pco":
                at = _inflate(coder, payload, at, lengths[0], stream)
            else:
                at = _inflate_sparse(coder, payload, at, lengths, stream)
        if payload[at:].any():
            raise _damaged("nothing but zeros after the streams", "other bytes")
        if symbols is not target:
            target[:] = symbols

    def _stream(self, coder: FileCompressor, stream: Symbols) -> tuple[str, list[bytes], list[int]]:
        """Coding, pieces and lengths of the smallest form of one stream."""
        n_nonzero = int(np.count_nonzero(stream))
        if not n_nonzero:
            return "zeros", [], []
        n, large = len(stream), len(stream) >= _LARGE
        dense = sparse = None
        if n_nonzero * (2 if large else 1) <= n // _SPARSE:
            places = np.flatnonzero(stream)
            gaps = np.diff(places, prepend=-1) - 1
            sparse = [self._deflated(coder, gaps.astype(np.uint32)), self._deflated(coder, stream[places])]
        if sparse is None or not large:
            dense = self._deflated(coder, stream)
        if sparse and (dense is None or sum(map(len, sparse)) < len(dense)):
            return "sparse", sparse, [n_nonzero, *map(len, sparse)]
        assert dense is not None
        return "pco", [dense], [len(dense)]

    def _deflated(self, coder: FileCompressor, numbers: Symbols) -> bytes:
        config = ChunkConfig(
            compression_level=self.level,
            mode_spec=ModeSpec.classic(),
            delta_spec=DeltaSpec.no_op(),
            paging_spec=PagingSpec.exact_page_sizes([len(numbers)]),
            enable_8_bit=True,
        )
        chunk = coder.chunk_compressor(numbers, config)
        return bytes(chunk.write_meta() + chunk.write_page(0))


def _streams(table: Any, n_symbols: int, n_bytes: int) -> list[list[Any]]:
    """The table of streams, once it is known to describe `n_symbols` within `n_bytes`."""
    if not isinstance(table, list):
        raise _damaged("a list of streams", reprlib.repr(table))
    for entry in table:
        if not (
            isinstance(entry, list)
            and len(entry) >= 2
            and isinstance(entry[0], str)
            and len(entry) == 2 + _LENGTHS.get(entry[0], -3)
            and all(type(number) is int and number >= 0 for number in entry[1:])
            and 1 <= entry[1] <= _LONGEST
        ):
            raise _damaged(f"a stream coded {', '.join(_LENGTHS)}", reprlib.repr(entry))
        n_symbols -= entry[1]
        n_bytes -= sum(entry[2:] if entry[0] == "pco" else entry[3:])
        if n_symbols < 0 or n_bytes < 0 or (entry[0] == "sparse" and not 1 <= entry[2] <= entry[1] // _SPARSE):
            raise _damaged("streams that fill tensor and payload", reprlib.repr(entry))
    if n_symbols:
        raise _damaged("streams that fill the tensor", f"{n_symbols} symbols missing")
    return table


def _reader(version: Any) -> FileDecompressor:
    known = isinstance(version, list) and all(type(number) is int and 0 <= number < 256 for number in version)
    if not known or len(version) != 2 or version[0] != _MAJOR:
        raise _damaged(f"version {_MAJOR}.x of pco's format", reprlib.repr(version))
    return FileDecompressor.new(bytes(version))[0]


def _inflate(coder: FileDecompressor, payload: Bytes, at: int, n_bytes: int, out: Symbols) -> int:
    """Fills `out` from `n_bytes` of the payload at `at`; returns where they end."""
    piece = payload[at : at + n_bytes].tobytes()
    if not piece or piece[0]:
        # The low four bits are the mode, the others the delta coding; both may ask for memory as they like.
        raise _damaged("a pco chunk of the classic mode without delta coding", piece[:1].hex() or "nothing")
    dtype = f"{out.dtype.kind}{8 * out.itemsize}"
    try:
        chunk, n_meta = coder.chunk_decompressor(piece, dtype)
        progress, n_page = chunk.read_page_into(piece[n_meta:], len(out), out)
    except BaseException as error:
        if isinstance(error, RuntimeError) or type(error).__name__ == "PanicException":
            raise _damaged("a whole pco chunk", str(error)) from error
        raise
    if progress.n_processed != len(out) or not progress.finished or n_meta + n_page != n_bytes:
        found = f"{progress.n_processed} in {n_meta + n_page}"
        raise _damaged(f"a pco chunk of {len(out)} numbers in {n_bytes} bytes", found)
    return at + n_bytes


def _inflate_sparse(coder: FileDecompressor, payload: Bytes, at: int, lengths: list[int], out: Symbols) -> int:
    """The same for run lengths of zeros, then the symbols between them."""
    n_nonzero, gap_bytes, value_bytes = lengths
    gaps, values = np.empty(n_nonzero, np.uint32), np.empty(n_nonzero, out.dtype)
    at = _inflate(coder, payload, at, gap_bytes, gaps)
    at = _inflate(coder, payload, at, value_bytes, values)
    places = np.cumsum(gaps, dtype=np.int64)
    places += np.arange(n_nonzero)
    if places[-1] >= len(out):
        raise _damaged(f"run lengths within {len(out)} symbols", str(places[-1]))
    out.fill(0)
    out[places] = values
    return at


def _little(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype(f"<{spec.dtype[0].lower()}{spec.itemsize}")


def _native(spec: TensorSpec) -> np.dtype[Any]:
    return _little(spec).newbyteorder("=")


def _damaged(expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        "pco codec",
        expected=expected,
        found=f"{found:.200}",
        do="the file is damaged; use another copy of it",
    )
