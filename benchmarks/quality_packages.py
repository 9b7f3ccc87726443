"""Lossy KV-cache codecs of other packages as quality peers, each skipped where it is not installed.

None of them writes a file. Sizes are what their own documentation says that they would store (`stated`), or the
arithmetic of their packed integers and bf16 scales (`arithmetic`).
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from benchmarks.quality_protocol import Pairs, n_values

PIP = {
    "quanto": ("optimum.quanto", "pip install optimum-quanto"),
    "hqq": ("hqq", "pip install hqq"),
    "kakeyalattice": ("kakeyalattice", "pip install --no-deps kakeyalattice"),
    "nexusquant": ("nexusquant", "pip install --no-deps nexusquant-kv"),
}
"""Of each package the module, and the line that installs it."""


def is_installed(name: str) -> bool:
    """Whether a package is there; prints how to get it where it is not."""
    module, line = PIP[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"skipped: {name} ({error}); {line}")
        return False
    return True


def transformers_cache(cache: Pairs, *, backend: str, bits: int, config: Any) -> tuple[Pairs, float]:
    """transformers' QuantizedCache with its defaults: groups of 64, nothing exempt after a prefill."""
    from transformers import QuantizedCache

    quantised = QuantizedCache(backend, config, nbits=bits)
    decoded = []
    for i, (keys, values) in enumerate(cache):
        # bfloat16, as people run it: the scales and zero points then take two bytes each.
        quantised.update(keys.bfloat16(), values.bfloat16(), i)
        layer = quantised.layers[i]
        found = (layer._dequantize(q) for q in (layer._quantized_keys, layer._quantized_values))
        k, v = (tensor.float().reshape(keys.shape) for tensor in found)
        decoded.append((k, v))
    return decoded, n_values(cache) * (bits + 2 * 16 / 64) / 8


def kakeyalattice(cache: Pairs, *, q_range: int) -> tuple[Pairs, float]:
    """The E8 codec of kakeyalattice 1.5 on each head's vector, after RoPE as its own cache class does."""
    head_dim = cache[0][0].shape[-1]
    codec = importlib.import_module("kakeyalattice").V15KakeyaZamirE8GPU(D=head_dim, q_range=q_range, device="cpu")
    decoded = [(_lattice(codec, keys), _lattice(codec, values)) for keys, values in cache]
    return decoded, n_values(cache) / head_dim * codec.bits_per_token_per_head / 8


def nexusquant(cache: Pairs, *, key_bits: int, value_bits: int, theta: float) -> tuple[Pairs, float]:
    """E8QuantizedCache of nexusquant-kv 0.6: RoPE taken off, Hadamard, E8; an fp16 scale for each head's vector."""
    integration = importlib.import_module("nexusquant.integrations.quantized_cache")
    quantised = integration.E8QuantizedCache(key_bits=key_bits, value_bits=value_bits, rope_base=theta)
    for i, (keys, values) in enumerate(cache):
        quantised.update(keys, values, i)
    head_dim = cache[0][0].shape[-1]
    bits = (key_bits + value_bits) / 2 + 16 / head_dim
    return [(layer.keys, layer.values) for layer in quantised.layers], math.ceil(n_values(cache) * bits / 8)


def _lattice(codec: Any, tensor: Any) -> Any:
    return codec.roundtrip(tensor.reshape(-1, tensor.shape[-1])).reshape(tensor.shape).to(tensor)
