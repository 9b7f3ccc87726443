"""The command line, `semq-state`: parsing and printing only. One command a file."""

from __future__ import annotations

import sys

import typer

from semq_state.cli.calibrate import calibrate
from semq_state.cli.check_signature import check_signature
from semq_state.cli.convert import convert
from semq_state.cli.demo import demo
from semq_state.cli.diff import diff
from semq_state.cli.doctor import doctor
from semq_state.cli.floor import floor
from semq_state.cli.inspect import inspect
from semq_state.cli.keys import keygen
from semq_state.cli.pack import pack
from semq_state.cli.quantize import quantize
from semq_state.cli.record import record
from semq_state.cli.replay import replay
from semq_state.cli.resume import resume
from semq_state.cli.run import run
from semq_state.cli.seal import seal
from semq_state.cli.sign import sign
from semq_state.cli.unseal import unseal
from semq_state.cli.verify import verify
from semq_state.errors import SemqStateError

app = typer.Typer(
    name="semq-state",
    help="Save, move, fork and resume the live state of a Transformer, bit for bit.\n\n"
    "Exit codes: 0 it holds, 1 the answer is no, 2 it could not be evaluated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    *(run, resume, inspect, verify, sign, check_signature, diff, floor, replay),
    *(quantize, pack, convert, calibrate, record, seal, unseal, keygen, doctor, demo),
):
    app.command()(command)


def main() -> None:
    """The entry point. Our own errors become one plain sentence on stderr and exit code 2."""
    try:
        app()
    except SemqStateError as error:
        print(f"semq-state: {error}", file=sys.stderr)
        sys.exit(2)
