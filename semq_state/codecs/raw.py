"""The raw codec: a tensor's bytes as they are, readable by every safetensors reader."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from semq_state.codecs.base import AbstractCodec, Encoded
from semq_state.content import Bytes, TensorSpec
from semq_state.errors import IntegrityError


@final
@dataclass(frozen=True)
class Raw(AbstractCodec):
    """No coding at all: each tensor is a plain safetensors tensor."""

    id: ClassVar[str] = "raw"

    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        return Encoded((data,), {})

    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        if len(payload) != len(out) or params:
            raise IntegrityError(
                "raw codec",
                expected=f"{len(out)} bytes and no parameters",
                found=f"{len(payload)} bytes and {reprlib.repr(dict(params)):.200}",
                do="the file is damaged; use another copy of it",
            )
        out[:] = payload
