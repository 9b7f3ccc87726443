"""Sealed files: only a key opens them, they name nothing of the prompt, and no change goes unnoticed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from safetensors import safe_open
from test_cli import folder as folder
from test_files import assert_same, bits, hidden, names, state
from test_hostile import MEMORY, tiny

import semq_state as sq
from semq_state import container, content, files, sealing
from semq_state.cli import unlocking
from semq_state.content import DTYPES
from semq_state.errors import (
    DecryptionError,
    FormatError,
    IntegrityError,
    SemqStateError,
    StoreError,
    UnsupportedOperationError,
)
from semq_state.sealing import (
    KeyFile,
    Passphrase,
    PrivateKey,
    Recipient,
    SealedFile,
    create_key_file,
    create_key_pair,
    segments,
    table,
    unseal,
    wrapping,
    writing,
)
from semq_state.snapshot import CacheState, LayerState, Snapshot
from semq_state.stores import LocalFile, local

GOLDEN = Path(__file__).parent / "golden"
WORDS = Passphrase("correct horse battery staple")


@pytest.fixture(autouse=True)
def _cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapping, "LOG2_N", 4)


@dataclass(frozen=True)
class Keys:
    """One key of each kind: what seals, and what opens."""

    file: KeyFile
    recipient: Recipient
    private: PrivateKey

    @property
    def pairs(self) -> dict[str, tuple[Any, Any]]:
        return {
            "passphrase": (WORDS, WORDS),
            "key file": (self.file, self.file),
            "x25519": (self.recipient, self.private),
        }


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    public = create_key_pair(folder / "pair")
    return Keys(
        create_key_file(folder / "secret"), Recipient.from_pem(public), PrivateKey.from_pem(folder / "pair")
    )


KINDS = ["passphrase", "key file", "x25519"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def read_all(path: Path, unlock: Any) -> bytes:
    """The plain file inside, every segment decrypted."""
    with LocalFile(path) as file:
        sealed = SealedFile(file, container.read_header(file.read, file.size, str(path)), unlock)
        return b"".join(sealed.opened(segment) for segment in sealed.segments)


# There and back


@each_kind
def test_everything_comes_back(kind: str, keys: Keys, path: Path) -> None:
    to, unlock = keys.pairs[kind]
    info = sq.save(state(), path, seal=to)
    assert info.sealed and info.n_bytes == path.stat().st_size
    assert_same(sq.load(path, unlock=unlock), state())
    assert sq.inspect(path, unlock=unlock).as_dict() == info.as_dict()
    assert sq.verify(path, unlock=unlock).passed


@pytest.mark.parametrize("codec", ["exact", "exact-max", "raw", "rotated"])
def test_every_codec_comes_back(codec: str, keys: Keys, path: Path, tmp_path: Path) -> None:
    sq.save(state(), tmp_path / "plain", codec=codec)
    info = sq.save(state(), path, codec=codec, seal=keys.file)
    expected = sq.load(tmp_path / "plain")
    assert_same(sq.load(path, unlock=keys.file), expected)
    assert info.state_id == expected.state_id == sq.inspect(tmp_path / "plain").state_id
    # What is sealed while it is saved is the very file that is saved plain.
    assert read_all(path, keys.file) == (tmp_path / "plain").read_bytes()


@each_kind
def test_each_of_several_keys_opens_alone(kind: str, keys: Keys, path: Path) -> None:
    sq.save(tiny(), path, seal=[to for to, _ in keys.pairs.values()])
    assert sq.load(path, unlock=keys.pairs[kind][1]).state_id == tiny().state_id
    others = [Passphrase("wrong"), keys.pairs[kind][1]]
    assert sq.load(path, unlock=others).state_id == tiny().state_id


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("v*.safetensors")), ids=lambda path: path.stem)
def test_any_file_is_sealed_and_unsealed_byte_for_byte(golden: Path, keys: Keys, tmp_path: Path) -> None:
    sq.seal(golden, tmp_path / "sealed", to=keys.file)
    unseal(tmp_path / "sealed", tmp_path / "plain", unlock=keys.file)
    assert (tmp_path / "plain").read_bytes() == golden.read_bytes()
    assert sq.inspect(tmp_path / "sealed", unlock=keys.file).state_id == sq.inspect(golden).state_id


def test_large_sections_are_cut_into_parts(keys: Keys, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "PART_BYTES", 1000)
    monkeypatch.setattr(content, "n_workers", lambda: 7)
    sq.save(state(), path, codec="raw", seal=keys.file)
    assert_same(sq.load(path, unlock=keys.file), state())
    plain = read_all(path, keys.file)
    with LocalFile(path) as file:
        sealed = SealedFile(file, container.read_header(file.read, file.size, str(path)), keys.file)
        assert max(segment.n_parts for segment in sealed.segments) > 5
        for begin, end in [(0, 0), (0, 8), (999, 1001), (0, len(plain)), (1500, 7003), (len(plain), len(plain))]:
            into = bytearray(end - begin)
            sealed.read_into(begin, memoryview(into))
            assert sealed.read(begin, end - begin) == plain[begin:end] == bytes(into)
        for offset, n_bytes in [(len(plain) - 1, 2), (-1, 1), (len(plain) + 1, 0)]:
            with pytest.raises(StoreError):
                sealed.read(offset, n_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back(dtype: str, keys: Keys, path: Path) -> None:
    layers = tuple(
        LayerState("mine", {"x": bits(dtype, *shape)}) for shape in [(), (3,), (0,), (2, 0, 4), (2, 7, 5)]
    )
    expected = replace(state(2), cache=CacheState("dynamic", layers))
    for codec in ("exact", "raw"):
        sq.save(expected, path, codec=codec, seal=keys.file, verify=False)
        assert_same(sq.load(path, unlock=keys.file), expected)


def test_plain_files_need_no_key_and_mind_none(keys: Keys, path: Path) -> None:
    info = sq.save(tiny(), path)
    assert not info.sealed
    assert sq.load(path, unlock=keys.file).state_id == sq.inspect(path, unlock=WORDS).state_id == tiny().state_id


def test_capture_seals_what_it_saves(keys: Keys, path: Path, model: Any) -> None:
    with sq.capture(model, autosave=path, every=2, seal=[keys.file, keys.recipient]) as run:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
    with pytest.raises(DecryptionError):
        sq.load(path)
    assert run.n_saved > 2
    assert_same(
        sq.load(path, unlock=keys.private),
        replace(run.snapshot(), provenance=sq.load(path, unlock=keys.file).provenance),
    )


def test_capture_refuses_a_key_that_is_not_there_at_once(path: Path, model: Any) -> None:
    with pytest.raises(StoreError), sq.capture(model, autosave=path, seal=KeyFile(path.parent / "none")):
        pass


def test_golden_file_is_read_forever(tmp_path: Path) -> None:
    key = KeyFile(GOLDEN / "sealed-1.key")
    unseal(GOLDEN / "sealed-1.safetensors", tmp_path / "plain", unlock=key)
    assert (tmp_path / "plain").read_bytes() == (GOLDEN / "v3-exact.safetensors").read_bytes()
    unseal(GOLDEN / "sealed-1.safetensors", tmp_path / "plain", unlock=Passphrase("golden"))
    private = PrivateKey(bytes(range(32)))
    assert (
        sq.load(GOLDEN / "sealed-1.safetensors", unlock=private).state_id == sq.inspect(tmp_path / "plain").state_id
    )


def test_page_is_enough_to_read_a_file(keys: Keys, path: Path, tmp_path: Path) -> None:
    """A second reader, written from FORMAT.md with other libraries only."""
    sq.save(state(), tmp_path / "plain")
    sq.seal(tmp_path / "plain", path, to=[WORDS, keys.file])
    data = path.read_bytes()
    n_header = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n_header])
    part = {
        name: data[8 + n_header + entry["data_offsets"][0] : 8 + n_header + entry["data_offsets"][1]]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    told = msgpack.unpackb(part["seal"])
    stanza = told["keys"][1]
    secret = np.frombuffer(base64.b64decode(Path(keys.file.path).read_text().split("\n")[1]), np.uint8)

    def hkdf(key: bytes, salt: str, n_bytes: int) -> bytes:
        return HKDF(hashes.SHA256(), n_bytes, bytes.fromhex(salt), b"semq_state sealed 1").derive(key)

    fixed = {"kind": "key-file", "salt": stanza["salt"]}
    bound = msgpack.packb(["semq_state sealed 1", told["seal_id"], fixed])
    wrapping_key = hkdf(secret.tobytes(), stanza["salt"], 32)
    data_key = AESGCM(wrapping_key).decrypt(bytes(12), bytes.fromhex(stanza["wrapped"]), bound)
    both = hkdf(data_key, told["seal_id"], 64)
    assert both[32:].hex() == told["commitment"]
    aes = AESGCM(both[:32])
    index = aes.decrypt(
        b"\xff" * 12, part["sealed.index"], hashlib.sha256(data[: 8 + n_header] + part["seal"]).digest()
    )
    index = msgpack.unpackb(index[8 : 8 + int.from_bytes(index[:8], "little")])
    plain, at, position = b"", 0, 0
    for name, size in zip(index["names"], index["sizes"], strict=True):
        n_parts = -(-size // 8388608)
        for number in range(n_parts):
            n_bytes = min(8388608, size - number * 8388608)
            place = [name, number, n_parts, position, len(plain), len(plain) + n_bytes]
            bound = msgpack.packb(["semq_state sealed 1", told["seal_id"], index["state_id"], *place])
            sealed = part["sealed.data"][at : at + n_bytes + 16]
            plain += aes.decrypt(position.to_bytes(12, "big"), sealed, bound)
            at, position = at + n_bytes + 16, position + 1
    assert at == len(part["sealed.data"])
    assert plain == (tmp_path / "plain").read_bytes()


# What a sealed file tells


def test_safetensors_opens_sealed_files_and_sees_nothing(keys: Keys, path: Path) -> None:
    sq.save(state(), path, seal=keys.file)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "semq_state sealed", "format_version": "1"}
        assert list(file.keys()) == ["seal", "sealed.data", "sealed.index"]


@pytest.mark.parametrize("codec", ["raw", "exact"])
def test_nothing_that_names_the_prompt_is_readable(codec: str, keys: Keys, path: Path) -> None:
    expected = state()
    sq.save(expected, path, codec=codec, seal=[WORDS, keys.file, keys.recipient])
    data = path.read_bytes()
    told = [expected.state_id[7:], "tiny llama", "layers.", "generation", "input_ids", "manifest", "planes", "raw"]
    found = [words for words in told if words.encode() in data or bytes.fromhex(expected.state_id[7:]) in data]
    digests = {digest for entry in content.all_digests(expected.tensors()).values() for digest in entry}
    assert found == [] and not [digest for digest in digests if digest[7:].encode() in data]
    assert content.raw_bytes(expected.generation.input_ids).tobytes()[:64] not in data
    assert content.raw_bytes(expected.cache.layers[0].tensors["keys"]).tobytes()[:16] not in data


def test_sizes_do_not_tell_one_prompt_from_another(keys: Keys, tmp_path: Path) -> None:
    """States of one shape compress to other sizes, by which a guessed prompt could be confirmed."""

    def like(seed: int) -> Snapshot:
        made = torch.randint(0, 9, (1, 2, 300, 64), generator=torch.Generator().manual_seed(seed)) * (seed % 5 / 3)
        layers = tuple(LayerState("dynamic", {"keys": made * i, "values": made.roll(i)}) for i in range(6))
        return replace(state(), cache=CacheState("dynamic", layers))

    plain = {sq.save(like(seed), tmp_path / "plain", verify=False).n_bytes for seed in (6, 11, 16, 21)}
    sealed = set()
    for seed in (6, 11, 16, 21):
        sq.save(like(seed), tmp_path / "sealed", verify=False, seal=keys.file)
        with LocalFile(tmp_path / "sealed") as file:
            header = container.read_header(file.read, file.size, "")
        sealed.add(file.size)
        assert len(header.sections) == 3
    assert len(plain) == 4 and len(sealed) == 1


def test_padding_is_small_and_hides_sizes() -> None:
    for n_bytes in [0, 1, 2, 9, 100, 4683, 10**5, 10**6, 10**8, 10**12]:
        found = segments.padded(n_bytes)
        assert n_bytes <= found <= n_bytes + min(n_bytes * 0.12, 4 << 20)
        assert segments.padded(found) == found
    assert len({segments.padded(n) for n in range(1_000_000, 1_030_000)}) <= 2
    assert segments.padded((1 << 40) + 1) == (1 << 40) + (4 << 20)


def test_no_file_is_sealed_like_another(keys: Keys, tmp_path: Path) -> None:
    parts = []
    for name in "ab":
        sq.save(tiny(), tmp_path / name, seal=[WORDS, keys.file, keys.recipient])
        data = (tmp_path / name).read_bytes()
        parts.append({data[at : at + 16] for at in range(1000, len(data) - 16, 16)})
    assert not parts[0] & parts[1]


def test_equal_sections_are_not_sealed_alike(keys: Keys, path: Path) -> None:
    layers = tuple(LayerState("dynamic", {"keys": bits("F32", 1, 2, 30, 8)}) for _ in range(4))
    sq.save(replace(state(), cache=CacheState("dynamic", layers)), path, codec="raw", seal=keys.file)
    data = path.read_bytes()
    found = {data[begin:][:16] for s, begin, _ in segments_in(path, keys.file) if s.name.endswith(".keys")}
    assert len(found) == 4


def test_no_plain_byte_is_ever_written(keys: Keys, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fdopen, written = os.fdopen, []

    class Spy:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: Any) -> int:
            written.append(bytes(data))
            return int(self._file.write(data))

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    monkeypatch.setattr(local.os, "fdopen", lambda *a, **k: Spy(fdopen(*a, **k)))
    expected = state()
    pieces = [content.raw_bytes(t).tobytes()[:48] for t in expected.tensors().values() if t.nbytes >= 48]
    pieces += [b'semq_state"', b"input_ids", b"layers.0", expected.state_id.encode()]

    def seen() -> int:
        everything = b"|".join(written)
        return sum(piece in everything for piece in pieces)

    sq.save(expected, path, codec="raw", seal=keys.file)
    assert written and seen() == 0
    sq.save(expected, path, codec="raw")
    assert seen() > len(pieces) // 2


def test_no_repr_tells_a_secret(keys: Keys) -> None:
    assert repr(WORDS) == "Passphrase()" and repr(keys.private) == "PrivateKey()"
    made = sealing.new_seal(keys.file)
    assert made.key.hex() not in repr(made) and repr(made.key) not in repr(made)
    assert Path(keys.file.path).read_text().split("\n")[1] not in repr(keys.file)


# Wrong keys


def test_sealed_file_without_a_key_says_what_to_give(keys: Keys, path: Path) -> None:
    sq.save(tiny(), path, seal=keys.file)
    for read in (sq.load, sq.inspect, sq.verify):
        with pytest.raises(
            DecryptionError, match=r"the file is sealed, found none; pass unlock=.*--passphrase-file"
        ):
            read(path)


@each_kind
def test_wrong_key_is_refused(kind: str, keys: Keys, path: Path, tmp_path: Path) -> None:
    create_key_pair(tmp_path / "other pair")
    wrong = {
        "passphrase": [Passphrase(WORDS.text + " "), Passphrase(WORDS.text.upper())],
        "key file": [create_key_file(tmp_path / "other")],
        "x25519": [PrivateKey.from_pem(tmp_path / "other pair")],
    }
    sq.save(tiny(), path, seal=keys.pairs[kind][0])
    others = [unlock for name, (_, unlock) in keys.pairs.items() if name != kind]
    for given in (*wrong[kind], *others, wrong[kind] + others, []):
        with pytest.raises(DecryptionError, match="none of the given keys opens it"):
            sq.load(path, unlock=given)
    with pytest.raises(DecryptionError, match="none of the given keys"):
        unseal(path, tmp_path / "plain", unlock=others)
    assert not (tmp_path / "plain").exists() and hidden(tmp_path) == []


def test_passphrases_that_look_alike_are_one(path: Path) -> None:
    sq.save(tiny(), path, seal=Passphrase("caf\u00e9"))
    assert sq.load(path, unlock=Passphrase("cafe\u0301")).state_id == tiny().state_id


def test_what_we_write_costs_as_much_as_we_say(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    made = sealing.new_seal(WORDS)
    stanza = msgpack.unpackb(made.table)["keys"][0]
    assert (stanza["log2_n"], stanza["r"], stanza["p"]) == (17, 8, 1)
    assert table.open_seal(made.table, WORDS, "x") == made


@pytest.mark.parametrize(
    "to", [[], [WORDS] * 5, [Recipient(bytes(31) + b"\x01")] * 65], ids=["none", "5 passphrases", "65 keys"]
)
def test_too_many_or_no_keys_are_refused(to: Any, path: Path) -> None:
    with pytest.raises(ValueError, match="1 to 64 keys"):
        sq.save(tiny(), path, seal=to)
    assert names(path.parent) == []


@pytest.mark.parametrize("to", ["words", PrivateKey(bytes(32)), 3], ids=["text", "private", "number"])
def test_what_is_no_key_is_refused(to: Any, path: Path) -> None:
    with pytest.raises(TypeError, match="Passphrase, KeyFile or Recipient"):
        sq.save(tiny(), path, seal=to if to == "words" else [to])
    for kind in (Recipient, PrivateKey):
        with pytest.raises(ValueError, match="32 bytes"):
            kind(b"short")
    with pytest.raises(ValueError, match="at least one"):
        Passphrase("")


# Keys as files


def test_new_keys_are_private_and_replace_nothing(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    for kind in sealing.PAIRS:
        assert create_key_pair(tmp_path / kind, kind) == tmp_path / f"{kind}.pub"
        assert stat.S_IMODE((tmp_path / kind).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len({*before.values()}) == 7
    (tmp_path / "x25519").rename(tmp_path / "elsewhere")
    before[tmp_path / "elsewhere"] = before.pop(tmp_path / "x25519")
    (tmp_path / "ed25519.pub").unlink()
    del before[tmp_path / "ed25519.pub"]
    for make in (
        lambda: create_key_file(tmp_path / "key"),
        lambda: create_key_pair(tmp_path / "x25519"),
        lambda: create_key_pair(tmp_path / "ed25519", "ed25519"),
        lambda: create_key_file(tmp_path / "no folder" / "key"),
    ):
        with pytest.raises(StoreError, match="nothing stands yet"):
            make()
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="x25519"):
        create_key_pair(tmp_path / "rsa", "rsa")


def test_files_that_are_no_key_are_refused(tmp_path: Path, path: Path) -> None:
    create_key_pair(tmp_path / "sign", "ed25519")
    create_key_pair(tmp_path / "pair")
    good = create_key_file(tmp_path / "key").path
    text = Path(good).read_bytes()
    wrongs = [
        b"",
        b"\xff\xfe",
        text[:-1],
        text + b"\n",
        text.replace(b"key 1", b"key 2"),
        bytes(70_000),
        os.urandom(32),
    ]
    for number, data in enumerate(wrongs):
        wrong = tmp_path / f"wrong {number}"
        wrong.write_bytes(data)
        reads = [
            KeyFile(wrong).secret,
            lambda w=wrong: Recipient.from_pem(w),
            lambda w=wrong: PrivateKey.from_pem(w),
        ]
        for read in reads:
            with pytest.raises(DecryptionError, match="keygen"):
                read()
        with pytest.raises(DecryptionError, match="key"):
            sq.save(tiny(), path, seal=KeyFile(wrong))
    for read in (
        lambda: Recipient.from_pem(tmp_path / "sign.pub"),
        lambda: PrivateKey.from_pem(tmp_path / "sign"),
        lambda: Recipient.from_pem(tmp_path / "pair"),
        lambda: PrivateKey.from_pem(tmp_path / "pair.pub"),
        lambda: Passphrase.from_file(tmp_path / "wrong 0"),
        lambda: Passphrase.from_file(tmp_path / "wrong 1"),
    ):
        with pytest.raises(DecryptionError):
            read()
    assert not path.exists()


def test_private_key_knows_its_recipient(keys: Keys) -> None:
    assert keys.private.recipient == keys.recipient


# Damage


@pytest.fixture
def sealed(keys: Keys, path: Path) -> bytes:
    """A small file, sealed to one key of each kind."""
    sq.save(tiny(), path, seal=[WORDS, keys.file, keys.recipient])
    return path.read_bytes()


def parts_of(data: bytes) -> dict[str, tuple[int, int]]:
    """Where header, table, ciphertexts and index are."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    bounds = {
        name: [start + at for at in header[name]["data_offsets"]] for name in header if name != "__metadata__"
    }
    return {"header": (0, start), **{name: (begin, end) for name, (begin, end) in bounds.items()}}


def test_no_flipped_byte_goes_unnoticed(sealed: bytes, keys: Keys, path: Path) -> None:
    begin, end = parts_of(sealed)["sealed.data"]
    plain = read_all(path, keys.file)
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(sealed):
            for bit in {at % 8} if begin <= at < end else {at % 8, 0, 5, 7}:
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                with pytest.raises((DecryptionError, FormatError)):
                    read_all(path, keys.file)
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert read_all(path, keys.file) == plain


def test_no_flipped_byte_goes_unnoticed_by_load(sealed: bytes, keys: Keys, path: Path) -> None:
    begin, end = parts_of(sealed)["sealed.data"]
    for at in range(0, len(sealed), 23):
        damaged = bytearray(sealed)
        damaged[at] ^= 64
        path.write_bytes(damaged)
        with pytest.raises((DecryptionError, FormatError)) as refusal:
            sq.load(path, unlock=keys.private)
        assert str(path) in str(refusal.value)
        if begin <= at < end:
            assert type(refusal.value) is DecryptionError


def test_truncated_file_is_refused(sealed: bytes, keys: Keys, path: Path) -> None:
    for n_bytes in [*range(0, len(sealed), 97), len(sealed) - 1]:
        path.write_bytes(sealed[:n_bytes])
        with pytest.raises(FormatError):
            sq.load(path, unlock=keys.file)
    path.write_bytes(sealed + b"\0")
    with pytest.raises(FormatError):
        sq.load(path, unlock=keys.file)


def test_verdict_names_the_damaged_section(keys: Keys, path: Path) -> None:
    info = sq.save(state(), path, seal=keys.file)
    with LocalFile(path) as file:
        header = container.read_header(file.read, file.size, str(path))
        opened = SealedFile(file, header, keys.file)
        segment = next(s for s in opened.segments if s.name == "layers.1.keys")
    data = bytearray(path.read_bytes())
    data[parts_of(data)["sealed.data"][0] + segment.sealed_begin] ^= 1
    path.write_bytes(data)
    failures = sq.verify(path, unlock=keys.file).failures
    assert [*failures] == ["layers.1.keys"]
    assert "section 'layers.1.keys'" in failures["layers.1.keys"]
    assert sq.inspect(path, unlock=keys.file).as_dict() == info.as_dict()
    with pytest.raises(DecryptionError, match=r"layers\.1\.keys"):
        sq.load(path, unlock=keys.file)


def segments_in(path: Path, unlock: Any) -> list[tuple[segments.Segment, int, int]]:
    """Every segment, and where its ciphertext is in the file."""
    start = parts_of(path.read_bytes())["sealed.data"][0]
    with LocalFile(path) as file:
        found = SealedFile(file, container.read_header(file.read, file.size, str(path)), unlock).segments
    return [(s, start + s.sealed_begin, start + s.sealed_begin + s.n_bytes + 16) for s in found]


def alike(n: int = 4, seed: int = 0) -> Snapshot:
    """Layers of one shape, so that their sections can change places."""
    layers = tuple(LayerState("dynamic", {"keys": bits("F32", 1, 2, 30, 8, seed=seed + i)}) for i in range(n))
    return replace(state(), cache=CacheState("dynamic", layers))


def test_sections_of_one_file_cannot_change_places(keys: Keys, path: Path) -> None:
    sq.save(alike(), path, codec="raw", seal=keys.file)
    data = path.read_bytes()
    layers = [(begin, end) for s, begin, end in segments_in(path, keys.file) if s.name.endswith(".keys")]
    assert len(layers) == 4
    for i in range(3):
        (a, b), (c, d) = layers[i], layers[i + 1]
        path.write_bytes(data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:])
        with pytest.raises(DecryptionError, match="layers"):
            sq.load(path, unlock=keys.file)
        path.write_bytes(data[:a] + data[c:d] + data[b:])  # one section twice
        with pytest.raises(DecryptionError, match="layers"):
            sq.load(path, unlock=keys.file)


@pytest.mark.parametrize("same", ["passphrase", "data key and seal"])
def test_sections_of_two_files_cannot_be_exchanged(
    same: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if same == "data key and seal":
        monkeypatch.setattr(table.os, "urandom", bytes)
    for name, seed in (("a", 0), ("b", 50)):
        sq.save(alike(seed=seed), tmp_path / name, codec="raw", seal=WORDS)
    a, b = ((tmp_path / name).read_bytes() for name in "ab")
    places = segments_in(tmp_path / "a", WORDS)
    assert [x[1:] for x in places] == [x[1:] for x in segments_in(tmp_path / "b", WORDS)]
    for segment, begin, end in places:
        if a[begin:end] == b[begin:end]:
            continue
        (tmp_path / "a").write_bytes(a[:begin] + b[begin:end] + a[end:])
        with pytest.raises(DecryptionError) as refusal:
            read_all(tmp_path / "a", WORDS)
        assert (segment.name or "sealed header") in str(refusal.value)


@pytest.mark.parametrize("piece", ["header", "seal", "sealed.data", "sealed.index"])
def test_pieces_of_two_files_cannot_be_exchanged(piece: str, keys: Keys, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 50)):
        sq.save(alike(seed=seed), tmp_path / name, codec="raw", seal=keys.file)
    a, b = ((tmp_path / name).read_bytes() for name in "ab")
    begin, end = parts_of(a)[piece]
    (tmp_path / "a").write_bytes(a[:begin] + b[begin:end] + a[end:])
    if piece == "header":
        assert a[begin:end] == b[begin:end]
        return
    with pytest.raises(DecryptionError):
        sq.load(tmp_path / "a", unlock=keys.file)


# Files made on purpose, by someone who has the key


def put_together(made: sealing.Seal, data: bytes, index: bytes, *, header: bytes | None = None) -> bytes:
    """A sealed file of these ciphertexts and this index, everything else in order."""
    sizes = (len(made.table), len(data), len(index) + 16)
    outer = sealing.layout.outer_header(sizes) if header is None else header
    bound = hashlib.sha256(outer + made.table).digest()
    return outer + made.table + data + AESGCM(made.key).encrypt(b"\xff" * 12, index, bound)


def told(fields: Any, *, zeros: bytes = bytes(100)) -> bytes:
    packed = fields if isinstance(fields, bytes) else content.pack(fields)
    return len(packed).to_bytes(8, "little") + packed + zeros


GOOD = {"state_id": "sha256:00", "names": ["", "a"], "sizes": [50, 18]}
INDEXES: dict[str, bytes] = {
    "no msgpack": told(b"\xc1"),
    "a list": told([]),
    "a field less": told({"state_id": "x", "names": [""]}),
    "a field more": told(GOOD | {"x": 1}),
    "not canonical": told(msgpack.packb(dict(reversed(GOOD.items())))),
    "no sections": told(GOOD | {"names": [], "sizes": []}),
    "more names": told(GOOD | {"names": ["", "a", "b"]}),
    "a named header": told(GOOD | {"names": ["b", "a"]}),
    "a number as name": told(GOOD | {"names": ["", 1]}),
    "text as size": told(GOOD | {"sizes": [50, "18"]}),
    "a bool as size": told(GOOD | {"sizes": [67, True]}),
    "a negative size": told(GOOD | {"sizes": [85, -1]}),
    "a huge size": told(GOOD | {"sizes": [50, 1 << 62]}),
    "a size too large": told(GOOD | {"sizes": [50, 19]}),
    "a size too small": told(GOOD | {"sizes": [50, 17]}),
    "an empty header": told(GOOD | {"names": [""], "sizes": [0]}),
    "a number as state": told(GOOD | {"state_id": 1}),
    "more than zeros": told(GOOD, zeros=b"\0\0\1\0"),
    "a length beyond": (1 << 60).to_bytes(8, "little") + content.pack(GOOD),
    "nothing": bytes(8),
    "a huge list": told(b"\x83\xa5names\xdd\xff\xff\xff\xff"),
    "many sections": told(GOOD | {"names": [""] * 70_000, "sizes": [1] * 70_000}),
    "deep lists": told(b"\x91" * 100_000),
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES)
def test_hostile_index_is_refused(index: bytes, keys: Keys, path: Path) -> None:
    made = sealing.new_seal(keys.file)
    path.write_bytes(put_together(made, bytes(100), index))
    tracemalloc.start()
    with pytest.raises(DecryptionError, match=r"sealed\.index"):
        sq.load(path, unlock=keys.file)
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


def test_good_index_is_taken_until_its_segments_are_not(keys: Keys, path: Path) -> None:
    path.write_bytes(put_together(sealing.new_seal(keys.file), bytes(100), told(GOOD)))
    with pytest.raises(DecryptionError, match="the sealed header"):
        sq.load(path, unlock=keys.file)


def test_sections_of_another_state_are_refused(keys: Keys, path: Path, tmp_path: Path) -> None:
    """Whoever has the key can bind sections to any state; the manifest inside must agree."""
    sq.save(tiny(), tmp_path / "plain")
    plain = (tmp_path / "plain").read_bytes()
    with path.open("wb") as file:
        writer = writing.SegmentWriter(file, sealing.new_seal(keys.file), f"sha256:{'0' * 64}")
        for segment in writer.announce("", len(plain)):
            writer.write(segment, plain)
        writer.finish()
    with pytest.raises(DecryptionError, match="a seal of 'sha256:000"):
        sq.load(path, unlock=keys.file)


def test_dropped_section_is_refused(keys: Keys, path: Path) -> None:
    sq.save(alike(), path, codec="raw", seal=keys.file)
    data, bounds = path.read_bytes(), parts_of(path.read_bytes())
    _, begin, end = next(x for x in segments_in(path, keys.file) if x[0].name == "layers.2.keys")
    table_bytes, index = (data[slice(*bounds[name])] for name in ("seal", "sealed.index"))
    left = data[bounds["sealed.data"][0] : begin] + data[end : bounds["sealed.data"][1]]
    outer = sealing.layout.outer_header((len(table_bytes), len(left), len(index)))
    path.write_bytes(outer + table_bytes + left + index)
    with pytest.raises(DecryptionError, match="header, seal and index"):
        sq.load(path, unlock=keys.file)


def table_with(change: Callable[[dict[str, Any]], object], to: Any) -> bytes:
    fields = msgpack.unpackb(sealing.new_seal(to).table)
    change(fields)
    return content.pack(fields)


def _first(**changed: Any) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["keys"][0].update(changed)


TABLES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a later version": lambda t: t.update(version=2),
    "true as version": lambda t: t.update(version=True),
    "another cipher": lambda t: t.update(cipher="ROT13"),
    "a field more": lambda t: t.update(more=1),
    "no keys": lambda t: t.update(keys=[]),
    "keys as text": lambda t: t.update(keys="x"),
    "too many keys": lambda t: t.update(keys=t["keys"] * 65),
    "too many passphrases": lambda t: t.update(keys=t["keys"] * 5),
    "a short identity": lambda t: t.update(seal_id="00"),
    "upper case": lambda t: t.update(seal_id="AB" * 16),
    "no commitment": lambda t: t.pop("commitment"),
    "another commitment": lambda t: t.update(commitment="ab" * 32),
    "a stanza of another kind": _first(kind="rsa"),
    "a list as kind": _first(kind="x25519"),
    "a stanza as text": lambda t: t.update(keys=["x"]),
    "a short salt": _first(salt="00"),
    "a number as salt": _first(salt=3),
    "a long key": _first(wrapped="00" * 49),
    "a stanza with more": _first(more=1),
    "scrypt of a gigabyte": _first(log2_n=20),
    "scrypt forever": _first(log2_n=1 << 40),
    "scrypt with a wide r": _first(r=1 << 20),
    "scrypt with a long p": _first(p=1 << 20),
    "scrypt of nothing": _first(log2_n=0),
    "scrypt of text": _first(log2_n="17"),
    "scrypt of true": _first(p=True),
}


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_hostile_table_is_refused_at_once(change: Callable[[dict[str, Any]], object], path: Path) -> None:
    made = replace(sealing.new_seal(WORDS), table=table_with(change, WORDS))
    path.write_bytes(put_together(made, bytes(100), told(GOOD)))
    started = time.monotonic()
    with pytest.raises(DecryptionError, match="seal: expected"):
        sq.load(path, unlock=WORDS)
    assert time.monotonic() - started < 2


TABLE_BYTES = [b"", b"\xc1", b"\x90", b"\x91" * 1000, b"\xdd\xff\xff\xff\xff", b"x" * 70_000]


@pytest.mark.parametrize("data", TABLE_BYTES, ids=lambda data: f"{len(data)} bytes of {data[:1]!r}")
def test_table_that_is_none_is_refused(data: bytes, keys: Keys, path: Path) -> None:
    path.write_bytes(put_together(replace(sealing.new_seal(keys.file), table=data), bytes(100), told(GOOD)))
    with pytest.raises(DecryptionError):
        sq.load(path, unlock=keys.file)


def test_table_must_be_canonical_and_small(keys: Keys, path: Path) -> None:
    made = sealing.new_seal(keys.file)
    turned = msgpack.packb(dict(reversed(msgpack.unpackb(made.table).items())))
    path.write_bytes(put_together(replace(made, table=turned), bytes(100), told(GOOD)))
    with pytest.raises(DecryptionError, match="table in canonical msgpack"):
        sq.load(path, unlock=keys.file)
    path.write_bytes(put_together(replace(made, table=bytes(70_000)), bytes(100), told(GOOD)))
    with pytest.raises(DecryptionError, match="possible size"):
        sq.load(path, unlock=keys.file)


def test_point_of_low_order_is_refused(keys: Keys, path: Path) -> None:
    data = table_with(_first(wrapped="00" * 80), keys.recipient)
    path.write_bytes(put_together(replace(sealing.new_seal(keys.file), table=data), bytes(100), told(GOOD)))
    with pytest.raises(DecryptionError, match="none of the given keys"):
        sq.load(path, unlock=keys.private)


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "other spaces": lambda h: None,
    "a later version": lambda h: h["__metadata__"].update(format_version="2"),
    "more metadata": lambda h: h["__metadata__"].update(note="x"),
    "another name": lambda h: h.update(other=h.pop("sealed.data")),
    "another dtype": lambda h: h["seal"].update(dtype="I8"),
    "another shape": lambda h: h["seal"].update(shape=[*h["seal"]["shape"], 1]),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_header_must_be_as_written(change: Callable[[dict[str, Any]], object], keys: Keys, path: Path) -> None:
    """Also where the index is bound to it, which takes the key."""
    made, index = sealing.new_seal(keys.file), told(GOOD)
    header = json.loads(sealing.layout.outer_header((len(made.table), 100, len(index) + 16))[8:])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(put_together(made, bytes(100), index, header=len(text).to_bytes(8, "little") + text))
    with pytest.raises(DecryptionError, match=r"expected (a sealed file's header|metadata|the sections seal)"):
        sq.load(path, unlock=keys.file)


def test_oversized_index_is_refused_before_it_is_read(keys: Keys, path: Path) -> None:
    made = sealing.new_seal(keys.file)
    n_index = 9 << 20
    with path.open("wb") as file:
        file.write(sealing.layout.outer_header((len(made.table), 100, n_index)) + made.table)
        file.truncate(sealing.layout.HEADER_BYTES + len(made.table) + 100 + n_index)
    with pytest.raises(DecryptionError, match="possible size"):
        sq.load(path, unlock=keys.file)


def test_too_many_sections_are_refused(keys: Keys, tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        writer = writing.SegmentWriter(file, sealing.new_seal(keys.file), "x")
        for i in range((1 << 16) + 1):
            writer.announce(str(i) if i else "", 0)
        with pytest.raises(UnsupportedOperationError, match="65536 sections"):
            writer.finish()


def test_one_file_does_not_open_as_two(keys: Keys, path: Path) -> None:
    """GCM alone has files that open under two keys, each to another content."""
    mine, theirs = (sealing.new_seal(to) for to in (keys.file, WORDS))
    fields, others = msgpack.unpackb(mine.table), msgpack.unpackb(theirs.table)
    stanza = wrapping.wrap(WORDS, b"another data key of 32 bytes ...", fields["seal_id"])
    both = content.pack(fields | {"keys": [*fields["keys"], stanza]})
    assert others["commitment"] != fields["commitment"]
    path.write_bytes(put_together(replace(mine, table=both), bytes(100), told(GOOD)))
    with pytest.raises(DecryptionError, match="a data key that the table commits to"):
        sq.load(path, unlock=WORDS)


# Failures leave nothing behind


def test_failed_save_leaves_nothing(keys: Keys, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sq.save(state(3), path, seal=keys.file)
    before = path.read_bytes()

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.SegmentWriter, "finish", fails)
    with pytest.raises(StoreError, match="No space"):
        sq.save(state(), path, seal=keys.file)
    sq.save(state(), path.parent / "plain")
    with pytest.raises(StoreError, match="No space"):
        sq.seal(path.parent / "plain", path, to=keys.file)
    assert path.read_bytes() == before and names(path.parent) == ["plain", path.name]


def test_save_reads_again_what_it_wrote(keys: Keys, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writing.SegmentWriter._write_at

    def flips(self: Any, offset: int, data: bytes) -> None:
        write(self, offset, data[:-1] + bytes([data[-1] ^ 1]) if len(data) == 5056 + 16 else data)

    monkeypatch.setattr(writing.SegmentWriter, "_write_at", flips)
    with pytest.raises(DecryptionError, match=r"generation\.rng\.cpu"):
        sq.save(state(), path, codec="raw", seal=keys.file)
    assert names(path.parent) == []
    sq.save(state(), path.parent / "plain", codec="raw")
    with pytest.raises(DecryptionError, match=r"generation\.rng\.cpu"):
        sq.seal(path.parent / "plain", path, to=keys.file)
    assert names(path.parent) == ["plain"]


def test_state_that_changes_while_it_is_saved_is_refused(
    keys: Keys, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = state()
    promise = files.writing._state_id

    def promised(snapshot: Snapshot, form: Any) -> str:
        found = promise(snapshot, form)
        snapshot.generation.input_ids.add_(1)
        return found

    monkeypatch.setattr(files.writing, "_state_id", promised)
    with pytest.raises(IntegrityError, match="changed while it was saved"):
        sq.save(expected, path, seal=keys.file, verify=False)
    assert names(path.parent) == []


def test_only_plain_snapshots_are_sealed_and_only_sealed_ones_unsealed(
    keys: Keys, path: Path, tmp_path: Path
) -> None:
    sq.save(tiny(), path)
    sq.seal(path, tmp_path / "sealed", to=keys.file)
    with pytest.raises(UnsupportedOperationError, match="unseal it first"):
        sq.seal(tmp_path / "sealed", tmp_path / "twice", to=keys.file)
    with pytest.raises(FormatError, match="a sealed file"):
        unseal(path, tmp_path / "plain", unlock=keys.file)
    with pytest.raises(FormatError, match="another safetensors file"):
        sq.seal(GOLDEN / "predictor-3.safetensors", tmp_path / "twice", to=keys.file)
    with pytest.raises(StoreError):
        sq.seal(tmp_path / "none", tmp_path / "twice", to=keys.file)
    assert names(tmp_path) == sorted([path.name, "sealed"])


def test_sealing_and_unsealing_tell_their_progress(keys: Keys, path: Path, tmp_path: Path) -> None:
    sq.save(state(), path)
    seen: list[tuple[int, int]] = []
    sq.seal(path, tmp_path / "sealed", to=keys.file, progress=lambda *both: seen.append(both))
    assert seen[-1] == (path.stat().st_size,) * 2 and seen == sorted(seen)
    seen.clear()
    unseal(tmp_path / "sealed", tmp_path / "plain", unlock=keys.file, progress=lambda *both: seen.append(both))
    assert seen[-1] == (path.stat().st_size,) * 2 and seen == sorted(seen)


def test_missing_package_is_named(path: Path, monkeypatch: pytest.MonkeyPatch, keys: Keys) -> None:
    sq.save(tiny(), path, seal=keys.file)
    data = path.read_bytes()
    for name in [*sys.modules]:
        if name == "cryptography" or name.startswith("cryptography."):
            monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: sq.save(tiny(), path, seal=keys.file),
        lambda: sq.load(path, unlock=keys.file),
        lambda: create_key_pair(path.parent / "pair"),
    ):
        with pytest.raises(UnsupportedOperationError, match=r"pip install 'semq-state\[seal\]'"):
            call()
    assert path.read_bytes() == data and names(path.parent) == [path.name]


def test_importing_needs_no_cryptography() -> None:
    words = "import sys, semq_state, semq_state.sealing; assert 'cryptography' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_errors_are_ours(sealed: bytes, keys: Keys, path: Path) -> None:
    with pytest.raises(SemqStateError) as refusal:
        sq.load(path, unlock=Passphrase("x"))
    assert isinstance(refusal.value, ValueError) and not isinstance(refusal.value, InvalidTag)
    assert refusal.value.where == str(path) and refusal.value.do


# The command line


def test_commands_seal_and_unseal(cli: Any, path: Path, tmp_path: Path) -> None:
    sq.save(state(), path)
    (tmp_path / "words").write_text("correct horse\nsecond line\n")
    assert cli("keygen", tmp_path / "pair")[:2] == (
        0,
        f"private key: {tmp_path / 'pair'}\npublic key:  {tmp_path / 'pair.pub'}\n",
    )
    assert cli("keygen", "--kind", "key-file", tmp_path / "key")[0] == 0
    out = tmp_path / "sealed"
    to = [
        "--passphrase-file",
        tmp_path / "words",
        "--key-file",
        tmp_path / "key",
        "--recipient",
        tmp_path / "pair.pub",
    ]
    code, said, _ = cli("seal", path, out, *to)
    assert code == 0 and said.startswith("sealed to 3 keys")
    for unlock in (to[:2], to[2:4], ["--private-key", tmp_path / "pair"]):
        assert cli("unseal", out, tmp_path / "plain", *unlock)[0] == 0
        assert (tmp_path / "plain").read_bytes() == path.read_bytes()
        (tmp_path / "plain").unlink()
        code, said, _ = cli("inspect", out, *unlock)
        assert code == 0 and state().state_id in said and ", sealed" in said
        assert cli("verify", out, *unlock)[0] == 0
    code, _, said = cli("inspect", out)
    assert code == 2 and "the file is sealed" in said and "--passphrase-file" in said
    code, _, said = cli("unseal", out, tmp_path / "plain")
    assert code == 2 and "SEMQ_STATE_PASSPHRASE" in said
    code, _, said = cli("keygen", tmp_path / "pair")
    assert code == 2 and "nothing stands yet" in said


def test_passphrase_comes_from_the_environment(
    cli: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sq.save(tiny(), path)
    monkeypatch.setenv("SEMQ_STATE_PASSPHRASE", "correct horse")
    assert cli("seal", path, tmp_path / "sealed")[0] == 0
    assert sq.load(tmp_path / "sealed", unlock=Passphrase("correct horse")).state_id == tiny().state_id
    assert cli("inspect", tmp_path / "sealed")[0] == 0
    assert cli("unseal", tmp_path / "sealed", tmp_path / "plain")[0] == 0
    monkeypatch.setenv("SEMQ_STATE_PASSPHRASE", "wrong")
    code, _, said = cli("inspect", tmp_path / "sealed")
    assert code == 2 and "none of the given keys opens it" in said


def test_passphrase_is_asked_for_twice(
    cli: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sq.save(tiny(), path)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(unlocking.typer, "prompt", lambda *_, **options: asked.append(options) or "typed")
    assert cli("seal", path, tmp_path / "sealed")[0] == cli("unseal", tmp_path / "sealed", tmp_path / "p")[0] == 0
    assert [(told["hide_input"], told["confirmation_prompt"]) for told in asked] == [(True, True), (True, False)]
    assert sq.load(tmp_path / "sealed", unlock=Passphrase("typed")).state_id == tiny().state_id


def test_convert_reads_and_writes_sealed_files(cli: Any, keys: Keys, path: Path, tmp_path: Path) -> None:
    sq.save(state(), path, seal=keys.file)
    create_key_pair(tmp_path / "pair")
    (tmp_path / "words").write_text("correct horse")
    unlock, out = ["--key-file", keys.file.path], tmp_path / "out"
    to = [
        "--seal-to",
        tmp_path / "pair.pub",
        "--seal-to",
        keys.file.path,
        "--seal-passphrase-file",
        tmp_path / "words",
    ]
    assert cli("convert", path, out, "--codec", "exact-max", *unlock, *to)[0] == 0
    for key in (keys.file, PrivateKey.from_pem(tmp_path / "pair"), Passphrase("correct horse")):
        assert sq.inspect(out, unlock=key).codec == "exact-max"
    code, _, said = cli("convert", path, out, *unlock, "--seal-to", tmp_path / "words")
    assert code == 2 and "X25519PublicKey" in said
    code, _, said = cli("convert", path, out, "--codec", "raw", *unlock)
    assert code == 2 and "--plain" in said and sq.inspect(out, unlock=keys.file).codec == "exact-max"
    assert cli("convert", path, out, "--codec", "exact", *unlock, "--plain")[0] == 0
    assert_same(sq.load(out), state())


def test_run_and_resume_keep_sealed_states(cli: Any, folder: str, keys: Keys, path: Path) -> None:
    start = ["run", folder, "--prompt", "w1 w2 w3", "--json"]
    whole = json.loads(cli(*start, "--tokens", "12")[1])
    to, unlock = ["--seal-to", keys.file.path], ["--key-file", keys.file.path]
    code, out, err = cli(*start, "--tokens", "5", "--save", path, *to)
    assert code == 0 and json.loads(out)["sealed"] and json.loads(out)["state_id"] is None, err
    then = path.parent / "then"
    code, out, err = cli("resume", path, "--model", folder, "--tokens", "7", "--json", "--save", then, *to, *unlock)
    assert code == 0 and json.loads(out)["tokens"] == whole["tokens"], err
    assert sq.inspect(then, unlock=keys.file).sealed
    code, _, err = cli("run", folder, "--prompt", "w1", "--tokens", "2", "--save", path, *to)
    assert code == 0 and f"semq-state resume {path}" in err
