"""Plain bit packing: every symbol in as many bits as the alphabet needs. For baselines, and readers without pco."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from semq_state.codecs.base import MAX_EXPANSION, AbstractCodec, Encoded
from semq_state.content import Bytes, TensorSpec
from semq_state.errors import IntegrityError

_BLOCK = 1 << 16  # symbols at a time; a multiple of 8, so that every block starts with a byte
_DTYPES: Mapping[str, str] = {"I8": "i1", "U8": "u1", "I16": "<i2"}


@final
@dataclass(frozen=True)
class Bits(AbstractCodec):
    """`symbol - lowest` in `width` bits each, least significant first, without gaps."""

    id: ClassVar[str] = "bits"

    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        if spec.dtype not in _DTYPES:
            raise ValueError(f"the dtype must be one of {', '.join(_DTYPES)}, got {spec.dtype!r}")
        symbols = data.view(_DTYPES[spec.dtype])
        lowest = int(symbols.min()) if len(symbols) else 0
        width = (int(symbols.max()) - lowest).bit_length() if len(symbols) else 0
        packed = np.zeros(max(-(-len(symbols) * width // 8), -(-len(data) // MAX_EXPANSION)), np.uint8)
        for at in range(0, len(symbols), _BLOCK):
            offsets = (symbols[at : at + _BLOCK].astype(np.int32) - lowest).astype("<u2")
            bits = np.unpackbits(offsets.view(np.uint8).reshape(-1, 2), axis=1, count=width, bitorder="little")
            block = np.packbits(bits, bitorder="little")
            packed[at * width // 8 :][: len(block)] = block
        return Encoded((packed,), {"lowest": lowest, "width": width})

    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        lowest, width = params.get("lowest"), params.get("width")
        if not (
            params.keys() == {"lowest", "width"}
            and spec.dtype in _DTYPES
            and type(lowest) is int
            and type(width) is int
            and -(1 << 15) <= lowest < 1 << 15
            and 0 <= width <= 8 * spec.itemsize
        ):
            raise _damaged(f"a lowest symbol and a width of {', '.join(_DTYPES)}", reprlib.repr(dict(params)))
        symbols = out.view(_DTYPES[spec.dtype])
        n_bytes = -(-len(symbols) * width // 8)
        if len(payload) < n_bytes or payload[n_bytes:].any():
            raise _damaged(f"{n_bytes} bytes and nothing but zeros after them", f"{len(payload)} bytes")
        info = np.iinfo(symbols.dtype)
        for at in range(0, len(symbols), _BLOCK):
            n = min(_BLOCK, len(symbols) - at)
            bits = np.unpackbits(payload[at * width // 8 :], count=n * width, bitorder="little").reshape(n, width)
            offsets = np.zeros((n, 2), np.uint8)
            offsets[:, : -(-width // 8)] = np.packbits(bits, axis=1, bitorder="little")
            block = offsets.view("<u2")[:, 0].astype(np.int32) + lowest
            if block.min() < info.min or block.max() > info.max:
                raise _damaged(f"symbols of {spec.dtype}", "others")
            symbols[at : at + n] = block


def _damaged(expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        "bits codec", expected=expected, found=f"{found:.200}", do="the file is damaged; use another copy of it"
    )
