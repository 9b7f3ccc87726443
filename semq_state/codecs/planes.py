"""The exact codec: byte planes, each entropy coded with zstandard where that pays, else stored as it is.

The top byte of a float holds its sign and most of its exponent and is worth coding; mantissa bytes are noise.
Zstandard is told to look for (almost) no matches, which leaves its Huffman coder alone with the plane: on KV
caches that is smaller *and* faster in both directions than any of its stock levels
(`benchmarks/results/exact.md`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import zstandard

from semq_state.codecs.base import MAX_EXPANSION, AbstractCodec, Encoded
from semq_state.content import Bytes, TensorSpec
from semq_state.errors import IntegrityError

LAYOUTS = ("token", "channel")

_BLOCK = 1 << 18  # values joined at a time, so that a block stays in the cache
_SAMPLE = 16  # slices that decide whether a plane is worth coding
_SLICE = 8 << 10


@final
@dataclass(frozen=True)
class Planes(AbstractCodec):
    """Byte planes and zstandard: lossless for every dtype.

    Args:
        layout: `token` keeps the order of the values (fast); `channel` lays the tokens of one channel side by
            side before coding (a little smaller, slower to load) where that pays: values often do not gain.
    """

    id: ClassVar[str] = "planes"
    layout: str = "token"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"`layout` must be one of {LAYOUTS}, got {self.layout!r}")

    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        pieces: list[bytes | Bytes] = []
        planes: list[list[Any]] = []
        layout = self.layout
        coder = zstandard.ZstdCompressor(compression_params=_parameters(layout))
        for plane in _split(data, spec.itemsize):
            coded = b""
            if _worth_coding(coder, plane):
                coded = coder.compress(_turned(plane, spec, layout).data)
                if layout == "channel" and all(coding == "raw" for coding, _ in planes):
                    in_order = zstandard.ZstdCompressor(compression_params=_parameters("token"))
                    other = in_order.compress(plane.data)
                    if len(other) < len(coded):
                        layout, coder, coded = "token", in_order, other
            if coded and len(coded) < len(plane):
                planes.append(["zstd", len(coded)])
                pieces.append(coded)
            else:
                planes.append(["raw", len(plane)])
                pieces.append(plane)
        padding = -(-len(data) // MAX_EXPANSION) - sum(len(piece) for piece in pieces)
        if padding > 0:
            pieces.append(bytes(padding))
        return Encoded(tuple(pieces), {"layout": layout, "planes": planes})

    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        layout, table = params.get("layout"), params.get("planes")
        n_values = len(out) // spec.itemsize
        if (
            params.keys() != {"layout", "planes"}
            or layout not in LAYOUTS
            or not isinstance(table, list)
            or len(table) != spec.itemsize
        ):
            raise _damaged(f"a layout of {LAYOUTS} and {spec.itemsize} planes", reprlib.repr(dict(params)))
        planes, at = [], 0
        for entry in table:
            if not (
                isinstance(entry, list)
                and len(entry) == 2
                and type(entry[1]) is int
                and 0 <= entry[1] <= len(payload) - at
            ):
                raise _damaged("a plane that lies within the payload", reprlib.repr(entry))
            coding, n_bytes = entry
            piece = payload[at : at + n_bytes]
            at += n_bytes
            if coding == "zstd":
                piece = _turned_back(_inflated(piece, n_values), spec, layout)
            elif coding != "raw":
                raise _damaged("a plane coded `raw` or `zstd`", reprlib.repr(coding))
            if piece.size != n_values:
                raise _damaged(f"{n_values} bytes in a plane", str(piece.size))
            planes.append(piece)
        if payload[at:].any():
            raise _damaged("nothing but zeros after the planes", "other bytes")
        _join(planes, out)


def _parameters(layout: str) -> zstandard.ZstdCompressionParameters:
    # Matches of at least 7 bytes through a table of 64 entries are next to never found, so zstandard's
    # Huffman stage codes the bytes themselves. A channel's statistics hold for a short run only, hence the
    # smaller window (which also bounds the size of a block) there.
    return zstandard.ZstdCompressionParameters(
        window_log=15 if layout == "channel" else 17,
        chain_log=6,
        hash_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        strategy=zstandard.STRATEGY_FAST,
    )


def _split(data: Bytes, itemsize: int) -> list[Bytes]:
    """One array per byte of a value, most significant first."""
    if itemsize == 1:
        return [data]
    if itemsize == 2:
        values = data.view("<u2")
        return [(values >> 8).astype(np.uint8), values.astype(np.uint8)]
    columns = data.reshape(-1, itemsize)
    return [np.ascontiguousarray(columns[:, i]) for i in reversed(range(itemsize))]


def _join(planes: list[Bytes], out: Bytes) -> None:
    """The inverse of `_split`; planes may be views of any shape that hold the values in their order."""
    if len(planes) == 2 and planes[0].ndim == planes[1].ndim == 1:
        values = out.view("<u2")
        for at in range(0, len(values), _BLOCK):
            block, joined = slice(at, at + _BLOCK), values[at : at + _BLOCK]
            np.multiply(planes[0][block], 256, out=joined, dtype=np.uint16)
            np.bitwise_or(joined, planes[1][block], out=joined)
    else:
        for i, plane in enumerate(reversed(planes)):
            out.reshape(*plane.shape, len(planes))[..., i] = plane


def _turned(plane: Bytes, spec: TensorSpec, layout: str) -> Bytes:
    """The plane in the order in which it is coded."""
    if layout == "token" or len(spec.shape) < 2:
        return plane
    return np.ascontiguousarray(plane.reshape(-1, *spec.shape[-2:]).transpose(0, 2, 1)).reshape(-1)


def _turned_back(plane: Bytes, spec: TensorSpec, layout: str) -> Bytes:
    """The inverse of `_turned`: a view, so that the values are moved once only, when planes are joined."""
    if layout == "token" or len(spec.shape) < 2 or not len(plane):
        return plane
    tokens, channels = spec.shape[-2:]
    return plane.reshape(-1, channels, tokens).transpose(0, 2, 1)


def _worth_coding(coder: zstandard.ZstdCompressor, plane: Bytes) -> bool:
    """Whether slices from all over the plane shrink by more than 1/64."""
    if len(plane) <= 64:
        return False
    if len(plane) > _SAMPLE * _SLICE:
        starts = np.linspace(0, len(plane) - _SLICE, _SAMPLE).astype(int)
        plane = np.concatenate([plane[start : start + _SLICE] for start in starts])
    return len(coder.compress(plane.data)) < len(plane) * 63 // 64


def _inflated(piece: Bytes, n_bytes: int) -> Bytes:
    try:
        # zstandard trusts the frame's own size over the caller's limit, so it is compared first.
        declared = zstandard.frame_content_size(piece.data)
        if declared != n_bytes:
            raise _damaged(f"a zstd frame of {n_bytes} bytes", f"one that declares {declared}")
        inflated = zstandard.ZstdDecompressor().decompress(piece.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _damaged("a whole zstd frame", str(error)) from error
    return np.frombuffer(inflated, np.uint8)


def _damaged(expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        "planes codec",
        expected=expected,
        found=f"{found:.200}",
        do="the file is damaged; use another copy of it",
    )
