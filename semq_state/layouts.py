"""What the tensors of a cache family are: keys, values or a recurrent state, and on which axes rows and tokens lie.

Kept apart from the families themselves so that whoever only reads, crops, selects or compares states needs no
model library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Cropping = Literal["tokens", "window", "never", "whole"]


@dataclass(frozen=True)
class TensorLayout:
    """The axes of one tensor of a layer.

    Args:
        kind: `keys`, `values`, `index`, `convolution`, `recurrent`, `latent` or `other`.
        token_axis: the axis that grows with the sequence; None where there is none.
        batch_axis: the axis of rows; None where all rows share the tensor.
    """

    kind: str
    token_axis: int | None = None
    batch_axis: int | None = 0


@dataclass(frozen=True)
class FamilyLayout:
    """The tensors of one family, and whether its state can be taken back to fewer tokens.

    Args:
        tensors: name to layout; a name that ends in `.*` stands for all that begin so.
        selects: whether rows can be taken from its tensors.
        cropping: `tokens`: its tensors are cut along their token axes. `window`: so, until the window has
            dropped a token. `never`: the past is folded into the state. `whole`: it does not grow at all.
    """

    tensors: Mapping[str, TensorLayout] = field(default_factory=dict)
    cropping: Cropping = "tokens"
    selects: bool = True

    def of(self, name: str) -> TensorLayout:
        """The layout of tensor `name`; one without axes but the batch's where the family does not list it."""
        table = self.tensors
        return (
            table.get(name) or table.get(f"{name.partition('.')[0]}.*") or table.get("*") or TensorLayout("other")
        )


ATTENTION = {"keys": TensorLayout("keys", -2), "values": TensorLayout("values", -2)}
LINEAR = {"conv.*": TensorLayout("convolution"), "recurrent.*": TensorLayout("recurrent")}
_INDEX = {
    "index_keys": TensorLayout("index", -2),
    "index_positions": TensorLayout("index", -1, batch_axis=1),
}
_SHARED = TensorLayout("other", batch_axis=None)
_REFERENCE = {
    **ATTENTION,
    "prefill_keys": TensorLayout("keys", -2),
    "prefill_values": TensorLayout("values", -2),
}

LAYOUTS: dict[str, FamilyLayout] = {
    "dynamic": FamilyLayout(ATTENTION),
    "sliding": FamilyLayout(ATTENTION, "window"),
    "indexed": FamilyLayout({**ATTENTION, **_INDEX}),
    "static": FamilyLayout(ATTENTION),
    "static-sliding": FamilyLayout(ATTENTION, "window"),
    "static-indexed": FamilyLayout({**ATTENTION, **_INDEX}),
    "linear": FamilyLayout(LINEAR, "never"),
    "linear+dynamic": FamilyLayout({**LINEAR, **ATTENTION}, "never"),
    "linear+sliding": FamilyLayout({**LINEAR, **ATTENTION}, "never"),
    "linear+static": FamilyLayout({**LINEAR, **ATTENTION}, "never"),
    "linear+static-sliding": FamilyLayout({**LINEAR, **ATTENTION}, "never"),
    "fp8": FamilyLayout({**ATTENTION, "key_scale": _SHARED, "value_scale": _SHARED}),
    "hqq": FamilyLayout({**ATTENTION, "*": _SHARED}, "never", selects=False),
    "quanto": FamilyLayout({**ATTENTION, "*": _SHARED}, "never", selects=False),
    "deepseek-v4-hca": FamilyLayout({"keys": TensorLayout("latent", -2), "*": TensorLayout("latent")}, "never"),
    "deepseek-v4-csa": FamilyLayout({"keys": TensorLayout("latent", -2), "*": TensorLayout("latent")}, "never"),
    "minimax-m3-sparse": FamilyLayout({**ATTENTION, "index_keys": TensorLayout("index", -2)}),
    "minimax-m3-sparse-static": FamilyLayout({**ATTENTION, "index_keys": TensorLayout("index", -2)}),
    "reference-sliding": FamilyLayout(_REFERENCE, "never"),
    "reference-sliding-static": FamilyLayout(_REFERENCE, "never"),
    "minimax-linear": FamilyLayout({"state": TensorLayout("recurrent")}, "never"),
    "rwkv": FamilyLayout({"state": TensorLayout("recurrent")}, "never"),
    "xlstm": FamilyLayout({"state.*": TensorLayout("recurrent")}, "never"),
    "xlnet": FamilyLayout({"memory": TensorLayout("latent", 0, batch_axis=1)}, "never"),
    "reformer": FamilyLayout({"states": TensorLayout("latent", 1), "buckets": TensorLayout("index", -1)}, "never"),
    "voxtral-padding": FamilyLayout({"frames": TensorLayout("convolution")}, "never"),
    "dummy": FamilyLayout({}, "whole"),
}
"""Family id to layout. `semq_state.caches.register` adds to it."""


def layout_of(family: str) -> FamilyLayout:
    """The layout of a family; of an unknown one nothing is assumed but that rows lie on axis 0."""
    return LAYOUTS.get(family, FamilyLayout({}, "never"))
