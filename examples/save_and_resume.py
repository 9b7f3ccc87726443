"""Generate, keep the state, and go on from the file with the same random stream.

python examples/save_and_resume.py [MODEL] [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import semq_state as sq
from semq_state.cli.models import load_model


def main(name: str = "smollm2", folder: str | None = None) -> None:
    model, tokenizer = load_model(name)
    inputs = tokenizer("The lighthouse keeper wrote in his diary:", return_tensors="pt")
    file = Path(folder or tempfile.mkdtemp()) / "diary.safetensors"

    torch.manual_seed(1)
    with sq.capture(model, tokenizer=tokenizer) as run:
        model.generate(**inputs, max_new_tokens=20, do_sample=True)
    print(sq.save(run.snapshot(), file).state_id)

    resumed = sq.restore(sq.load(file), model, tokenizer=tokenizer)
    whole = resumed.generate(max_new_tokens=20)
    print(tokenizer.decode(whole[0]))

    # The same text in one piece.
    torch.manual_seed(1)
    again = model.generate(**inputs, max_new_tokens=40, do_sample=True)
    assert torch.equal(whole, again)


if __name__ == "__main__":
    main(*sys.argv[1:])
