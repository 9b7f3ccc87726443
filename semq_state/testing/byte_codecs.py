"""What every byte codec promises, as tests."""

from __future__ import annotations

import copy
import sys
import tempfile
import unittest
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from semq_state import codecs, files
from semq_state.codecs import MAX_EXPANSION, AbstractCodec
from semq_state.content import DTYPES, Bytes, TensorSpec
from semq_state.testing import damage
from semq_state.testing.running import as_in_a_file, check_id, decoders, little_memory, sound_or_refused
from semq_state.testing.states import SHAPES, contents, registered, small_state, specials, values_of

_GUARD = 64  # bytes around a decoder's output that it must leave alone
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class ByteCodecTests:
    """The suite for an `AbstractCodec`.

    Args:
        codec: the value under test.
        other: one of the same class with other arguments, where it takes any; it decodes what `codec` encodes.
        dtypes: what it takes, by safetensors' names.
    """

    codec: ClassVar[AbstractCodec]
    other: ClassVar[AbstractCodec | None] = None
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)

    def test_id_is_text_and_its_own(self) -> None:
        """The id is text, belongs to the class, and is no other codec's."""
        check_id(self.codec, {**codecs.VECTOR_DECODERS, **codecs.DECODERS})

    def test_every_bit_comes_back(self) -> None:
        """Any content of any dtype and shape comes back bit for bit, no values and one value among them."""
        for dtype in self.dtypes:
            for shape in SHAPES:
                spec = TensorSpec(dtype, shape)
                for words, data in contents(spec):
                    self._there_and_back(f"{words} in {spec}", data, spec)

    def test_special_floats_come_back(self) -> None:
        """Negative zeros, infinities, denormals and the payloads of NaNs are kept."""
        for dtype in set(self.dtypes) & set(_FLOATS):
            data = np.tile(specials(dtype), 40)
            n_values = len(data) // DTYPES[dtype].itemsize
            for shape in ((n_values,), (2, n_values // 2), (1, n_values // 4, 4)):
                self._there_and_back(f"special floats in {dtype} {shape}", data, TensorSpec(dtype, shape))

    def test_pieces_are_flat_bytes(self) -> None:
        """A payload comes in pieces of `bytes` or flat uint8 arrays, which is what is written."""
        for spec, data in self._samples():
            for piece in self.codec.encode(data.copy(), spec).pieces:
                flat = isinstance(piece, np.ndarray) and piece.dtype == np.uint8 and piece.ndim == 1
                assert isinstance(piece, bytes) or (flat and piece.flags.c_contiguous), (
                    f"{spec}: expected bytes or a flat uint8 array, found {type(piece).__name__}"
                )

    def test_same_bytes_every_time(self) -> None:
        """The same content gives the same payload and parameters, whatever was coded in between."""
        samples = list(self._samples())
        first = [self._encoded(data, spec) for spec, data in samples]
        for (spec, data), (payload, params) in reversed(list(zip(samples, first, strict=True))):
            again, found = self._encoded(data, spec)
            assert again.tobytes() == payload.tobytes(), f"{spec}: another payload the second time"
            assert found == params, f"{spec}: other parameters the second time"

    def test_params_are_plain_values(self) -> None:
        """Parameters go into a manifest and come out of it as they were."""
        for spec, data in self._samples():
            params = self.codec.encode(data.copy(), spec).params
            assert as_in_a_file(as_in_a_file(params)) == as_in_a_file(params)

    def test_payload_is_not_too_small(self) -> None:
        """A payload holds at least 1/256 of the bytes that it stands for."""
        for dtype in self.dtypes:
            for shape in ((1, 1, 700, 128), (1000,), (3,)):
                spec = TensorSpec(dtype, shape)
                for value in (0, 1):
                    data = np.full(spec.n_bytes, value, np.uint8)
                    n_bytes = self.codec.encode(data, spec).n_bytes
                    assert n_bytes * MAX_EXPANSION >= len(data), f"{spec}: {n_bytes} bytes for {len(data)}"

    def test_arguments_are_not_changed(self) -> None:
        """Neither the data of `encode`, which may be a live model's cache, nor what `decode` is given changes."""
        for spec, data in self._samples():
            given = data.copy()
            coded = self.codec.encode(given, spec)
            payload = np.frombuffer(b"".join(bytes(piece) for piece in coded.pieces), np.uint8).copy()
            assert given.tobytes() == data.tobytes(), f"{spec}: `encode` changed its data"
            params = as_in_a_file(coded.params)
            known = payload.copy(), copy.deepcopy(params)
            self.codec.decode(payload, params, spec, np.empty(spec.n_bytes, np.uint8))
            assert payload.tobytes() == known[0].tobytes(), f"{spec}: `decode` changed the payload"
            assert params == known[1], f"{spec}: `decode` changed the parameters"

    def test_another_value_decodes(self) -> None:
        """Decoding depends on payload and parameters alone: a file's reader has another value than its writer."""
        for decoder in decoders(self.codec, self.other, codecs.DECODERS):
            for spec, data in self._samples():
                payload, params = self._encoded(data, spec)
                assert _decoded(decoder, payload, params, spec) == data.tobytes(), f"{spec}: {decoder} differs"

    def test_one_value_serves_threads(self) -> None:
        """Threads use one value at a time, without a lock."""
        samples = [s for s in self._samples() if s[0].n_bytes][:8] * 2
        alone = [self._encoded(data, spec) for spec, data in samples]

        def work(i: int) -> None:
            for j in range(i, i + len(samples)):
                (spec, data), (payload, params) = samples[j % len(samples)], alone[j % len(samples)]
                found = self._encoded(data, spec)
                assert found[0].tobytes() == payload.tobytes() and found[1] == params, f"{spec}: threads disagree"
                back = _decoded(self.codec, payload, params, spec)
                assert back == data.tobytes(), f"{spec}: threads disagree"

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(work, range(8)))
        finally:
            sys.setswitchinterval(interval)

    def test_damaged_payloads_are_harmless(self) -> None:
        """Cut, longer or flipped payloads end in IntegrityError or in other content, never outside of `out`."""
        for spec, data in self._samples():
            payload, params = self._encoded(data, spec)
            for words, damaged in damage.payloads(payload):
                self._harmless(f"{spec}, {words}", damaged, params, spec)

    def test_damaged_params_are_harmless(self) -> None:
        """The same for parameters that are missing, too many, or of other types and values; no size in them is
        believed before memory is taken for it."""
        for spec, data in self._samples(shapes=((1, 2, 30, 16),)):
            payload, params = self._encoded(data, spec)
            with little_memory():
                for words, damaged in damage.params(params):
                    self._harmless(f"{spec}, {words}", payload, damaged, spec)

    def test_other_specs_are_harmless(self) -> None:
        """The same where a file claims another dtype or shape than was coded."""
        for spec, data in self._samples():
            payload, params = self._encoded(data, spec)
            for dtype in DTYPES:
                for shape in {spec.shape, (), (0,), (3, *spec.shape), (0, *spec.shape), spec.shape[1:]}:
                    other = TensorSpec(dtype, shape)
                    self._harmless(f"{spec} read as {other}", payload, params, other)

    def test_other_dtypes_are_refused(self) -> None:
        """`encode` refuses what it does not take, rather than write what cannot be read."""
        for dtype in set(DTYPES) - set(self.dtypes):
            spec = TensorSpec(dtype, (2, 3))
            try:
                self.codec.encode(np.zeros(spec.n_bytes, np.uint8), spec)
            except (ValueError, TypeError):
                continue
            raise AssertionError(f"expected a ValueError for {dtype}, found none")

    def test_state_comes_back_from_a_file(self) -> None:
        """A state that is saved with the codec is the state that it was."""
        if set(self.dtypes) != set(DTYPES):
            raise unittest.SkipTest("a codec of some dtypes only cannot take a whole state")
        snapshot = small_state()
        with tempfile.TemporaryDirectory() as folder, registered(self.other or self.codec):
            path = Path(folder) / "state.safetensors"
            exact = files.save(snapshot, path).state_id
            assert files.save(snapshot, path, codec=self.codec).state_id == exact
            first = path.read_bytes()
            loaded = files.load(path)
            files.save(loaded, path, codec=self.codec)
            assert path.read_bytes() == first, "another file the second time"
        assert loaded.state_id == exact and loaded.coding is None
        for name, tensor in snapshot.tensors().items():
            assert loaded.tensors()[name].equal(tensor), f"{name} has changed"

    def _samples(
        self, shapes: tuple[tuple[int, ...], ...] = ((1, 2, 90, 16), (), (2, 0, 8))
    ) -> Iterator[tuple[TensorSpec, Bytes]]:
        """A few contents of every dtype."""
        for i, dtype in enumerate(self.dtypes):
            for shape in shapes:
                spec = TensorSpec(dtype, shape)
                numbers = np.random.default_rng(i).normal(size=spec.n_bytes // spec.itemsize) * 3
                yield spec, values_of(spec, numbers)

    def _encoded(self, data: Bytes, spec: TensorSpec) -> tuple[Bytes, dict[str, Any]]:
        """Payload and parameters as they are read from a file."""
        coded = self.codec.encode(data.copy(), spec)
        payload = np.frombuffer(b"".join(bytes(piece) for piece in coded.pieces), np.uint8)
        return payload, as_in_a_file(coded.params)

    def _there_and_back(self, what: str, data: Bytes, spec: TensorSpec) -> None:
        payload, params = self._encoded(data, spec)
        assert _decoded(self.codec, payload, params, spec) == data.tobytes(), f"{what} did not come back"

    def _harmless(self, what: str, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec) -> None:
        given = copy.deepcopy(dict(params))
        sound_or_refused(what, lambda: _decoded(self.codec, payload, given, spec))


def _decoded(codec: AbstractCodec, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec) -> bytes:
    """The content, written between guards."""
    room = np.full(spec.n_bytes + 2 * _GUARD, 0xA5, np.uint8)
    out = room[_GUARD : _GUARD + spec.n_bytes]
    try:
        codec.decode(payload, params, spec, out)
    finally:
        guards = np.append(room[:_GUARD], room[_GUARD + spec.n_bytes :])
        assert (guards == 0xA5).all(), f"{spec}: written outside of `out`"
    return out.tobytes()
