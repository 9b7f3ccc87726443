"""Writes the golden files of the present format version. Run once per version, never again.

PYTHONPATH=tests python tests/golden/make.py VERSION
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import guessing
import torch
from workers import made

import semq_state as sq
from semq_state.calibration import save_predictor
from semq_state.sketch import sketch_rule
from semq_state.snapshot import (
    CacheState,
    Checkpoint,
    GenerationState,
    HiddenRows,
    LayerState,
    ProcessorState,
    Trace,
)


def version_1() -> sq.Snapshot:
    """A small state with every family and dtype of version 1, from arithmetic alone."""
    ramp = torch.arange(2 * 2 * 6 * 8, dtype=torch.float32).reshape(2, 2, 6, 8)
    keys = (torch.sin(ramp) * 3).to(torch.bfloat16)
    values = torch.cos(ramp)
    values[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    cache = CacheState(
        "dynamic",
        (
            LayerState("dynamic", {"keys": keys, "values": values}, {"filled": True}),
            LayerState(
                "sliding",
                {"keys": keys[:, :, -3:].half(), "values": keys[:, :, -3:].to(torch.float8_e4m3fn)},
                {"window": 4, "n_seen": 6, "filled": True},
            ),
            LayerState("dummy", {}),
        ),
        {"grows": False},
    )
    ids = torch.arange(14).reshape(2, 7)
    generation = GenerationState(
        input_ids=ids,
        prompt_length=4,
        n_cached=6,
        finished=torch.tensor([False, True]),
        logits=torch.linspace(-1, 1, 38).reshape(2, 19),
        step_inputs={"attention_mask": torch.ones(2, 7, dtype=torch.int64), "position_ids": ids},
        step_values={"use_cache": True, "logits_to_keep": 1},
        rng={"cpu": torch.arange(200, dtype=torch.uint8)},
        config={"do_sample": True, "temperature": 0.7, "max_length": 20, "eos_token_id": [2, 3]},
        processors=(ProcessorState("logits", "Counting", {"seen": torch.ones(3)}, {"n": 3}),),
    )
    return sq.Snapshot(cache, generation, _provenance())


def version_2() -> sq.Snapshot:
    """What version 2 brought: parts, in-place and recurrent families, a search, companions, attributes, nested
    inputs and checkpoints."""
    first = version_1()
    ramp = torch.arange(2 * 2 * 6 * 8, dtype=torch.float32).reshape(2, 2, 6, 8)
    keys, values = torch.sin(ramp), torch.cos(ramp).to(torch.bfloat16)
    scale = torch.tensor(0.25)
    own = CacheState(
        "static",
        (
            LayerState(
                "static", {"keys": keys, "values": values}, {"max_length": 16, "n_seen": 6, "filled": True}
            ),
            LayerState(
                "linear",
                {"conv.0": keys[:, 0, :4, :3], "recurrent.0": torch.exp(-ramp[:, :, :4, :4] / 50)},
                {"n_states": 1, "has_previous": [True], "kernel_sizes": [3], "recurrent": [True], "filled": True},
            ),
            LayerState(
                "indexed",
                {"keys": keys, "values": values, "index_keys": keys[:, 0]},
                {"filled": True, "holds": ["index_keys", "keys", "values"]},
            ),
            LayerState(
                "fp8",
                {
                    "keys": keys.to(torch.float8_e4m3fn), "values": keys.to(torch.float8_e4m3fn),
                    "key_scale": scale, "value_scale": scale,
                },
                {"n_seen": 6, "dtype": "float32", "filled": True},
            ),
        ),
        {"grows": False},
    )  # fmt: skip
    cross = CacheState(
        "dynamic", (LayerState("dynamic", {"keys": keys[:, :, :3], "values": values[:, :, :3]}, {"filled": True}),)
    )
    cache = CacheState("encoder-decoder", (), {"is_updated": [[0, True]]}, {"self": own, "cross": cross})
    generation = dataclasses.replace(
        first.generation,
        step_inputs={
            **first.generation.step_inputs,
            "encoder_outputs.last_hidden_state": torch.sin(ramp[:, 0]),
        },
        step_values={
            "use_cache": True,
            "encoder_outputs": {
                "output": [
                    ["last_hidden_state", {"tensor": "encoder_outputs.last_hidden_state", "order": [0, 2, 1]}],
                    ["attentions", None],
                ]
            },
        },
        search={"scores": torch.linspace(-3, 0, 2)[:, None], "is_done": torch.tensor(False)},
        companions={"assistant": CacheState("dynamic", first.cache.layers, {"grows": False})},
        attributes={"model.rope_deltas": torch.tensor([[-3], [4]])},
        cache_argument="cache_params",
        generator="language_model",
    )
    kept = Checkpoint(
        5,
        CacheState(
            "static", (LayerState("dummy", {}), own.layers[1], LayerState("dummy", {}), LayerState("dummy", {}))
        ),
        {"cpu": torch.arange(200, dtype=torch.uint8).flip(0)},
        {"model.rope_deltas": torch.tensor([[-3], [4]])},
    )
    checkpoint = dataclasses.replace(kept, cache=CacheState("encoder-decoder", (), {}, {"self": kept.cache}))
    return sq.Snapshot(cache, generation, _provenance(), checkpoints=(checkpoint,))


def _provenance() -> sq.Provenance:
    return sq.Provenance(
        weights=f"sha256:{'ab' * 32}",
        config={"model_type": "llama", "num_hidden_layers": 3},
        rope={"rope_type": "default", "rope_theta": 10000.0},
        tokenizer=None,
        adapters={},
        quantization={},
        dtype="bfloat16",
        model_name="golden",
        versions={"torch": "2.13.0"},
        attention="sdpa",
        device="cpu",
        threads=2,
        created="2026-11-22T00:00:00+00:00",
    )


def version_3() -> sq.Snapshot:
    """A state whose layers follow from one another, as in a model."""
    return guessing.snapshot_of(guessing.cache_of(40, 5))


def write_version_3(folder: Path) -> None:
    """What is new in version 3: symbols under every codec, an embedded calibration, tensors coded together."""
    state = version_3()
    for codec in ("rotated", "uniform", "semq"):
        sq.save(state, folder / f"v3-{codec}.safetensors", codec=codec)
    predictor = guessing.predictor_of()
    save_predictor(predictor, folder / "predictor-3.safetensors")
    sq.save(state, folder / "v3-exact-predicted.safetensors", codec="exact-predicted", predictor=predictor)
    calibration = made.calibration()
    coder = sq.Transform(calibration, step=0.05)
    sq.save(made.state(), folder / "v3-transform.safetensors", codec=coder, embed_calibration=True)


def version_4() -> sq.Snapshot:
    """What is new in version 4: a trace."""
    first = version_1()
    ramp = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 4)
    trace = Trace(
        begin=4,
        tokens=first.generation.input_ids[:, 4:],
        top_ids=(ramp * 3 % 19).to(torch.int32),
        top_logits=-torch.sin(ramp),
        norms=torch.cos(ramp[..., 0]) + 2,
        prints=(ramp * 7 % 251).to(torch.uint8),
        rule=sketch_rule(8),
        rng={"cpu": torch.arange(200, dtype=torch.uint8).flip(0)},
    )
    return dataclasses.replace(first, trace=trace)


def write_version_4(folder: Path) -> None:
    """And a signature inside the file, whose key stands beside it."""
    from cryptography.hazmat.primitives import serialization as serial
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    public = key.public_key().public_bytes(serial.Encoding.PEM, serial.PublicFormat.SubjectPublicKeyInfo)
    (folder / "signer-4.pub").write_bytes(public)
    path = folder / "v4-signed.safetensors"
    sq.save(version_4(), path)
    with tempfile.TemporaryDirectory() as hidden:
        private = Path(hidden, "key.pem")
        private.write_bytes(
            key.private_bytes(serial.Encoding.PEM, serial.PrivateFormat.PKCS8, serial.NoEncryption())
        )
        sq.sign(path, private, inside=True)


def version_5() -> sq.Snapshot:
    """What is new in version 5: hidden states of two streams, with rows left out and NaN."""
    ramp = torch.arange(8 * 16, dtype=torch.float32).reshape(8, 16)
    states = torch.sin(ramp) * 3
    states[3, :2] = torch.tensor([float("nan"), float("inf")])
    rows = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 5], [1, 0], [1, 1], [1, 2], [1, 3]])
    sequence = HiddenRows(
        rows, torch.tensor([0, 1, 2, 5, 9, 10, 11, -1]),
        {"hidden_states.2": states, "model.layers.0.mlp": states[:, :6].to(torch.bfloat16)}, "0::",
    )  # fmt: skip
    encoder = HiddenRows(
        torch.tensor([[0, 0], [1, 0]]), torch.tensor([-1, -1]), {"hidden_states.2": states[4:6]}, "all", "mean"
    )
    return dataclasses.replace(version_1(), hidden={"sequence": sequence, "encoder": encoder})


def write_version_5(folder: Path) -> None:
    """And hidden states alone, as symbols."""
    sq.save(version_5().without_cache(), folder / "v5-semq.safetensors", codec="semq")


def write_symbols(folder: Path) -> None:
    """An index file, whose version is its own. Run by hand: it needs no snapshot."""
    ramp = torch.arange(5 * 8, dtype=torch.float32).reshape(5, 8)
    index = sq.SymbolIndex(8)
    index.add(torch.sin(ramp * 3) + 0.1, ids=[40, 7, 19, 3, 11])
    index.save(folder / "symbols-1.safetensors")


if __name__ == "__main__":
    here = Path(__file__).parent
    snapshot = {"1": version_1, "2": version_2, "3": version_3, "4": version_4, "5": version_5}[sys.argv[1]]()
    for codec in ("exact", "exact-max", "raw"):
        sq.save(snapshot, here / f"v{sys.argv[1]}-{codec}.safetensors", codec=codec)
    if sys.argv[1] == "3":
        write_version_3(here)
    if sys.argv[1] == "4":
        write_version_4(here)
    if sys.argv[1] == "5":
        write_version_5(here)
    for path in sorted(here.glob(f"v{sys.argv[1]}-*.safetensors")):
        print(path.name, sq.inspect(path).state_id)
