"""transformers' quantised layers in their packed form: fp8, HQQ and quanto.

The two libraries behind the last are needed to take and to rebuild such a state, for only they read their packing.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from transformers.cache_utils import Fp8QuantizedLayer, HQQQuantizedLayer, QuantoQuantizedLayer

from semq_state.caches.base import AGAIN, AbstractFamily, Mark, require_length
from semq_state.errors import IncompleteStateError, UnsupportedModelError
from semq_state.provenance import plain
from semq_state.snapshot import LayerState

_VIEWS = {_name: getattr(torch, _name) for _name in ("uint8", "int8", "int16", "int32")}
_OPTIONS = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")


@final
class Fp8(AbstractFamily):
    """Keys and values in 8-bit floats that grow by concatenation, each with one scale for the whole tensor."""

    id: ClassVar[str] = "fp8"
    layer_type: ClassVar[type | str] = Fp8QuantizedLayer
    names: ClassVar[tuple[str, ...]] = ("keys", "values", "key_scale", "value_scale")
    counts: ClassVar[dict[str, int]] = {"n_seen": 0}

    def mark(self, layer: Any) -> Mark:
        return layer.cumulative_length

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        if not mark:
            return LayerState(self.id, {}, {"n_seen": 0, "dtype": "", "filled": False})
        (keys, key_scale), (values, value_scale) = layer._quantized_keys, layer._quantized_values
        if keys.shape[-2] < mark:
            raise IncompleteStateError(
                "cache", expected=f"{mark} tokens", found=f"{keys.shape[-2]}: it was cut since"
            )
        tensors = {
            "keys": keys[:, :, :mark],
            "values": values[:, :, :mark],
            "key_scale": key_scale,
            "value_scale": value_scale,
        }
        return LayerState(self.id, tensors, {"n_seen": mark, "dtype": _dtype_name(layer.dtype), "filled": True})

    def empty(self, state: LayerState) -> Any:
        return Fp8QuantizedLayer()

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        if not state.tensors:
            return
        tensors = {name: t.to(device) for name, t in state.tensors.items()}
        _initialize(layer, state, device)
        layer._quantized_keys = tensors["keys"], tensors["key_scale"]
        layer._quantized_values = tensors["values"], tensors["value_scale"]
        layer.cumulative_length = state.meta["n_seen"]

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_seen"]) if state.tensors else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        if state.tensors:
            require_length(state.tensors["keys"], -2, state.meta["n_seen"], f"{where}, keys")
            _dtype(state, where)


class Packed(AbstractFamily):
    """A packed past, as its library keeps it, and the last tokens' `keys` and `values` in full precision.

    `key_codes`, `key_scale` and `key_zero`, and so for values. Their axes are the library's own, so rows cannot be
    selected.
    """

    names: ClassVar[tuple[str, ...]] = (
        "key_codes", "key_scale", "key_zero", "value_codes", "value_scale", "value_zero",
    )  # fmt: skip
    optional: ClassVar[tuple[str, ...]] = ("keys", "values", "pending_rows")
    counts: ClassVar[dict[str, int]] = {"n_seen": 0, "nbits": 1, "q_group_size": 1, "residual_length": 1}
    library: ClassVar[str]

    def mark(self, layer: Any) -> Mark:
        packed = layer._quantized_keys, layer._quantized_values
        return packed, layer.keys, layer.values, layer._pending_beam_idx, layer.cumulative_length

    def dump(self, layer: Any, mark: Mark) -> LayerState:
        packed, keys, values, pending, n_seen = mark
        meta: dict[str, Any] = {name: getattr(layer, name) for name in _OPTIONS}
        if not n_seen:
            return LayerState(self.id, {}, {**meta, "n_seen": 0, "dtype": "", "filled": False})
        tensors: dict[str, torch.Tensor] = {}
        for side, whole in zip(("key", "value"), packed, strict=True):
            (codes, scale, zero), settings = self.unpacked(whole)
            tensors |= {f"{side}_codes": codes, f"{side}_scale": scale, f"{side}_zero": zero}
            meta[f"{side}_packing"] = settings
        if keys.ndim == 4:
            tensors |= {"keys": keys, "values": values}
        if pending is not None:
            tensors["pending_rows"] = pending
        return LayerState(
            self.id, tensors, {**meta, "n_seen": n_seen, "dtype": _dtype_name(layer.dtype), "filled": True}
        )

    def empty(self, state: LayerState) -> Any:
        try:
            return self.layer_type(**{name: state.meta[name] for name in _OPTIONS})  # type: ignore[operator]
        except ImportError as error:
            raise UnsupportedModelError(
                f"a {self.id!r} layer",
                expected=f"{self.library}, which packed it",
                found="not installed",
                do=f"pip install {self.library}",
            ) from error

    def fill(self, layer: Any, state: LayerState, device: torch.device) -> None:
        if not state.tensors:
            return
        tensors = {name: t.to(device) for name, t in state.tensors.items()}
        _initialize(layer, state, device)
        for side, where in (("key", "_quantized_keys"), ("value", "_quantized_values")):
            parts = tuple(tensors[f"{side}_{part}"] for part in ("codes", "scale", "zero"))
            setattr(layer, where, self.packed(layer, side, parts, state.meta[f"{side}_packing"]))
        layer.keys = tensors.get("keys", layer.keys)
        layer.values = tensors.get("values", layer.values)
        layer._pending_beam_idx = tensors.get("pending_rows")
        layer.cumulative_length = state.meta["n_seen"]

    def unpacked(self, whole: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Codes, scale and zero-point of a packed tensor, and its plain settings."""
        raise NotImplementedError

    def packed(self, layer: Any, side: str, parts: tuple[torch.Tensor, ...], settings: Any) -> Any:
        """The inverse of `unpacked`."""
        raise NotImplementedError

    def n_cached(self, state: LayerState) -> int | None:
        return int(state.meta["n_seen"]) if state.tensors else None

    def check(self, state: LayerState, batch_size: int, where: str) -> None:
        super().check(state, batch_size, where)
        if not state.tensors:
            return
        _dtype(state, where)
        n_residual = state.tensors["keys"].shape[-2] if "keys" in state.tensors else 0
        for side in ("key", "value"):
            settings = state.meta.get(f"{side}_packing")
            shape = settings.get("shape") if isinstance(settings, dict) else None
            if (
                not (isinstance(shape, list) and len(shape) == 4 and all(type(n) is int for n in shape))
                or shape[2] + n_residual != state.meta["n_seen"]
                or shape[0] != batch_size
            ):
                raise IncompleteStateError(
                    f"{where}, {side}_codes",
                    expected=f"{state.meta['n_seen'] - n_residual} packed tokens of {batch_size} rows",
                    found=repr(shape),
                    do=AGAIN,
                )


@final
class Hqq(Packed):
    """As Half-Quadratic Quantization packs them."""

    id: ClassVar[str] = "hqq"
    layer_type: ClassVar[type | str] = HQQQuantizedLayer
    library: ClassVar[str] = "hqq"

    def unpacked(self, whole: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        codes, meta = whole
        settings = {
            "shape": list(meta["shape"]),
            "group_size": meta["group_size"],
            "axis": meta["axis"],
            "packing": meta["packing"],
            "unpack_view": _dtype_name(meta["unpack_view_dtype"]),
            "view_as_float": meta["view_as_float"],
        }
        return (codes, meta["scale"], meta["zero"]), plain(settings)

    def packed(self, layer: Any, side: str, parts: tuple[torch.Tensor, ...], settings: Any) -> Any:
        codes, scale, zero = parts
        meta = {
            "nbits": layer.nbits,
            "group_size": settings["group_size"],
            "shape": torch.Size(settings["shape"]),
            "scale": scale,
            "zero": zero,
            "axis": settings["axis"],
            "packing": settings["packing"],
            "unpack_view_dtype": _VIEWS[settings["unpack_view"]],
            "view_as_float": settings["view_as_float"],
            "compute_dtype": layer.dtype,
        }
        return codes, meta


@final
class Quanto(Packed):
    """As optimum-quanto packs them."""

    id: ClassVar[str] = "quanto"
    layer_type: ClassVar[type | str] = QuantoQuantizedLayer
    library: ClassVar[str] = "optimum-quanto"

    def unpacked(self, whole: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        settings = {"shape": list(whole.shape), "packed_shape": list(whole._data.shape), "axis": whole._axis}
        return (whole._data._data, whole._scale, whole._shift), plain(settings)

    def packed(self, layer: Any, side: str, parts: tuple[torch.Tensor, ...], settings: Any) -> Any:
        from optimum.quanto.tensor.packed import PackedTensor
        from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor

        codes, scale, shift = parts
        size, packed = torch.Size(settings["shape"]), torch.Size(settings["packed_shape"])
        data = PackedTensor(codes, layer.nbits, packed, _strides(packed))
        return WeightQBitsTensor(
            layer.qtype, settings["axis"], layer.q_group_size, size, _strides(size), data, scale, shift
        )


def _initialize(layer: Any, state: LayerState, device: torch.device) -> None:
    # The base class's own part of it: the subclasses' would quantise.
    layer.dtype, layer.device = _dtype(state, "cache"), device
    layer.keys = torch.tensor([], dtype=layer.dtype, device=device)
    layer.values = torch.tensor([], dtype=layer.dtype, device=device)
    layer.is_initialized = True


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(state: LayerState, where: str) -> torch.dtype:
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(
        str(state.meta.get("dtype"))
    )
    if dtype is None:
        raise IncompleteStateError(
            where, expected="a floating dtype", found=repr(state.meta.get("dtype")), do=AGAIN
        )
    return dtype
