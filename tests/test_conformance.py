"""Our codecs pass the published suites, and every test of these suites catches a codec that breaks its promise."""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from semq_state import codecs
from semq_state.codecs import (
    AbstractCodec,
    AbstractVectorCodec,
    Bits,
    Encoded,
    Neuqi,
    Pco,
    Planes,
    Raw,
    Rotated,
    Semq,
    Septq,
    Specquant,
    Symbolic,
    Symbols,
    Uniform,
)
from semq_state.content import Bytes, TensorSpec
from semq_state.errors import IntegrityError, UnsupportedModelError
from semq_state.testing import ByteCodecTests, VectorCodecTests, broken_promises

INTEGERS = ("I8", "U8", "I16")


class TestPlanes(ByteCodecTests):
    codec, other = Planes(), Planes(layout="channel")


class TestPlanesByChannel(ByteCodecTests):
    codec, other = Planes(layout="channel"), Planes()


class TestRaw(ByteCodecTests):
    codec = Raw()


class TestPco(ByteCodecTests):
    codec, other, dtypes = Pco(), Pco(level=2), INTEGERS


class TestBits(ByteCodecTests):
    codec, dtypes = Bits(), INTEGERS


class TestRotated(VectorCodecTests):
    codec, other, tolerance = Rotated(), Rotated(step=1.0, seed=4, centred=False), 0.102


class TestRotatedFinely(VectorCodecTests):
    codec, other = Rotated(step=2.0**-8, centred=False, seed=2**64 - 1), Rotated()
    tolerance = 0.00115


class TestRotatedCoarsely(VectorCodecTests):
    codec, other, tolerance = Rotated(step=16.0), Rotated(), 1.0


class TestRotatedToLevels(VectorCodecTests):
    codec, other, tolerance = Rotated(quantiser="lloyd-max", bits=3), Rotated(), 0.2


class TestRotatedToManyLevels(VectorCodecTests):
    codec, other, tolerance = Rotated(quantiser="lloyd-max", bits=8, centred=False), Rotated(), 0.01


class TestSemqQuant(VectorCodecTests):
    codec, other, tolerance = Semq(), Semq(parameter=4, centred=True), 0.105


class TestSemqQuantCentred(VectorCodecTests):
    codec, other, tolerance = Semq(parameter=64, c=4.0, centred=True), Semq(), 0.02


class TestSemqQuantScaled(VectorCodecTests):
    codec, other, tolerance = Semq(centred=True, scaled=True), Semq(centred=True), 0.105


class TestSemqPhase(VectorCodecTests):
    codec, other, tolerance = Semq(operator="phase"), Semq(operator="phase", parameter=32), 0.5
    dims = (4, 8, 64)


class TestSemqOrbit(VectorCodecTests):
    codec, other = Semq(operator="orbit"), Semq()
    dims = (1, 2, 7, 64)


class TestUniform(VectorCodecTests):
    codec, other, tolerance = Uniform(), Uniform(bits=8, symmetric=True), 0.1


class TestUniformByChannel(VectorCodecTests):
    codec, other, tolerance = Uniform(bits=2, along="channel", group=5), Uniform(), 0.27


class TestUniformSymmetric(VectorCodecTests):
    codec, other, tolerance = Uniform(bits=8, symmetric=True, group=7), Uniform(), 0.01


class TestNeuqi(VectorCodecTests):
    codec, other, tolerance = Neuqi(), Neuqi(bits=8, along="channel"), 0.175


class TestNeuqiByChannel(VectorCodecTests):
    codec, other, tolerance = Neuqi(bits=2, along="channel", group=5), Neuqi(), 0.2


class TestSeptq(VectorCodecTests):
    codec, other, tolerance = Septq(), Septq(bits=8, along="channel", share=0.0), 0.175


class TestSeptqByChannel(VectorCodecTests):
    codec, other, tolerance = Septq(bits=2, along="channel", group=5, share=0.3), Septq(), 0.2


class TestSpecquant(VectorCodecTests):
    codec, other, tolerance = Specquant(), Specquant(bits=8, along="channel", budget=0), 0.175


class TestSpecquantByChannel(VectorCodecTests):
    codec, other, tolerance = Specquant(bits=2, along="channel", group=5, share=0.1, budget=16), Specquant(), 0.2


# Byte codecs that break a promise


@dataclass(frozen=True)
class Keyed(AbstractCodec):
    """A codec that keeps every promise: each byte combined with a key."""

    id: ClassVar[str] = "keyed"
    key: int = 1

    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        return Encoded((data ^ np.uint8(self.key),), {"key": self.key, "n_bytes": len(data)})

    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        sound = params.keys() == {"key", "n_bytes"} and type(params["key"]) is int and 0 <= params["key"] < 256
        if not sound or type(params["n_bytes"]) is not int or {len(payload), len(out)} != {params["n_bytes"]}:
            raise IntegrityError("keyed codec", expected="a key and all bytes", found=f"{params!r:.80}")
        np.bitwise_xor(payload, np.uint8(params["key"]), out=out)


class TestKeyed(ByteCodecTests):
    codec, other = Keyed(), Keyed(key=3)


class OthersId(Keyed):
    id = "planes"


class LosesLastByte(Keyed):
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        cut = data.copy()
        cut[-1:] = 7
        return super().encode(cut, spec)


class ForgetsNans(Keyed):
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        kept = data.copy()
        if spec.dtype == "F32":
            kept.view("<f4")[np.isnan(kept.view("<f4"))] = np.nan
        return super().encode(kept, spec)


class GivesBytearrays(Keyed):
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        coded = super().encode(data, spec)
        return Encoded(tuple(map(bytearray, coded.pieces)), coded.params)


class Counts(Keyed):
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        made = vars(self).setdefault("made", [])
        made.append(spec)
        return Keyed(key=len(made) % 256).encode(data, spec)


class NumpyParams(Keyed):
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        return Encoded(super().encode(data, spec).pieces, {"key": np.int64(self.key), "n_bytes": len(data)})


class BytesInParams(Keyed):
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        coded = super().encode(data, spec)
        return Encoded(coded.pieces, {**coded.params, "more": b"bytes"})


class Deflates(Keyed):
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        return Encoded((zlib.compress(data),), {})


class WorksInPlace(Keyed):
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        data ^= np.uint8(self.key)
        return Encoded((data,), {"key": self.key, "n_bytes": len(data)})


class EmptiesParams(Keyed):
    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        super().decode(payload, params, spec, out)
        params.clear()


class KnowsItsKey(Keyed):
    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        super().decode(payload, {**params, "key": self.key}, spec, out)


class Remembers(Keyed):
    def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
        vars(self)["data"] = data
        time.sleep(1e-5)
        return super().encode(vars(self)["data"], spec)


class TrustsPayloads(Keyed):
    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        super().decode(np.zeros_like(out), params, spec, out)
        out[:] = payload ^ np.uint8(params["key"])


class WritesTooFar(Keyed):
    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        assert out.base is not None
        if len(payload) > len(out):
            out.base[-1] = 0
        super().decode(payload, params, spec, out)


class TrustsParams(Keyed):
    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        super().decode(payload, {"key": params["key"], "n_bytes": len(payload)}, spec, out)


class TakesMemory(Keyed):
    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        n_bytes = params.get("n_bytes")
        if type(n_bytes) is int and 0 <= n_bytes < 1 << 38:
            np.empty(n_bytes, np.uint8)
        super().decode(payload, params, spec, out)


class TrustsSpecs(Keyed):
    def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
        super().decode(payload, params, TensorSpec(spec.dtype, (len(payload),)), payload.copy())
        out[:] = payload ^ np.uint8(params["key"])


BYTE_CODECS: dict[type[Keyed], str] = {
    OthersId: "test_id_is_text_and_its_own",
    LosesLastByte: "test_every_bit_comes_back",
    ForgetsNans: "test_special_floats_come_back",
    GivesBytearrays: "test_pieces_are_flat_bytes",
    Counts: "test_same_bytes_every_time",
    NumpyParams: "test_params_are_plain_values",
    BytesInParams: "test_params_are_plain_values",
    Deflates: "test_payload_is_not_too_small",
    WorksInPlace: "test_arguments_are_not_changed",
    EmptiesParams: "test_arguments_are_not_changed",
    KnowsItsKey: "test_another_value_decodes",
    Remembers: "test_one_value_serves_threads",
    TrustsPayloads: "test_damaged_payloads_are_harmless",
    WritesTooFar: "test_damaged_payloads_are_harmless",
    TrustsParams: "test_damaged_params_are_harmless",
    TakesMemory: "test_damaged_params_are_harmless",
    TrustsSpecs: "test_other_specs_are_harmless",
}


@pytest.mark.parametrize("broken", BYTE_CODECS, ids=lambda broken: broken.__name__)
def test_broken_byte_codec_is_caught(broken: type[Keyed]) -> None:
    suite = type("Suite", (ByteCodecTests,), {"codec": broken(), "other": broken(key=3)})
    with pytest.raises(AssertionError):
        getattr(suite(), BYTE_CODECS[broken])()


def test_dtypes_that_are_not_declared_are_caught() -> None:
    suite = type("Suite", (ByteCodecTests,), {"codec": Keyed(), "other": Keyed(key=3), "dtypes": ("U8", "BF16")})
    assert list(broken_promises(suite)) == ["test_other_dtypes_are_refused"]


def test_state_that_does_not_come_back_is_caught() -> None:
    suite = type("Suite", (ByteCodecTests,), {"codec": LosesLastByte(), "other": LosesLastByte(key=3)})
    with pytest.raises(IntegrityError):
        suite().test_state_comes_back_from_a_file()


# Symbolic codecs that break one


@dataclass(frozen=True)
class Scaled(AbstractVectorCodec):
    """A codec that keeps every promise: each vector as `levels` parts of its largest number."""

    id: ClassVar[str] = "scaled"
    levels: int = 127

    def encode(self, values: torch.Tensor) -> Symbolic:
        scale = (
            torch.linalg.vector_norm(values, torch.inf, -1)
            if values.shape[-1]
            else values.new_zeros(values.shape[:-1])
        )
        made = (values / scale.masked_fill(scale == 0, 1)[..., None] * self.levels).round_().to(torch.int8)
        return Symbolic({"made": Symbols(made, -127, 127)}, {"scale": scale}, {"levels": self.levels})

    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        self.check(symbolic, shape)
        made, scale = symbolic.symbols["made"].values, symbolic.exact["scale"]
        return made.float() * scale[..., None] / symbolic.params["levels"]

    def check(self, symbolic: Symbolic, shape: tuple[int, ...]) -> None:
        levels, made, scale = (
            symbolic.params.get("levels"), symbolic.symbols.get("made"), symbolic.exact.get("scale"),
        )  # fmt: skip
        sound = (
            type(levels) is int and 0 < levels < 128 and len(symbolic.params) == 1
            and made is not None and made.values.dtype == torch.int8 and made.values.shape == shape
            and scale is not None and scale.dtype == torch.float32 and scale.shape == shape[:-1]
        )  # fmt: skip
        if not sound:
            raise IntegrityError("scaled codec", expected="symbols, a scale and levels", found="others")


class TestScaled(VectorCodecTests):
    codec, other, tolerance = Scaled(), Scaled(levels=9), 0.01


class SymbolicId(Scaled):
    id = "semq"


class NeedsValues(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        values.abs().amax(-1)
        return super().encode(values)


class SaysLess(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        coded = super().encode(values)
        return Symbolic({"made": Symbols(coded.symbols["made"].values, -120, 120)}, coded.exact, coded.params)


class WideSymbols(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        coded = super().encode(values)
        made = Symbols(coded.symbols["made"].values.int(), -127, 127)
        return Symbolic({"made": made}, coded.exact, coded.params)


class ComplexScale(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        coded = super().encode(values)
        exact = {**coded.exact, "more": torch.zeros(2, dtype=torch.complex64)}
        return Symbolic(coded.symbols, exact, coded.params)


class TensorParams(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        coded = super().encode(values)
        return Symbolic(coded.symbols, coded.exact, {**coded.params, "more": torch.ones(2)})


class HalfScale(Scaled):
    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        self.check(symbolic, shape)
        exact = {"scale": symbolic.exact["scale"].half().float()}
        return super().decode(Symbolic(symbolic.symbols, exact, symbolic.params), shape)


class ShiftsZeros(Scaled):
    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        return super().decode(symbolic, shape) + 0.001


class Coarse(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        return Scaled(levels=3).encode(values)


class Dithers(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        return super().encode(values * (1 - torch.rand(values.shape) / 300))


class TakesRandomNumbers(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        torch.rand(1)
        return super().encode(values)


class ScalesInPlace(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        return super().encode(values.mul_(2))


class ScalesPartsInPlace(Scaled):
    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        restored = super().decode(symbolic, shape)
        symbolic.exact["scale"].mul_(2)
        return restored


class KnowsItsLevels(Scaled):
    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        self.check(symbolic, shape)
        return super().decode(Symbolic(symbolic.symbols, symbolic.exact, {"levels": self.levels}), shape)


class TrustsParts(Scaled):
    def check(self, symbolic: Symbolic, shape: tuple[int, ...]) -> None:
        if symbolic.params.keys() != {"levels"} or type(symbolic.params["levels"]) is not int:
            raise IntegrityError("scaled codec")


class LooksUp(Scaled):
    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        self.check(symbolic, shape)
        parts = torch.arange(-127.0, 128.0) / symbolic.params["levels"]
        made = parts.index_select(0, symbolic.symbols["made"].values.int().flatten() + 127).view(shape)
        return made * symbolic.exact["scale"][..., None]


class TrustsLevels(Scaled):
    def check(self, symbolic: Symbolic, shape: tuple[int, ...]) -> None:
        super().check(Symbolic(symbolic.symbols, symbolic.exact, {"levels": 1}), shape)


class TrustsShapes(Scaled):
    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        return super().decode(symbolic, tuple(symbolic.symbols["made"].values.shape)).reshape(shape)


class GivesTheShapeItHas(Scaled):
    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        return super().decode(symbolic, tuple(symbolic.symbols["made"].values.shape))


class KeepsOriginals(Scaled):
    def encode(self, values: torch.Tensor) -> Symbolic:
        coded = super().encode(values)
        vars(self).setdefault("originals", []).append((coded.exact["scale"], values))
        return coded

    def decode(self, symbolic: Symbolic, shape: tuple[int, ...]) -> torch.Tensor:
        restored = super().decode(symbolic, shape)
        known = [values for scale, values in vars(self).get("originals", []) if scale is symbolic.exact["scale"]]
        return known[0] if known else restored


VECTOR_CODECS: dict[type[Scaled], str] = {
    SymbolicId: "test_id_is_text_and_its_own",
    NeedsValues: "test_every_shape_comes_back",
    SaysLess: "test_symbols_lie_in_their_alphabets",
    WideSymbols: "test_symbols_lie_in_their_alphabets",
    ComplexScale: "test_exact_tensors_can_be_written",
    TensorParams: "test_params_are_plain_values",
    HalfScale: "test_finite_at_every_magnitude",
    ShiftsZeros: "test_zeros_stay_zero",
    Coarse: "test_error_is_within_the_tolerance",
    Dithers: "test_same_symbols_every_time",
    TakesRandomNumbers: "test_same_symbols_every_time",
    ScalesInPlace: "test_arguments_are_not_changed",
    ScalesPartsInPlace: "test_arguments_are_not_changed",
    KnowsItsLevels: "test_another_value_decodes",
    TrustsParts: "test_damaged_parts_are_harmless",
    LooksUp: "test_damaged_parts_are_harmless",
    TrustsLevels: "test_damaged_params_are_harmless",
    TrustsShapes: "test_other_shapes_are_harmless",
    GivesTheShapeItHas: "test_other_shapes_are_harmless",
    KeepsOriginals: "test_state_comes_back_from_a_file",
}


@pytest.mark.parametrize("broken", VECTOR_CODECS, ids=lambda broken: broken.__name__)
def test_broken_symbolic_codec_is_caught(broken: type[Scaled]) -> None:
    suite = type("Suite", (VectorCodecTests,), {"codec": broken(), "other": broken(levels=9), "tolerance": 0.01})
    with pytest.raises((AssertionError, IndexError, UnsupportedModelError)):
        getattr(suite(), VECTOR_CODECS[broken])()


# The suites themselves


@pytest.mark.parametrize("suite", [ByteCodecTests, VectorCodecTests])
def test_every_test_of_a_suite_is_seen_to_fail(suite: type) -> None:
    elsewhere = {"test_other_dtypes_are_refused", "test_state_comes_back_from_a_file"}
    caught = set(BYTE_CODECS.values()) if suite is ByteCodecTests else set(VECTOR_CODECS.values())
    assert {name for name in dir(suite) if name.startswith("test_")} == caught | (elsewhere & set(dir(suite)))


def test_arguments_need_another_value() -> None:
    suite = type("Suite", (VectorCodecTests,), {"codec": Scaled(), "tolerance": 0.01})
    assert "set `other`" in str(broken_promises(suite)["test_another_value_decodes"])


def test_suites_leave_the_registries_as_they_were() -> None:
    before = dict(codecs.DECODERS), dict(codecs.VECTOR_DECODERS)
    TestKeyed().test_state_comes_back_from_a_file()
    assert not broken_promises(TestScaled)
    assert before == (codecs.DECODERS, codecs.VECTOR_DECODERS)


def test_suites_need_no_pytest() -> None:
    words = "import sys, semq_state.testing; assert not {'pytest', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
