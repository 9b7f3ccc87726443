"""Codecs: a tensor's bytes to a payload and back. One codec a file, one registry of ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from semq_state.codecs.base import MAX_EXPANSION as MAX_EXPANSION
from semq_state.codecs.base import AbstractCodec as AbstractCodec
from semq_state.codecs.base import Encoded as Encoded
from semq_state.codecs.entropy import Bits as Bits
from semq_state.codecs.entropy import Pco as Pco
from semq_state.codecs.neuqi import Neuqi as Neuqi
from semq_state.codecs.planes import Planes as Planes
from semq_state.codecs.raw import Raw as Raw
from semq_state.codecs.rotated import Rotated as Rotated
from semq_state.codecs.semq import Semq as Semq
from semq_state.codecs.septq import Septq as Septq
from semq_state.codecs.specquant import Specquant as Specquant
from semq_state.codecs.symbolic import AbstractVectorCodec as AbstractVectorCodec
from semq_state.codecs.symbolic import AbstractWeightedCodec as AbstractWeightedCodec
from semq_state.codecs.symbolic import Symbolic as Symbolic
from semq_state.codecs.symbolic import Symbols as Symbols
from semq_state.codecs.transform import Transform as Transform
from semq_state.codecs.uniform import Uniform as Uniform
from semq_state.errors import UnknownCodecError

_T = TypeVar("_T")

DECODERS: dict[str, AbstractCodec] = {
    Planes.id: Planes(),
    Raw.id: Raw(),
    Pco.id: Pco(),
    Bits.id: Bits(),
}
"""What a file's codec id means: bytes to bytes."""

VECTOR_DECODERS: dict[str, AbstractVectorCodec] = {
    Neuqi.id: Neuqi(),
    Rotated.id: Rotated(),
    Semq.id: Semq(),
    Septq.id: Septq(),
    Specquant.id: Specquant(),
    Uniform.id: Uniform(),
}
"""What the codec id of a group of symbols means; `transform`, which needs a calibration, stands apart."""

PRESETS: dict[str, AbstractCodec] = {
    "exact": Planes(),
    "exact-max": Planes(layout="channel"),
    "raw": Raw(),
}
"""The words that `sq.save(codec=…)` and the command line take."""


def register(codec: AbstractCodec | AbstractVectorCodec) -> None:
    """Makes files that name `codec.id` readable. A taken id is refused.

    `semq_state.testing` holds what a codec must pass first.

    Raises:
        ValueError: the id is taken.
    """
    taken = {**DECODERS, **VECTOR_DECODERS, Transform.id: Transform}
    if codec.id in taken:
        raise ValueError(f"codec id {codec.id!r} is taken by {taken[codec.id]!r}")
    if isinstance(codec, AbstractCodec):
        DECODERS[codec.id] = codec
    else:
        VECTOR_DECODERS[codec.id] = codec


def decoder(codec_id: str) -> AbstractCodec:
    """The codec that decodes `codec_id`.

    Raises:
        UnknownCodecError: no such id is registered.
    """
    return _known(codec_id, DECODERS)


def vector_decoder(codec_id: str) -> AbstractVectorCodec:
    """The symbolic codec that decodes `codec_id`.

    Raises:
        UnknownCodecError: no such id is registered.
    """
    return _known(codec_id, VECTOR_DECODERS)


def _known(codec_id: str, table: Mapping[str, _T]) -> _T:
    if codec_id not in table:
        raise UnknownCodecError(
            "codec",
            expected=f"one of {', '.join(sorted(table))}",
            found=f"{codec_id!r:.80}",
            do="install a newer semq_state, or register the codec with semq_state.codecs.register",
        )
    return table[codec_id]


def preset(codec: str | AbstractCodec) -> AbstractCodec:
    """A codec by its preset's name; a codec value is returned as it is.

    Raises:
        UnknownCodecError: no such preset.
    """
    if isinstance(codec, AbstractCodec):
        return codec
    if codec not in PRESETS:
        raise UnknownCodecError(
            "codec",
            expected=f"one of {', '.join(PRESETS)}, or a codec value",
            found=f"{codec!r:.80}",
            do="choose one",
        )
    return PRESETS[codec]
