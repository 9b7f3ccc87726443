"""Where in a shard's file what stands, every claim of its header and of the journal held against the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from semq_state import files
from semq_state.container import Header, Manifest, shown
from semq_state.content import DTYPES, TensorSpec, tensor_of
from semq_state.errors import IntegrityError
from semq_state.files.opening import specs_of
from semq_state.files.reading import bounds_of, jobs, read_section
from semq_state.records.journal import Shard
from semq_state.records.plan import Plan
from semq_state.snapshot.hidden import keys
from semq_state.stores import ReadableFile

ROWS, TOKEN_IDS = "rows", "token_ids"

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Where a shard's tensors stand.

    Args:
        path: its file.
        size: of the file.
        specs: site to the spec of its states, `(n, dim)`.
        begins: offset of `rows`, `token_ids` and each site's states; None where they are coded.
    """

    path: Path
    size: int
    specs: Mapping[str, TensorSpec]
    begins: Mapping[str, int] | None


def read_layout(folder: Path, shard: Shard, plan: Plan) -> Layout:
    """Reads the header of a shard, and row ids where it is plain.

    Raises:
        StoreError: there is no such file.
        FormatError: it is no snapshot.
        IntegrityError: it is not the shard that the journal tells of.
    """
    path = folder / shard.name
    with files.open_snapshot(path) as (file, header, manifest):
        specs = _checked(manifest, shard, plan, str(path))
        begins = _begins(header, manifest, plan)
        # What is mapped is not looked at again.
        if begins is not None:
            check_ids(_ids(file, header, manifest, plan)[0], shard, str(path))
        return Layout(path, file.size, specs, begins)


def read_ids(folder: Path, shard: Shard, plan: Plan) -> tuple[Ints, Ints]:
    """Row ids `(n, 2)` and token ids `(n,)` of a shard, their digests compared; no states are read.

    Raises:
        StoreError, FormatError, IntegrityError: as `read_layout`; or they are damaged.
    """
    path = folder / shard.name
    with files.open_snapshot(path) as (file, header, manifest):
        _checked(manifest, shard, plan, str(path))
        rows, token_ids = _ids(file, header, manifest, plan)
    check_ids(rows, shard, str(path))
    return rows, token_ids


def check_ids(rows: Ints, shard: Shard, where: str) -> None:
    """Refuses rows that do not increase from the journal's first to its last."""
    numbers = keys(torch.from_numpy(rows)).numpy()
    ends = [(int(d), int(p)) for d, p in rows[[0, -1]].tolist()]
    small = rows.min() >= 0 and rows[:, 1].max() < 1 << 32 and rows[:, 0].max() < 1 << 31
    if not small or ends != [shard.first, shard.last] or not (np.diff(numbers) > 0).all():
        raise broken(
            f"{where}, rows",
            f"{shard.n_rows} increasing ones from {shard.first} to {shard.last}",
            f"others, from {ends[0]} to {ends[1]}",
        )


def broken(where: str, expected: str, found: str, do: str = "use another copy of the record") -> IntegrityError:
    return IntegrityError(where, expected=expected, found=found, do=do)


def check_alike(layout: Layout, first: Layout) -> None:
    """Refuses a shard whose states have other dims or dtypes than those of the first."""
    for name, spec in layout.specs.items():
        wanted = first.specs[name]
        if (spec.dtype, spec.shape[1:]) != (wanted.dtype, wanted.shape[1:]):
            raise broken(f"{layout.path}, {name!r:.80}", f"{wanted} as in the first shard", f"{spec}")


def _checked(manifest: Manifest, shard: Shard, plan: Plan, where: str) -> dict[str, TensorSpec]:
    if manifest.state_id != shard.state_id:
        raise broken(where, f"the shard {shard.state_id}", shown(manifest.state_id), "it was replaced or changed")
    told = manifest.structure.get("hidden")
    wanted = {plan.stream: {"states": list(plan.states), "tokens": plan.tokens, "pool": plan.pool}}
    if told != wanted:
        raise broken(where, f"hidden states {shown(wanted)}", shown(told))
    specs, n = specs_of(manifest), shard.n_rows
    ids = {ROWS: TensorSpec("I64", (n, 2)), TOKEN_IDS: TensorSpec("I64", (n,))}
    for name, spec in ids.items():
        if specs.get(_name(plan, name)) != spec:
            raise broken(f"{where}, {name}", f"{spec}", f"{specs.get(_name(plan, name))}")
    states = {name: specs[_name(plan, f"states.{name}")] for name in plan.states}
    for name, spec in states.items():
        shape = spec.shape
        if len(shape) != 2 or shape[0] != n or not shape[1] or not DTYPES[spec.dtype].is_floating_point:
            raise broken(f"{where}, {name!r:.80}", f"floats ({n}, dim)", f"{spec}")
    return states


def _begins(header: Header, manifest: Manifest, plan: Plan) -> dict[str, int] | None:
    """Offsets of the tensors where all are plain and in one piece, else None."""
    names = {name: _name(plan, name) for name in (ROWS, TOKEN_IDS)}
    names |= {f"states.{name}": _name(plan, f"states.{name}") for name in plan.states}
    begins = {}
    for name, tensor_name in names.items():
        tensor = manifest.tensors.get(tensor_name)
        sections = tensor.sections if tensor else ()
        if not tensor or len(sections) != 1 or sections[0].codec != "raw":
            return None
        if (sections[0].start, sections[0].stop) != bounds_of(tensor.spec):
            return None
        begins[name] = header.data_start + header.sections[sections[0].section].begin
    return begins


def _ids(file: ReadableFile, header: Header, manifest: Manifest, plan: Plan) -> tuple[Ints, Ints]:
    found: list[torch.Tensor] = []
    for name in (_name(plan, ROWS), _name(plan, TOKEN_IDS)):
        spec = manifest.tensors[name].spec
        parts = [
            tensor_of(read_section(file, header, manifest, job), spec.chunk(job.start, job.stop))
            for job in jobs(manifest)
            if job.tensor == name
        ]
        if not parts:
            raise broken(str(file.path), f"sections of {name}", "none", "no writer makes such a file")
        found.append(torch.cat(parts) if len(parts) > 1 else parts[0])
    return found[0].numpy(), found[1].numpy()


def _name(plan: Plan, name: str) -> str:
    return f"hidden.{plan.stream}.{name}"
