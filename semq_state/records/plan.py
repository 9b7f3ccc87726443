"""What makes two recordings the same: which states of which tokens, and how they are cut into shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from semq_state.content import DTYPES
from semq_state.errors import Difference
from semq_state.records.checks import Fields
from semq_state.snapshot import ENCODER, SEQUENCE

POOLS = ("", "mean", "last")
MAX_SITES = 4096
MAX_NAME = 1024
"""Characters of a site's name."""

_FLOATS = ("", *(str(dtype)[6:] for dtype in DTYPES.values() if dtype.is_floating_point))


@dataclass(frozen=True)
class Plan:
    """What makes two recordings the same, beside the model.

    Args:
        states: names of the sites, `hidden_states.12` or the path of a module; sorted, none twice.
        stream: `sequence` or `encoder`.
        tokens: which tokens were kept, as in `HiddenRows`.
        pool: `mean` or `last` over each document; empty where each token has its own row.
        dtype: dtype of the states, `float32` say; empty for the model's own.
        codec: how shards are coded, a word for people.
        max_tokens: tokens of a document that the model reads at once.
        batch_tokens: tokens of a batch.
        shard_bytes: raw bytes of states at which a shard ends.
    """

    states: tuple[str, ...]
    stream: str
    tokens: str
    pool: str
    dtype: str
    codec: str
    max_tokens: int
    batch_tokens: int
    shard_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file or for JSON."""
        return asdict(self) | {"states": list(self.states)}

    @classmethod
    def from_dict(cls, told: Any, where: str = "plan") -> Plan:
        """The inverse of `as_dict`, of values from anyone.

        Raises:
            FormatError: a field is missing, unknown, or not of its kind.
        """
        fields = Fields(where)
        table = fields.table(told, tuple(cls.__dataclass_fields__))
        states = tuple(fields.text(name, "states") for name in fields.items(table["states"], "states"))
        if not 1 <= len(states) <= MAX_SITES or not all(1 <= len(name) <= MAX_NAME for name in states):
            raise fields.refused(f"1 to {MAX_SITES} names of up to {MAX_NAME} characters", f"{len(states)}")
        if list(states) != sorted(set(states)):
            raise fields.refused("names in order, none twice, as `states`", f"{states!r:.80}")
        return cls(
            states=states,
            stream=fields.one_of(table["stream"], "stream", (SEQUENCE, ENCODER)),
            tokens=fields.text(table["tokens"], "tokens"),
            pool=fields.one_of(table["pool"], "pool", POOLS),
            dtype=fields.one_of(table["dtype"], "dtype", _FLOATS),
            codec=fields.text(table["codec"], "codec"),
            max_tokens=fields.count(table["max_tokens"], "max_tokens"),
            batch_tokens=fields.count(table["batch_tokens"], "batch_tokens"),
            shard_bytes=fields.count(table["shard_bytes"], "shard_bytes"),
        )


def differences(expected: Plan, found: Plan) -> Iterator[Difference]:
    """In what two plans differ."""
    for name, value in expected.as_dict().items():
        other = found.as_dict()[name]
        if value != other:
            yield Difference(name, f"{value!r:.200}", f"{other!r:.200}")
