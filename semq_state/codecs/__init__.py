"""Codecs: a tensor's bytes to a payload and back. One codec a file, one registry of ids."""

from __future__ import annotations

from semq_state.codecs.base import MAX_EXPANSION as MAX_EXPANSION
from semq_state.codecs.base import AbstractCodec as AbstractCodec
from semq_state.codecs.base import Encoded as Encoded
from semq_state.codecs.planes import Planes as Planes
from semq_state.codecs.raw import Raw as Raw
from semq_state.errors import UnknownCodecError

DECODERS: dict[str, AbstractCodec] = {
    Planes.id: Planes(),
    Raw.id: Raw(),
}
"""What a file's codec id means."""

PRESETS: dict[str, AbstractCodec] = {
    "exact": Planes(),
    "exact-max": Planes(layout="channel"),
    "raw": Raw(),
}
"""The words that `sq.save(codec=…)` and the command line take."""


def register(codec: AbstractCodec) -> None:
    """Makes files that name `codec.id` readable. A taken id is refused.

    Raises:
        ValueError: the id is taken.
    """
    if codec.id in DECODERS:
        raise ValueError(f"codec id {codec.id!r} is taken by {DECODERS[codec.id]!r}")
    DECODERS[codec.id] = codec


def decoder(codec_id: str) -> AbstractCodec:
    """The codec that decodes `codec_id`.

    Raises:
        UnknownCodecError: no such id is registered.
    """
    if codec_id not in DECODERS:
        raise UnknownCodecError(
            "codec",
            expected=f"one of {', '.join(sorted(DECODERS))}",
            found=f"{codec_id!r:.80}",
            do="install a newer semq_state, or register the codec with semq_state.codecs.register",
        )
    return DECODERS[codec_id]


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
