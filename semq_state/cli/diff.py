"""`semq-state diff`: where two states part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import semq_state as sq
from semq_state.audit.diff import BINS
from semq_state.audit.floor_files import load_floor
from semq_state.audit.report import HIDDEN, CellDiff, Diff
from semq_state.audit.sources import loaded
from semq_state.audit.verdict import Verdict
from semq_state.cli.generating import Json
from semq_state.cli.progress import bytes_bar
from semq_state.cli.unlocking import KeyFiles, PassphraseFile, PrivateKeys, unlock_of

_WIDTH = 120
_MOST_LINES = 12  # of each list of small differences


def diff(
    a: Annotated[Path, typer.Argument(help="A snapshot, or a record's folder; the reference.")],
    b: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    across_models: Annotated[
        bool, typer.Option("--across-models", help="Compare states of two models of the same shape.")
    ] = False,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Relative error beyond which a token counts as parted; 0: any bit.")
    ] = 0.0,
    bins: Annotated[
        int | None, typer.Option(min=2, max=64, help="Bins of each sign, of the symbols; 8 are 4 bits.")
    ] = None,
    floor: Annotated[Path | None, typer.Option(help="Judge by this noise floor: is it within?")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw layer by token to this PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Draw layer by token to this HTML file.")] = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="With --json: numbers of each token.")] = False,
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
    as_json: Json = False,
) -> None:
    """Compares two states: tokens, then each layer. Exit code 0 where they are equal, or within the floor."""
    limits = load_floor(floor) if floor else None
    if limits is not None and bins not in (None, limits.bins):
        raise typer.BadParameter(f"the floor was measured with {limits.bins} bins; leave --bins out")
    unlock = unlock_of(passphrase_file, key_file, private_key)
    states = []
    for path in (a, b):
        with bytes_bar(f"loading {path.name}") as progress:
            states.append(loaded(path, unlock, progress))
    with bytes_bar("comparing") as progress:
        report = sq.diff(
            *states,
            across_models=across_models,
            bins=limits.bins if limits else bins or BINS,
            threshold=threshold,
            progress=progress,
        )
    verdict = report.within(limits) if limits else None
    title = f"{a.name} and {b.name}"
    if png:
        report.save_png(png, title=title)
    if html:
        report.save_html(html, title=title)
    if as_json:
        judged = {"verdict": verdict.as_dict()} if verdict else {}
        print(json.dumps({**report.as_dict(per_token=per_token), **judged}, indent=2))
    else:
        _show(report, verdict)
    if not (verdict.passed if verdict else report.equal):
        raise typer.Exit(1)


def _show(report: Diff, verdict: Verdict | None) -> None:
    print(summary(report))
    for title, lines in _lists(report).items():
        if lines:
            print(f"{title}:")
            print("\n".join(f"  {line}" for line in lines[:_MOST_LINES]))
            if len(lines) > _MOST_LINES:
                print(f"  … and {len(lines) - _MOST_LINES} more; --json has them all")
    if any(not cell.equal for cell in report.cells):
        console = Console()
        console.width = max(console.width, _WIDTH)  # rather broken lines than cut numbers
        console.print(_table(report))
    if verdict:
        print(f"by the floor: {verdict.outcome}")
        print("".join(f"  {reason}\n" for reason in verdict.reasons), end="")


def summary(report: Diff) -> str:
    """The answer in one line."""
    is_record = report.tokens.of_records
    words = "rows" if is_record else "tokens"
    if report.equal:
        return f"equal: {report.tokens.n_a} {words}, {len(report.cells)} tensors, bit for bit; {report.a}"
    tokens, said = report.tokens, []
    if tokens.earliest is not None and tokens.values is not None:
        ours, theirs = tokens.values
        row = f"{'document' if is_record else 'row'} {tokens.row}"
        said.append(f"tokens part at {tokens.earliest} ({row}): {ours} ≠ {theirs}")
    if tokens.n_a != tokens.n_b:
        said.append(f"{tokens.n_a} and {tokens.n_b} {words}")
    first = report.first_cell
    if first is not None:
        at = "" if report.first_token is None else f"states part at token {report.first_token}, "
        said.append(f"{at}first layer {first.layer} ({first.key})")
    if report.first_row is not None:
        document, position = report.first_row
        cell = next(cell for cell in report.cells if cell.first_row == report.first_row)
        named = "" if first is not None else f" ({cell.key})"
        said.append(f"hidden states part at document {document}, position {position}{named}")
    return f"different: {'; '.join(said) or 'not in any layer'}"


def _lists(report: Diff) -> dict[str, list[str]]:
    return {
        "origin": [f"{d.name}: {d.expected} ≠ {d.found}" for d in report.provenance],
        "not compared": [f"{name}: {words}" for name, words in report.missing.items()],
        "beside the layers": [f"{name}: {words}" for name, words in report.others.items()]
        + [f"{d.name}: {d.expected} ≠ {d.found}" for d in report.structure],
    }


def _table(report: Diff) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tensor", no_wrap=True)
    for name in ("first token", "vectors", "bits differ", "symbols", "p99", "min cosine", "relative", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in report.cells:
        if not cell.equal:
            table.add_row(*_row(cell))
    n_equal = sum(cell.equal for cell in report.cells)
    if n_equal:
        table.caption, table.caption_justify = f"{n_equal} more are equal", "left"
    return table


def _first(cell: CellDiff) -> str:
    if cell.kind == HIDDEN:
        return "" if cell.first_row is None else "document {}, {}".format(*cell.first_row)
    return "" if cell.first_token is None else str(cell.first_token)


def _row(cell: CellDiff) -> tuple[str, ...]:
    return (
        cell.key,
        _first(cell),
        str(cell.n_vectors),
        str(cell.n_bits_changed),
        str(cell.n_changed),
        str(cell.p99),
        f"{cell.min_cosine:.6f}",
        f"{cell.relative:.3g}",
        f"{cell.max_abs:.3g}",
    )
