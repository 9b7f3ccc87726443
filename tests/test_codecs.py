"""Codecs: every bit pattern comes back, and damaged payloads are refused without harm."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from semq_state import codecs, content
from semq_state.codecs import MAX_EXPANSION, AbstractCodec, Encoded, Planes, Raw
from semq_state.content import DTYPES, Bytes, TensorSpec
from semq_state.errors import FormatError, IntegrityError, UnknownCodecError

CODECS = {"token": Planes(), "channel": Planes(layout="channel"), "raw": Raw()}
SHAPES = [(), (1,), (7,), (0,), (0, 4), (4, 0), (2, 0, 3), (1, 1), (1, 2, 1, 8), (3, 2, 37, 5), (1, 1, 401, 33)]

each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
each_planes = pytest.mark.parametrize("codec", [Planes(), Planes(layout="channel")], ids=["token", "channel"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def random_bits(spec: TensorSpec, seed: int = 0) -> torch.Tensor:
    """Any bit pattern: NaNs with payloads, infinities, negative zeros and denormals among them."""
    data = np.random.default_rng(seed).integers(0, 256, spec.n_bytes, np.uint8)
    return as_tensor(data & 1 if spec.dtype == "BOOL" else data, spec)


def like_a_cache(spec: TensorSpec, seed: int = 0) -> torch.Tensor:
    """Values whose upper bytes are worth coding."""
    values = torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DTYPES[spec.dtype])


def as_tensor(data: Bytes, spec: TensorSpec) -> torch.Tensor:
    if not data.size:
        return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    return torch.from_numpy(data.copy()).view(DTYPES[spec.dtype]).reshape(spec.shape)


def encoded(codec: AbstractCodec, tensor: torch.Tensor) -> tuple[Bytes, Mapping[str, Any], TensorSpec]:
    spec = content.spec_of(tensor)
    coded = codec.encode(content.raw_bytes(tensor), spec)
    return joined(coded), coded.params, spec


def joined(coded: Encoded) -> Bytes:
    return np.frombuffer(b"".join(bytes(piece) for piece in coded.pieces), np.uint8)


def decoded(codec: AbstractCodec, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec) -> bytes:
    out = np.full(spec.n_bytes, 0xA5, np.uint8)
    codec.decode(payload, params, spec, out)
    return out.tobytes()


def there_and_back(codec: AbstractCodec, tensor: torch.Tensor) -> None:
    payload, params, spec = encoded(codec, tensor)
    assert decoded(codec, payload, params, spec) == content.raw_bytes(tensor).tobytes()
    assert codec.encode(content.raw_bytes(tensor), spec).n_bytes == len(payload)
    assert len(payload) * MAX_EXPANSION >= spec.n_bytes
    assert content.pack(params)


@each_codec
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_bits_come_back(codec: AbstractCodec, dtype: str, shape: tuple[int, ...]) -> None:
    there_and_back(codec, random_bits(TensorSpec(dtype, shape)))


@each_codec
@each_dtype
def test_values_of_a_cache_come_back(codec: AbstractCodec, dtype: str) -> None:
    there_and_back(codec, like_a_cache(TensorSpec(dtype, (1, 2, 301, 64))))


@each_codec
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_special_floats_come_back(codec: AbstractCodec, dtype: str) -> None:
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 5e-324, 1e-45, 6e-8, 9.2e-41])
    there_and_back(codec, torch.cat([special, -special]).to(DTYPES[dtype]).repeat(3, 50, 4))


@each_codec
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("fill", [0x00, 0x80, 0xFF])
def test_constant_large_tensor_is_padded(codec: AbstractCodec, itemsize: int, fill: int) -> None:
    spec = TensorSpec({1: "U8", 2: "BF16", 4: "F32", 8: "I64"}[itemsize], (1, 2, 1031, 128))
    tensor = as_tensor(np.full(spec.n_bytes, fill, np.uint8), spec)
    there_and_back(codec, tensor)
    if codec != Raw():
        assert len(encoded(codec, tensor)[0]) == -(-spec.n_bytes // MAX_EXPANSION)


@each_codec
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(1, 2),
        lambda t: t[:, :, 3:41:2, 1:],
        lambda t: t.permute(3, 2, 1, 0),
        lambda t: t[:1, :1, :1].expand(3, 2, 19, 16),
        lambda t: t[..., 5],
        lambda t: t[0, 0, :, 0],
        lambda t: t.new_empty(16, 4).t().copy_(t[0, 0, :4]),
    ],
    ids=["transposed", "strided", "reversed", "expanded", "column", "line", "fortran"],
)
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "I64", "BOOL"])
def test_views_come_back(codec: AbstractCodec, view: Any, dtype: str) -> None:
    tensor = view(random_bits(TensorSpec(dtype, (3, 2, 47, 16))))
    assert content.raw_bytes(tensor).tobytes() == content.raw_bytes(tensor.clone().contiguous()).tobytes()
    there_and_back(codec, tensor)


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 13), max_size=5).map(tuple),
    codec=st.sampled_from(list(CODECS.values())),
    seed=st.integers(0, 2**32 - 1),
    mask=st.integers(0, 255),
)
def test_any_shape_and_dtype_comes_back(
    dtype: str, shape: tuple[int, ...], codec: AbstractCodec, seed: int, mask: int
) -> None:
    spec = TensorSpec(dtype, shape)
    there_and_back(codec, as_tensor(content.raw_bytes(random_bits(spec, seed)) & np.uint8(mask), spec))


def test_canonical_bytes_are_little_endian_rows() -> None:
    tensor = torch.tensor([[1, 2], [-2, 0x1234]], dtype=torch.int16)
    assert content.raw_bytes(tensor).tobytes() == bytes.fromhex("0100 0200 feff 3412")
    assert content.raw_bytes(tensor.t()).tobytes() == bytes.fromhex("0100 feff 0200 3412")


def test_canonical_bytes_are_little_endian_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.tensor([[1, 2], [-2, 0x1234]], dtype=torch.int16)
    turned = content.raw_bytes(tensor.view(torch.uint8).flip(-1).view(torch.int16).flip(-1)).copy()
    monkeypatch.setattr(sys, "byteorder", "big")
    assert content.raw_bytes(tensor).tobytes() == turned.tobytes()
    assert content.tensor_of(turned, content.spec_of(tensor)).equal(tensor)


@each_dtype
@pytest.mark.parametrize("order", ["little", "big"])
def test_tensor_of_canonical_bytes_is_the_tensor(dtype: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", order)
    for shape in SHAPES:
        data = content.raw_bytes(random_bits(TensorSpec(dtype, shape)))
        tensor = content.tensor_of(data.copy(), TensorSpec(dtype, shape))
        assert content.spec_of(tensor) == TensorSpec(dtype, shape)
        assert content.raw_bytes(tensor).tobytes() == data.tobytes()


@each_planes
def test_payload_is_pinned(codec: Planes) -> None:
    tensor = torch.tensor([[1, 2], [-2, 0x1234]], dtype=torch.int16)
    payload, params, _ = encoded(codec, tensor)
    assert payload.tobytes() == bytes.fromhex("0000ff12 0102fe34")
    assert params == {"layout": codec.layout, "planes": [["raw", 4], ["raw", 4]]}


@each_planes
def test_cache_values_get_smaller(codec: Planes) -> None:
    payload, params, spec = encoded(codec, like_a_cache(TensorSpec("BF16", (1, 2, 600, 64))))
    assert len(payload) < 0.85 * spec.n_bytes
    assert [coding for coding, _ in params["planes"]] == ["zstd", "raw"]


def test_channel_layout_turns_the_plane_before_coding() -> None:
    g = torch.Generator().manual_seed(0)
    spread = torch.exp(2 * torch.randn(64, generator=g))
    words = (torch.randn(2, 900, 64, generator=g) * spread).bfloat16().view(torch.int16)
    tensor = ((words >> 8) & 255).to(torch.uint8)
    payload, params, spec = encoded(Planes(layout="channel"), tensor)
    assert params["planes"][0][0] == "zstd"
    turned = decoded(Planes(), payload, {**params, "layout": "token"}, spec)
    assert turned == content.raw_bytes(tensor.transpose(1, 2)).tobytes()


@pytest.mark.parametrize("layout", ["channel", "token"])
def test_the_smaller_layout_is_kept(layout: str) -> None:
    spread = torch.exp(2 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    values = torch.randn(1, 3, 900, 64, generator=torch.Generator().manual_seed(1))
    tensor = (values * (spread if layout == "channel" else 1)).bfloat16()
    payload, params, spec = encoded(Planes(layout="channel"), tensor)
    assert params["layout"] == layout
    assert len(payload) <= len(encoded(Planes(), tensor)[0])
    assert decoded(Planes(), payload, params, spec) == content.raw_bytes(tensor).tobytes()


@each_codec
def test_encoding_is_deterministic(codec: AbstractCodec) -> None:
    first, second = (encoded(codec, like_a_cache(TensorSpec("F32", (2, 300, 40)))) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes() and first[1:] == second[1:]


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout"):
        Planes(layout="row")


# Damage


def survives(codec: AbstractCodec, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec) -> bool:
    """Whether damage was taken for content; any exception but ours ends the test."""
    try:
        decoded(codec, payload, params, spec)
    except FormatError as error:
        assert str(error)
        return False
    return True


GOOD = {
    "coded": TensorSpec("BF16", (1, 2, 90, 16)),
    "eight planes": TensorSpec("I64", (3, 40)),
    "one plane": TensorSpec("F8_E5M2", (5, 99)),
    "no axes": TensorSpec("F32", ()),
    "empty": TensorSpec("BF16", (2, 0, 8)),
}
each_good = pytest.mark.parametrize("spec", GOOD.values(), ids=GOOD)


def good(codec: AbstractCodec, spec: TensorSpec) -> tuple[Bytes, Mapping[str, Any], TensorSpec]:
    tensor = torch.arange(spec.n_bytes // spec.itemsize) % 11
    return encoded(codec, tensor.to(DTYPES[spec.dtype]).reshape(spec.shape))


@each_codec
@each_good
def test_flipped_bytes_end_in_our_errors(codec: AbstractCodec, spec: TensorSpec) -> None:
    payload, params, _ = good(codec, spec)
    random = np.random.default_rng(1)
    for _ in range(300 if len(payload) else 0):
        damaged = payload.copy()
        for at in random.integers(0, len(payload), random.integers(1, 4)):
            damaged[at] ^= random.integers(1, 256)
        survives(codec, damaged, params, spec)


@each_codec
@each_good
def test_payload_of_another_length_is_refused(codec: AbstractCodec, spec: TensorSpec) -> None:
    payload, params, _ = good(codec, spec)
    for n_bytes in range(len(payload)):
        assert not survives(codec, payload[:n_bytes], params, spec)
    assert not survives(codec, np.append(payload, np.uint8(1)), params, spec)


@settings(max_examples=150, deadline=None)
@given(
    codec=st.sampled_from(list(CODECS.values())),
    spec=st.sampled_from(list(GOOD.values())),
    payload=st.binary(max_size=300),
    params=st.dictionaries(
        st.sampled_from(["layout", "planes", "more"]),
        st.recursive(
            st.sampled_from(
                [None, True, -1, 0, 1, 2**64, 1.5, float("nan"), "token", "channel", "raw", "zstd", b""]
            ),
            lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        ),
    ),
)
def test_any_payload_and_parameters_end_in_our_errors(
    codec: AbstractCodec, spec: TensorSpec, payload: bytes, params: Mapping[str, Any]
) -> None:
    survives(codec, np.frombuffer(payload, np.uint8), params, spec)


ONE = [["raw", 100]]
WRONG_PARAMS: dict[str, Mapping[str, Any]] = {
    "none at all": {},
    "no layout": {"planes": ONE},
    "unknown layout": {"layout": "row", "planes": ONE},
    "layout a list": {"layout": ["token"], "planes": ONE},
    "layout a table": {"layout": {}, "planes": ONE},
    "no planes": {"layout": "token"},
    "planes a number": {"layout": "token", "planes": 1},
    "planes none": {"layout": "token", "planes": None},
    "planes a table": {"layout": "token", "planes": {"raw": 100}},
    "planes text": {"layout": "token", "planes": "r"},
    "too few planes": {"layout": "token", "planes": []},
    "too many planes": {"layout": "token", "planes": [["raw", 50], ["raw", 50]]},
    "plane a number": {"layout": "token", "planes": [100]},
    "plane too long": {"layout": "token", "planes": [["raw", 100, 0]]},
    "plane too short": {"layout": "token", "planes": [["raw"]]},
    "plane nested": {"layout": "token", "planes": [[["raw", 100]]]},
    "size none": {"layout": "token", "planes": [["raw", None]]},
    "size negative": {"layout": "token", "planes": [["raw", -100]]},
    "size huge": {"layout": "token", "planes": [["raw", 2**63]]},
    "size a float": {"layout": "token", "planes": [["raw", 100.0]]},
    "size a bool": {"layout": "token", "planes": [["raw", True]]},
    "size text": {"layout": "token", "planes": [["raw", "100"]]},
    "size one less": {"layout": "token", "planes": [["raw", 99]]},
    "size one more": {"layout": "token", "planes": [["raw", 101]]},
    "unknown coding": {"layout": "token", "planes": [["lz4", 100]]},
    "coding a list": {"layout": "token", "planes": [[["raw"], 100]]},
    "coding none": {"layout": "token", "planes": [[None, 100]]},
    "not a frame": {"layout": "token", "planes": [["zstd", 100]]},
    "more besides": {"layout": "token", "planes": ONE, "more": 0},
}


@pytest.mark.parametrize("params", WRONG_PARAMS.values(), ids=WRONG_PARAMS)
def test_wrong_parameters_are_refused(params: Mapping[str, Any]) -> None:
    payload = np.zeros(100, np.uint8)
    spec = TensorSpec("U8", (10, 10))
    assert survives(Planes(), payload, {"layout": "token", "planes": ONE}, spec)
    with pytest.raises(IntegrityError, match=r"expected .* found") as refusal:
        decoded(Planes(), payload, params, spec)
    assert len(str(refusal.value)) < 1000


def test_size_of_one_is_no_bool() -> None:
    one = np.zeros(1, np.uint8)
    with pytest.raises(IntegrityError):
        decoded(Planes(), one, {"layout": "token", "planes": [["raw", True]]}, TensorSpec("U8", (1,)))


@pytest.mark.parametrize("depth", [1, 5, 500])
def test_long_parameters_make_a_short_message(depth: int) -> None:
    nested: Any = "x" * 10**6
    for _ in range(depth):
        nested = [nested] * 10
    for params in ({"layout": nested, "planes": nested}, {"layout": "token", "planes": [nested, nested]}):
        with pytest.raises(IntegrityError) as refusal:
            decoded(Planes(), np.zeros(1, np.uint8), params, GOOD["coded"])
        assert len(str(refusal.value)) < 1000


def test_raw_refuses_parameters() -> None:
    with pytest.raises(IntegrityError, match="no parameters"):
        decoded(Raw(), np.zeros(2, np.uint8), {"layout": "token"}, TensorSpec("U8", (2,)))


PLANE = 300 * 256


def frame(n_bytes: int, *, declared: int | None = None) -> bytes:
    """A zstd frame of zeros, whose header says another size if told to."""
    coded = zstandard.ZstdCompressor().compress(bytes(n_bytes))
    if declared is None:
        return coded
    assert coded[4] == 0xA0, "one segment and a size of four bytes"
    return coded[:5] + declared.to_bytes(4, "little") + coded[9:]


def silent_frame(n_bytes: int) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(n_bytes))


FRAMES = {
    "declares more": frame(PLANE + 1),
    "declares less": frame(PLANE - 1),
    "declares a gigabyte": frame(PLANE, declared=1 << 30),
    "holds more than it declares": frame(PLANE + 100_000, declared=PLANE),
    "holds one more than it declares": frame(PLANE + 1, declared=PLANE),
    "holds less than it declares": frame(PLANE - 1000, declared=PLANE),
    "declares nothing": silent_frame(PLANE),
    "two frames": frame(PLANE - 30_000) + frame(30_000),
    "two whole frames": frame(PLANE) + frame(PLANE),
    "a frame and an empty one": frame(PLANE) + frame(0),
    "a frame and a skippable one": frame(PLANE) + bytes.fromhex("502a4d18 04000000 00000000"),
    "a skippable one first": bytes.fromhex("502a4d18 04000000 00000000") + frame(PLANE),
    "trailing zeros": frame(PLANE) + bytes(5),
    "trailing bytes": frame(PLANE) + b"more",
    "cut short": frame(PLANE)[:-1],
    "only a header": frame(PLANE)[:9],
    "empty": b"",
    "no frame": b"PK\x03\x04" + bytes(100),
    "needs a dictionary": zstandard.ZstdCompressor(
        dict_data=zstandard.ZstdCompressionDict(bytes(range(256)) * 8, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    ).compress(bytes(range(250)) * (PLANE // 250) + bytes(PLANE % 250)),
}


@each_planes
@pytest.mark.parametrize("coded", FRAMES.values(), ids=FRAMES)
def test_wrong_frame_is_refused(codec: Planes, coded: bytes) -> None:
    spec = TensorSpec("U8", (300, 256))
    params = {"layout": codec.layout, "planes": [["zstd", len(coded)]]}
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            decoded(codec, np.frombuffer(coded, np.uint8), params, spec)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@each_planes
def test_right_frame_is_taken(codec: Planes) -> None:
    coded = frame(PLANE)
    params = {"layout": codec.layout, "planes": [["zstd", len(coded)]]}
    spec = TensorSpec("U8", (300, 256))
    assert decoded(codec, np.frombuffer(coded, np.uint8), params, spec) == bytes(PLANE)


@each_planes
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 0)], ids=str)
def test_frame_for_an_empty_plane_ends_in_our_errors(codec: Planes, shape: tuple[int, ...]) -> None:
    coded = frame(0)
    params = {"layout": codec.layout, "planes": [["zstd", len(coded)]]}
    survives(codec, np.frombuffer(coded, np.uint8), params, TensorSpec("U8", shape))


# Registries


def test_taken_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "DECODERS", dict(codecs.DECODERS))
    for codec in list(codecs.DECODERS.values()):
        with pytest.raises(ValueError, match="taken"):
            codecs.register(codec)


def test_registered_codec_decodes_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(AbstractCodec):
        id = "mine"

        def encode(self, data: Bytes, spec: TensorSpec) -> Encoded:
            return Encoded((data,), {})

        def decode(self, payload: Bytes, params: Mapping[str, Any], spec: TensorSpec, out: Bytes) -> None:
            out[:] = payload

    monkeypatch.setattr(codecs, "DECODERS", dict(codecs.DECODERS))
    mine = Mine()
    codecs.register(mine)
    assert codecs.decoder("mine") is mine
    assert codecs.preset(mine) is mine
    with pytest.raises(ValueError, match="taken"):
        codecs.register(Mine())


@pytest.mark.parametrize("name", ["", "zip", "Planes", "planes "])
def test_unknown_id_is_named(name: str) -> None:
    with pytest.raises(UnknownCodecError, match=repr(name)) as refusal:
        codecs.decoder(name)
    assert "planes, raw" in refusal.value.expected
    with pytest.raises(UnknownCodecError, match="exact, exact-max, raw"):
        codecs.preset(name)


def test_presets_are_decoded_by_their_own_ids() -> None:
    assert set(codecs.PRESETS) == {"exact", "exact-max", "raw"}
    for preset, codec in codecs.PRESETS.items():
        assert codecs.preset(preset) is codec
        assert type(codecs.decoder(codec.id)) is type(codec)
