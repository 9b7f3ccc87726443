"""Hidden states of a few texts on disk, read again without the model, and searched.

python examples/hidden_states.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import semq_state as sq
from semq_state.cli.models import load_model

TEXTS = (
    "The lighthouse keeper climbed the stairs and lit the lamp.",
    "At dusk the lamp of the tower was burning over the sea.",
    "Interest rates rose by a quarter of a point on Thursday.",
    "The central bank left its key rate where it was.",
)


def main() -> None:
    model, tokenizer = load_model("smollm2", dtype="float32")

    # Beside the cache, in one snapshot: two layers of the prompt and of every new token.
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    with sq.capture(model, tokenizer=tokenizer, hidden_states=sq.HiddenStates(layers=(12, -1))) as run:
        model.generate(**inputs, max_new_tokens=8, do_sample=False)
    rows = run.snapshot().hidden["sequence"]
    print(f"{len(rows)} rows of {', '.join(rows.states)}")

    with tempfile.TemporaryDirectory() as folder:
        # A dataset, one row a text. Called again after a kill, this goes on where it was.
        # The first token draws attention whatever it is; its state is a hundred times as long, and says nothing.
        wanted = sq.HiddenStates(layers=20, tokens=slice(1, None), pool="mean")
        sq.record(model, TEXTS, Path(folder, "states"), hidden_states=wanted, tokenizer=tokenizer)

        # Somebody else, later, without the model.
        record = sq.open_record(Path(folder, "states"))
        print(record)
        states = record["hidden_states.20"][:]
        print("norms:", [round(float(norm)) for norm in states.norm(dim=-1)])

        # What all texts have in common says nothing of any of them.
        centred = states - states.mean(0)
        index = sq.SymbolIndex(centred.shape[1])
        index.add(centred)
        for text, (_, nearest) in zip(TEXTS, index.search(centred, k=2).ids, strict=True):
            print(f"{text[:30]}… is nearest to {TEXTS[int(nearest)][:30]}…")


if __name__ == "__main__":
    main()
