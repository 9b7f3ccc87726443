"""What every benchmark shares: the machine, fresh processes, and a JSON file with its table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """The machine in words; no name, no address."""
    info: dict[str, Any] = {"system": platform.system(), "arch": platform.machine(), "cores": os.cpu_count()}
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        info["cpu"] = models[0] if models else ""
    if meminfo.exists():
        info["memory_gib"] = round(int(meminfo.read_text().split()[1]) / 2**20)
    return info


def versions() -> dict[str, str]:
    names = ("semq-state", "torch", "transformers", "safetensors", "zstandard", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def in_process(module: str, *arguments: str) -> Any:
    """The JSON that a fresh process prints on its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median(rows: Sequence[Row]) -> Row:
    """Column by column, the median of the numbers; other values are the first row's."""
    return {
        key: statistics.median(row[key] for row in rows) if isinstance(value, float) else value
        for key, value in rows[0].items()
    }


def write(name: str, out: Path, tables: Mapping[str, Sequence[Row]], *, model: str, notes: str) -> None:
    """`NAME.json` with every row, and `NAME.md` with the tables."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"table": title, **row} for title, table in tables.items() for row in table]
    about = {"machine": machine(), "versions": versions(), "model": model}
    (out / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    units = {"cores": "cores", "memory_gib": "GiB"}
    described = ", ".join(f"{value} {units.get(key, '')}".strip() for key, value in machine().items())
    parts = [f"<!-- written by python -m benchmarks.{name} -->", f"Machine: {described}.", notes]
    for title, table in tables.items():
        parts += [f"**{title}**", tabulate(table, headers="keys", tablefmt="pipe", floatfmt=".4g")]
    (out / f"{name}.md").write_text("\n\n".join(parts) + "\n")
