"""A hand-written loop of forward passes, saved in the middle and finished from the file.

python examples/own_loop.py [MODEL] [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import DynamicCache

import semq_state as sq
from semq_state.cli.models import load_model


@torch.no_grad()
def main(name: str = "smollm2", folder: str | None = None) -> None:
    model, tokenizer = load_model(name)
    file = Path(folder or tempfile.mkdtemp()) / "loop.safetensors"
    cache = DynamicCache(config=model.config)
    tokens = tokenizer("One, two, three,", return_tensors="pt").input_ids
    feed = tokens
    for _ in range(8):
        logits = model(feed, past_key_values=cache, logits_to_keep=1).logits
        feed = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, feed], dim=-1)

    sq.save(sq.snapshot_of(model, cache, tokens), file)
    resumed = sq.restore(sq.load(file), model)
    print(tokenizer.decode(resumed.generate(max_new_tokens=8, do_sample=False)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
