"""`semq-state floor`: how far re-runs vary when nothing was changed on purpose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import semq_state as sq
from semq_state.audit.diff import BINS
from semq_state.audit.floor import MARGIN, Floor
from semq_state.audit.floor_files import floor_dict, save_floor
from semq_state.audit.sources import Held, loaded
from semq_state.cli.generating import Device, Dtype, Json
from semq_state.cli.progress import bytes_bar, steps_bar
from semq_state.cli.unlocking import KeyFiles, PassphraseFile, PrivateKeys, unlock_of
from semq_state.stores import check_writable

_VARIED = "threads,chunks,batch"
_PROMPT = (
    "A keeper wrote down every evening what the light had done, how the wind had turned and which ships had "
    "passed. One evening there was a line in the book that he had not written. It said:"
)


def floor(
    reference: Annotated[
        Path | None, typer.Argument(help="A snapshot or a record. Or a model, from which one is made with --runs.")
    ] = None,
    nulls: Annotated[
        list[Path] | None, typer.Argument(help="Snapshots or records of the same tokens, null runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the floor, a JSON file.")] = Path("floor.json"),
    runs: Annotated[int, typer.Option(min=0, help="Null runs to make with --model; 20 are a good number.")] = 0,
    model: Annotated[str, typer.Option(help="For --runs: smollm2, a folder, or a hub id.")] = "smollm2",
    vary: Annotated[str, typer.Option(help="What null runs vary, of threads, chunks, batch, attention.")] = _VARIED,
    seed: Annotated[int, typer.Option(help="Of what null runs draw.")] = 0,
    prompt: Annotated[str, typer.Option(help="Without a reference: the text that one is made from.")] = _PROMPT,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with that text.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate from it.")] = 64,
    save_reference: Annotated[Path | None, typer.Option(help="Where to keep the reference made so.")] = None,
    bins: Annotated[int, typer.Option(min=2, max=64, help="Bins of each sign, of the symbols.")] = BINS,
    margin: Annotated[
        tuple[int, int], typer.Option(help="A factor and an addend by which the floor may be exceeded; 1 0: none.")
    ] = MARGIN,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    passphrase_file: PassphraseFile = None,
    key_file: KeyFiles = None,
    private_key: PrivateKeys = None,
    as_json: Json = False,
) -> None:
    """Measures the noise floor of a state from null runs: given as files, or made here with --runs. With --runs and
    a model instead of a snapshot, a reference is made first."""
    files = list(nulls or ())
    text = prompt_file.read_text(encoding="utf-8") if prompt_file else prompt
    if not files and not runs:
        raise typer.BadParameter("name snapshots of null runs, or how many --runs to make")
    if reference is not None and runs and not files and not reference.is_file():
        # A model, as `run` takes it: a name, a hub id or a folder.
        model, reference = str(reference), None
    if reference is None and save_reference is None:
        save_reference = out.with_name(f"{out.stem}-reference.safetensors")
    for path in (out, save_reference) if save_reference else (out,):
        check_writable(path)
    unlock = unlock_of(passphrase_file, key_file, private_key)
    if reference is None and not runs:
        raise typer.BadParameter("a reference is made together with its null runs: give --runs")
    own: Held | None = None
    if reference is not None:
        with bytes_bar(f"loading {reference.name}") as progress:
            own = loaded(reference, unlock, progress)
        if runs and not isinstance(own, sq.Snapshot):
            raise typer.BadParameter("null runs of a record are recordings: make them, and name their folders")
        dtype = own.provenance.dtype if dtype == "auto" else dtype
    live = tokenizer = None
    if runs:
        from semq_state.cli.models import load_model

        live, tokenizer = load_model(model, dtype=dtype, device=device)
    if own is None:
        own = _made(live, tokenizer, text, tokens)
        sq.save(own, save_reference or out)
    varied = [name for name in vary.split(",") if name]
    shown = _shown(own, files, live, runs, varied, seed)
    try:
        found = sq.measure_floor(own, shown, bins=bins, margin=margin, unlock=unlock)
    finally:
        shown.close()
    save_floor(found, out)
    _report(found, out, as_json=as_json)


def _made(live: Any, tokenizer: Any, text: str, n_tokens: int) -> sq.Snapshot:
    inputs = tokenizer(text, return_tensors="pt").to(live.device)
    with sq.capture(live, tokenizer=tokenizer) as run:
        live.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
    return run.snapshot()


def _shown(reference: Held, files: list[Path], live: Any, n_runs: int, vary: list[str], seed: int) -> Any:
    """Files and null runs, with a bar."""
    from semq_state.audit.nulls import AXES, null_runs

    if unknown := sorted(set(vary) - set(AXES)):
        raise typer.BadParameter(f"--vary takes {', '.join(AXES)}, not {', '.join(unknown)}")

    def steps() -> Iterator[tuple[str, Any]]:
        n_all = len(files) + n_runs
        with steps_bar() as bar:
            bar("null runs", 0, n_all)
            for i, path in enumerate(files, 1):
                yield str(path), path
                bar(path.name, i, n_all)
            if not isinstance(reference, sq.Snapshot):
                return
            made = null_runs(reference, live, n_runs, vary=vary, seed=seed) if n_runs else ()
            for i, (label, snapshot) in enumerate(made, len(files) + 1):
                yield label, snapshot
                bar(label, i, n_all)

    return steps()


def _report(found: Floor, out: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": str(out), **floor_dict(found)}, indent=2))
        return
    print(f"floor of {found.reference} from {found.n_nulls} null runs in {out}")
    quiet = sum(not cell.changed for cell in found.cells)
    print(f"  {quiet} of {len(found.cells)} tensors never changed in a symbol")
    if quiet < len(found.cells):
        # Shares of different totals, by cross-multiplication as everywhere here.
        worst = found.cells[0]
        for cell in found.cells:
            worst = cell if cell.changed * worst.total > worst.changed * cell.total else worst
        n_vectors, n_symbols, _ = found.allowed(worst)
        print(
            f"  most in {worst.name}: {worst.changed} of {worst.total} vectors, by at most {worst.p99} of "
            f"{worst.n_units} symbols (99 %); allowed are {min(n_vectors, worst.total)} and {n_symbols}"
        )
    if found.varied:
        print(f"  differed beside the layers: {', '.join(found.varied)}")
