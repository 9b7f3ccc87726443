"""Running a suite without pytest, and the checks that both suites share."""

from __future__ import annotations

import contextlib
import tracemalloc
import unittest
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgpack

from semq_state import content
from semq_state.codecs import AbstractCodec, AbstractVectorCodec
from semq_state.errors import IntegrityError

_LITTLE = 64 << 20

_T = TypeVar("_T")
_Codec = TypeVar("_Codec", AbstractCodec, AbstractVectorCodec)


def broken_promises(suite: type) -> dict[str, Exception]:
    """Runs a suite.

    Args:
        suite: a subclass of `ByteCodecTests` or `VectorCodecTests`.

    Returns:
        The name of each test that failed, and how. Empty where the codec keeps every promise.
    """
    found: dict[str, Exception] = {}
    for name in sorted(dir(suite)):
        if name.startswith("test_"):
            try:
                getattr(suite(), name)()
            except unittest.SkipTest:
                pass
            except Exception as error:
                found[name] = error
    return found


def sound_or_refused(what: str, decode: Callable[[], _T]) -> _T | None:
    """What `decode` makes of damage, or None where it refuses it in the one way that is allowed."""
    try:
        return decode()
    except IntegrityError:
        return None
    except (AssertionError, KeyboardInterrupt):
        raise
    except BaseException as error:
        # Panics of Rust's extension modules are no `Exception`s.
        words = f"{what}: expected IntegrityError, found {type(error).__name__}: {error}"
        raise AssertionError(words) from error


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Refuses code that takes more than 64 MiB at a time, as far as Python and numpy know of it."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < _LITTLE, f"damage took {peak:,} bytes of memory"


def as_in_a_file(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as a manifest gives them back: packed and unpacked, tuples as lists.

    Raises:
        AssertionError: they hold something else than text, numbers, booleans, None, lists and tables of these.
    """
    try:
        found = msgpack.unpackb(content.pack(params), raw=False, strict_map_key=True, max_ext_len=0)
    except (TypeError, ValueError, OverflowError) as error:
        raise AssertionError(f"params {dict(params)!r:.200} do not fit in a manifest: {error}") from error
    assert isinstance(found, dict) and _is_plain(found), f"params {dict(params)!r:.200} are not all plain values"
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def check_id(codec: AbstractCodec | AbstractVectorCodec, table: Mapping[str, object]) -> None:
    """Refuses an id that cannot stand in a file, or that is another codec's."""
    assert type(codec.id) is str and codec.id, f"expected an id of text, found {codec.id!r}"
    assert type(codec).id == codec.id, "an id belongs to the class, the same for all its values"
    known = table.get(codec.id)
    assert known is None or type(known) is type(codec), f"id {codec.id!r} is taken by {known!r}"


def decoders(codec: _Codec, other: _Codec | None, table: Mapping[str, _Codec]) -> list[_Codec]:
    """The values that must decode what `codec` encodes: whoever reads a file has another one than its writer."""
    found = [value for value in (other, table.get(codec.id)) if value is not None]
    assert all(type(value) is type(codec) for value in found), "`other` must be of the same class as `codec`"
    if getattr(codec, "__dict__", None):
        told = "set `other` to a value of this class with other arguments: files are not decoded by their writer's"
        assert any(value != codec for value in found), told
    return found or [codec]
