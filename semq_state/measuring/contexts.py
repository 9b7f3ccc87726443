"""The tokens that a calibration runs a model on: pieces of given texts, or what the model itself writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from semq_state.errors import CalibrationError
from semq_state.measuring.observing import cache_of

TEMPERATURES = (0.7, 1.0, 1.3)
"""Of the samples that stand in for a text, so that they are neither all plain nor all odd."""


def pieces(tokenizer: Any, texts: Sequence[str], n: int, length: int) -> list[torch.Tensor]:
    """`n` runs of `length` tokens, `(1, length)`, in equal shares from all texts and evenly spread over each.

    The last piece of each text comes last, so that what is held out is of every kind of text.

    Raises:
        CalibrationError: the texts are too short.
    """
    tokens = [tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for text in texts]
    shares = [n // len(texts) + (i < n % len(texts)) for i in range(len(texts))]
    short = [f"{len(ids)} tokens for {share} of {length}" for ids, share in zip(tokens, shares, strict=True)
             if len(ids) < share * length]  # fmt: skip
    if short:
        raise CalibrationError(
            "calibration text",
            expected=f"at least {n * length} tokens, in equal shares",
            found="; ".join(short),
            do="give more text, or none: the model then writes its own",
        )
    found = []
    for ids, share in zip(tokens, shares, strict=True):
        starts = torch.linspace(0, len(ids) - length, share).long().tolist() if share > 1 else [0] * share
        found.append([ids[at : at + length][None] for at in starts])
    # One of each text in turn: the last ones are a mixture of all.
    longest = max(map(len, found))
    return [run[i] for i in range(longest) for run in found if i < len(run)]


@torch.no_grad()
def samples(model: Any, n: int, length: int, *, seed: int = 0) -> list[torch.Tensor]:
    """`n` runs of `length` tokens, `(1, length)`, that the model writes from its beginning-of-text token.

    Raises:
        CalibrationError: the model has no such token.
    """
    config = model.generation_config
    begin = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    begin = begin[0] if isinstance(begin, list) else begin
    if begin is None:
        raise CalibrationError(
            "calibration", expected="a token to begin a text with", found="none", do="give a text to calibrate on"
        )
    ids = torch.full((n, 1), begin, device=model.device)
    temperatures = torch.tensor([TEMPERATURES[i % len(TEMPERATURES)] for i in range(n)], device=model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    cache, fed = None, ids
    for _ in range(length - 1):
        out = model(fed, past_key_values=cache, use_cache=True)
        cache = cache_of(out, model)
        chances = (out.logits[:, -1].float() / temperatures[:, None]).softmax(-1)
        fed = torch.multinomial(chances, 1, generator=generator)
        ids = torch.cat([ids, fed], dim=1)
    return [row[None] for row in ids.cpu()]
