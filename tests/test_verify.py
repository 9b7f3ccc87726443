"""Verify: each byte read once, and whatever does not hold is named."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_files import bits, raw, state
from test_hostile import put, put_together, signed, taken_apart, tiny

import semq_state as sq
from semq_state import container, content
from semq_state.cli import main
from semq_state.errors import StoreError
from semq_state.files.pipeline import Scratch
from semq_state.stores import LocalFile

PRESETS = ["exact", "exact-max", "raw", "uniform", "rotated"]
each_preset = pytest.mark.parametrize("codec", PRESETS)


@pytest.fixture
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CHUNK_BYTES", 1000)


def header_of(path: Path) -> container.Header:
    with LocalFile(path) as file:
        return container.read_header(file.read, file.size, str(path))


@each_preset
@pytest.mark.usefixtures("several_chunks")
def test_a_flipped_byte_names_its_section_and_no_other(codec: str, path: Path) -> None:
    sq.save(state(), path, codec=codec)
    assert sq.verify(path).passed
    good, header = path.read_bytes(), header_of(path)
    sections = [s for s in header.sections.values() if s.n_bytes and s.name != "manifest"]
    assert len(sections) > 12
    for section in sections:
        data = bytearray(good)
        data[header.data_start + (section.begin + section.end) // 2] ^= 0xFF
        path.write_bytes(data)
        verdict = sq.verify(path)
        assert list(verdict.failures) == [section.name]
        assert str(path) in verdict.failures[section.name] and section.name in verdict.failures[section.name]
        assert not verdict.passed and not verdict.whole and not verdict.unchecked


@each_preset
def test_every_byte_of_the_file_is_read_once(
    codec: str, path: Path, monkeypatch: pytest.MonkeyPatch, several_chunks: None
) -> None:
    sq.save(state(), path, codec=codec)
    counts = np.zeros(path.stat().st_size, int)

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(LocalFile, name)

        def call(self: LocalFile, offset: int, what: Any) -> Any:
            counts[offset : offset + (what if isinstance(what, int) else len(what))] += 1
            return method(self, offset, what)

        return call

    for name in ("read", "read_into"):
        monkeypatch.setattr(LocalFile, name, counted(name))
    assert sq.verify(path).passed
    assert (counts == 1).all()


def test_progress_ends_at_the_whole(path: Path) -> None:
    sq.save(state(), path)
    seen: list[tuple[int, int]] = []
    sq.verify(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (sum(t.nbytes for t in state().tensors().values()),) * 2


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "the state's id": put("manifest", "state_id", value=f"sha256:{'0' * 64}"),
    "the content's digest": put("manifest", "content_digest", value=f"sha256:{'0' * 64}"),
    "the origin": put("manifest", "provenance", "weights", value="sha256:cd"),
    "the structure": put("manifest", "structure", "generation", "prompt_length", value=3),
    "a tensor less": lambda d: d["manifest"]["tensors"].pop("layers.0.keys"),
    "a section less": lambda d: d["sections"].pop("layers.0.keys"),
    "a section more": lambda d: d["sections"].update(more={"dtype": "U8", "shape": [1], "data": b"x"}),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_what_does_not_follow_from_the_content_fails_the_file(lie: Callable[[Any], object], path: Path) -> None:
    sq.save(tiny(), path)
    draft = taken_apart(path.read_bytes())
    lie(draft)
    path.write_bytes(put_together(draft))
    verdict = sq.verify(path)
    assert list(verdict.failures) == ["file"] and not verdict.passed and verdict.vouched is None


@pytest.mark.parametrize("change", [lambda d: d + b"\0", lambda d: d[:-1], lambda d: d * 2, lambda d: b""])
def test_a_file_of_another_length_fails(change: Callable[[bytes], bytes], path: Path) -> None:
    sq.save(tiny(), path)
    path.write_bytes(change(path.read_bytes()))
    assert list(sq.verify(path).failures) == ["file"]


def test_a_section_under_an_unknown_codec_could_not_be_checked(path: Path) -> None:
    sq.save(tiny(), path)
    draft = taken_apart(path.read_bytes())
    draft["manifest"]["tensors"]["layers.0.keys"]["sections"][0][3] = "tomorrow's"
    path.write_bytes(put_together(signed(draft)))
    verdict = sq.verify(path)
    assert list(verdict.unchecked) == ["layers.0.keys"] and "tomorrow" in verdict.unchecked["layers.0.keys"]
    assert not verdict.passed and not verdict.failures
    assert json.loads(json.dumps(verdict.as_dict()))["unchecked"] == dict(verdict.unchecked)


def test_answers_of_the_command_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cli(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["semq-state", "verify", str(path), *more])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().out

    info = sq.save(tiny(), path)
    assert cli() == (
        0,
        f"whole: 8 sections, {info.state_id}\nwhole, but nobody vouches for it: no signature\n",
    )
    good = taken_apart(path.read_bytes())
    good["manifest"]["tensors"]["layers.0.keys"]["sections"][0][3] = "tomorrow's"
    path.write_bytes(put_together(signed(good)))
    code, out = cli()
    assert code == 2 and out.startswith("could not be checked: 1 of 8 sections\n  layers.0.keys: ")
    good["sections"]["generation.input_ids"]["data"] = bytes(good["sections"]["generation.input_ids"]["shape"][0])
    path.write_bytes(put_together(signed(good)))
    code, out = cli()
    assert code == 1 and out.startswith("damaged: 1 failed\n  generation.input_ids: ")
    assert "layers.0.keys" in out and "whole" not in out
    code, out = cli("--json")
    assert code == 1 and list(json.loads(out)["failures"]) == ["generation.input_ids"]


# Memory that is used again


def test_scratch_is_used_again_and_grows() -> None:
    scratch = Scratch()
    first, second = scratch.take("a", 10), scratch.take("a", 5)
    assert (len(first), len(second)) == (10, 5) and np.shares_memory(first, second)
    assert len(scratch.take("a", 20)) == 20 and not np.shares_memory(scratch.take("b", 5), scratch.take("a", 5))


@pytest.mark.parametrize("codec", ["exact", "raw"])
def test_loaded_tensors_share_no_memory(codec: str, path: Path) -> None:
    sq.save(state(), path, codec=codec)
    sq.verify(path)
    found = [t for t in sq.load(path).tensors().values() if t.numel()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in found)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    for tensor in found:
        tensor.zero_()
    assert raw(sq.load(path).tensors()) == raw(state().tensors())


def test_sections_of_falling_and_rising_size_are_told_apart(path: Path) -> None:
    from dataclasses import replace

    from semq_state.snapshot import CacheState, LayerState

    sizes = (500, 3, 0, 700, 1, 500)
    layers = tuple(LayerState("mine", {"x": bits("BF16", 1, 1, n, 8, seed=n + 1)}) for n in sizes)
    expected = replace(state(2), cache=CacheState("dynamic", layers))
    for codec in ("exact", "exact-max", "raw"):
        sq.save(expected, path, codec=codec)
        assert sq.verify(path).passed
        assert raw(sq.load(path).tensors()) == raw(expected.tensors())


def test_a_file_that_shrinks_while_it_is_verified_is_a_store_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sq.save(state(), path, codec="raw")
    read_into = LocalFile.read_into

    def shrinks(self: LocalFile, offset: int, into: memoryview) -> None:
        os.truncate(path, offset + max(0, len(into) - 1))
        read_into(self, offset, into)

    monkeypatch.setattr(LocalFile, "read_into", shrinks)
    with pytest.raises(StoreError, match="shorter"):
        sq.verify(path)
