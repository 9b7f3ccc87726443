"""What every symbolic codec promises, as tests."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch

from semq_state import codecs, files
from semq_state.codecs import AbstractVectorCodec, Symbolic
from semq_state.content import DTYPES
from semq_state.snapshot import SectionError
from semq_state.symbolic import Policy
from semq_state.testing import damage
from semq_state.testing.running import as_in_a_file, check_id, decoders, sound_or_refused
from semq_state.testing.states import gaussian, registered, small_state

_INTEGERS = (torch.int8, torch.uint8, torch.int16)
_MAGNITUDES = (1e-30, 1e-12, 1e-5, 1.0, 7e4, 1e12, 1e30)


class VectorCodecTests:
    """The suite for an `AbstractVectorCodec`.

    Args:
        codec: the value under test.
        other: one of the same class with other arguments, where it takes any; it decodes what `codec` encodes.
        tolerance: the largest relative error, norm over norm, on Gaussian vectors of the last of `dims`; None for
            no promise.
        dims: vector lengths that it takes.
    """

    codec: ClassVar[AbstractVectorCodec]
    other: ClassVar[AbstractVectorCodec | None] = None
    tolerance: ClassVar[float | None] = None
    dims: ClassVar[tuple[int, ...]] = (1, 2, 7, 8, 64)

    def test_id_is_text_and_its_own(self) -> None:
        """The id is text, belongs to the class, and is no other codec's."""
        check_id(self.codec, {**codecs.DECODERS, codecs.Transform.id: codecs.Transform, **codecs.VECTOR_DECODERS})

    def test_every_shape_comes_back(self) -> None:
        """`(…, seq, dim)` with any leading axes, any of them 0, comes back as finite float32 of the same shape."""
        for dim in (0, *self.dims):
            for shape in ((5, dim), (1, dim), (0, dim), (3, 9, dim), (2, 1, 3, 4, dim), (0, 3, dim), (2, 0, dim)):
                self._restored(gaussian(*shape))

    def test_symbols_lie_in_their_alphabets(self) -> None:
        """Symbols are int8, uint8 or int16 between the two bounds that are declared for them."""
        for values in self._samples():
            symbolic = self.codec.encode(values.clone())
            assert symbolic.symbols, "no symbols"
            for name, symbols in symbolic.symbols.items():
                made, bounds = symbols.values, (symbols.lowest, symbols.highest)
                assert type(name) is str and made.dtype in _INTEGERS, f"{name!r}: {made.dtype}"
                assert all(type(n) is int and abs(n) < 1 << 15 for n in bounds), f"{name!r}: bounds {bounds}"
                assert bounds[0] <= bounds[1], f"{name!r}: bounds {bounds}"
                if made.numel():
                    found = int(made.min()), int(made.max())
                    assert bounds[0] <= found[0] and found[1] <= bounds[1], f"{name!r}: {found} not in {bounds}"

    def test_exact_tensors_can_be_written(self) -> None:
        """Exact tensors have dtypes that a file can hold, and lie in plain memory on the CPU."""
        for values in self._samples():
            for name, tensor in self.codec.encode(values.clone()).exact.items():
                assert type(name) is str and isinstance(tensor, torch.Tensor), f"{name!r}: {type(tensor)}"
                plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.requires_grad
                assert tensor.dtype in DTYPES.values() and plain, f"{name!r}: {tensor.dtype}, {tensor.device}"

    def test_params_are_plain_values(self) -> None:
        """Parameters go into a manifest and come out of it, and decode to the same bits from there."""
        for values in self._samples():
            symbolic, shape = self.codec.encode(values.clone()), tuple(values.shape)
            told = dataclasses.replace(symbolic, params=as_in_a_file(symbolic.params))
            assert self.codec.decode(told, shape).equal(self.codec.decode(symbolic, shape))

    def test_finite_at_every_magnitude(self) -> None:
        """Finite vectors of any size, together or apart, give finite vectors."""
        for dim in self.dims:
            for magnitude in _MAGNITUDES:
                self._restored(gaussian(2, 6, dim) * magnitude)
                self._restored(torch.full((2, 6, dim), magnitude))
            sizes = torch.tensor(_MAGNITUDES)[:, None]
            self._restored(gaussian(2, len(sizes), dim) * sizes)

    def test_zeros_stay_zero(self) -> None:
        """Zeros come back as zeros; among others, a vector of zeros within the tolerance."""
        dim = self.dims[-1]
        for shape in ((5, dim), (2, 3, 4, dim)):
            zeros = self._restored(torch.zeros(shape))
            assert float(zeros.abs().max()) <= 1e-6, f"zeros became {float(zeros.abs().max())}"
        if self.tolerance is not None:
            values = gaussian(2, 32, dim)
            values[:, 3] = 0
            worst = float(self._restored(values)[:, 3].norm(dim=-1).max()) / dim**0.5
            assert worst <= self.tolerance, f"a vector of zeros became one of {worst} of the others' norm"

    def test_error_is_within_the_tolerance(self) -> None:
        """On Gaussian vectors the relative error is no larger than the codec says."""
        if self.tolerance is not None:
            values = gaussian(2, 3, 128, self.dims[-1])
            error = float((self._restored(values) - values).norm() / values.norm())
            assert error <= self.tolerance, f"expected an error of at most {self.tolerance}, found {error}"

    def test_same_symbols_every_time(self) -> None:
        """The same vectors give the same symbols, and torch's random state is neither used nor changed."""
        values, between = gaussian(2, 3, 12, self.dims[-1]), gaussian(1, 4, self.dims[-1], seed=1)
        with torch.random.fork_rng(devices=[]):
            state = torch.manual_seed(1).get_state()
            first = self.codec.encode(values.clone())
            restored = self.codec.decode(first, tuple(values.shape))
            assert torch.get_rng_state().equal(state), "torch's random state was used"
            self.codec.encode(between)
            torch.manual_seed(2)
            second = self.codec.encode(values.clone())
            again = self.codec.decode(first, tuple(values.shape))
            assert again.equal(restored), "other vectors the second time"
        assert _same(first, second), "other symbols, exact tensors or parameters the second time"

    def test_arguments_are_not_changed(self) -> None:
        """Neither the vectors of `encode` nor the parts that `decode` is given change."""
        for values in self._samples():
            given = values.clone()
            symbolic = self.codec.encode(given)
            assert given.equal(values), "`encode` changed its vectors"
            known = copy.deepcopy(symbolic)
            self.codec.decode(symbolic, tuple(values.shape)).add_(1)
            assert _same(symbolic, known), "`decode` changed what it was given, or returned it"

    def test_another_value_decodes(self) -> None:
        """Decoding depends on what was encoded alone: a file's reader has another value than its writer."""
        for decoder in decoders(self.codec, self.other, codecs.VECTOR_DECODERS):
            for values in self._samples():
                symbolic, shape = self.codec.encode(values.clone()), tuple(values.shape)
                expected = self.codec.decode(symbolic, shape)
                assert decoder.decode(symbolic, shape).equal(expected), f"{decoder} decodes otherwise"

    def test_damaged_parts_are_harmless(self) -> None:
        """Names, dtypes, shapes, alphabets and numbers that it never made end in IntegrityError, or in vectors."""
        for values in self._hostile():
            for words, damaged in damage.symbolics(self.codec.encode(values)):
                self._harmless(words, damaged, tuple(values.shape))

    def test_damaged_params_are_harmless(self) -> None:
        """The same for parameters that are missing, too many, or of other types and values."""
        for values in self._hostile():
            symbolic = self.codec.encode(values)
            for words, params in damage.params(as_in_a_file(symbolic.params)):
                damaged = dataclasses.replace(symbolic, params=copy.deepcopy(params))
                self._harmless(words, damaged, tuple(values.shape))

    def test_other_shapes_are_harmless(self) -> None:
        """The same where a file claims another shape than was coded, one beyond all memory among them."""
        for values in self._hostile():
            symbolic, (rows, tokens, dim) = self.codec.encode(values), values.shape
            shapes = [(), (dim,), (tokens, dim), (1, rows, tokens, dim), (rows, dim, tokens), (0, tokens, dim)]
            shapes += [(rows, tokens, 0), (rows, tokens + 1, dim), (rows, tokens, dim + 1), (rows, tokens, 1 << 20)]
            for shape in (*shapes, (rows, 1 << 40, dim), (1 << 40, tokens, dim), (rows, tokens, 1 << 40)):
                if shape != tuple(values.shape):
                    self._harmless(f"read as {shape}", symbolic, shape)

    def test_state_comes_back_from_a_file(self) -> None:
        """A state that is saved with the codec names it, and what it says of its errors is so."""
        snapshot = small_state(self.dims[-1])
        with tempfile.TemporaryDirectory() as folder, registered(self.other or self.codec):
            path = Path(folder) / "state.safetensors"
            info = files.save(snapshot, path, codec=self.codec)
            first, loaded = path.read_bytes(), files.load(path)
            files.save(snapshot, path, codec=self.codec)
            assert path.read_bytes() == first, "another file the second time"
        assert loaded.state_id == info.state_id and loaded.coding is not None
        named = [loaded.coding.codec, loaded.coding.picked["keys"], loaded.coding.picked["values"]]
        assert named == [self.codec.id] * 3, f"expected {self.codec.id!r}, found {named}"
        caches, n_sinks = snapshot.cache.tensors(), Policy().n_sinks
        assert loaded.coding.errors.keys() == caches.keys()
        for name, tensor in caches.items():
            found = loaded.tensors()[name]
            assert found[..., :n_sinks, :].equal(tensor[..., :n_sinks, :]), f"{name}: the first tokens have changed"
            told = loaded.coding.errors[name]
            is_so = _error(tensor[..., n_sinks:, :], found[..., n_sinks:, :])
            close = abs(told.relative - is_so.relative) <= 1e-4 and abs(told.cosine - is_so.cosine) <= 1e-4
            assert close, f"{name}: expected {told}, found {is_so}"

    def _samples(self) -> Iterator[torch.Tensor]:
        for dim in self.dims:
            yield gaussian(2, 3, 12, dim)
            yield gaussian(1, 7, dim) * torch.tensor(_MAGNITUDES)[:, None]
        yield gaussian(2, 0, self.dims[-1])

    def _hostile(self) -> Iterator[torch.Tensor]:
        yield from (gaussian(2, 6, dim) for dim in {self.dims[0], self.dims[-1]})

    def _restored(self, values: torch.Tensor) -> torch.Tensor:
        restored = self.codec.decode(self.codec.encode(values.clone()), tuple(values.shape))
        _check_vectors("decoded vectors", restored, tuple(values.shape))
        assert restored.isfinite().all(), f"finite vectors {tuple(values.shape)} came back as NaN or infinity"
        return restored

    def _harmless(self, what: str, symbolic: Symbolic, shape: tuple[int, ...]) -> None:
        found = sound_or_refused(what, lambda: self.codec.decode(symbolic, shape))
        if found is not None:
            _check_vectors(what, found, shape)


def _check_vectors(what: str, found: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert found.dtype == torch.float32, f"{what}: expected float32, found {found.dtype}"
    assert tuple(found.shape) == shape, f"{what}: expected {shape}, found {tuple(found.shape)}"


def _same(a: Symbolic, b: Symbolic) -> bool:
    """Whether two encodings are the same to the bit."""
    if list(a.symbols) != list(b.symbols) or list(a.exact) != list(b.exact) or dict(a.params) != dict(b.params):
        return False
    symbols = list(zip(a.symbols.values(), b.symbols.values(), strict=True))
    pairs = [(x.values, y.values) for x, y in symbols]
    pairs += list(zip(a.exact.values(), b.exact.values(), strict=True))
    alike = all((x.lowest, x.highest) == (y.lowest, y.highest) for x, y in symbols)
    return alike and all(x.dtype == y.dtype and x.equal(y) for x, y in pairs)


def _error(values: torch.Tensor, restored: torch.Tensor) -> SectionError:
    a, b = values.flatten().double(), restored.flatten().double()
    return SectionError(float((a - b).norm() / a.norm()), float(torch.cosine_similarity(a, b, dim=0)))
