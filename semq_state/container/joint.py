"""Tensors that are coded together: what the manifest says of them, read with every field checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from semq_state.container.header import shown
from semq_state.content import TensorSpec

if TYPE_CHECKING:
    from semq_state.container.manifest import Check


@dataclass(frozen=True)
class JointSection:
    """One section: tokens `start` to `stop` of all tensors, and the digest of its bytes as they are stored."""

    section: str
    start: int
    stop: int
    digest: str


@dataclass(frozen=True)
class JointEntry:
    """Tensors of one spec that are coded together, in the order in which the codec takes them."""

    names: tuple[str, ...]
    codec: str
    params: Mapping[str, Any]
    sections: tuple[JointSection, ...]

    def as_list(self) -> list[Any]:
        """Plain values; the inverse of `joint_of`."""
        sections = [[s.section, s.start, s.stop, s.digest] for s in self.sections]
        return [list(self.names), self.codec, dict(self.params), sections]


def joint_of(told: Any, alone: Mapping[str, TensorSpec | None], check: Check) -> tuple[JointEntry, ...]:
    """The field `joint` of a manifest.

    Args:
        told: what the file says.
        alone: every tensor, with its spec where it has no section of its own.
        check: reads untrusted values.

    Raises:
        FormatError: it breaks a rule, or not every tensor without sections is in it once.
    """
    entries = tuple(_entry(item, alone, check) for item in check.items(told, "joint"))
    found = [name for entry in entries for name in entry.names]
    wanted = [name for name, spec in alone.items() if spec is not None]
    if sorted(found) != sorted(wanted):
        left = sorted(set(found) ^ set(wanted))
        raise check.refused("sections that cover every tensor once", shown(left or "a tensor coded jointly twice"))
    return entries


def _entry(item: Any, alone: Mapping[str, TensorSpec | None], check: Check) -> JointEntry:
    if not isinstance(item, list) or len(item) != 4:
        raise check.refused("four fields for tensors coded jointly", shown(item))
    names = tuple(check.text(name, "joint") for name in check.items(item[0], "joint"))
    specs = {alone.get(name) for name in names}
    spec = specs.pop() if len(specs) == 1 else None
    if spec is None:
        raise check.refused("tensors of one spec, without sections of their own, coded jointly", shown(names))
    return JointEntry(
        names,
        check.text(item[1], "joint"),
        check.table(item[2], "joint"),
        _sections(item[3], names[0], spec, check),
    )


def _sections(told: Any, name: str, spec: TensorSpec, check: Check) -> tuple[JointSection, ...]:
    """The sections, once they are known to cover all tokens in order, each within one chunk."""
    sections: list[JointSection] = []
    for item in check.items(told, name):
        if not isinstance(item, list) or len(item) != 4:
            raise check.refused(f"four fields for a joint section of {shown(name)}", shown(item))
        start, stop = check.count(item[1], name), check.count(item[2], name)
        at, step = (sections[-1].stop if sections else 0), spec.chunk_tokens
        if not (step and at == start < stop and start // step == (stop - 1) // step):
            raise check.refused(f"the next joint section of {shown(name)} from {at}, in one chunk", shown(item))
        sections.append(JointSection(check.text(item[0], name), start, stop, check.digest(item[3], name)))
    if not sections or sections[-1].stop != spec.n_tokens:
        raise check.refused(f"joint sections of all {spec.n_tokens} tokens of {shown(name)}", shown(told))
    return tuple(sections)


def n_bytes_of(entry: JointEntry, section: JointSection, specs: Mapping[str, TensorSpec]) -> int:
    """Canonical bytes that a joint section stands for."""
    return len(entry.names) * specs[entry.names[0]].chunk(section.start, section.stop).n_bytes


def all_sections(entries: Sequence[JointEntry]) -> list[tuple[JointEntry, JointSection]]:
    """Every joint section with its entry, in order."""
    return [(entry, section) for entry in entries for section in entry.sections]
