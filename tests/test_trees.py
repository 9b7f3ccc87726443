"""What a forward pass takes, as tensors by name and plain values, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import KVSharingDict
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

import semq_state as sq
from semq_state import content
from semq_state.generation.trees import put_together, take_apart


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected) and found.stride() == expected.stride()
    if isinstance(expected, (list, tuple)):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    if hasattr(expected, "items"):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    return bool(found == expected and type(found) is type(expected))


x = torch.arange(24.0).reshape(2, 3, 4)
INPUTS: dict[str, Any] = {
    "plain": {
        "use_cache": True,
        "logits_to_keep": 1,
        "scale": 0.5,
        "mask": None,
        "mode": "text",
        "sizes": [1, [2]],
    },
    "a tensor": {"attention_mask": x},
    "transposed": {"hidden": x.transpose(1, 2), "deep": [x.permute(2, 0, 1)]},
    "expanded": {"mask": torch.ones(1, 3).expand(1, 3)},
    "encoder outputs": {"encoder_outputs": BaseModelOutput(last_hidden_state=x, hidden_states=(x, x + 1))},
    "nested": {"image": {"features": [x, (x, None)], "size": 3}, "none": [], "empty": {}},
    "shared": {"shared_kv_states": KVSharingDict({"full": (x, x * 2)})},
}


@pytest.mark.parametrize("what", INPUTS)
def test_inputs_come_back(what: str) -> None:
    tensors, values = take_apart(INPUTS[what])
    content.pack(values)
    found = put_together({name: t.contiguous() for name, t in tensors.items()}, values)
    assert found.keys() == INPUTS[what].keys()
    for name, expected in INPUTS[what].items():
        assert same(found[name], expected), name


def test_an_output_keeps_the_fields_that_are_none() -> None:
    given = BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=None)
    found = put_together(*take_apart({"out": given}))["out"]
    assert found[0] is x and found.pooler_output is None and found.to_tuple() == (x,)


ODD: dict[str, Any] = {
    "object": object(),
    "numbered": {1: x},
    "list": [object()],
    "deep": {"a": {"b": object()}},
    "module": torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_neither_tensor_nor_plain_is_refused(what: str) -> None:
    with pytest.raises(sq.IncompleteStateError, match=r"input 'odd.*cannot be kept"):
        take_apart({"odd": ODD[what]})


MALFORMED: list[Any] = [
    {"tensor": "nowhere"}, {"tensor": 3}, {"tensor": "x", "order": [0]}, {"tensor": "x", "order": [0, 0, 1]},
    {"tensor": "x", "order": "012"}, {"class": "os.system"}, {}, {"list": 3}, {"output": [["a"]]},
    {"output": [["a b", 1]]}, {"dict": {"a": 1}}, {"list": [], "tuple": []}, {"output": [["__class__.x", 1]]},
    {"output": [["__class__", 1]]}, {"output": [["keys", 1]]}, {"output": [["to_tuple", None]]},
]  # fmt: skip


@pytest.mark.parametrize("value", MALFORMED, ids=str)
def test_a_malformed_description_is_refused(value: Any) -> None:
    with pytest.raises(sq.IncompleteStateError, match="input 'y'"):
        put_together({"x": x}, {"y": value})
    with pytest.raises(sq.IncompleteStateError, match="input 'x'"):
        put_together({"x": x}, {"x": None})
