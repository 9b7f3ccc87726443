"""Signatures: who vouches for a file is told truly, and no byte of a signed file can change unseen."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_files import assert_same, hidden, names, raw, state
from test_hostile import header_of as header_in
from test_hostile import put, put_together, taken_apart, with_header

import semq_state as sq
from semq_state import content
from semq_state.audit import keys, signing
from semq_state.audit.envelope import PAYLOAD_TYPE, Envelope, parsed, read_envelope, rendered
from semq_state.audit.signatures import check_signature
from semq_state.errors import (
    FormatError,
    IntegrityError,
    SignatureError,
    StoreError,
    UnsupportedOperationError,
)
from semq_state.files import signature as places
from semq_state.sealing import Passphrase, create_key_pair
from semq_state.snapshot import CacheState, GenerationState, Snapshot

KINDS = ("ed25519", "ecdsa")
CODECS = ("exact", "raw")
Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of each kind, and another pair."""
    folder = tmp_path_factory.mktemp("keys")
    for name, kind in (("ed25519", "ed25519"), ("ecdsa", "ecdsa"), ("other", "ed25519")):
        create_key_pair(folder / name, kind)
    return folder


@pytest.fixture
def file(path: Path) -> Path:
    sq.save(least(), path)
    return path


def least() -> Snapshot:
    """A small state, so that each byte of its file can be flipped."""
    generation = GenerationState(
        torch.tensor([[5, 6]]), prompt_length=1, n_cached=1, finished=torch.tensor([False])
    )
    origin = replace(state(2).provenance, config={"n": 1, "limit": float("inf")}, rope={}, adapters={}, versions={})
    return Snapshot(CacheState("none", ()), generation, origin)


def damage(file: Path) -> None:
    """Changes the tokens."""
    data = bytearray(file.read_bytes())
    at = header_in(bytes(data))["generation.input_ids"]["data_offsets"][0]
    data[8 + int.from_bytes(data[:8], "little") + at] ^= 1
    file.write_bytes(data)


def id_of(pairs: Path, name: str) -> str:
    return keys.public_key_of(pairs / f"{name}.pub").keyid


def envelope_at(place: Path) -> Envelope:
    return read_envelope(place.read_bytes(), str(place))


def statement_at(place: Path) -> Any:
    return parsed(envelope_at(place).payload)


def signed_over(payload: bytes, key: Path, kind: str = PAYLOAD_TYPE) -> bytes:
    """An envelope over any payload, with a signature that holds."""
    return signing._with_signature(Envelope(payload, kind, {}), keys.signer_of(key)).to_bytes()


# There and back


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_signed_file_is_vouched_for(kind: str, codec: str, inside: bool, path: Path, pairs: Path) -> None:
    before = sq.save(state(), path, codec=codec)
    plain = path.read_bytes()
    made = sq.sign(path, pairs / kind, inside=inside)
    assert made.key_id == id_of(pairs, kind) and made.state_id == before.state_id
    assert made.path == str(path if inside else f"{path}.intoto.json")
    assert (path.read_bytes() == plain) is not inside
    verdict = sq.verify(path, key=pairs / f"{kind}.pub")
    assert verdict.passed and verdict.vouched is True and verdict.signers == (made.key_id,)
    assert verdict.signature == f"signed by {made.key_id}"
    assert check_signature(path, pairs / f"{kind}.pub") == (made.key_id,)
    assert_same(sq.load(path), state())
    assert sq.inspect(path).as_dict() | {"n_bytes": 0, "ratio": 0} == before.as_dict() | {"n_bytes": 0, "ratio": 0}
    assert hidden(path.parent) == []


def test_what_is_said_without_a_key(file: Path, pairs: Path) -> None:
    verdict = sq.verify(file)
    assert (verdict.passed, verdict.vouched, verdict.signers, verdict.signature) == (True, None, (), "no signature")
    sq.sign(file, pairs / "ed25519")
    verdict = sq.verify(file)
    assert verdict.passed and verdict.vouched is None and verdict.signers == (id_of(pairs, "ed25519"),)
    assert verdict.signature == f"signed by {verdict.signers[0]}, not checked: give a public key"


def test_statement_says_bytes_state_and_origin_and_nothing_private(file: Path, pairs: Path) -> None:
    made = sq.sign(file, pairs / "ed25519")
    told = statement_at(Path(made.path))
    info = sq.inspect(file)
    assert told == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": "snapshot", "digest": {"sha256": made.digest.removeprefix("sha256:")}},
            {"name": "state", "digest": {"sha256": info.state_id.removeprefix("sha256:")}},
        ],
        "predicateType": "urn:semq-state:provenance:v1",
        "predicate": {
            "provenance": {**info.manifest.provenance, "config": {"n": 1, "limit": "Infinity"}},
            "codec": "exact",
            "writer": info.manifest.writer,
            "format_version": 5,
            "content_digest": info.manifest.content_digest,
            "report": {},
        },
    }
    text = Path(made.path).read_bytes() + envelope_at(Path(made.path)).payload
    for private in (file.name, str(file.parent), str(Path.home()), __import__("socket").gethostname()):
        assert private.encode() not in text


def test_digest_beside_is_that_of_the_file(file: Path, pairs: Path) -> None:
    import hashlib

    found = sq.sign(file, pairs / "ed25519").digest
    assert found == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    places.beside(file).unlink()
    inner = sq.sign(file, pairs / "ed25519", inside=True).digest
    n_bytes = header_in(file.read_bytes())["signature"]["shape"][0]
    assert inner == f"sha256:{hashlib.sha256(file.read_bytes()[:-n_bytes]).hexdigest()}"


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_signature_holds_by_the_letter_of_the_format(kind: str, inside: bool, file: Path, pairs: Path) -> None:
    """With nothing of ours and nothing of the library that made it: JSON, SHA-256 and the key."""
    import hashlib

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    place = Path(sq.sign(file, pairs / kind, inside=inside).path)
    data = file.read_bytes()
    if inside:
        start = 8 + int.from_bytes(data[:8], "little") + header_in(data)["signature"]["data_offsets"][0]
        data, envelope = data[:start], json.loads(data[start:].rstrip(b"\0"))
    else:
        envelope = json.loads(place.read_bytes())
    payload = base64.b64decode(envelope["payload"])
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    message = b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload)
    public = serialization.load_pem_public_key((pairs / f"{kind}.pub").read_bytes())
    if kind == "ed25519":
        public.verify(signature, message)
        told: dict[str, Any] = {"keytype": "ed25519", "keyval": {"public": public.public_bytes_raw().hex()}}
    else:
        public.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        told = {"keytype": "ecdsa", "keyval": {"public": (pairs / f"{kind}.pub").read_text()}}
    told["scheme"] = "ed25519" if kind == "ed25519" else "ecdsa-sha2-nistp256"
    # Canonical JSON escapes no line ends.
    text = json.dumps(told, sort_keys=True, separators=(",", ":")).replace("\\n", "\n")
    assert envelope["signatures"][0]["keyid"] == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(payload)["subject"][0]["digest"]["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("codec", CODECS)
def test_safetensors_opens_a_signed_file(codec: str, path: Path, pairs: Path) -> None:
    info = sq.save(state(), path, codec=codec)
    with safe_open(path, framework="pt") as found:
        before = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
    sq.sign(path, pairs / "ed25519", inside=True)
    with safe_open(path, framework="pt") as found:
        after = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        assert found.metadata()["state_id"] == info.state_id
    envelope = read_envelope(after.pop("signature").numpy().tobytes().rstrip(b"\0"), "")
    assert list(envelope.signatures) == [id_of(pairs, "ed25519")]
    assert raw(after) == raw(before)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_older_versions_are_signed_as_version_4(version: int, path: Path, pairs: Path) -> None:
    golden = Path(__file__).parent / "golden" / f"v{version}-exact.safetensors"
    path.write_bytes(golden.read_bytes())
    sq.sign(path, pairs / "ecdsa")
    assert sq.verify(path, key=pairs / "ecdsa.pub").passed
    places.beside(path).unlink()
    sq.sign(path, pairs / "ecdsa", inside=True)
    info = sq.inspect(path)
    assert info.as_dict()["format_version"] == 4 and info.state_id == sq.inspect(golden).state_id
    assert sq.verify(path, key=pairs / "ecdsa.pub").passed
    assert_same(sq.load(path), sq.load(golden))


def test_signed_copy_and_signature_go_where_they_are_told_to(file: Path, pairs: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    sq.sign(file, pairs / "ed25519", out=tmp_path / "elsewhere.json")
    sq.sign(file, pairs / "ed25519", inside=True, out=tmp_path / "copy.safetensors")
    assert file.read_bytes() == before and not places.beside(file).exists()
    assert statement_at(tmp_path / "elsewhere.json")["subject"][1]["name"] == "state"
    assert sq.verify(tmp_path / "copy.safetensors", key=pairs / "ed25519.pub").passed


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_signing_twice_gives_the_same_bytes(inside: bool, file: Path, pairs: Path) -> None:
    place = Path(sq.sign(file, pairs / "ed25519", inside=inside).path)
    before = place.read_bytes()
    sq.sign(file, pairs / "ed25519", inside=inside)
    assert place.read_bytes() == before


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_two_may_sign(inside: bool, file: Path, pairs: Path) -> None:
    both = [pairs / "ed25519.pub", pairs / "ecdsa.pub"]
    sq.sign(file, pairs / "ed25519", inside=inside)
    assert sq.verify(file, key=both).vouched is False
    sq.sign(file, pairs / "ecdsa", inside=inside)
    verdict = sq.verify(file, key=both)
    assert verdict.passed and verdict.signers == tuple(sorted(id_of(pairs, kind) for kind in KINDS))
    assert verdict.signature == f"signed by {id_of(pairs, 'ed25519')}, {id_of(pairs, 'ecdsa')}"
    assert all(sq.verify(file, key=key).passed for key in both)
    assert not sq.verify(file, key=[*both, pairs / "other.pub"]).passed


def test_one_inside_and_one_beside(file: Path, pairs: Path) -> None:
    sq.sign(file, pairs / "ed25519", inside=True)
    sq.sign(file, pairs / "ecdsa")
    assert sq.verify(file, key=[pairs / "ed25519.pub", pairs / "ecdsa.pub"]).passed
    with pytest.raises(SignatureError, match=r"no signatures beside .*intoto\.json"):
        sq.sign(file, pairs / "other", inside=True)
    assert sq.verify(file, key=[pairs / "ed25519.pub", pairs / "ecdsa.pub"]).passed


def test_section_of_signatures_fills_up(file: Path, pairs: Path, tmp_path: Path) -> None:
    sq.sign(file, pairs / "ed25519", inside=True)
    for i in range(10):
        create_key_pair(tmp_path / f"key{i}", "ed25519")
        before = file.read_bytes()
        try:
            sq.sign(file, tmp_path / f"key{i}", inside=True)
        except SignatureError as error:
            assert "sign beside the file" in str(error) and file.read_bytes() == before
            break
    assert 2 <= i < 9
    assert sq.verify(file, key=[pairs / "ed25519.pub", *(tmp_path / f"key{k}.pub" for k in range(i))]).passed


# Sealed files


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_signature_holds_for_the_file_once_it_is_sealed(
    inside: bool, file: Path, pairs: Path, tmp_path: Path
) -> None:
    key = Passphrase("open sesame")
    sq.sign(file, pairs / "ed25519", inside=inside)
    sealed = tmp_path / "sealed.safetensors"
    sq.seal(file, sealed, to=key)
    if not inside:
        places.beside(sealed).write_bytes(places.beside(file).read_bytes())
    verdict = sq.verify(sealed, unlock=key, key=pairs / "ed25519.pub")
    assert verdict.passed and verdict.vouched is True
    assert check_signature(sealed, pairs / "ed25519.pub", unlock=key)


def test_sealed_file_is_signed_beside_it_only(file: Path, pairs: Path, tmp_path: Path) -> None:
    key, sealed = Passphrase("open sesame"), tmp_path / "sealed.safetensors"
    sq.seal(file, sealed, to=key)
    with pytest.raises(UnsupportedOperationError, match="before it is sealed"):
        sq.sign(sealed, pairs / "ecdsa", inside=True, unlock=key)
    sq.sign(sealed, pairs / "ecdsa", unlock=key)
    assert sq.verify(sealed, unlock=key, key=pairs / "ecdsa.pub").passed
    places.beside(file).write_bytes(places.beside(sealed).read_bytes())
    assert sq.verify(file, key=pairs / "ecdsa.pub").passed


# Refusals, each in its own words


def refused(file: Path, key: Path, words: str, *, whole: bool = True) -> None:
    """The check raises it, and `verify` has it as its verdict."""
    with pytest.raises(SignatureError, match=words):
        check_signature(file, key)
    verdict = sq.verify(file, key=key)
    assert verdict.vouched is False and not verdict.passed and verdict.whole is whole
    assert verdict.signature


def test_unsigned_file_is_refused(file: Path, pairs: Path) -> None:
    refused(file, pairs / "ed25519.pub", "expected a signature, found none, inside the file or beside it")


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_signature_by_another_key_is_refused(inside: bool, file: Path, pairs: Path) -> None:
    sq.sign(file, pairs / "other", inside=inside)
    for kind in KINDS:
        refused(
            file,
            pairs / f"{kind}.pub",
            f"by key {id_of(pairs, kind)}, found another key's: {id_of(pairs, 'other')}",
        )


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_signature_under_the_id_of_another_key_is_refused(inside: bool, file: Path, pairs: Path) -> None:
    made = sq.sign(file, pairs / "other", inside=inside)
    data = Path(made.path).read_bytes()
    Path(made.path).write_bytes(data.replace(made.key_id.encode(), id_of(pairs, "ed25519").encode()))
    refused(file, pairs / "ed25519.pub", "one that does not hold")


def test_signature_over_another_file_is_refused(file: Path, pairs: Path, tmp_path: Path) -> None:
    sq.sign(file, pairs / "ed25519")
    other = tmp_path / "other.safetensors"
    sq.save(least(), other, codec="raw")
    places.beside(other).write_bytes(places.beside(file).read_bytes())
    refused(other, pairs / "ed25519.pub", "about a file of SHA-256 .* found other bytes")


def test_signature_inside_is_over_all_bytes_before_it(file: Path, pairs: Path) -> None:
    sq.sign(file, pairs / "ed25519", inside=True)
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"model":"tiny', b'"model":"huge'))
    assert sq.verify(file).passed
    refused(file, pairs / "ed25519.pub", "found other bytes")


STATEMENTS: dict[str, tuple[Change, str]] = {
    "another type of statement": (put("_type", value="https://in-toto.io/Statement/v2"), "another type"),
    "another type of predicate": (put("predicateType", value="https://slsa.dev/provenance/v1"), "found another, "),
    "other bytes": (put("subject", 0, "digest", "sha256", value="0" * 64), "found other bytes"),
    "another state": (
        put("subject", 1, "digest", "sha256", value="0" * 64),
        "about the state sha256:.* found another",
    ),
    "subjects the other way round": (lambda s: s["subject"].reverse(), "found other bytes"),
    "another name": (put("subject", 0, "name", value="x"), "found other bytes"),
    "a weaker digest": (put("subject", 0, "digest", value={"md5": "0" * 32}), "found other bytes"),
    "one subject": (lambda s: s["subject"].pop(), "subjects snapshot and state"),
    "three subjects": (lambda s: s["subject"].append({}), "subjects snapshot and state"),
    "no subjects": (put("subject", value=None), "subjects snapshot and state"),
    "a field more": (put("more", value=1), "subjects snapshot and state"),
    "a field less": (lambda s: s.pop("predicate"), "subjects snapshot and state"),
    "another model": (put("predicate", "provenance", "model_name", value="x"), "another provenance"),
    "other weights": (put("predicate", "provenance", "weights", value="x"), "another provenance"),
    "a number as a float": (put("predicate", "provenance", "config", "n", value=1.0), "another provenance"),
    "a number as a truth": (put("predicate", "provenance", "config", "n", value=True), "another provenance"),
    "another codec": (put("predicate", "codec", value="raw"), "another provenance"),
}


@pytest.mark.parametrize("case", STATEMENTS.values(), ids=STATEMENTS)
def test_statement_that_says_something_else_is_refused(case: tuple[Change, str], file: Path, pairs: Path) -> None:
    place = Path(sq.sign(file, pairs / "ed25519").path)
    told = statement_at(place)
    case[0](told)
    place.write_bytes(signed_over(rendered(told), pairs / "ed25519"))
    refused(file, pairs / "ed25519.pub", case[1])
    with pytest.raises(SignatureError, match=case[1]):  # and nobody adds a signature to it
        sq.sign(file, pairs / "other")


PAYLOADS = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "not UTF-8": b"\xff",
    "a name twice": b'{"_type":1,"_type":1}',
    "no number": b'{"_type":NaN,"subject":[1,2],"predicateType":1,"predicate":1}',
    "a number without end": b'{"_type":1e999,"subject":[1,2],"predicateType":1,"predicate":1}',
    "a surrogate": b'{"_type":"\\ud800","subject":[1,2],"predicateType":1,"predicate":1}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_odd_payload_is_refused(payload: bytes, file: Path, pairs: Path) -> None:
    places.beside(file).write_bytes(signed_over(payload, pairs / "ecdsa"))
    refused(file, pairs / "ecdsa.pub", "in-toto statement with the subjects")


def test_statement_that_says_two_things_is_refused(file: Path, pairs: Path) -> None:
    place = Path(sq.sign(file, pairs / "ed25519").path)
    payload = envelope_at(place).payload
    place.write_bytes(signed_over(b'{"_type":"x",' + payload[1:], pairs / "ed25519"))
    refused(file, pairs / "ed25519.pub", "a name stands twice")


def test_payload_of_another_type_is_refused(file: Path, pairs: Path) -> None:
    place = Path(sq.sign(file, pairs / "ed25519").path)
    place.write_bytes(signed_over(envelope_at(place).payload, pairs / "ed25519", "text/plain"))
    refused(file, pairs / "ed25519.pub", "found another type, 'text/plain'")


def test_payload_type_is_signed_as_well(file: Path, pairs: Path) -> None:
    place = Path(sq.sign(file, pairs / "ed25519").path)
    told = envelope_at(place)
    place.write_bytes(
        replace(
            read_envelope(signed_over(told.payload, pairs / "ed25519", "text/plain"), ""), payload_type=PAYLOAD_TYPE
        ).to_bytes()
    )
    refused(file, pairs / "ed25519.pub", "one that does not hold")


def test_edited_payload_is_refused(file: Path, pairs: Path) -> None:
    place = Path(sq.sign(file, pairs / "ed25519").path)
    told = envelope_at(place)
    edited = told.payload.replace(b"tiny llama", b"huge llama")
    assert edited != told.payload
    place.write_bytes(replace(told, payload=edited).to_bytes())
    refused(file, pairs / "ed25519.pub", "one that does not hold")


def _edited(change: Change) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        told = json.loads(data)
        change(told)
        return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()

    return edit


ENVELOPES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "cut": lambda data: data[:-1],
    "more behind": lambda data: data + b" ",
    "a line's end": lambda data: data + b"\n",
    "a space": lambda data: data.replace(b":", b": ", 1),
    "indented": lambda data: json.dumps(json.loads(data), indent=1, sort_keys=True).encode(),
    "another order": lambda data: json.dumps(
        dict(reversed(json.loads(data).items())), separators=(",", ":")
    ).encode(),
    "a name twice": lambda data: data.replace(b'{"payload":', b'{"payload":"","payload":', 1),
    "an escape": lambda data: data.replace(b"keyid", b"\\u006beyid", 1),
    "not UTF-8": lambda data: data.replace(b"keyid", b"keyi\xff", 1),
    "a list": lambda data: b"[]",
    "a number": lambda data: b"1",
    "no number": lambda data: b"NaN",
    "deep": lambda data: b"[" * 200_000,
    "no signatures": _edited(put("signatures", value=[])),
    "signatures of another kind": _edited(put("signatures", value={})),
    "a signature that is text": _edited(put("signatures", value=["x"])),
    "a signature less a field": _edited(lambda d: d["signatures"][0].pop("sig")),
    "a signature with a field more": _edited(put("signatures", 0, "cert", value="x")),
    "the same signature twice": _edited(lambda d: d["signatures"].append(d["signatures"][0])),
    "a key id in capitals": _edited(lambda d: d["signatures"][0].update(keyid=d["signatures"][0]["keyid"].upper())),
    "no key id": _edited(put("signatures", 0, "keyid", value="")),
    "a key id that is none": _edited(put("signatures", 0, "keyid", value=None)),
    "a field more": _edited(put("more", value=1)),
    "a payload that is none": _edited(put("payload", value=None)),
    "a type that is none": _edited(lambda d: d.pop("payloadType")),
    "other base64": _edited(lambda d: d.update(payload=d["payload"].replace("A", "-", 1))),
    "base64 in lines": _edited(lambda d: d.update(payload=d["payload"][:64] + "\n" + d["payload"][64:])),
    "base64 without its end": _edited(
        lambda d: d["signatures"][0].update(sig=d["signatures"][0]["sig"].rstrip("="))
    ),
    "base64 with other unused bits": _edited(
        lambda d: d["signatures"][0].update(sig=d["signatures"][0]["sig"].replace("==", "")[:-1] + "_==")
    ),
}


@pytest.mark.parametrize("case", ENVELOPES.values(), ids=ENVELOPES)
def test_envelope_in_another_rendering_is_refused(case: Callable[[bytes], bytes], file: Path, pairs: Path) -> None:
    place = Path(sq.sign(file, pairs / "ed25519").path)
    before = place.read_bytes()
    place.write_bytes(case(before))
    assert place.read_bytes() != before
    refused(file, pairs / "ed25519.pub", "a DSSE envelope in its one canonical rendering")
    verdict = sq.verify(file)
    assert verdict.passed and verdict.vouched is None and "canonical" in verdict.signature
    with pytest.raises(SignatureError, match="canonical"):
        sq.sign(file, pairs / "other")
    assert place.read_bytes() == case(before)


def test_signatures_in_another_order_are_refused(file: Path, pairs: Path) -> None:
    for kind in KINDS:
        place = Path(sq.sign(file, pairs / kind).path)
    told = json.loads(place.read_bytes())
    told["signatures"].reverse()
    place.write_bytes(json.dumps(told, sort_keys=True, separators=(",", ":")).encode())
    refused(file, pairs / "ed25519.pub", "canonical")


def test_unused_bits_of_base64_are_refused(file: Path, pairs: Path) -> None:
    place = Path(sq.sign(file, pairs / "ed25519").path)
    told = json.loads(place.read_bytes())
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    sig = told["signatures"][0]["sig"]
    assert sig.endswith("==")
    other = sig[:-3] + alphabet[alphabet.index(sig[-3]) ^ 1] + "=="
    assert base64.b64decode(other) == base64.b64decode(sig)
    place.write_bytes(place.read_bytes().replace(sig.encode(), other.encode()))
    refused(file, pairs / "ed25519.pub", "canonical")


def test_huge_file_beside_is_refused_unread(file: Path, pairs: Path) -> None:
    with places.beside(file).open("wb") as handle:
        handle.truncate(1 << 40)
    refused(file, pairs / "ed25519.pub", "at most 1048576 bytes, found 1099511627776")


def test_damaged_file_is_not_signed(file: Path, pairs: Path) -> None:
    damage(file)
    data = file.read_bytes()
    for inside in (False, True):
        with pytest.raises(IntegrityError, match=r"generation\.input_ids"):
            sq.sign(file, pairs / "ed25519", inside=inside)
    assert file.read_bytes() == data and names(file.parent) == [file.name]


def test_signatures_of_other_bytes_are_not_added_to(file: Path, pairs: Path) -> None:
    place = Path(sq.sign(file, pairs / "ed25519").path)
    before = place.read_bytes()
    sq.save(least(), file, codec="raw")
    with pytest.raises(SignatureError, match="found other bytes"):
        sq.sign(file, pairs / "ecdsa")
    assert place.read_bytes() == before


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_nothing_changes_where_the_folder_refuses(
    inside: bool, file: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        sq.sign(file, pairs / "ed25519", inside=inside)
    assert file.read_bytes() == before and names(file.parent) == [file.name]


# Keys


def test_keys_of_another_kind_are_refused(file: Path, pairs: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519

    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    sq.sign(file, pairs / "ed25519")
    for made in (
        rsa.generate_private_key(65537, 2048),
        x25519.X25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256K1()),
    ):
        private, public = tmp_path / "private", tmp_path / "public"
        private.write_bytes(made.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
        public.write_bytes(made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
        with pytest.raises(SignatureError, match="Ed25519 or ECDSA key, found another type"):
            sq.sign(file, private)
        with pytest.raises(SignatureError, match="Ed25519 or ECDSA"):
            sq.verify(file, key=public)


@pytest.mark.parametrize("curve", ["SECP384R1", "SECP521R1"])
def test_wider_curves_sign_too(curve: str, file: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    made = ec.generate_private_key(getattr(ec, curve)())
    (tmp_path / "key").write_bytes(made.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    (tmp_path / "key.pub").write_bytes(
        made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    sq.sign(file, tmp_path / "key", inside=True)
    assert sq.verify(file, key=tmp_path / "key.pub").passed


def test_files_that_are_no_keys_are_refused(file: Path, pairs: Path, tmp_path: Path) -> None:
    for data in (b"", b"x", b"-----BEGIN PUBLIC KEY-----\n", b"\xff" * 100_000):
        (tmp_path / "key").write_bytes(data)
        with pytest.raises(SignatureError, match="a private key in PEM"):
            sq.sign(file, tmp_path / "key")
        with pytest.raises(SignatureError, match="a public key in PEM"):
            sq.verify(file, key=tmp_path / "key")
    with pytest.raises(SignatureError, match="a public key in PEM"):
        sq.verify(file, key=pairs / "ed25519")
    with pytest.raises(SignatureError, match="a private key in PEM"):
        sq.sign(file, pairs / "ed25519.pub")
    with pytest.raises(SignatureError, match="at least one public key"):
        sq.verify(file, key=[])
    for missing in (tmp_path / "no", tmp_path):
        with pytest.raises(StoreError, match="a key's file"):
            sq.sign(file, missing)
        with pytest.raises(StoreError, match="a key's file"):
            sq.verify(file, key=missing)


@pytest.fixture
def locked(pairs: Path, tmp_path: Path) -> Path:
    """The private key, encrypted."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key((pairs / "ed25519").read_bytes(), None)
    encrypted = serialization.BestAvailableEncryption(b"swordfish")
    data = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted)
    (tmp_path / "locked").write_bytes(data)
    return tmp_path / "locked"


def test_encrypted_key_needs_its_passphrase(locked: Path, file: Path, pairs: Path) -> None:
    with pytest.raises(SignatureError, match="a passphrase, found none"):
        sq.sign(file, locked)
    for wrong in ("x", "", lambda: "x"):
        with pytest.raises(SignatureError, match="its passphrase"):
            sq.sign(file, locked, passphrase=wrong)
    sq.sign(file, locked, passphrase="swordfish")
    sq.sign(file, locked, passphrase=lambda: "swordfish")
    assert sq.verify(file, key=pairs / "ed25519.pub").passed
    sq.sign(file, pairs / "ecdsa", passphrase=lambda: pytest.fail("asked"))


@pytest.mark.parametrize("package", ["securesystemslib.signer", "cryptography"])
def test_missing_packages_are_named(package: str, file: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sq.sign(file, pairs / "ed25519")
    monkeypatch.setitem(sys.modules, package, None)
    for act in (
        lambda: sq.sign(file, pairs / "ed25519"),
        lambda: sq.verify(file, key=pairs / "ed25519.pub"),
        lambda: check_signature(file, pairs / "ed25519.pub"),
    ):
        with pytest.raises(UnsupportedOperationError, match=r"pip install 'semq-state\[sign\]'"):
            act()
    assert sq.verify(file).signers and sq.load(file).state_id == least().state_id


# The section, against the rules of the format


@pytest.fixture
def parts(file: Path, pairs: Path) -> tuple[Any, bytes]:
    """Header and data part of a file that is signed inside."""
    sq.sign(file, pairs / "ed25519", inside=True)
    data = file.read_bytes()
    return header_in(data), data[8 + int.from_bytes(data[:8], "little") :]


def _version(version: int) -> Callable[[Any, bytes], tuple[Any, bytes]]:
    def change(header: Any, body: bytes) -> tuple[Any, bytes]:
        number = b"format_version%c"
        assert body.count(number % 5) == 1
        return header, body.replace(number % 5, number % version)

    return change


def _first(header: Any, body: bytes) -> tuple[Any, bytes]:
    n_bytes = header["signature"]["shape"][0]
    moved = {
        name: {**entry, "data_offsets": [at + n_bytes for at in entry["data_offsets"]]}
        for name, entry in header.items()
        if name not in ("signature", "__metadata__")
    }
    moved["signature"] = {**header["signature"], "data_offsets": [0, n_bytes]}
    return {**moved, "__metadata__": header["__metadata__"]}, body[-n_bytes:] + body[:-n_bytes]


def _entry(**changed: Any) -> Callable[[Any, bytes], tuple[Any, bytes]]:
    return lambda header, body: ({**header, "signature": {**header["signature"], **changed}}, body)


def _resized(n_bytes: int) -> Callable[[Any, bytes], tuple[Any, bytes]]:
    def change(header: Any, body: bytes) -> tuple[Any, bytes]:
        start, stop = header["signature"]["data_offsets"]
        entry = {**header["signature"], "shape": [n_bytes], "data_offsets": [start, start + n_bytes]}
        return {**header, "signature": entry}, body[:stop][: start + n_bytes].ljust(start + n_bytes, b"\0")

    return change


def _called(name: str) -> Callable[[Any, bytes], tuple[Any, bytes]]:
    return lambda header, body: ({name if k == "signature" else k: v for k, v in header.items()}, body)


SECTIONS: dict[str, tuple[type[FormatError], Callable[[Any, bytes], tuple[Any, bytes]], str]] = {
    "in a file of version 3": (IntegrityError, _version(3), "named once by the manifest"),
    "not the last": (FormatError, _first, "the signature as the last section"),
    "I8": (FormatError, _entry(dtype="I8"), "U8"),
    "of two dimensions": (FormatError, lambda h, b: _entry(shape=[1, *h["signature"]["shape"]])(h, b), "U8"),
    "empty": (FormatError, _resized(0), "U8"),
    "too large": (FormatError, _resized((1 << 20) + 1), "U8"),
    "of another name": (IntegrityError, _called("Signature"), "named once by the manifest"),
}


@pytest.mark.parametrize("case", SECTIONS.values(), ids=SECTIONS)
def test_section_that_breaks_a_rule_is_refused(
    case: tuple[type[FormatError], Callable[[Any, bytes], tuple[Any, bytes]], str],
    parts: tuple[Any, bytes],
    file: Path,
    pairs: Path,
) -> None:
    kind, change, words = case
    header, body = change(*parts)
    file.write_bytes(with_header(json.dumps(header).encode(), body))
    for read in (sq.load, sq.inspect):
        with pytest.raises(kind, match=words):
            read(file)
    verdict = sq.verify(file, key=pairs / "ed25519.pub")
    assert list(verdict.failures) == ["file"] and verdict.vouched is False


def test_largest_section_is_taken(parts: tuple[Any, bytes], file: Path, pairs: Path) -> None:
    header, body = _resized(1 << 20)(*parts)
    file.write_bytes(with_header(json.dumps(header).encode(), body))
    assert sq.verify(file).passed and sq.load(file).state_id == least().state_id
    refused(file, pairs / "ed25519.pub", "found other bytes")


def test_tensor_in_the_section_of_the_signature_is_refused(path: Path) -> None:
    sq.save(least(), path)
    draft = taken_apart(path.read_bytes())
    coded = draft["sections"].pop("generation.input_ids")
    assert (coded["dtype"], len(coded["shape"])) == ("U8", 1)
    draft["manifest"]["tensors"]["generation.input_ids"]["sections"][0][0] = "signature"
    for version in (3, 4):
        draft["manifest"]["format_version"] = version
        data = put_together(draft)
        header, body = header_in(data), data[8 + int.from_bytes(data[:8], "little") :]
        header["signature"] = {**coded, "data_offsets": [len(body), len(body) + len(coded["data"])]}
        body += header["signature"].pop("data")
        path.write_bytes(with_header(json.dumps(header).encode(), body))
        if version == 3:  # where the name means nothing
            assert sq.load(path).state_id == least().state_id
        else:
            with pytest.raises(IntegrityError, match="one named twice"):
                sq.load(path)


def test_damage_to_the_section_is_named_without_a_key(parts: tuple[Any, bytes], file: Path) -> None:
    data = file.read_bytes()
    for at in (len(data) - 1, len(data) - header_in(data)["signature"]["shape"][0]):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        verdict = sq.verify(file)
        assert list(verdict.failures) == ["signature"] and not verdict.passed


# Every byte


@pytest.mark.parametrize("mask", [0x01, 0xFF], ids=hex)
@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_no_flipped_byte_goes_unnoticed(
    inside: bool, mask: int, file: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "n_workers", lambda: 1)
    sq.sign(file, pairs / "ed25519", inside=inside)
    key = pairs / "ed25519.pub"
    flipped = 0
    both = [file] if inside else [file, places.beside(file)]
    for place in both:
        with place.open("r+b", buffering=0) as handle:
            for at, byte in enumerate(place.read_bytes()):
                handle.seek(at)
                handle.write(bytes([byte ^ mask]))
                verdict = sq.verify(file, key=key)
                assert not verdict.passed and verdict.vouched is False, (place, at)
                handle.seek(at)
                handle.write(bytes([byte]))
                flipped += 1
    assert sq.verify(file, key=key).passed
    assert flipped == sum(place.stat().st_size for place in both)


# The command line


def test_sign_and_check_from_the_command_line(cli: Any, file: Path, pairs: Path) -> None:
    key = pairs / "ecdsa.pub"
    id, whole = id_of(pairs, "ecdsa"), f"whole: 2 sections, {least().state_id}\n"
    none = (
        f"{file}: expected a signature, found none, inside the file or beside it; "
        "ask whoever made the file to sign it\n"
    )
    assert cli("verify", file) == (0, f"{whole}whole, but nobody vouches for it: no signature\n", "")
    assert cli("verify", file, "--key", key) == (1, f"{whole}whole, but nobody vouches for it: {none}", "")
    assert cli("check-signature", file, "--key", key) == (1, none, "")
    code, out, _ = cli("sign", file, "--key", pairs / "ecdsa")
    assert code == 0 and out.startswith(f"signed by {id} in {file}.intoto.json: sha256:")
    assert cli("verify", file, "--key", key) == (0, f"{whole}signed by {id}\n", "")
    assert cli("check-signature", file, "--key", key) == (0, f"signed by {id}\n", "")
    assert cli("verify", file)[1] == f"{whole}signed by {id}, not checked: give a public key\n"
    code, out, _ = cli("verify", file, "--key", pairs / "other.pub")
    assert code == 1 and "whole, but nobody vouches for it: " in out and "another key's" in out
    answer = json.loads(cli("verify", file, "--key", key, "--key", pairs / "other.pub", "--json")[1])
    assert (answer["passed"], answer["vouched"], answer["signers"]) == (False, False, [id])
    answer = json.loads(cli("check-signature", file, "--key", key, "--json")[1])
    assert answer == {"passed": True, "signers": [id], "words": ""}
    damage(file)
    code, out, _ = cli("verify", file, "--key", key)
    assert code == 1 and out.startswith("damaged: 1 failed\n  generation.input_ids: ") and "whole" not in out
    assert f"\nnobody vouches for it: {file}.intoto.json: expected a statement about a file of SHA-256 " in out


def test_sign_inside_from_the_command_line(cli: Any, file: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "signed.safetensors"
    code, words, _ = cli("sign", file, "--key", pairs / "ed25519", "--inside", "--out", out, "--json")
    assert code == 0 and json.loads(words)["path"] == str(out)
    assert cli("verify", out, "--key", pairs / "ed25519.pub")[0] == 0


def test_what_cannot_be_evaluated_is_exit_code_2(
    cli: Any, file: Path, pairs: Path, locked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (
        ("check-signature", file, "--key", pairs / "ed25519"),
        ("verify", file, "--key", pairs / "no"),
        ("sign", file, "--key", pairs / "ed25519.pub"),
        ("check-signature", pairs / "no", "--key", pairs / "ed25519.pub"),
    ):
        code, out, err = cli(*arguments)
        assert (code, out) == (2, "") and err.startswith("semq-state: ") and len(err.splitlines()) == 1
    monkeypatch.delenv("SEMQ_STATE_KEY_PASSPHRASE", raising=False)
    code, _, err = cli("sign", file, "--key", locked)
    assert code == 2 and "SEMQ_STATE_KEY_PASSPHRASE" in err
    monkeypatch.setenv("SEMQ_STATE_KEY_PASSPHRASE", "swordfish")
    assert cli("sign", file, "--key", locked)[0] == 0
    assert cli("verify", file, "--key", pairs / "ed25519.pub")[0] == 0
