"""`sq.verify`: are these bytes whole, and who vouches for them? Every digest is computed again from the content."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semq_state import files
from semq_state.audit import signatures
from semq_state.audit.keys import KeyFile
from semq_state.calibration import Predictor
from semq_state.container import SIGNATURE, Header, Manifest
from semq_state.errors import (
    CalibrationError,
    DecryptionError,
    FormatError,
    IncompleteStateError,
    SignatureError,
    StoreError,
    UnknownCodecError,
)
from semq_state.records import Record, open_record
from semq_state.sealing import Unlock
from semq_state.stores import ReadableFile

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

UNPROVED = (CalibrationError, UnknownCodecError)
"""What keeps a section from being checked, and says nothing against it."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        path: the file, or a record's folder.
        state_id: the identity that it claims, empty where it has none; of a record its `record_id`.
        n_sections: tensor sections in it; of a record its shards.
        failures: section name, or `file`, to what is wrong with it; of a record the name of the shard's file, or
            `record`.
        unchecked: section name to what it would take to check it: a predictor or a codec that is not here.
        vouched: whether every key that was given signed these bytes; None where none was given.
        signers: ids of the keys whose signatures are there, checked or not.
        signature: in words, who vouches for the file.
    """

    path: str
    state_id: str
    n_sections: int
    failures: Mapping[str, str]
    unchecked: Mapping[str, str] = field(default_factory=dict)
    vouched: bool | None = None
    signers: tuple[str, ...] = ()
    signature: str = ""

    @property
    def whole(self) -> bool:
        """Whether every byte is proved to be what it claims."""
        return not self.failures and not self.unchecked

    @property
    def passed(self) -> bool:
        """Whether it is whole and, where a key was given, vouched for."""
        return self.whole and self.vouched is not False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": self.path,
            "passed": self.passed,
            "state_id": self.state_id,
            "n_sections": self.n_sections,
            "failures": dict(self.failures),
            "unchecked": dict(self.unchecked),
            "vouched": self.vouched,
            "signers": list(self.signers),
            "signature": self.signature,
        }


def verify(
    path: str | os.PathLike[str],
    *,
    unlock: Unlock | None = None,
    key: KeyFile | Sequence[KeyFile] | None = None,
    predictor: Predictor | str | os.PathLike[str] | None = None,
    progress: files.Progress | None = None,
) -> Verification:
    """Reads each byte of a snapshot file, and says which section does not hold, and who vouches for it. Of a record
    of hidden states, a folder, each byte of each shard.

    Args:
        path: the file, or the record's folder.
        unlock: what opens it where it is sealed; see `load`.
        key: a public key, or several of which each must have signed: PEM files. The file is read once more for it.
            Of a record each shard must have been signed.
        predictor: the predictor that an `exact-predicted` file refers to, or its file; by default the one that the
            cache folder has.
        progress: called with the bytes done and the bytes in all.

    Returns:
        The verdict; a damaged file is one, not an exception, and so is a signature that does not hold.

    Raises:
        StoreError: there is no such file.
        DecryptionError: it is sealed, and no key was given or none opens it.
        SignatureError: `key` is no public key.

    Example:
        >>> sq.verify("chat.safetensors").passed  # doctest: +SKIP
        >>> sq.verify("chat.safetensors", key="them.pub").vouched  # doctest: +SKIP
    """
    publics = None if key is None else signatures.public_keys(key)
    if Path(path).is_dir():
        return _of_record(path, publics, progress)
    try:
        with files.open_snapshot(path, unlock) as (file, header, manifest):
            advance = files.counter(progress, sum(t.spec.n_bytes for t in manifest.tensors.values()))
            found = files.failures_of(file, header, manifest, predictor, advance)
            vouched, signers, words = _vouched(file, header, manifest, publics)
            failures = {name: str(e) for name, e in found.items() if not isinstance(e, UNPROVED)}
            failures |= _unreadable(file, header)
    except (FormatError, IncompleteStateError) as error:
        return Verification(str(path), "", 0, {"file": str(error)}, vouched=None if publics is None else False)
    n_sections = sum(len(t.sections) for t in manifest.tensors.values())
    n_sections += sum(len(entry.sections) for entry in manifest.joint)
    unchecked = {name: str(e) for name, e in found.items() if isinstance(e, UNPROVED)}
    return Verification(str(path), manifest.state_id, n_sections, failures, unchecked, vouched, signers, words)


def _of_record(
    folder: str | os.PathLike[str], publics: Sequence[SSlibKey] | None, progress: files.Progress | None
) -> Verification:
    """The verdict on a record: on each of its shards, which are files of their own, and on its journal."""
    try:
        record = open_record(folder)
    except (FormatError, IncompleteStateError) as error:
        vouched = None if publics is None else False
        return Verification(str(folder), "", 0, {"record": str(error)}, vouched=vouched)
    found = record.verify(progress)
    unchecked = {name: str(e) for name, e in found.items() if isinstance(e, UNPROVED)}
    if not record.complete:
        unchecked["end"] = f"the record is incomplete, {len(record)} rows so far"
    failures = {name: str(e) for name, e in found.items() if not isinstance(e, UNPROVED)}
    by_all, signers, words = _vouched_shards(record, publics, failures)
    return Verification(
        path=str(folder),
        state_id=record.record_id,
        n_sections=len(record.shards),
        failures=failures,
        unchecked=unchecked,
        vouched=by_all,
        signers=signers,
        signature=words,
    )


def _vouched_shards(
    record: Record, publics: Sequence[SSlibKey] | None, failures: dict[str, str]
) -> tuple[bool | None, tuple[str, ...], str]:
    """As `_vouched`, of all shards, and adds shards whose signatures cannot be read to `failures`. No signature
    covers the journal, so none says that these are all of them."""
    signers: set[str] = set()
    n_vouched, refusal = 0, ""
    for shard in record.shards:
        try:
            with files.open_snapshot(shard) as (file, header, manifest):
                vouched, own, words = _vouched(file, header, manifest, publics)
                for why in _unreadable(file, header).values():
                    failures.setdefault(shard.name, why)
        except (FormatError, IncompleteStateError, StoreError) as error:
            vouched, own, words = False, (), str(error)
        signers.update(own)
        n_vouched += vouched is True
        refusal = refusal or ("" if vouched else f"{shard.name}: {words}")
    n = len(record.shards)
    if publics is None:
        said = f"signatures on shards by {', '.join(sorted(signers))}, not checked: give a public key"
        return None, tuple(sorted(signers)), said if signers else "no signature"
    if not n or n_vouched < n:
        return False, tuple(sorted(signers)), f"{n_vouched} of {n} shards are signed by the keys; {refusal}"
    names = ", ".join(public.keyid for public in publics)
    return True, tuple(sorted(signers)), f"each of {n} shards signed by {names}; nobody signed that these are all"


def _vouched(
    file: ReadableFile, header: Header, manifest: Manifest, publics: Sequence[SSlibKey] | None
) -> tuple[bool | None, tuple[str, ...], str]:
    """Whether the keys vouch for the file, who signed it, and both in words."""
    signers: tuple[str, ...] = ()
    try:
        found = signatures.placed(file, header)
        signers = tuple(sorted({id for each in found for id in each.envelope.signatures}))
        if publics is None:
            words = f"signed by {', '.join(signers)}, not checked: give a public key" if signers else "no signature"
            return None, signers, words
        signatures.check(file, header, manifest, found, publics)
    except (SignatureError, DecryptionError) as error:
        return None if publics is None else False, signers, str(error)
    return True, signers, f"signed by {', '.join(public.keyid for public in publics)}"


def _unreadable(file: ReadableFile, header: Header) -> dict[str, str]:
    """What is wrong with the last section, which is as much a part of the file as any other."""
    try:
        signatures.placed_inside(file, header)
    except (SignatureError, DecryptionError) as error:
        return {SIGNATURE: str(error)}
    return {}
