"""`semq-state record`: hidden states of a text, to a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated

import typer

import semq_state as sq
from semq_state.cli.generating import Codec, Device, Dtype, Json
from semq_state.cli.showing import show_record


def record(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, or a hub id.")] = "smollm2",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="What to read: .txt (a document a line) or .jsonl (tables with a text); several."),
    ] = None,
    into: Annotated[Path, typer.Option(help="The folder; a recording that was stopped goes on.")] = Path("record"),
    layers: Annotated[
        str, typer.Option(help="Numbers as in `hidden_states`, 0,12,-1 say, or all; the last by default.")
    ] = "",
    modules: Annotated[
        list[str] | None, typer.Option(help="Paths of modules, 'model.layers.*.mlp' say; several.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="Only the last token of each document.")] = False,
    pool: Annotated[str | None, typer.Option(help="One row a document: mean or last.")] = None,
    codec: Codec = "raw",
    whole_files: Annotated[bool, typer.Option("--whole-files", help="A .txt file is one document.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens read at once; longer documents are read in windows.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch, padding included.")] = 4096,
    shard_mib: Annotated[int, typer.Option(min=1, help="Size of a shard before coding, in MiB.")] = 128,
    keep_nan: Annotated[bool, typer.Option("--keep-nan", help="Keep rows with NaN instead of stopping.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Runs a model over texts and keeps hidden states, shard by shard. After a kill, the same command goes on."""
    from semq_state.cli.models import load_reader

    if not text:
        raise typer.BadParameter("give --text")
    wanted = sq.HiddenStates(
        layers=_layers(layers), modules=modules or None, tokens="last" if last else "all", pool=pool
    )
    documents = Texts(text, whole_files=whole_files)
    live, tokenizer = load_reader(model, dtype=dtype, device=device)
    made = sq.record(
        live, documents, into, hidden_states=wanted, tokenizer=tokenizer, codec=codec, max_tokens=max_tokens,
        batch_tokens=batch_tokens, shard_bytes=shard_mib << 20, nan="keep" if keep_nan else "refuse",
        progress=False if as_json else None,
    )  # fmt: skip
    show_record(made, as_json=as_json)


def _layers(given: str) -> tuple[int, ...] | str | None:
    if given in ("", "all"):
        return given or None
    try:
        return tuple(int(number) for number in given.split(","))
    except ValueError:
        raise typer.BadParameter(f"--layers takes numbers and commas, or all; got {given!r}") from None


class Texts:
    """The documents of text files, read as they are asked for."""

    def __init__(self, paths: list[Path], *, whole_files: bool) -> None:
        self._paths, self._whole_files = paths, whole_files

    def __iter__(self) -> Iterator[str]:
        for path in self._paths:
            with path.open(encoding="utf-8") as file:
                if path.suffix == ".jsonl":
                    yield from (_text_of(line, path, n) for n, line in enumerate(file, 1) if line.strip())
                elif self._whole_files:
                    yield file.read()
                else:
                    yield from (line.strip() for line in file if line.strip())

    def __len__(self) -> int:
        return self._n

    @cached_property
    def _n(self) -> int:
        n = 0
        for path in self._paths:
            if self._whole_files and path.suffix != ".jsonl":
                n += 1
                continue
            with path.open(encoding="utf-8") as file:
                n += sum(1 for line in file if line.strip())
        return n


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        table = json.loads(line)
        text = table["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise typer.BadParameter(f"{path}, line {number}: expected a JSON table with a text")
    return text
