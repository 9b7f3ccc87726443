"""Configurations from a file, of which nothing is trusted: to objects of transformers' own registry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from semq_state.container import shown
from semq_state.content import DTYPES
from semq_state.errors import FormatError

_DROPPED = (
    "attn_implementation", "experts_implementation", "auto_map", "quantization_config", "name_or_path",
    "trust_remote_code", "transformers_version",
)  # fmt: skip
# What would fetch or choose code, and what is told otherwise.

_COUNT = re.compile(r"(^|_)(num|n)_\w*(layer|label|expert|stage|block|codebook)|layers$|^depth$")
_MOST = 1 << 14  # of what is made one by one, before any tensor can be held against it
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}


def config_of(told: Mapping[str, Any], where: str) -> Any:
    """A model's configuration.

    Raises:
        FormatError: transformers knows no such model, or a value is out of reach of any.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = told.get("model_type")
    if type(kind) is not str or kind not in CONFIG_MAPPING_NAMES:
        raise _refused(where, "a type of model that transformers knows", kind, "update transformers")
    kept = _kept({name: value for name, value in told.items() if name != "model_type"}, where)
    try:
        config = AutoConfig.for_model(kind, **kept)
        config.get_text_config(decoder=True)
    except Exception as error:  # what a class of transformers makes of any values at all
        raise _refused(where, f"a configuration of {kind}", f"{type(error).__name__}: {error!s:.100}") from error
    return config


def generation_config_of(told: Mapping[str, Any], where: str) -> Any:
    """The settings of a model's generation; unknown ones are left out.

    Raises:
        FormatError: transformers refuses them.
    """
    from transformers import GenerationConfig

    known = GenerationConfig()
    kept = {
        name: value
        for name, value in told.items()
        if not name.startswith("_") and hasattr(known, name) and not callable(getattr(known, name))
    }
    try:
        return GenerationConfig(**kept)
    except Exception as error:  # as above
        raise _refused(where, "settings of a generation", f"{type(error).__name__}: {error!s:.100}") from error


def _kept(told: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration without what would choose code, those within it included."""
    from transformers import PreTrainedConfig

    found = {}
    for name, value in told.items():
        if name.startswith("_") or name in _DROPPED:
            continue
        if callable(getattr(PreTrainedConfig, name, None)):
            raise _refused(where, "settings, no methods", name)
        if name in ("dtype", "torch_dtype"):
            if value is not None and value not in _DTYPES:
                raise _refused(where, "a dtype of weights", value)
        elif name == "use_pretrained_backbone" and value:
            raise _refused(where, "weights of this file alone", f"{name}={value!r}")
        elif type(value) is int and _COUNT.search(name) and value > _MOST:
            raise _refused(where, f"at most {_MOST} of {shown(name)}", value)
        found[name] = _kept(value, where) if isinstance(value, dict) else value
    return found


def _refused(where: str, expected: str, found: Any, do: str = "use another copy of the file") -> FormatError:
    return FormatError(f"{where}, config", expected=expected, found=shown(found), do=do)
