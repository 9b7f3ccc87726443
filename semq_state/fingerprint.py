"""A live model's provenance: the digest of its weights, its configuration, tokenizer, adapters and surroundings."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import platform
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from semq_state import content
from semq_state.errors import UnsupportedModelError
from semq_state.provenance import Provenance, plain

MODES = ("full", "sampled")
"""`full` reads every byte of the weights. `sampled` reads `SAMPLES` evenly spaced pieces of each tensor: for
models of many gigabytes. It tells other weights, another fine-tune or another rounding; it cannot tell a change
of a few bytes, and it proves nothing against someone who knows where it looks."""

SAMPLES = 16
SAMPLE_BYTES = 4096
_GUARD_VALUES = 64  # of each weight, when a remembered digest is used again

_LIBRARIES = ("torch", "transformers", "semq-state")
_NOT_CONFIG = {
    "_name_or_path", "_model_name_or_path", "_commit_hash", "_attn_implementation_internal",
    "_experts_implementation_internal", "transformers_version", "architectures", "id2label", "label2id",
    "problem_type", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
    "dtype", "torch_dtype", "rope_parameters", "rope_scaling", "rope_theta", "quantization_config",
    "is_local", "_from_model_config",
}  # fmt: skip
# Names and paths prove nothing, outputs and versions do not change the state, the rest is compared apart.

_CHANGING_ROPE = ("dynamic", "longrope")
_remembered: weakref.WeakKeyDictionary[Any, dict[str, _Remembered]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class WeightsMark:
    """Which tensors a model held at one moment, by name, and how often each had been written to."""

    held: Mapping[str, tuple[weakref.ref[torch.Tensor], int]]

    def changed(self, model: Any) -> list[str]:
        """Names of tensors that were added, removed, replaced, or changed in place as far as torch counts."""
        now = dict(weights_of(model))
        return sorted(self.held.keys() ^ now.keys()) + [
            name
            for name, tensor in now.items()
            if name in self.held and (self.held[name][0]() is not tensor or self.held[name][1] != _version(tensor))
        ]


@dataclass(frozen=True)
class _Remembered:
    digest: str
    mark: WeightsMark
    guard: str


def mark_weights(model: Any) -> WeightsMark:
    """Remembers which weights `model` holds now, without reading them."""
    _settle(model)
    return WeightsMark({name: (weakref.ref(t), _version(t)) for name, t in weights_of(model)})


def weights_digest(model: Any, mode: str = "full") -> str:
    """The digest of every parameter and buffer, in the order of their names.

    It is remembered for the model object until a tensor is replaced or written to. torch counts writes, save
    those through `.data` or shared memory; so each use of a remembered digest also reads a small sample again.

    Args:
        model: a torch module.
        mode: `full`, or `sampled` for very large models (see `MODES`).

    Returns:
        `sha256:…` or `sampled:…`.

    Raises:
        UnsupportedModelError: a weight lies on no device that can be read.
    """
    if mode not in MODES:
        raise ValueError(f"`weights` must be one of {MODES}, got {mode!r}")
    _settle(model)
    known = _remembered.setdefault(model, {}).get(mode)
    if known and not known.mark.changed(model) and known.guard == _guard(model):
        return known.digest
    mark, guard = mark_weights(model), _guard(model)
    weights = list(_computing(model))
    # The largest tensors first, so that no core is left alone with one at the end.
    order = sorted(range(len(weights)), key=lambda i: -weights[i][1])
    rows: list[list[Any]] = [[] for _ in weights]
    read = _whole if mode == "full" else _sampled

    def row(i: int) -> list[Any]:
        name, _, take = weights[i]
        tensor = take()
        return [name, str(tensor.dtype)[6:], list(tensor.shape), read(tensor)]

    with ThreadPoolExecutor(content.n_workers()) as pool:
        for i, found in zip(order, pool.map(row, order), strict=True):
            rows[i] = found
    table = rows
    whole = hashlib.sha256(content.pack(table)).hexdigest()
    digest = f"{'sha256' if mode == 'full' else 'sampled'}:{whole}"
    _remembered[model][mode] = _Remembered(digest, mark, guard)
    return digest


def fingerprint(model: Any, tokenizer: Any = None, *, weights: str = "full", adapters_of: Any = None) -> Provenance:
    """The provenance of what `model` computes from now on.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer, where tokens shall be comparable too.
        weights: how the weights are read, `full` or `sampled`; empty to leave them out.
        adapters_of: the wrapper that holds the adapters, where it is not `model` itself.
    """
    config = model.config.to_dict()
    text_config = model.config.get_text_config(decoder=True).to_dict()
    described = {**_described(config), "model_class": type(model).__name__}
    held = getattr(model, "semq_weights", None)
    quantization = config.get("quantization_config") or ({} if held is None else held.provenance())
    return Provenance(
        weights=weights_digest(model, weights) if weights else "",
        config=plain(described),
        rope=plain(text_config.get("rope_parameters") or {}),
        tokenizer=tokenizer_digest(tokenizer) if tokenizer is not None else None,
        adapters=_adapters(adapters_of if adapters_of is not None else model),
        quantization=plain(quantization if isinstance(quantization, dict) else quantization.to_dict()),
        dtype=str(model.dtype).removeprefix("torch."),
        model_name=model_name(model),
        versions={
            "python": platform.python_version(),
            **_library_versions(),
        },
        attention=str(model.config._attn_implementation or ""),
        device=model.device.type,
        threads=torch.get_num_threads(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def model_name(model: Any) -> str:
    """A name for people, from the architecture and the size; a path or hub id would tell more than it should."""
    return f"{model.config.model_type} {model.num_parameters() / 1e6:.0f}M"


def tokenizer_digest(tokenizer: Any) -> str:
    """The digest of what a tokenizer makes of text: vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Calls change these two; they say how the last batch was cut and filled, not what a token is.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"vocab": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map}
    return f"sha256:{hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()}"


@functools.cache
def _settle(model: Any) -> None:
    """Has RWKV divide its weights now, as its first forward pass would: the digest is of what computes."""
    decoder: Any = getattr(model, "base_model", None)
    if hasattr(decoder, "_rescale_layers"):
        decoder._rescale_layers()


def _library_versions() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


def weights_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by name. Buffers that a rotary embedding recomputes as the text grows are left
    out: they follow from the configuration and from the one beside them that stays."""
    changing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name and _recomputes(module)
    }
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(named):
        if name not in changing:
            yield name, named[name]


def _computing(model: Any) -> Iterator[tuple[str, int, Callable[[], torch.Tensor]]]:
    """Name and size of every weight that the model computes with, and how to get it. A layer that holds symbols
    (`weights/linear.py`) tells the weights that it stands for, so that one model has one digest however it holds
    them."""
    standing = {name: module for name, module in model.named_modules() if hasattr(module, "plain_weights")}
    found: dict[str, tuple[int, Callable[[], torch.Tensor]]] = {}
    for name, tensor in weights_of(model):
        owner, _, last = name.rpartition(".")
        if owner not in standing or last == "bias":
            found[name] = tensor.numel() * tensor.element_size(), partial(_same, tensor)
    for owner, module in standing.items():
        size = module.in_features * module.out_features
        found[f"{owner}.weight"] = size, partial(_plain, module)
    for name in sorted(found):
        yield name, *found[name]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _plain(module: Any) -> torch.Tensor:
    found: torch.Tensor = module.plain_weights()["weight"]
    return found


def _recomputes(module: torch.nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    return any(kind in _CHANGING_ROPE for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "meta":
        raise UnsupportedModelError(
            "weights",
            expected="weights in memory",
            found="a tensor on the meta device (offloaded to disk?)",
            do="load the model without disk offload",
        )
    return tensor.detach()


def _whole(tensor: torch.Tensor) -> str:
    return hashlib.sha256(content.raw_bytes(_readable(tensor)).data).hexdigest()


def _sampled(tensor: torch.Tensor) -> str:
    flat = _readable(tensor).reshape(-1)
    size = max(1, SAMPLE_BYTES // tensor.element_size())
    starts = np.linspace(0, max(0, flat.numel() - size), SAMPLES).astype(int)
    pieces = torch.cat([flat[start : start + size] for start in dict.fromkeys(starts.tolist())])
    return hashlib.sha256(content.raw_bytes(pieces).data).hexdigest()


def _guard(model: Any) -> str:
    """A digest of a few values from all over each weight, read in about a millisecond per hundred weights."""
    found = hashlib.sha256()
    for _, tensor in weights_of(model):
        flat = _readable(tensor).reshape(-1)
        found.update(content.raw_bytes(flat[:: max(1, flat.numel() // _GUARD_VALUES)]).data)
    return found.hexdigest()


def _described(config: Any) -> Any:
    """A configuration, those within it included, without what proves nothing."""
    if not isinstance(config, dict):
        return config
    return {key: _described(value) for key, value in config.items() if key not in _NOT_CONFIG}


def _adapters(model: Any) -> dict[str, Any]:
    loaded = getattr(model, "peft_config", None)
    if not isinstance(loaded, dict):
        return {}
    active = getattr(model, "active_adapters", [])
    active = active() if callable(active) else active
    return {name: {"active": name in active, **_adapter_settings(settings)} for name, settings in loaded.items()}


def _adapter_settings(settings: Any) -> dict[str, Any]:
    left_out = (
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
    )
    kept = {name: value for name, value in settings.to_dict().items() if name not in left_out}
    return dict(plain(kept))
