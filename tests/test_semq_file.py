"""`.semq` files: the documented bytes and digests; damaged and hostile files are refused by name."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semq_state.codecs.semq_rules import AbstractOperator, Orbit, Phase, Quant
from semq_state.errors import FormatError, IntegrityError, StoreError, UnsupportedOperationError
from semq_state.interchange import SemqFile, read_semq, write_semq

CONFIG = bytes.fromhex("02040000000400000000000000")
EMPTY = bytes.fromhex(
    "53454d510200"
    "02040000000400000000000000"
    "00" + "00" * 8 + "00000000"
    "4528e8a0422f5cde968847e021c85b4e6e78ce68da9e92b2981c62dd48f78f4a"
    "ef4d1522eb158aa9b6b83cd5d51f80ea2cc59ac3aeb45b69a1c28c99375b55b9"
)  # fmt: skip
DOCS = np.array([[0.6, 0.8, 0, 0], [0, 0.6, 0.8, 0], [0, 0, 0.6, 0.8]], np.float32)
MANIFEST = {"encoder": "example-encoder", "encoder_revision": "1"}


def numbers(*ids: int) -> np.ndarray:
    return np.array(ids, np.uint64)


def docs(vectors: np.ndarray = DOCS) -> SemqFile:
    return SemqFile.from_vectors(["doc-1", "doc-2", "doc-3"], vectors, operator=Quant(4, 4), manifest=MANIFEST)


def raw_file(
    ids: bytes, rows: bytes, *, n: int, kind: int = 0, config: bytes = CONFIG, manifest: bytes = b"\0" * 4
) -> bytes:
    """A file of these sections with the digests that belong to them."""
    content = config + struct.pack("<BQ", kind, n) + ids + rows
    digest = hashlib.sha256(content).digest()
    return b"SEMQ\2\0" + content + manifest + digest + hashlib.sha256(digest + manifest).digest()


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def pairs(*texts: bytes, n: int | None = None) -> bytes:
    parts = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return struct.pack("<I", len(texts) // 2 if n is None else n) + parts


def read(data: bytes, folder: Path) -> SemqFile:
    path = folder / "x.semq"
    path.write_bytes(data)
    return read_semq(path)


def test_the_empty_file_byte_by_byte(tmp_path: Path) -> None:
    file = SemqFile(Quant(4, 4), numbers(), np.empty((0, 2), np.uint8))
    write_semq(tmp_path / "a.semq", file)
    assert len(EMPTY) == 96
    assert (tmp_path / "a.semq").read_bytes() == EMPTY
    assert file.content_digest + file.state_id == EMPTY[-64:].hex()
    assert read_semq(tmp_path / "a.semq") == file


def test_one_row(tmp_path: Path) -> None:
    file = SemqFile(Quant(4, 4), numbers(7), np.array([[7, 7]], np.uint8), {"encoder": "x"})
    assert file.content_digest == "1a3d8e8bfbf3429525d0bc11e18a17b75ea49af40b6b441f6863444f71230489"
    assert file.state_id == "07d119f5a0a76de95bd4b41110d6005e6fc38cfc398421dd15df2be68adf9f85"
    assert file.symbols().tolist() == [[7, 0, 4, 3]]
    write_semq(tmp_path / "a.semq", file)
    assert (tmp_path / "a.semq").read_bytes() == raw_file(u64(7), b"\7\7", n=1, manifest=pairs(b"encoder", b"x"))


def test_the_documented_example_and_its_difference() -> None:
    file, other = docs(), docs(np.array([*DOCS[:2], [0.8, 0, 0, 0.6]], np.float32))
    assert file.state_id.startswith("6e6f8a89bae4")
    differs = file.symbols() != other.symbols()
    assert differs.sum(axis=1).tolist() == [0, 0, 3]
    assert file != other
    assert file.decoded()[0].tolist() == [0.625, 0.875, 0.125, 0.125]


FILES: dict[str, tuple[AbstractOperator, Any]] = {
    "quant": (Quant(61, 8), range(9)),
    "quant-3": (Quant(61, 3), [2**64 - 1, 5, 2**63, 0, 1, 2, 3, 4, 6]),
    "phase": (Phase(60, 16), [f"L03/K/h05/t{i:06}" for i in range(9)]),
    "phase-256": (Phase(62, 256), ["ü", "z", "𝄞", "\uffff", "zz", "a" * 4096, "\x01", "Z", "y"]),
    "orbit": (Orbit(60), np.arange(9, 0, -1)),
}
each_file = pytest.mark.parametrize(("operator", "ids"), FILES.values(), ids=FILES)


@each_file
def test_files_come_back(operator: AbstractOperator, ids: Any, tmp_path: Path) -> None:
    vectors = torch.nn.functional.normalize(
        torch.randn(9, operator.dim, generator=torch.Generator().manual_seed(0)), dim=1
    )
    file = SemqFile.from_vectors(list(ids), vectors.numpy(), operator=operator, manifest={"b": "ü", "a": ""})
    write_semq(tmp_path / "a.semq", file)
    back = read_semq(tmp_path / "a.semq")
    assert back == file
    assert hash(back) == hash(file)
    assert back.operator == operator
    assert back.manifest == {"a": "", "b": "ü"}
    assert (back.rows == file.rows).all()
    position = {str(each): i for i, each in enumerate(ids)}
    order = [position[str(each)] for each in back.ids]
    assert (back.symbols() == operator.encode(vectors.numpy())[order]).all()
    if isinstance(back.ids, tuple):
        assert list(back.ids) == sorted(back.ids, key=lambda each: each.encode())
    shuffled = SemqFile(operator, back.ids[::-1], back.rows[::-1], dict(back.manifest))
    assert shuffled == file
    with pytest.raises(ValueError, match="read-only"):
        back.rows[0, 0] = 1


def test_digests_cover_what_they_should() -> None:
    file = docs()
    other = SemqFile(file.operator, file.ids, file.rows, {})
    assert file.content_digest == other.content_digest
    assert file.state_id != other.state_id
    assert file != object()
    assert SemqFile(file.operator, ("doc-1", "doc-2", "doc-4"), file.rows).content_digest != file.content_digest


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_semq(tmp_path / "a.semq", docs())
    data = (tmp_path / "a.semq").read_bytes()
    for n_bytes in range(len(data)):
        with pytest.raises(FormatError, match=r"x\.semq: (framing|ids|rows|manifest|content_digest)"):
            read(data[:n_bytes], tmp_path)
    with pytest.raises(FormatError, match="manifest: expected an end after 2 pairs, found 1 bytes more"):
        read(data + b"\0", tmp_path)


def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    write_semq(tmp_path / "a.semq", docs())
    data = (tmp_path / "a.semq").read_bytes()
    rows = 28 + 8 * 4 + 15
    manifest = rows + 3 * 2
    for i in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        at = i // 8
        with pytest.raises(FormatError) as caught:
            read(bytes(flipped), tmp_path)
        section = caught.value.where.partition("x.semq: ")[2]
        if at < 6:
            assert section == "framing"
        elif at in range(28, rows):
            assert section in ("ids", "rows", "manifest", "content_digest")
        elif at in range(rows, manifest):
            assert section == "content_digest"
            assert isinstance(caught.value, IntegrityError)
        elif at in range(manifest, len(data) - 64):
            assert section in ("manifest", "state_id")
        elif at >= len(data) - 64:
            assert section == ("content_digest" if at < len(data) - 32 else "state_id")


def config(operator: int, dim: int, parameter: int, revision: int = 0) -> bytes:
    return struct.pack("<BIII", operator, dim, parameter, revision)


TEXTS = {"kind": 1, "n": 2, "rows": b"\0" * 4}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "version 1": (b"SEMQ\1\0" + EMPTY[6:], "framing: .*version 2"),
    "magic": (b"SEMR" + EMPTY[4:], "framing"),
    "operator 3": (raw_file(b"", b"", n=0, config=config(3, 4, 4)), "config: expected operator"),
    "revision 1": (raw_file(b"", b"", n=0, config=config(2, 4, 4, 1)), "config: .*revision"),
    "dim 0": (raw_file(b"", b"", n=0, config=config(2, 0, 4)), "config: quant: .*dim"),
    "dim too large": (raw_file(b"", b"", n=0, config=config(0, 65_537, 4)), "config: orbit: .*dim"),
    "bins 65": (raw_file(b"", b"", n=0, config=config(2, 4, 65)), "config: quant: .*bins"),
    "sectors 1": (raw_file(b"", b"", n=0, config=config(1, 4, 1)), "config: phase: .*sectors"),
    "dim 6 in nibbles": (raw_file(b"", b"", n=0, config=config(1, 6, 16)), "config: phase: .*divisible by 4"),
    "scale 0": (raw_file(b"", b"", n=0, config=config(0, 4, 0)), "config: orbit: .*scale"),
    "id kind 2": (raw_file(b"", b"", n=0, kind=2), "id kind"),
    "more ids than bytes": (raw_file(b"", b"", n=2**61 + 1), "ids"),
    "more texts than bytes": (raw_file(b"", b"", n=2**64 - 1, kind=1), "ids"),
    "no offset": (raw_file(b"", b"", n=0, kind=1, manifest=b"\0" * 4)[:-68] + b"\0" * 68, "ids|manifest"),
    "more rows than bytes": (raw_file(u64(1, 2), b"\0" * 3, n=2), "rows: expected 2 of 2 bytes"),
    "wide rows": (raw_file(u64(1, 2), b"\0" * 4, n=2, config=config(0, 65_536, 4)), "rows: expected 2 of 65536"),
    "ids out of order": (raw_file(u64(2, 1), b"\0" * 4, n=2), "ids: expected increasing"),
    "an id twice": (raw_file(u64(1, 1), b"\0" * 4, n=2), "ids: expected increasing"),
    "texts out of order": (raw_file(u64(0, 1, 2) + b"ba", **TEXTS), "ids: .*increasing"),
    "a text twice": (raw_file(u64(0, 1, 2) + b"aa", **TEXTS), "ids: .*increasing"),
    "an empty text": (raw_file(u64(0, 0, 1) + b"a", **TEXTS), "ids: .*offsets"),
    "offsets not from 0": (raw_file(u64(1, 2, 3) + b"abc", **TEXTS), "ids: .*offsets"),
    "offsets that fall": (raw_file(u64(0, 3, 2) + b"ab", **TEXTS), "ids: .*offsets"),
    "offsets beyond": (raw_file(u64(0, 1, 2**63) + b"ab", **TEXTS), "ids: expected an end"),
    "a long text": (raw_file(u64(0, 4097, 4098) + b"a" * 4097 + b"b", **TEXTS), "ids: .*4096"),
    "a NUL": (raw_file(u64(0, 1, 3) + b"ab\0", **TEXTS), "ids: .*NUL"),
    "half a character": (raw_file(u64(0, 1, 2) + "ü".encode(), **TEXTS), "ids: expected UTF-8|ids: .*increasing"),
    "a surrogate": (raw_file(u64(0, 1, 4) + b"a\xed\xa0\x80", **TEXTS), "ids: expected UTF-8"),
    "many pairs": (raw_file(b"", b"", n=0, manifest=pairs(n=4097)), "manifest: .*4096"),
    "missing pairs": (raw_file(b"", b"", n=0, manifest=pairs(b"a", b"b", n=2)), "manifest"),
    "a long key": (raw_file(b"", b"", n=0, manifest=pairs(b"a" * 257, b"")), "manifest: .*256"),
    "an empty key": (raw_file(b"", b"", n=0, manifest=pairs(b"", b"")), "manifest: expected keys"),
    "a long value": (raw_file(b"", b"", n=0, manifest=pairs(b"a", b"b" * 65_537)), "manifest: .*65536"),
    "an endless value": (raw_file(b"", b"", n=0, manifest=b"\1\0\0\0\1\0\0\0a\xff\xff\0\0"), "manifest: .*65535"),
    "keys out of order": (raw_file(b"", b"", n=0, manifest=pairs(b"b", b"", b"a", b"")), "manifest: expected keys"),
    "a key twice": (raw_file(b"", b"", n=0, manifest=pairs(b"a", b"", b"a", b"")), "manifest: expected keys"),
    "a value that is no text": (raw_file(b"", b"", n=0, manifest=pairs(b"a", b"\xff")), "manifest: expected UTF-8"),
    "a NUL in a value": (raw_file(b"", b"", n=0, manifest=pairs(b"a", b"\0")), "manifest: .*NUL"),
    "a large manifest": (
        raw_file(b"", b"", n=0, manifest=pairs() + b"\0" * (16 << 20)),
        "manifest: expected at most .*16777216",
    ),
    "padding": (raw_file(u64(1), b"\x80", n=1, config=config(2, 3, 2)), "rows: expected padding"),
    "a symbol of another alphabet": (
        raw_file(u64(1), b"\6", n=1, config=config(2, 2, 3)),
        "rows: expected symbols",
    ),
    "a sector of another alphabet": (raw_file(u64(1), b"\x70", n=1, config=config(1, 4, 7)), "rows: .*below 7"),
    "root 19": (raw_file(u64(1), b"\x13", n=1, config=config(0, 1, 9)), "rows: expected symbols below 19"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"x\.semq: {message}" if "|" not in message else message):
        read(data, tmp_path)


def test_the_hostile_files_would_be_read_were_they_not_hostile(tmp_path: Path) -> None:
    assert read(raw_file(u64(1, 2), b"\0" * 4, n=2), tmp_path).ids.tolist() == [1, 2]
    assert read(raw_file(u64(0, 1, 2) + b"ab", **TEXTS), tmp_path).ids == ("a", "b")
    assert read(raw_file(b"\0" * 8, b"", n=0, kind=1), tmp_path).ids == ()
    assert read(raw_file(b"", b"", n=0, manifest=pairs(b"a", b"b" * 65_536)), tmp_path).manifest["a"][-1] == "b"


ROW = np.zeros((2, 2), np.uint8)
UNFIT: dict[str, Any] = {
    "an id twice": lambda: SemqFile(Quant(4, 4), numbers(3, 3), ROW),
    "a text twice": lambda: SemqFile(Quant(4, 4), ("a", "a"), ROW),
    "an empty text": lambda: SemqFile(Quant(4, 4), ("a", ""), ROW),
    "a long text": lambda: SemqFile(Quant(4, 4), ("a", "b" * 4097), ROW),
    "a NUL": lambda: SemqFile(Quant(4, 4), ("a", "b\0"), ROW),
    "a surrogate": lambda: SemqFile(Quant(4, 4), ("a", "\ud800"), ROW),
    "signed ids": lambda: SemqFile(Quant(4, 4), np.array([1, 2]), ROW),  # type: ignore[arg-type]
    "mixed ids": lambda: SemqFile.from_vectors([1, "a"], DOCS[:2], operator=Quant(4)),  # type: ignore[list-item]
    "negative ids": lambda: SemqFile.from_vectors([1, -1], DOCS[:2], operator=Quant(4)),
    "fewer ids": lambda: SemqFile.from_vectors([1], DOCS[:2], operator=Quant(4)),
    "another width": lambda: SemqFile(Quant(5, 4), numbers(1, 2), np.zeros((2, 2), np.uint8)[:, :1]),
    "int8 rows": lambda: SemqFile(Quant(4, 4), numbers(1, 2), ROW.astype(np.int8)),  # type: ignore[arg-type]
    "padding": lambda: SemqFile(Quant(3, 2), numbers(1, 2), np.full((2, 1), 128, np.uint8)),
    "an empty key": lambda: SemqFile(Quant(4, 4), numbers(1, 2), ROW, {"": "x"}),
    "a long value": lambda: SemqFile(Quant(4, 4), numbers(1, 2), ROW, {"x": "y" * 65_537}),
    "a number as value": lambda: SemqFile(Quant(4, 4), numbers(1, 2), ROW, {"x": 1}),  # type: ignore[dict-item]
    "many pairs": lambda: SemqFile(Quant(4, 4), numbers(1, 2), ROW, {str(i): "" for i in range(4097)}),
    "another range": lambda: SemqFile(Quant(4, 4, 2.345), numbers(1, 2), ROW),
    "a vector of norm 2": lambda: SemqFile.from_vectors([1, 2], 2 * DOCS[:2], operator=Quant(4)),
}


@pytest.mark.parametrize("make", UNFIT.values(), ids=UNFIT)
def test_what_no_file_could_hold_is_refused_when_made(make: Any) -> None:
    with pytest.raises(UnsupportedOperationError, match="expected"):
        make()


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        read_semq(tmp_path / "missing.semq")
    with pytest.raises(StoreError):
        write_semq(tmp_path / "missing" / "x.semq", docs())
    assert not list(tmp_path.iterdir())
