"""How lossy codecs are judged: what the model says after its cache was coded and decoded.

A segment is a prefix of 1,024 tokens and the 256 that follow it. The prefix is prefilled once; for each method its
cache is replaced by the decoded one and the model is teacher-forced through

- the following tokens, and
- a repetition of the prefix's tokens 300 to 428, scored from the 17th on: copying from the context, where a cache
  that only keeps averages fails.

Everything is computed in the model's dtype; use float32. Python source as a domain is read from the standard
library of the running Python (PSF licence), so it differs a little from version to version.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.report import Row

Pairs = list[tuple[Tensor, Tensor]]
"""Of each layer keys and values, float32 (1, kv_heads, seq, head_dim); keys as cached, after RoPE."""

N_PREFIX = 1024
N_NEXT = 256
N_SEGMENTS = 4
COPIED = slice(300, 428)
COPY_SKIPS = 16

_PYTHON = {
    "test": (
        "argparse.py",
        "ast.py",
        "configparser.py",
        "difflib.py",
        "fractions.py",
        "inspect.py",
        "json/decoder.py",
        "json/encoder.py",
        "statistics.py",
        "tarfile.py",
        "textwrap.py",
        "zipfile.py",
    ),
    "calibration": (
        "calendar.py",
        "collections/__init__.py",
        "csv.py",
        "dataclasses.py",
        "datetime.py",
        "doctest.py",
        "email/message.py",
        "enum.py",
        "functools.py",
        "http/client.py",
        "ipaddress.py",
        "locale.py",
        "logging/__init__.py",
        "mailbox.py",
        "optparse.py",
        "pickle.py",
        "random.py",
        "shutil.py",
        "smtplib.py",
        "socket.py",
        "subprocess.py",
        "threading.py",
        "typing.py",
        "unittest/mock.py",
        "uuid.py",
        "xml/dom/minidom.py",
    ),
}


@dataclass(frozen=True)
class Segment:
    """One prefix with its exact cache: what a codec is given.

    Attributes:
        domain: the text's name.
        tokens: the prefix, (1, n_prefix); the cache's positions are 0 to n_prefix - 1.
        cache: its exact cache. Codecs leave it as it is.
    """

    domain: str
    tokens: Tensor
    cache: Pairs


Code = Callable[[Segment], tuple[Pairs, float]]
"""The decoded cache, of the same shapes, and the bytes that were stored for it, everything counted."""


@dataclass(frozen=True)
class _Test:
    """One teacher-forced pass: tokens to feed, which of the logits count, and what the exact cache gave there."""

    name: str
    fed: Tensor
    scored: slice
    targets: Tensor
    exact: Tensor  # log-probabilities (n_scored, vocabulary)


@dataclass(frozen=True)
class _Score:
    """Sums over scored positions."""

    kl: float
    top1: int
    nll: float
    n: int


class Protocol:
    """The segments of some texts, with everything about the exact cache computed once.

    Args:
        model: a causal model whose cache is one pair of tensors a layer.
        tokenizer: its tokenizer.
        texts: domains by name.
        n_segments: how many of each text, evenly spread over it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, texts: Mapping[str, str], *, n_segments: int = N_SEGMENTS
    ) -> None:
        self.model = model
        self._segments: list[tuple[Segment, list[_Test]]] = []
        for domain, text in texts.items():
            for ids in spread(token_ids(tokenizer, text), n_segments, N_PREFIX + N_NEXT + 1):
                self._segments.append(self._prepared(domain, ids))

    @property
    def segments(self) -> list[Segment]:
        return [segment for segment, _ in self._segments]

    def evaluate(self, code: Code, **labels: Any) -> Row:
        """Size and quality of one codec.

        Args:
            code: codes and decodes one segment's cache.
            labels: the row's first columns, such as `method`.

        Returns:
            the labels; `bits_per_value`, `ratio` (bf16 over stored) over all segments, and `bits` of each domain;
            `kl` (mean KL(exact ‖ decoded), nats), `top1` (% of positions with the same most likely token) and
            `perplexity` of each domain and of `copy`; `seconds` that a coding and decoding took on average.
        """
        scores: dict[str, list[_Score]] = {}
        sizes: dict[str, list[tuple[float, int]]] = {}
        seconds = 0.0
        for segment, tests in self._segments:
            start = time.perf_counter()
            decoded, n_bytes = code(segment)
            seconds += time.perf_counter() - start
            sizes.setdefault(segment.domain, []).append((n_bytes, n_values(segment.cache)))
            for test in tests:
                scores.setdefault(test.name, []).append(self._score(decoded, test))
        bits = _bits([size for domain in sizes.values() for size in domain])
        row: Row = {**labels, "bits_per_value": bits, "ratio": 16 / bits}
        row |= {f"bits_{domain}": _bits(found) for domain, found in sizes.items()}
        for name, found in scores.items():
            row |= _columns(name, found)
        return {**row, "seconds": seconds / len(self._segments)}

    def _prepared(self, domain: str, ids: Tensor) -> tuple[Segment, list[_Test]]:
        prefix, following = ids[:N_PREFIX], ids[N_PREFIX:]
        segment = Segment(domain, prefix[None], prefill(self.model, prefix[None]))
        copied, scored = prefix[COPIED], slice(COPY_SKIPS - 1, -1)
        tests = [
            self._test(segment, domain, following[:-1], slice(None), following[1:]),
            self._test(segment, "copy", copied, scored, copied[COPY_SKIPS:]),
        ]
        return segment, tests

    def _test(self, segment: Segment, name: str, fed: Tensor, scored: slice, targets: Tensor) -> _Test:
        exact = self._log_probabilities(segment.cache, fed, scored)
        return _Test(name, fed, scored, targets, exact)

    def _score(self, decoded: Pairs, test: _Test) -> _Score:
        found = self._log_probabilities(decoded, test.fed, test.scored)
        kl = torch.nn.functional.kl_div(found, test.exact, log_target=True, reduction="sum")
        top1 = (found.argmax(-1) == test.exact.argmax(-1)).sum()
        nll = torch.nn.functional.nll_loss(found, test.targets, reduction="sum")
        return _Score(float(kl), int(top1), float(nll), len(test.targets))

    @torch.no_grad()
    def _log_probabilities(self, pairs: Pairs, fed: Tensor, scored: slice) -> Tensor:
        cache = _cache(self.model, pairs)
        return torch.log_softmax(self.model(fed[None], past_key_values=cache).logits[0, scored].float(), dim=-1)


@torch.no_grad()
def prefill(model: Any, tokens: Tensor) -> Pairs:
    """The exact cache of `tokens`, (1, seq)."""
    cache = _cache(model, [])
    model(tokens, past_key_values=cache, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text that may be longer than the model's context, (n,)."""
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids


def spread(ids: Tensor, n: int, length: int) -> list[Tensor]:
    """`n` pieces of `length` tokens that begin at equal distances.

    Raises:
        ValueError: the text is too short for pieces that do not overlap.
    """
    stride = len(ids) // n
    if stride < length:
        raise ValueError(f"{n} pieces of {length} tokens asked of a text of {len(ids)}")
    return [ids[i * stride : i * stride + length] for i in range(n)]


def python_source(split: Literal["test", "calibration"] = "test") -> str:
    """Source files of the running Python's standard library, one after the other; no file is in both splits."""
    library = Path(sysconfig.get_paths()["stdlib"])
    # Files move between versions (zipfile became a package); those that are missing are left out.
    found = [library / name for name in _PYTHON[split] if (library / name).is_file()]
    return "\n".join(path.read_text(encoding="utf-8") for path in found)


def n_values(pairs: Pairs) -> int:
    """How many numbers the cache holds."""
    return sum(tensor.numel() for pair in pairs for tensor in pair)


def _cache(model: Any, pairs: Pairs) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for i, (keys, values) in enumerate(pairs):
        cache.update(keys, values, i)
    return cache


def _bits(sizes: list[tuple[float, int]]) -> float:
    return 8 * sum(n_bytes for n_bytes, _ in sizes) / sum(n for _, n in sizes)


def _columns(name: str, scores: list[_Score]) -> Row:
    n = sum(score.n for score in scores)
    return {
        f"kl_{name}": sum(score.kl for score in scores) / n,
        f"top1_{name}": 100 * sum(score.top1 for score in scores) / n,
        f"perplexity_{name}": float(torch.tensor(sum(score.nll for score in scores) / n).exp()),
    }
