"""What a file says about itself, for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from semq_state.capsules import CapsuleInfo
from semq_state.files import SnapshotInfo
from semq_state.records import Record
from semq_state.snapshot import ABSENT, Coding
from semq_state.weights.info import WeightsInfo


def show_info(info: SnapshotInfo, *, as_json: bool) -> None:
    """Prints a file's summary; plain lines, whatever the width of the terminal: a digest must never be cut."""
    if as_json:
        print(json.dumps(info.as_dict(), indent=2))
        return
    for name, value in _summary(info).items():
        print(f"{name:<10} {value}")


def show_record(record: Record, *, as_json: bool) -> None:
    """Prints what a record of hidden states holds."""
    told = {
        "path": str(record.folder),
        "record_id": record.record_id,
        "complete": record.complete,
        "n_documents": record.n_documents,
        "n_rows": len(record),
        "n_bytes": record.n_bytes,
        "sites": {site: {"dim": record.dim(site), "dtype": _dtype(record, site)} for site in record.sites},
        "plan": record.plan.as_dict(),
        "provenance": record.provenance.as_dict(),
    }
    if as_json:
        print(json.dumps(told, indent=2))
        return
    plan, made_by = record.plan, record.provenance
    kept = f"tokens {plan.tokens}" + (f", pooled: {plan.pool}" if plan.pool else "")
    lines = {
        "record": f"{record.folder}, {'complete' if record.complete else 'not complete: the same command goes on'}",
        "record_id": record.record_id,
        "rows": f"{len(record):,} of {record.n_documents:,} documents; {kept}",
        "size": f"{record.n_bytes:,} bytes as {plan.codec}",
        "model": f"{made_by.model_name}, {made_by.dtype}, {made_by.attention} attention",
        "weights": made_by.weights,
        "tokenizer": made_by.tokenizer or "not recorded",
        **{site: f"({len(record):,}, {record.dim(site)}) {_dtype(record, site)}" for site in record.sites},
    }
    _show_lines(lines)


def show_weights(info: WeightsInfo, *, as_json: bool) -> None:
    """Prints what a file of quantised weights says."""
    if as_json:
        print(json.dumps(info.as_dict(), indent=2))
        return
    _show_lines({"file": info.path, "weights_id": info.weights_id, **_weights(info)})


def show_capsule(info: CapsuleInfo, *, as_json: bool) -> None:
    """Prints what a capsule says, and each of its parts with its size and identity."""
    if as_json:
        print(json.dumps(info.as_dict(), indent=2))
        return
    state = info.snapshot
    _show_lines(
        {
            "capsule": f"{info.path}, {info.n_bytes:,} bytes, {info.manifest.writer}",
            "capsule_id": info.capsule_id,
            "tokens": f"{state.n_tokens}, state as {state.codec}",
            **_weights(info.weights),
            **{
                name: f"{info.stored[name]:,} bytes, {entry.identity}"
                for name, entry in sorted(info.manifest.parts.items())
            },
        }
    )


def _weights(info: WeightsInfo) -> dict[str, str]:
    told = info.recipe
    group = f"groups of {told.get('group')}" if told.get("group") else "a scale for each channel"
    return {
        "model": f"{info.origin.model_name}, {info.n_parameters:,} parameters",
        "original": info.origin.weights,
        "method": f"{told.get('method')!s:.40}, {told.get('bits')!s:.8} bits, {group:.40}",
        "size": f"{info.n_bytes:,} bytes, {info.bits_per_weight:.3f} bits a weight, "
        + f"of quantised ones {info.bits_per_quantized_weight:.3f}",
    }


def _show_lines(lines: Mapping[str, str]) -> None:
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}} {value}")


def _dtype(record: Record, site: str) -> str:
    return str(record.dtype(site)).removeprefix("torch.")


def _summary(info: SnapshotInfo) -> dict[str, str]:
    said = info.as_dict()
    made_by = said["provenance"]
    coding = info.coding
    return {
        "file": f"{info.path}, format {said['format_version']}, {said['writer']}",
        "state_id": info.state_id,
        "tokens": f"{info.n_tokens} ({said['prompt_length']} of them the prompt), batch of {said['batch_size']}",
        "cache": "none, hidden states alone"
        if said["cache_kind"] == ABSENT
        else f"{said['n_layers']} layers ({', '.join(said['families'])}), {said['n_cached']} tokens cached",
        **({"hidden": ", ".join(_hidden(said))} if said["hidden"] else {}),
        "size": f"{info.n_bytes:,} bytes as {info.codec}, {said['ratio']:.3f} times smaller than raw"
        + (", sealed" if info.sealed else ""),
        **(_coding(coding) if coding else {}),
        "model": f"{made_by['model_name']}, {made_by['dtype']}, {made_by['attention']} attention",
        "weights": made_by["weights"],
        "tokenizer": made_by["tokenizer"] or "not recorded",
        "taken": f"{made_by['created']} on {made_by['device']} with {made_by['threads']} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(made_by["versions"].items())),
    }


def _hidden(said: Mapping[str, Any]) -> Iterator[str]:
    """Streams and sites of hidden states."""
    for stream, each in said["hidden"].items():
        yield f"{each['n_rows']} rows of {stream}, {len(each['states'])} sites: {', '.join(each['states'])}"


def _coding(coding: Coding) -> dict[str, str]:
    """What coding did to the state."""
    said = {
        "coded": ", ".join(f"{kind}: {codec}" for kind, codec in coding.picked.items())
        + f"; {coding.bits_per_value:.3f} bits a value",
        "source": coding.source,
    }
    if coding.worst:
        errors = coding.errors.values()
        worst = coding.errors[coding.worst]
        mean = sum(error.relative for error in errors) / len(errors)
        said["error"] = (
            f"relative {mean:.4f} on average; at worst {worst.relative:.4f}, cosine {worst.cosine:.6f}, "
            f"in {coding.worst}"
        )
    if coding.kl is not None:
        said["expected"] = f"KL {coding.kl:.5f} nats in the next token, by the calibration"
        said["calibrated"] = coding.calibration
    if coding.n_exact_vectors:
        said["escaped"] = f"{coding.n_exact_vectors} vectors that no codec takes, kept exactly"
    for name, reason in coding.left_out.items():
        said["left out"] = f"{name}: {reason}"
    return said
