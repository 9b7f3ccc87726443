"""Search over symbols: its rate beside float32 and FAISS, what is found, and what a row takes.

    python -m benchmarks.search [--rows N ...] --out FOLDER

Needs Linux and `pip install faiss-cpu`. Takes 5 to 6 minutes on two quiet cores and 4 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
import textwrap
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Row, in_process, write

if TYPE_CHECKING:
    from semq_state import SymbolIndex

DIM, K, SEED = 384, 10, 0
SIZES = (100_000, 1_000_000)
BATCHES = (1, 8, 64, 256)
BATCH = 64
TARGET = 20.0
"""Million pairs of row and query a second and core, in batches of at least `BATCH`."""

N_CLUSTERS, SPREAD = 1000, 0.7
BASE = "numpy float32"
RULES: tuple[tuple[str, int | None], ...] = (("quant", 2), ("quant", 4), ("quant", 8), ("phase", 16), ("orbit", 50))

_NUMPY_ROWS = 8192  # of a product: fastest of 2,048, 8,192 and 32,768
_FEW_PAIRS, _ROUNDS, _MANY_ROUNDS = 2_000_000, 3, 5

Floats = NDArray[np.float32]
Found = NDArray[np.int64]

NOTES = """\
{dim} coordinates, k = {k}; `symbols` are those of `quant`, 8 bins, 4 bits. Rows and queries are random unit
vectors (Gaussian, seed {seed}) where nothing else is said. A rate is million pairs of row and query a second and
core: pairs over the time that passed, over the cores in use. 1 core: a process that may use only that one, all
libraries at one thread; {cores} cores: one that may use all. Best and median of {rounds} rounds, {many} where a
call has at most {few:,} pairs, after a short call that is not counted; the methods take turns within a round, and
each round begins with another of them. `x`: the rate over that of {base} in the same rounds.

{base}: `queries @ rows.T` in blocks of {block:,} rows, `argpartition`, one sort at the end; on all cores only the
product is parallel. FAISS {faiss}: `IndexFlatIP` as it comes, and with its BLAS threshold at 1, since the default
({default}) can keep it from BLAS in all of these batches; `IndexScalarQuantizer` with QT_4bit, trained on all
rows (`SQ4`). Left out, because a call takes seconds: `{sq4}` and `{symbols}` above {most_sq:,.0f}
pairs, `{flat}` above {most_flat:,.0f}.

{target}

{weak}

Whether speed depends on the data: {data} `clusters` are rows around {n_clusters:,} centres, Gaussian with a
standard deviation that falls as i^-1/2 over {dim} directions, rotated at random, and {spread} times that around the
centres; queries are drawn like rows. `in order`: one cluster after the other. `100 times each`: every row stands
there 100 times, so that many scores are equal.

`recall@10`: how many of the ten nearest by float32 brute force are among the ten that are found. Neighbours of
random vectors are nearly equally far and say little; clusters are nearer to embeddings. `exact`: whether ids and
their order are those of a float64 brute force over the decoded rows, for {batch} queries; it holds in {exact}.

Bytes of a row in memory: of the index as measured (tracemalloc, ids included), of FAISS the length of its code.
`save` syncs to the disk and `load` checks a digest; FAISS does neither. Processes took up to {memory:.1f} GB, all
methods and their float32 rows together. The run took {minutes:.1f} minutes and began at a load average of
{load:.1f}: where other work has the cores, the lines of all cores show that."""


@dataclass(frozen=True)
class Method:
    """One way to search.

    Args:
        search: queries to ids `(n_queries, K)`.
        most_pairs: beyond this a call takes too long.
    """

    name: str
    search: Callable[[Floats], Found]
    most_pairs: float = math.inf


FLAT, FLAT_BLAS, SQ4 = "faiss FlatIP", "faiss FlatIP, BLAS", "faiss SQ4"
INDEX, SYMBOLS = "symbols", "symbols to symbols"
_MOST = {FLAT: 1e7, SQ4: 6.4e7, SYMBOLS: 6.4e7}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", choices=("one", "all"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = sorted(set(args.rows))
    if not hasattr(os, "sched_setaffinity"):
        parser.error("needs Linux: processes are held to one core")
    if sizes[0] < 1000:
        parser.error("--rows: at least 1,000")
    if args.worker:
        print(json.dumps(_worked(sizes, all_tables=args.worker == "one")))
        return
    began, load = time.monotonic(), os.getloadavg()[0]
    n_cores = len(os.sched_getaffinity(0))
    parts = []
    for which, cores in (("one", 1), ("all", n_cores)):
        if which == "one" or n_cores > 1:
            print(f"{cores} of {n_cores} cores", flush=True)
            with _held_to(cores):
                arguments = ("--worker", which, "--out", str(args.out), "--rows", *map(str, sizes))
                parts.append(in_process("benchmarks.search", *arguments))
    one = parts[0]
    rates = [row for part in parts for row in part["rates"]]
    medians, bests = _rates(rates, statistics.median), _rates(rates, min)
    tables = {
        "Rates, medians": medians,
        "Rates, best": bests,
        f"Rules, {BATCH} queries, {sizes[0]:,} rows, 1 core": _compared(one["rules"], "rule"),
        f"Data, {BATCH} queries, {sizes[0]:,} rows, 1 core": _compared(one["data"], "data"),
        "What is found": one["found"],
        f"What {sizes[-1]:,} rows take, 1 core": one["costs"],
    }
    exact = [row["exact"] for row in one["found"] if row["exact"] is not None]
    notes = NOTES.format(
        dim=DIM,
        k=K,
        seed=SEED,
        cores=n_cores,
        rounds=_ROUNDS,
        many=_MANY_ROUNDS,
        few=_FEW_PAIRS,
        base=BASE,
        block=_NUMPY_ROWS,
        faiss=one["faiss"],
        most_sq=_MOST[SQ4],
        most_flat=_MOST[FLAT],
        target=" ".join(_target(table, name) for name, table in (("medians", medians), ("the best", bests))),
        weak=_weak(medians),
        data=_data(tables[f"Data, {BATCH} queries, {sizes[0]:,} rows, 1 core"]),
        n=sizes[0],
        n_clusters=N_CLUSTERS,
        spread=SPREAD,
        batch=BATCH,
        exact=f"{sum(exact)} of {len(exact)} lines",
        default=f"{one['blas_threshold']:,}",
        sq4=SQ4,
        symbols=SYMBOLS,
        flat=FLAT,
        memory=max(part["memory_gb"] for part in parts),
        load=load,
        minutes=(time.monotonic() - began) / 60,
    )
    notes = "\n\n".join(textwrap.fill(part, 116) for part in notes.split("\n\n"))
    write("search", args.out, tables, model="none: seeded vectors", notes=notes)
    print((args.out / "search.md").read_text())


@contextmanager
def _held_to(n_cores: int) -> Iterator[None]:
    """Processes that start meanwhile may use this many cores, and their libraries as many threads."""
    usable, before = os.sched_getaffinity(0), dict(os.environ)
    # Passive: threads of one library that spin after its turn would slow down the next one's.
    threads = {name: str(n_cores) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(threads, OMP_WAIT_POLICY="PASSIVE")
    os.sched_setaffinity(0, sorted(usable)[-n_cores:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)
        os.environ.clear()
        os.environ.update(before)


# What the processes do.


def _worked(sizes: Sequence[int], *, all_tables: bool) -> dict[str, Any]:
    import faiss

    n_cores = len(os.sched_getaffinity(0))
    faiss.omp_set_num_threads(n_cores)
    rows, queries = gaussian(sizes[-1], SEED), gaussian(max(BATCHES), SEED + 1)
    done: dict[str, Any] = {"faiss": faiss.__version__, "rates": []}
    done["blas_threshold"] = int(faiss.cvar.distance_compute_blas_threshold)
    if all_tables:
        done |= {"costs": _costs(rows), "rules": [], "data": [], "found": []}
        _small(rows[: sizes[0]], queries, done)
    for n in sizes:
        methods = _methods(rows[:n])
        for batch in BATCHES:
            timed = _timed([each for each in methods if n * batch <= each.most_pairs], queries[:batch], n)
            done["rates"] += [
                {"rows": n, "cores": n_cores, "queries": batch, "method": name, "seconds": seconds}
                for name, seconds in timed.items()
            ]
    done["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return done


def _methods(rows: Floats) -> list[Method]:
    import faiss

    index = _index(rows)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(rows)
    scalar = _scalar(rows)

    def with_blas(queries: Floats) -> Found:
        default = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = 1
        try:
            return np.asarray(flat.search(queries, K)[1])
        finally:
            faiss.cvar.distance_compute_blas_threshold = default

    return [
        Method(INDEX, lambda queries: index.search(queries, K).ids),
        Method(SYMBOLS, lambda queries: index.search_symbols(queries, K).ids, _MOST[SYMBOLS]),
        Method(BASE, lambda queries: brute_force(rows, queries)),
        Method(FLAT, lambda queries: np.asarray(flat.search(queries, K)[1]), _MOST[FLAT]),
        Method(FLAT_BLAS, with_blas),
        Method(SQ4, lambda queries: np.asarray(scalar.search(queries, K)[1]), _MOST[SQ4]),
    ]


def _scalar(rows: Floats) -> Any:
    import faiss

    scalar = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_4bit, faiss.METRIC_INNER_PRODUCT)
    scalar.train(rows)
    scalar.add(rows)
    return scalar


def _small(rows: Floats, queries: Floats, done: dict[str, Any]) -> None:
    """The tables over the fewest rows: other rules, other data, what is found."""
    n, few = len(rows), queries[:BATCH]
    base = Method(BASE, lambda queries: brute_force(rows, queries))
    built = {rule: _index(rows, *rule) for rule in RULES}
    methods = [Method(_rule(index), _searching(index)) for index in built.values()]
    timed = _timed([*methods, base], few, n)
    sizes = {_rule(index): index.n_bytes for index in built.values()} | {BASE: 4 * DIM}
    done["rules"] = [
        {"rule": name, "bytes of a row": sizes[name], "pairs": n * BATCH, "seconds": seconds}
        for name, seconds in timed.items()
    ]

    clusters, near = clustered(n, max(BATCHES), SEED)
    ordered, near_ordered = clustered(n, max(BATCHES), SEED, in_order=True)
    kinds = {
        "random": (rows, few),
        "clusters": (clusters, near[:BATCH]),
        "clusters, in order": (ordered, near_ordered[:BATCH]),
        "clusters, 100 times each": (np.tile(clusters[: -(-n // 100)], (100, 1))[:n], near[:BATCH]),
    }
    kept = {name: _index(data) for name, (data, _) in kinds.items()}
    methods = [Method(name, _searching(kept[name], own)) for name, (_, own) in kinds.items()]
    done["data"] = [
        {"data": name, "pairs": n * BATCH, "seconds": seconds}
        for name, seconds in _timed([*methods, base], few, n).items()
    ]
    done["found"] = [
        *_found("random", rows, queries, built),
        *_found("clusters", clusters, near, {rule: _index(clusters, *rule) for rule in RULES}),
        {
            "data": "clusters, 100 times each",
            "method": _rule(kept["clusters, 100 times each"]),
            "recall@10": None,
            "exact": _is_exact(kept["clusters, 100 times each"], near[:BATCH]),
        },
    ]


def _found(
    data: str, rows: Floats, queries: Floats, built: Mapping[tuple[str, int | None], SymbolIndex]
) -> Iterator[Row]:
    expected = brute_force(rows, queries)
    methods = _methods(rows)[1:]
    for index in built.values():
        found = index.search(queries, K).ids
        exact = _is_exact(index, queries[:BATCH])
        yield {"data": data, "method": _rule(index), "recall@10": recall(found, expected), "exact": exact}
    for each in methods:
        yield {
            "data": data,
            "method": each.name,
            "recall@10": recall(each.search(queries), expected),
            "exact": None,
        }


def _costs(rows: Floats) -> list[Row]:
    import faiss

    from semq_state import SymbolIndex

    share = 1e6 / len(rows)
    seconds: dict[str, list[float]] = {name: [] for name in ("add", "save", "load", "sq4", "write", "read")}
    with tempfile.TemporaryDirectory(prefix="semq-state-bench-") as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        for _ in range(_ROUNDS):
            took, index = _seconds(lambda: _index(rows))
            seconds["add"].append(took)
            took, scalar = _seconds(lambda: _scalar(rows))
            seconds["sq4"].append(took)
            seconds["save"].append(_seconds(lambda: index.save(ours))[0])  # noqa: B023
            seconds["write"].append(_seconds(lambda: faiss.write_index(scalar, str(theirs)))[0])  # noqa: B023
            seconds["load"].append(_seconds(lambda: SymbolIndex.load(ours))[0])
            seconds["read"].append(_seconds(lambda: faiss.read_index(str(theirs)))[0])
        sizes = [path.stat().st_size / len(rows) for path in (ours, theirs)]
    lines = [
        (INDEX, _in_memory(rows[:20_000]), sizes[0], ("add", "save", "load")),
        (SQ4, float(scalar.code_size), sizes[1], ("sq4", "write", "read")),
    ]
    return [
        {"method": name, "bytes in memory": memory, "bytes in the file": size}
        | {
            f"{what} a million, {kind} s": _short(share * pick(seconds[key]))
            for what, key in zip(("add", "save", "load"), keys, strict=True)
            for kind, pick in (("best", min), ("median", statistics.median))
        }
        for name, memory, size, keys in lines
    ] + [{"method": BASE, "bytes in memory": 4.0 * DIM, "bytes in the file": 4.0 * DIM}]


def _in_memory(rows: Floats) -> float:
    """Bytes of a row in an index that was searched."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = _index(rows)
    index.search(rows[:1], K)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return round(taken / len(index), 1)


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _timed(methods: Sequence[Method], queries: Floats, n: int) -> dict[str, list[float]]:
    """Seconds of every round; the methods take turns, and each round begins with another."""
    seconds: dict[str, list[float]] = {each.name: [] for each in methods}
    for each in methods:
        each.search(queries[:8])
    for i in range(_MANY_ROUNDS if n * len(queries) <= _FEW_PAIRS else _ROUNDS):
        first = i % len(methods)
        for each in (*methods[first:], *methods[:first]):
            seconds[each.name].append(_seconds(lambda: each.search(queries))[0])  # noqa: B023
    return seconds


def brute_force(rows: Floats, queries: Floats) -> Found:
    """The K rows of the largest products with each query, best first."""
    tops, places = [], []
    for start in range(0, len(rows), _NUMPY_ROWS):
        products = queries @ rows[start : start + _NUMPY_ROWS].T
        top = np.argpartition(products, -min(K, products.shape[1]), axis=1)[:, -K:]
        tops.append(np.take_along_axis(products, top, 1))
        places.append(top + start)
    top = np.argsort(-np.concatenate(tops, axis=1), axis=1, kind="stable")[:, :K]
    return np.take_along_axis(np.concatenate(places, axis=1), top, 1)


def _is_exact(index: SymbolIndex, queries: Floats) -> bool:
    """Whether ids and their order are those of float64 products of all decoded rows; equal scores go by id."""
    lengths = np.sqrt(np.square(queries.astype(np.float64)).sum(1, keepdims=True))
    units = (queries / lengths).astype(np.float32).astype(np.float64)
    packed, tops = index.contents().packed, []
    for start in range(0, len(packed), _NUMPY_ROWS):
        part = packed[start : start + _NUMPY_ROWS]
        decoded = index.operator.decode(index.operator.unpack(part)).astype(np.float64)
        lengths = np.sqrt(np.square(decoded).sum(1))
        tops.append((units @ decoded.T / lengths).astype(np.float32))
    scores = np.concatenate(tops, axis=1)
    # Stable: among equals the smaller id, which is its place.
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return bool((index.search(queries, K).ids == expected).all())


def recall(found: Found, expected: Found) -> float:
    """How many of `expected` are found, in percent."""
    return round(100 * float((found[:, :, None] == expected[:, None, :]).any(1).mean()), 2)


def gaussian(n: int, seed: int) -> Floats:
    """Random unit vectors; fewer are the first of more."""
    rng, rows = np.random.default_rng(seed), np.empty((n, DIM), np.float32)
    for start in range(0, n, _NUMPY_ROWS):
        part = rng.standard_normal(rows[start : start + _NUMPY_ROWS].shape, dtype=np.float32)
        rows[start : start + _NUMPY_ROWS] = _unit(part)
    return rows


def clustered(n: int, n_queries: int, seed: int, *, in_order: bool = False) -> tuple[Floats, Floats]:
    """Unit rows around centres, and queries drawn like them."""
    rng = np.random.default_rng(seed)
    falling = np.arange(1, DIM + 1, dtype=np.float32) ** -0.5
    turned = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
    mixed = falling[:, None] * turned
    centres = rng.standard_normal((N_CLUSTERS, DIM), dtype=np.float32) @ mixed
    which = rng.integers(0, N_CLUSTERS, n + n_queries)
    if in_order:
        which[:n].sort()
    made = centres[which]
    made += SPREAD * rng.standard_normal((n + n_queries, DIM), dtype=np.float32) @ mixed
    made = _unit(made)
    return made[:n], made[n:]


def _unit(rows: Floats) -> Floats:
    rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows


def _index(rows: Floats, operator: str = "quant", bins: int | None = None) -> SymbolIndex:
    from semq_state import SymbolIndex

    index = SymbolIndex(DIM, operator=operator, bins=bins)
    index.add(rows)
    return index


def _searching(index: SymbolIndex, own: Floats | None = None) -> Callable[[Floats], Found]:
    """A search; with queries of its own in place of those that it is given, as many of them."""
    return lambda queries: index.search(queries if own is None else own[: len(queries)], K).ids


def _rule(index: SymbolIndex) -> str:
    operator = index.operator
    return f"{operator.name} {operator.parameter}, {8 * operator.n_bytes / operator.dim:g} bits"


# What is said of it.


def _rates(measured: Sequence[Row], pick: Callable[[Sequence[float]], float]) -> list[Row]:
    """A row for each number of rows, cores and queries; million pairs a second and core of each method."""
    groups: dict[tuple[int, int, int], dict[str, float]] = {}
    for each in measured:
        key = each["rows"], each["cores"], each["queries"]
        rate = each["rows"] * each["queries"] / pick(each["seconds"]) / each["cores"] / 1e6
        groups.setdefault(key, {})[each["method"]] = rate
    names = list(dict.fromkeys(each["method"] for each in measured))
    return [
        {"rows": n, "cores": cores, "queries": queries}
        | {name: _short(rates.get(name)) for name in names}
        | {
            f"x, {name}": _short(rates[name] / rates[BASE] if name in rates else None)
            for name in names
            if name != BASE
        }
        for (n, cores, queries), rates in groups.items()
    ]


def _short(number: float | None) -> float | None:
    """To three digits."""
    return None if number is None else float(f"{number:.3g}")


def _compared(measured: Sequence[Row], key: str) -> list[Row]:
    """Rates of the methods of one table."""
    rows = []
    for each in measured:
        row: Row = {name: value for name, value in each.items() if name not in ("pairs", "seconds")}
        for kind, pick in (("median", statistics.median), ("best", min)):
            base = next(pick(other["seconds"]) for other in measured if other[key] == BASE)
            row[f"rate, {kind}"] = _short(each["pairs"] / pick(each["seconds"]) / 1e6)
            row[f"x, {kind}"] = _short(base / pick(each["seconds"]))
        rows.append(row)
    return rows


def _target(table: Sequence[Row], kind: str) -> str:
    asked = [row for row in table if row["queries"] >= BATCH]
    reached = [row for row in asked if row[INDEX] >= TARGET]
    least = min(asked, key=lambda row: row[INDEX])
    word = "reached" if len(reached) == len(asked) else "NOT reached" if not reached else "reached in part"
    return (
        f"Wanted, {TARGET:g} million pairs a second and core in batches of {BATCH} or more, by {kind}: {word}, in "
        f"{len(reached)} of {len(asked)} lines; the least is {least[INDEX]:g} ({least['rows']:,} rows, "
        f"{least['cores']} core(s), {least['queries']} queries)."
    )


def _weak(table: Sequence[Row]) -> str:
    said = []
    for name in (BASE, FLAT, FLAT_BLAS, SQ4):
        both = [row for row in table if row[name] is not None]
        lost = [row for row in both if row[name] > row[INDEX]]
        if lost:
            batches = ", ".join(str(batch) for batch in sorted({row["queries"] for row in lost}))
            most = max(row[name] / row[INDEX] for row in lost)
            said.append(
                f"{name} in {len(lost)} of {len(both)} lines (batches of {batches}; up to {most:.1f} times)"
            )
    return f"Faster than `{INDEX}`, by medians: {'; '.join(said) or 'nothing'}."


def _data(table: Sequence[Row]) -> str:
    rates = {row["data"]: row["rate, median"] for row in table if row["data"] != BASE}
    others = ", ".join(f"{name} {rate / rates['random']:.2f}" for name, rate in rates.items() if name != "random")
    return f"rates over that with random vectors, by medians: {others}."


if __name__ == "__main__":
    main()
