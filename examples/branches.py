"""Pay for a long prompt once, and go on from it in several ways.

python examples/branches.py [MODEL]
"""

from __future__ import annotations

import sys

import semq_state as sq
from semq_state.cli.models import load_model


def main(name: str = "smollm2") -> None:
    model, tokenizer = load_model(name)
    prompt = "A list of things that one can find on a beach after a storm. " * 10
    with sq.capture(model) as run:
        model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=1, do_sample=True)
    resumed = sq.restore(run.snapshot(), model)

    for branch in resumed.fork(3, seeds=(1, 2, 3)):
        tokens = branch.generate(max_new_tokens=16)
        print(repr(tokenizer.decode(tokens[0, branch.snapshot.n_tokens :])))
        print(f"  {branch.reused_tokens} tokens were not computed again")

    question = tokenizer("\nQuestion: which of them floats? Answer:", add_special_tokens=False)
    tokens = resumed.generate(append=question["input_ids"], max_new_tokens=16)
    print(repr(tokenizer.decode(tokens[0, resumed.snapshot.n_tokens :])))


if __name__ == "__main__":
    main(*sys.argv[1:])
