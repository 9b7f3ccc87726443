"""`sq.supports`: what of a model's state is kept and what is missing, said beforehand by trying a few tokens."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from semq_state.capture import capture
from semq_state.errors import SemqStateError
from semq_state.restore import restore
from semq_state.snapshot import CacheState

_N_NEW, _STOPPED_AFTER = 6, 3
_SETTINGS: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "forced_eos_token_id": None,
    "num_beams": 1,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@dataclass(frozen=True)
class Support:
    """What a trial on a few tokens found.

    Args:
        model_name: name or class.
        supported: whether a run resumed in the middle gave the same logits and tokens, bit for bit.
        cache: id of the kind of cache.
        families: family id to number of layers.
        others: what is kept besides the cache: attributes of modules, encoder outputs, further caches.
        crop: `any count`, or `at checkpoints` where layers forget.
        bytes_per_token: of cache, for one more token of one row, where it grows.
        fixed_bytes: of cache, for one row, whatever the number of tokens.
        missing: why the state cannot be kept, what to do about it; empty where it can.
    """

    model_name: str
    supported: bool
    cache: str = ""
    families: Mapping[str, int] | None = None
    others: tuple[str, ...] = ()
    crop: str = ""
    bytes_per_token: int = 0
    fixed_bytes: int = 0
    missing: str = ""

    def __bool__(self) -> bool:
        return self.supported

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "others": list(self.others), "families": dict(self.families or {})}


def supports(model: Any, inputs: Mapping[str, Any] | None = None) -> Support:
    """Generates a few tokens, interrupts, resumes, and compares logits and tokens: seconds, and nothing is changed.

    Args:
        model: a transformers model.
        inputs: what to give `generate`; a few text tokens by default. A model of images or sounds is tried on what
            it will be used for when these are passed.

    Returns:
        What is kept and what is missing; true where the resume was exact.

    Raises:
        UnsupportedModelError: it is no model that generates.

    Example:
        >>> print(sq.supports(model).families)  # doctest: +SKIP
    """
    from semq_state.generation.attributes import attributes_put_back
    from semq_state.generation.seams import base_model

    inner = base_model(model)
    name = str(getattr(inner.config, "_name_or_path", "") or type(inner).__name__)
    given = dict(inputs) if inputs is not None else {"input_ids": _tokens(inner)}
    with torch.random.fork_rng(devices=_cuda(inner)), warnings.catch_warnings(), attributes_put_back(inner):
        warnings.simplefilter("ignore")
        try:
            whole = _generated(model, given, _N_NEW)
        except Exception as error:  # whatever a model says to inputs that do not suit it
            text = f"it does not generate from these inputs ({type(error).__name__}: {error}); pass inputs="
            return Support(name, False, missing=text)
        try:
            return _tried(model, name, given, whole)
        except SemqStateError as error:
            return Support(name, False, missing=str(error))


def _tried(model: Any, name: str, inputs: Mapping[str, Any], whole: Any) -> Support:
    with capture(model, weights="sampled") as run:
        _generated(model, inputs, _STOPPED_AFTER)
    snapshot = run.snapshot()
    resumed = restore(snapshot, model).generate(max_new_tokens=_N_NEW - _STOPPED_AFTER, **_SETTINGS)
    same = torch.equal(resumed.sequences, whole.sequences) and all(
        map(torch.equal, resumed.logits, whole.logits[_STOPPED_AFTER:])
    )
    layers = snapshot.cache.all_layers()
    growing, fixed = _sizes(snapshot.cache, snapshot.batch_size)
    forgets = any(x.tensors and x.layout.cropping in ("window", "never") for x in layers)
    state = snapshot.generation
    others = [*state.attributes, *state.companions, *(n for n in ("encoder_outputs",) if n in state.step_values)]
    return Support(
        name,
        same,
        cache=snapshot.cache.kind,
        families=dict(Counter(layer.family for layer in layers)),
        others=tuple(others),
        crop="at checkpoints" if forgets else "any count",
        bytes_per_token=growing,
        fixed_bytes=fixed,
        missing=""
        if same
        else "the resumed run differs: something outside the state that is kept decides it; "
        "please report this architecture",
    )


def _generated(model: Any, inputs: Mapping[str, Any], n_tokens: int) -> Any:
    torch.manual_seed(0)
    return model.generate(**inputs, **_SETTINGS, max_new_tokens=n_tokens)


def _sizes(cache: CacheState, n_rows: int, *, grows: bool = True) -> tuple[int, int]:
    growing = fixed = 0
    for layer in cache.layers:
        for name, tensor in layer.tensors.items():
            axis = layer.layout.of(name).token_axis
            n_bytes = tensor.numel() * tensor.element_size() // max(1, n_rows)
            if axis is None or layer.is_fixed or not grows:
                fixed += n_bytes
            else:
                growing += n_bytes // max(1, tensor.shape[axis])
    for part, inner in cache.parts.items():
        more = _sizes(inner, n_rows, grows=cache.grows(part))
        growing, fixed = growing + more[0], fixed + more[1]
    return growing, fixed


def _tokens(model: Any) -> torch.Tensor:
    vocabulary = int(getattr(model.config.get_text_config(decoder=True), "vocab_size", None) or 64)
    return torch.arange(3, 11, device=model.device)[None] % vocabulary


def _cuda(model: Any) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
