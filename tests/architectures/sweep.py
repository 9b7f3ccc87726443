"""One architecture taken through a file: resumed in the middle, cropped, as a batch. Its row of docs/SUPPORT.md."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto as auto
from transformers.generation.streamers import BaseStreamer

import semq_state as sq
from architectures import causal, image_text, seq2seq
from architectures.cases import Case, build, tokens

SETTINGS = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}
N_NEW, STOP_AFTER = 12, 5
MAPPINGS: dict[str, tuple[Any, Mapping[str, Case]]] = {
    "causal": (auto.MODEL_FOR_CAUSAL_LM_MAPPING, causal.CASES),
    "seq2seq": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, seq2seq.CASES),
    "image-text": (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, image_text.CASES),
}
CROPPED_AFTER = 2


class StoppedError(Exception):
    """What stops a run in the middle."""


class _StopAfter(BaseStreamer):  # type: ignore[misc]
    def __init__(self, n: int) -> None:
        self._left = n

    def put(self, value: torch.Tensor) -> None:
        if not self._left:
            raise StoppedError
        self._left -= 1

    def end(self) -> None: ...


@dataclass(frozen=True)
class Row:
    """What was found of one architecture; a text is the reason of a no."""

    families: str = ""
    exact: str = ""
    crop: str = ""
    batch: str = ""


def tried(mapping: str, name: str, folder: Path) -> Row:
    """Builds entry `name` small, interrupts it, and goes on from a file."""
    auto_mapping, cases = MAPPINGS[mapping]
    case = cases[name]
    if case.impossible:
        return Row(exact=f"no: {case.impossible}", crop="-", batch="-")
    model, inputs = build(case, name, auto_mapping), None
    inputs = case.inputs(model)
    whole = generated(model, inputs)
    snapshot = interrupted(model, inputs)
    file = folder / "state.safetensors"
    sq.save(snapshot, file, codec="raw")
    loaded = sq.load(file)
    require_same(sq.restore(loaded, model).generate(return_dict_in_generate=True), whole, STOP_AFTER)
    return Row(
        families=kept_by(loaded),
        exact="yes",
        crop=_cropped(model, inputs, loaded, whole),
        batch=_batched(model, inputs),
    )


def kept_by(snapshot: sq.Snapshot) -> str:
    """The kind of cache and the families of its layers, and what else of the model is in the state."""
    families = sorted({layer.family for layer in snapshot.cache.all_layers() if layer.tensors})
    if not families:
        return "none, every step starts from the first token"
    kind = snapshot.cache.kind
    text = ", ".join(families) if kind == "dynamic" else f"{kind} ({', '.join(families)})"
    others = sorted({path.rpartition(".")[2] for path in snapshot.generation.attributes})
    others += sorted(snapshot.generation.companions)
    return " + ".join([text, *others])


def generated(model: Any, inputs: Mapping[str, Any], **settings: Any) -> Any:
    torch.manual_seed(1)
    return model.generate(**copy.deepcopy(dict(inputs)), **{**SETTINGS, "max_new_tokens": N_NEW, **settings})


def interrupted(
    model: Any, inputs: Mapping[str, Any], settings: Mapping[str, Any] | None = None, **capture: Any
) -> sq.Snapshot:
    """The state of the same run, stopped while the token after number `STOP_AFTER` is computed."""
    with sq.capture(model, weights="sampled", **capture) as run:
        try:
            generated(model, inputs, **(settings or {}), streamer=_StopAfter(STOP_AFTER))
        except StoppedError:
            return run.snapshot()
    raise AssertionError("the run was not stopped")


def require_same(resumed: Any, whole: Any, n_before: int) -> None:
    """Tokens and raw logits, bit for bit, from the token after number `n_before` on."""
    expected = whole.logits[n_before:]
    assert len(resumed.logits) == len(expected), f"{len(resumed.logits)} steps, not {len(expected)}"
    for i, (found, logits) in enumerate(zip(resumed.logits, expected, strict=True)):
        assert torch.equal(found, logits), f"logits {i} differ by {float((found - logits).abs().max())}"
    assert torch.equal(resumed.sequences, whole.sequences), "tokens differ"


def _cropped(model: Any, inputs: Mapping[str, Any], snapshot: sq.Snapshot, whole: Any) -> str:
    n_tokens = snapshot.generation.prompt_length + CROPPED_AFTER
    try:
        cropped, word = snapshot.crop(n_tokens), "yes"
    except sq.UnsupportedOperationError:
        kept = interrupted(model, inputs, checkpoints=(n_tokens,))
        try:
            cropped, word = kept.crop(n_tokens), "at checkpoints"
        except sq.UnsupportedOperationError as error:
            return f"no: {error.found} would have to be cropped too"
    resumed = sq.restore(cropped, model).generate(return_dict_in_generate=True)
    require_same(resumed, whole, CROPPED_AFTER)
    return word


def _batched(model: Any, inputs: Mapping[str, Any]) -> str:
    double = {name: torch.cat([t, t]) if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    if "input_ids" in double:
        ids = double["input_ids"]
        row = ids.shape[0] // 2
        other = tokens(1, ids.shape[1]).flip(-1) if ids.ndim == 2 else ids[row:]
        plain = (ids[row:] >= 60) & (ids[row:] < 190)
        ids[row:] = torch.where(plain, other, ids[row:])
    try:
        whole = generated(model, double)
    except Exception as error:  # what transformers itself cannot do with two rows is no fault of ours
        return f"no: transformers takes no two rows of it so ({type(error).__name__})"
    snapshot = interrupted(model, double)
    require_same(sq.restore(snapshot, model).generate(return_dict_in_generate=True), whole, STOP_AFTER)
    return "yes"


def quiet() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
