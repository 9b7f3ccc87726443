"""`record.json`: what a record is of, written once before its first row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semq_state import content
from semq_state.container import Manifest, shown
from semq_state.errors import Difference, FormatError, IntegrityError, SemqStateError, UnsupportedOperationError
from semq_state.files.opening import provenance_of
from semq_state.provenance import Provenance, identity_differences
from semq_state.records import plan as plans
from semq_state.records.checks import Fields, parse, render
from semq_state.records.plan import Plan
from semq_state.stores import LocalFile, atomic_write

NAME = "record.json"
FORMAT = "semq_state record"
VERSION = 1

MAX_BYTES = 16 << 20
"""Larger files are refused unread."""

_FIELDS = ("format", "format_version", "plan", "plan_id", "provenance")


@dataclass(frozen=True)
class Description:
    """What a record is of.

    Args:
        plan: which states of which tokens.
        provenance: the model, and the circumstances under which the record was begun.
    """

    plan: Plan
    provenance: Provenance

    @property
    def plan_id(self) -> str:
        """`sha256:…` over the plan and the model's identity: recordings that can go on in one folder have one."""
        return _digest({"plan": self.plan.as_dict(), "identity": self.provenance.identity()})

    def record_id(self, state_ids: list[str]) -> str:
        """`sha256:…` of a record of these shards."""
        return _digest({"plan_id": self.plan_id, "shards": state_ids})


def differences(expected: Description, found: Description) -> Iterator[Difference]:
    """Every reason why one cannot go on in the other's folder."""
    yield from plans.differences(expected.plan, found.plan)
    yield from identity_differences(expected.provenance, found.provenance)
    mine, other = expected.provenance.tokenizer, found.provenance.tokenizer
    if mine != other and None in (mine, other):
        yield Difference("tokenizer", f"{mine!s:.24}", f"{other!s:.24}")


def write_description(folder: Path, description: Description) -> None:
    """Writes `record.json`, whole or not at all.

    Raises:
        UnsupportedOperationError: plan or provenance hold what the file has no place for.
        StoreError: the folder or disk refused.
    """
    try:
        data = rendered(description)
        understood = _parsed(data, "plan") == _plain(description)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _unfit(error) from error
    if not understood:
        raise _unfit("values that JSON turns into others")
    with atomic_write(folder / NAME) as file:
        file.write(data)


def rendered(description: Description) -> bytes:
    """The bytes of `record.json`."""
    return render(
        {
            "format": FORMAT,
            "format_version": VERSION,
            "plan": description.plan.as_dict(),
            "plan_id": description.plan_id,
            "provenance": description.provenance.as_dict(),
        }
    )


def read_description(folder: Path) -> Description:
    """The inverse of `write_description`, of a folder from anyone.

    Raises:
        StoreError: there is no such file.
        FormatError: it is no record, a newer one, or a field is wrong.
        IntegrityError: the plan or the model's identity was changed.
    """
    path = folder / NAME
    with LocalFile(path) as file:
        if file.size > MAX_BYTES:
            raise Fields(str(path)).refused(f"at most {MAX_BYTES} bytes", f"{file.size}")
        data = file.read(0, file.size)
    return _parsed(data, str(path))


def _parsed(data: bytes, where: str) -> Description:
    fields = Fields(where)
    try:
        told = parse(data)
    except ValueError as error:
        raise fields.refused("the JSON of a record", f"{error!s:.200}") from error
    if type(told) is not dict or told.get("format") != FORMAT:
        raise fields.refused("a semq_state record", f"{shown(told)}")
    if told.get("format_version") != VERSION:
        raise FormatError(
            where,
            expected=f"format version {VERSION}",
            found=shown(told.get("format_version")),
            do="update semq_state to read this record",
        )
    table = fields.table(told, _FIELDS)
    plan = Plan.from_dict(table["plan"], f"{where}, plan")
    description = Description(plan, _provenance(table["provenance"], fields))
    try:
        plan_id = description.plan_id
    except (ValueError, TypeError, OverflowError) as error:  # numbers or texts that msgpack has no place for
        raise fields.refused("plain values", f"{error!s:.200}") from error
    if fields.digest(table["plan_id"], "plan_id") != plan_id:
        raise IntegrityError(
            where,
            expected=f"plan_id {table['plan_id']}",
            found=plan_id,
            do="the plan or the model's identity was changed; use another copy of the record",
        )
    return description


def _provenance(told: Any, fields: Fields) -> Provenance:
    if type(told) is not dict:
        raise fields.refused("a table as `provenance`", shown(told))
    return provenance_of(Manifest("", "", {}, {}, told, "", ""), fields.where)


def _plain(description: Description) -> Description:
    """The description with tuples inside its tables as lists, as a file gives them back."""
    told = {name: _listed(value) for name, value in description.provenance.as_dict().items()}
    return Description(description.plan, Provenance(**told))


def _listed(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    return {key: _listed(item) for key, item in value.items()} if isinstance(value, dict) else value


def _digest(value: Any) -> str:
    return f"sha256:{hashlib.sha256(content.pack(value)).hexdigest()}"


def _unfit(found: object) -> UnsupportedOperationError:
    told = f"{found.expected} and not {found.found}" if isinstance(found, SemqStateError) else f"{found!s:.200}"
    return UnsupportedOperationError(
        "plan and provenance", expected="plain values", found=told, do="give a plan that a file can hold"
    )
