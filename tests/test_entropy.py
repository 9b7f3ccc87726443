"""Entropy coders: every symbol comes back, near the entropy, and what is damaged or hostile is refused."""

from __future__ import annotations

import copy
import tracemalloc
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semq_state.codecs import MAX_EXPANSION, AbstractCodec
from semq_state.codecs.entropy import Bits, Pco, pco
from semq_state.codecs.entropy.streams import cuts
from semq_state.content import Bytes, TensorSpec
from semq_state.errors import IntegrityError

DTYPES = {"I8": np.int8, "U8": np.uint8, "I16": np.int16}
SHAPES = [(), (1,), (7,), (0,), (0, 4), (4, 0), (2, 0, 3), (1, 1), (257,), (3, 2, 37, 5), (40, 300), (700, 3)]
Array = np.ndarray[Any, Any]
Params = dict[str, Any]

each_codec = pytest.mark.parametrize("codec", [Pco(), Bits()], ids=["pco", "bits"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def round_trip(codec: AbstractCodec, symbols: Array) -> tuple[Bytes, Params]:
    """Codes and decodes; the payload and its parameters."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    spec, data = TensorSpec(names[symbols.dtype], symbols.shape), symbols.reshape(-1).view(np.uint8)
    coded = codec.encode(data, spec)
    payload = np.frombuffer(b"".join(bytes(piece) for piece in coded.pieces), np.uint8)
    assert coded.n_bytes == len(payload) >= len(data) / MAX_EXPANSION
    assert decoded(codec, payload, dict(coded.params), spec) == data.tobytes()
    return payload, dict(coded.params)


def decoded(codec: AbstractCodec, payload: Bytes, params: Params, spec: TensorSpec) -> bytes:
    out = np.full(spec.n_bytes, 0xA5, np.uint8)
    codec.decode(payload, params, spec, out)
    return out.tobytes()


def coefficients(rows: int, tokens: int, dtype: type[Any] = np.int16, seed: int = 0) -> Array:
    """Symbols of a transform: the spread of the rows falls from 30 to 0.05."""
    values = np.random.default_rng(seed).laplace(size=(rows, tokens)) * np.geomspace(30, 0.05, rows)[:, None]
    return (np.sign(values) * np.floor(np.abs(values) + 0.45)).clip(-128, 127).astype(dtype)


def entropy_bytes(symbols: Array) -> float:
    """What an ideal coder that knows the frequencies needs."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


@each_codec
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_symbols_come_back(codec: AbstractCodec, dtype: str, shape: tuple[int, ...]) -> None:
    info = np.iinfo(DTYPES[dtype])
    noise = np.random.default_rng(0).integers(info.min, info.max + 1, shape)
    for symbols in [noise, np.full(shape, info.min), np.full(shape, info.max), np.zeros(shape), noise % 2]:
        round_trip(codec, np.asarray(symbols).astype(DTYPES[dtype]))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    dtype=st.sampled_from(sorted(DTYPES)),
    spread=st.floats(0, 200),
    density=st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 1 << 32),
)
def test_any_distribution_comes_back(
    shape: list[int], dtype: str, spread: float, density: float, seed: int
) -> None:
    rng, info = np.random.default_rng(seed), np.iinfo(DTYPES[dtype])
    values = np.asarray(rng.normal(size=shape) * spread * (rng.random(shape) < density))
    for codec in (Pco(), Bits()):
        round_trip(codec, values.round().clip(info.min, info.max).astype(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["I8", "I16"])
def test_coefficients_cost_their_entropy(dtype: str) -> None:
    symbols = coefficients(600, 2048, DTYPES[dtype])
    payload, params = round_trip(Pco(), symbols)
    ideal = sum(entropy_bytes(row) for row in symbols)
    assert len(payload) < 1.02 * ideal
    assert 10 < len(params["streams"]) < 60


@pytest.mark.parametrize("density", [0.0005, 0.004, 0.02, 0.05, 0.12])
def test_sparse_symbols_cost_their_entropy(density: float) -> None:
    rng = np.random.default_rng(1)
    symbols = (rng.integers(0, 2, (64, 8192)) * 2 - 1) * (rng.random((64, 8192)) < density)
    symbols[rng.random(symbols.shape) < density / 20] = 2
    payload, params = round_trip(Pco(), symbols.astype(np.int8))
    [[coding, *_]] = params["streams"]
    assert coding == ("sparse" if density < 1 / 16 else "pco")
    assert len(payload) < 1.02 * max(entropy_bytes(symbols) + 60, symbols.size / MAX_EXPANSION)


def test_rows_alike_are_one_stream_and_a_change_is_found() -> None:
    rng = np.random.default_rng(0)
    alike = rng.integers(-8, 8, (3, 500, 64)).astype(np.int16)
    assert cuts(alike.reshape(-1), 64) == [0, alike.size]
    changed = np.concatenate([alike[0, :100], alike[1, :50] * 20])
    assert cuts(changed.reshape(-1), 64) == [0, 100 * 64, 150 * 64]


def test_a_long_row_is_cut_inside() -> None:
    symbols = np.zeros((1, 1 << 20), np.int16)
    symbols[0, : 1 << 18] = np.random.default_rng(0).integers(-100, 100, 1 << 18)
    _, params = round_trip(Pco(), symbols)
    assert [entry[:2] for entry in params["streams"]] == [["pco", 1 << 18], ["zeros", 3 << 18]]


def test_symbols_without_rows_are_cut_where_they_change() -> None:
    symbols = np.zeros(1 << 14, np.int16)
    symbols[: 1 << 12] = np.random.default_rng(0).integers(-100, 100, 1 << 12)
    _, params = round_trip(Pco(), symbols)
    assert [entry[:2] for entry in params["streams"]] == [["pco", 1 << 12], ["zeros", 3 << 12]]


def test_streams_longer_than_a_chunk_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pco, "_LONGEST", 1000)
    _, params = round_trip(Pco(), np.random.default_rng(0).integers(-9, 9, (5, 700)).astype(np.int16))
    assert [entry[1] for entry in params["streams"]] == [1000, 1000, 1000, 500]


def test_zeros_cost_only_what_every_payload_must_hold() -> None:
    payload, params = round_trip(Pco(), np.zeros((100, 512), np.int16))
    assert params["streams"] == [["zeros", 51200]]
    assert len(payload) == 51200 * 2 / MAX_EXPANSION
    assert not payload.any()


def test_bytes_at_odd_addresses_decode() -> None:
    symbols = coefficients(20, 100)
    payload, params = round_trip(Pco(), symbols)
    out = np.empty(symbols.nbytes + 1, np.uint8)[1:]
    Pco().decode(payload, params, TensorSpec("I16", symbols.shape), out)
    assert out.tobytes() == symbols.tobytes()


GOLDEN = bytes.fromhex(
    "00280090eaff0bacff7f026966475c7ac8bee6a91a4743fd56c9a0b7ec470281c42096955c6cf2fa8c47560866d8ef9de182dc5c0746"
    "bcc50cfbbd335c909bebc088b79861bf77860b72731d18f11633ecf7ce70416eae0323de6286fdde192ec80d"
    "00100000000000400003600099"
    "002200d0ff4fc01208006acc"
)


def test_golden_payload() -> None:
    """Written by pcodec 1.1.0 in version 4.1 of pco's format: it must decode for ever."""
    i = np.arange(256)
    dense, sparse = ((i * i * 7 + i // 5) % 11 - 5) // 2, np.zeros(256)
    sparse[[3, 100, 101, 255]] = [1, -2, 1, 300]
    symbols = np.stack([dense, np.zeros(256), sparse]).astype("<i2")
    params = {"version": [4, 1], "streams": [["pco", 256, 98], ["zeros", 256], ["sparse", 256, 4, 13, 12]]}
    payload = np.frombuffer(GOLDEN, np.uint8)
    assert decoded(Pco(), payload, params, TensorSpec("I16", symbols.shape)) == symbols.tobytes()


def test_golden_bits() -> None:
    payload, params = round_trip(Bits(), np.array([-3, 4, 0, 1, -3], np.int8))
    assert params == {"lowest": -3, "width": 3}
    assert payload.tobytes() == bytes([0b11_111_000, 0b0_000_100_0])


def test_what_is_written_is_what_the_format_promises() -> None:
    payload, params = round_trip(Pco(), coefficients(300, 4096))
    assert params["version"] == [4, 1]
    assert {"pco", "sparse"} == {entry[0] for entry in params["streams"]}
    assert payload[0] == 0, "the classic mode without delta coding"


@each_codec
def test_other_dtypes_are_refused(codec: AbstractCodec) -> None:
    with pytest.raises(ValueError, match="I8"):
        codec.encode(np.zeros(8, np.uint8), TensorSpec("F32", (2,)))
    for dtype in ("F32", "I32", "U16"):
        spec = TensorSpec(dtype, (4,))
        with pytest.raises(IntegrityError):
            decoded(codec, np.zeros(0, np.uint8), {"version": [4, 1], "streams": [["zeros", 4]]}, spec)
        with pytest.raises(IntegrityError):
            decoded(codec, np.zeros(0, np.uint8), {"lowest": 0, "width": 0}, spec)


BROKEN: dict[str, Params] = {
    "nothing": {},
    "more": {"version": [4, 1], "streams": [["zeros", 64]], "x": 1},
    "no list": {"version": [4, 1], "streams": {"zeros": 64}},
    "no entry": {"version": [4, 1], "streams": ["zeros"]},
    "empty entry": {"version": [4, 1], "streams": [[]]},
    "coding": {"version": [4, 1], "streams": [["lz", 64, 1]]},
    "coding's type": {"version": [4, 1], "streams": [[["zeros"], 64]]},
    "length": {"version": [4, 1], "streams": [["zeros", 64, 1]]},
    "float": {"version": [4, 1], "streams": [["zeros", 64.0]]},
    "bool": {"version": [4, 1], "streams": [["zeros", 63], ["zeros", True]]},
    "too few": {"version": [4, 1], "streams": [["zeros", 63]]},
    "too many": {"version": [4, 1], "streams": [["zeros", 65]]},
    "negative": {"version": [4, 1], "streams": [["zeros", 65], ["zeros", -1]]},
    "no symbol": {"version": [4, 1], "streams": [["zeros", 64], ["zeros", 0]]},
    "beyond": {"version": [4, 1], "streams": [["pco", 64, 1 << 40]]},
    "no bytes": {"version": [4, 1], "streams": [["pco", 64, 0]]},
    "not so sparse": {"version": [4, 1], "streams": [["sparse", 64, 9, 20, 20]]},
    "no places": {"version": [4, 1], "streams": [["sparse", 64, 0, 20, 20]]},
    "too new": {"version": [5, 0], "streams": [["zeros", 64]]},
    "too old": {"version": [3], "streams": [["zeros", 64]]},
    "version": {"version": [4, 256], "streams": [["zeros", 64]]},
    "version's type": {"version": "4.1", "streams": [["zeros", 64]]},
    "width": {"lowest": 0, "width": 9},
    "lowest": {"lowest": 1 << 15, "width": 1},
}


@each_codec
@pytest.mark.parametrize("params", BROKEN.values(), ids=BROKEN)
def test_broken_parameters_are_refused(codec: AbstractCodec, params: Params) -> None:
    for byte in (0x00, 0xFF):
        with pytest.raises(IntegrityError):
            decoded(codec, np.full(64, byte, np.uint8), params, TensorSpec("I8", (64,)))


def test_symbols_that_the_dtype_cannot_hold_are_refused() -> None:
    with pytest.raises(IntegrityError, match="symbols of I8"):
        decoded(Bits(), np.full(64, 0xFF, np.uint8), {"lowest": 100, "width": 8}, TensorSpec("I8", (64,)))


def test_other_modes_and_delta_coding_never_reach_pco(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pco, "_reader", lambda version: None)
    for first in (0x01, 0x04, 0x10, 0x20, 0x30, 0xF0):
        params = {"version": [4, 1], "streams": [["pco", 64, 64]]}
        with pytest.raises(IntegrityError, match="classic"):
            decoded(Pco(), np.full(64, first, np.uint8), params, TensorSpec("I8", (64,)))


def test_a_stream_that_ends_early_or_is_not_sparse_is_refused() -> None:
    padded = np.frombuffer(GOLDEN[:98] + bytes(1), np.uint8)
    with pytest.raises(IntegrityError, match="256 numbers in 99 bytes"):
        decoded(Pco(), padded, {"version": [4, 1], "streams": [["pco", 256, 99]]}, TensorSpec("I16", (256,)))
    crowded = {"version": [4, 1], "streams": [["sparse", 31, 4, 13, 12]]}
    with pytest.raises(IntegrityError, match="fill tensor and payload"):
        decoded(Pco(), np.frombuffer(GOLDEN[98:], np.uint8), crowded, TensorSpec("I16", (31,)))


def test_places_beyond_the_stream_are_refused() -> None:
    params = {"version": [4, 1], "streams": [["sparse", 255, 4, 13, 12]]}
    with pytest.raises(IntegrityError, match="run lengths"):
        decoded(Pco(), np.frombuffer(GOLDEN[98:], np.uint8), params, TensorSpec("I16", (255,)))


def test_a_panic_in_pco_is_damage_and_an_interrupt_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Reader:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def chunk_decompressor(self, piece: bytes, dtype: str) -> Any:
            raise self.error

    params = {"version": [4, 1], "streams": [["pco", 64, 64]]}
    for error, raised in [(PanicException("!"), IntegrityError), (KeyboardInterrupt(), KeyboardInterrupt)]:
        monkeypatch.setattr(pco, "_reader", lambda version, error=error: Reader(error))
        with pytest.raises(raised):
            decoded(Pco(), np.zeros(64, np.uint8), params, TensorSpec("I8", (64,)))


def test_bytes_after_the_end_must_be_zeros() -> None:
    for codec in (Pco(), Bits()):
        symbols = coefficients(8, 100)
        payload, params = round_trip(codec, symbols)
        spec = TensorSpec("I16", symbols.shape)
        assert decoded(codec, np.append(payload, np.zeros(9, np.uint8)), params, spec) == symbols.tobytes()
        with pytest.raises(IntegrityError):
            decoded(codec, np.append(payload, np.array([0, 1], np.uint8)), params, spec)


def test_damage_is_refused_or_decodes_within_bounds() -> None:
    """Random flips, cuts and parameters: the library's error or some symbols, and no memory to speak of."""
    rng, symbols = np.random.default_rng(0), coefficients(60, 800)
    spec, process = TensorSpec("I16", symbols.shape), psutil.Process()
    payload, params = round_trip(Pco(), symbols)
    before, refused = process.memory_info().rss, 0
    for turn in range(3000):
        damaged, table = payload.copy(), copy.deepcopy(params)
        entry = table["streams"][rng.integers(len(table["streams"]))]
        start = sum(sum(e[2 if e[0] == "pco" else 3 :]) for e in table["streams"][: table["streams"].index(entry)])
        if turn % 4 == 0:
            damaged[rng.integers(len(damaged), size=3)] ^= np.uint8(1 << rng.integers(8))
        elif turn % 4 == 1:
            damaged[start + rng.integers(40)] = rng.integers(256)  # the tables of a stream
        elif turn % 4 == 2:
            damaged = damaged[: rng.integers(len(damaged))]
        else:
            entry[rng.integers(1, len(entry))] += int(rng.choice([-1, 1, 1 << 20, 1 << 62, -entry[1]]))
        try:
            decoded(Pco(), damaged, table, spec)
        except IntegrityError:
            refused += 1
    assert refused > 2000
    assert process.memory_info().rss - before < 64 << 20


def test_decoding_takes_no_more_than_a_few_times_the_tensor() -> None:
    n = 1 << 21
    params = {"version": [4, 1], "streams": [["sparse", n, n // 8, 6, 6]]}
    one = bytes([0, 0x10, 0, 0, 0, 0])
    tracemalloc.start()
    with pytest.raises(IntegrityError):
        decoded(Pco(), np.frombuffer(one + one, np.uint8), params, TensorSpec("I16", (n,)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2 * n
