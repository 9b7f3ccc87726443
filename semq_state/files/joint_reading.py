"""Tensors that were coded together, read back a chunk at a time, every digest compared."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch

from semq_state import calibration as calibrations
from semq_state import container, content
from semq_state.calibration import Predictor
from semq_state.codecs import predicted
from semq_state.codecs.residual import Words
from semq_state.container import JointEntry, JointSection, Manifest
from semq_state.errors import CalibrationError, DecryptionError, IntegrityError, SemqStateError, UnknownCodecError
from semq_state.files.opening import section_in, told_from
from semq_state.files.pipeline import in_order
from semq_state.stores import ReadableFile

Find: TypeAlias = Callable[[str], Predictor]
"""From a digest to the predictor."""

_Read: TypeAlias = tuple[tuple[JointEntry, JointSection], Sequence[Words] | SemqStateError]


def finder(given: Predictor | str | os.PathLike[str] | None, manifest: Manifest) -> Find:
    """From a digest to the predictor: the one that was given, or that of the folder."""

    @functools.cache
    def find(digest: str) -> Predictor:
        if given is None:
            return calibrations.predictor_of_digest(digest, manifest.provenance["weights"])
        found = given if isinstance(given, Predictor) else calibrations.load_predictor(given)
        if found.digest != digest:
            raise CalibrationError(
                "predictor", expected=f"{digest:.80}", found=found.digest, do="name the file of that one"
            )
        return found

    return find


@dataclass(frozen=True)
class Chunk:
    """One chunk of joint tensors that was read, or what is wrong with it.

    Args:
        start: its first token.
        stop: the token after its last.
        tensors: by name; empty where one of its sections failed.
        failures: by section.
    """

    start: int
    stop: int
    tensors: Mapping[str, torch.Tensor]
    failures: Mapping[str, SemqStateError]


def chunks(file: ReadableFile, header: container.Header, manifest: Manifest, find: Find) -> Iterator[Chunk]:
    """Every chunk of the joint tensors, decoded on all cores, with digests compared."""
    read = partial(_read, file, header, manifest, find)
    jobs = container.all_sections(manifest.joint)
    steps = {name: tensor.spec.chunk_tokens for name, tensor in manifest.tensors.items()}

    def chunk_of(job: _Read) -> tuple[str, int]:
        (entry, section), _ = job
        return entry.names[0], section.start // steps[entry.names[0]]

    # An entry is known by its first tensor, which no other entry has.
    for (_, number), results in groupby(in_order(read, jobs), chunk_of):
        yield _put_together(str(file.path), manifest, number, results)


def _put_together(
    where: str,
    manifest: Manifest,
    number: int,
    results: Iterator[_Read],
) -> Chunk:
    found: dict[str, torch.Tensor] = {}
    failures: dict[str, SemqStateError] = {}
    sections: list[str] = []
    start = stop = 0
    for (entry, section), words in results:
        if not sections:
            spec = manifest.tensors[entry.names[0]].spec
            start, stop = spec.chunks()[number]
            shape = spec.chunk(start, stop).shape
            found = {name: torch.empty(shape, dtype=torch.bfloat16) for name in entry.names}
        sections.append(section.section)
        if isinstance(words, SemqStateError):
            failures[section.section] = words
            continue
        for tensor, run in zip(found.values(), words, strict=True):
            part = content.chunk_of(tensor, section.start - start, section.stop - start)
            part.view(torch.int16).copy_(torch.from_numpy(run.view(np.int16)))
    if not failures:
        for name, digests in content.all_digests(found).items():
            expected = manifest.tensors[name].digests[number]
            if digests != (expected,):
                failures[sections[0]] = IntegrityError(
                    f"{section_in(where, sections[0])} to {sections[-1]!r:.200}, {name}",
                    expected=expected,
                    found=digests[0],
                    do="the tensor was changed or damaged",
                )
                break
    return Chunk(start, stop, {} if failures else found, failures)


def _read(
    file: ReadableFile,
    header: container.Header,
    manifest: Manifest,
    find: Find,
    job: tuple[JointEntry, JointSection],
) -> Sequence[Words] | SemqStateError:
    entry, told = job
    where, section = section_in(str(file.path), told.section), header.sections[told.section]
    try:
        payload = np.frombuffer(file.read(header.data_start + section.begin, section.n_bytes), np.uint8)
    except DecryptionError as error:
        return error
    digest = content.digest(payload)
    if digest != told.digest:
        do = "the section was changed or damaged"
        return IntegrityError(where, expected=told.digest, found=digest, do=do)
    try:
        with told_from(where):
            if entry.codec != predicted.ID:
                raise UnknownCodecError(
                    "joint codec",
                    expected=predicted.ID,
                    found=f"{entry.codec!r:.80}",
                    do="install a newer semq_state",
                )
            spec = manifest.tensors[entry.names[0]].spec
            guesses, begin = predicted.told_of(entry.params, entry.names, spec, find)
            run = spec.chunk(told.start, told.stop)
            return predicted.decode(guesses, begin + told.start, payload, run)
    except SemqStateError as error:
        return error
