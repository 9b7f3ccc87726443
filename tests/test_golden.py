"""Golden files of every released format version are read forever."""

from __future__ import annotations

from pathlib import Path

import guessing
import pytest
import torch
from workers import made

import semq_state as sq
from semq_state.audit.traces import compare_traces
from semq_state.generation.trees import put_together
from semq_state.sketch import symbols_of

LOSSLESS = ("exact", "exact-max", "raw", "exact-predicted", "signed")
ALL = sorted((Path(__file__).parent / "golden").glob("v*.safetensors"))
GOLDEN = [path for path in ALL if path.stem.partition("-")[2] in LOSSLESS]
STATE_IDS = {
    "v1": "sha256:8e974fba87f81f07f6ba89d93546d90b66681a19afbd7c99cddcb78980b3d58a",
    "v2": "sha256:1d28bd8c357b09eca898f71a7a377afd4021cabe321cf7d0ad75f72f62b719e4",
    "v3": "sha256:9ec9cd928b2890f6c9ece6178bc886f6957b7bb16b3d5c74002f0a0e775828a6",
    "v4": "sha256:8932a6be193c452d9d1abb9886e48f5756824d7939b4feaf333a49e7add19057",
    "v5": "sha256:6411f06b6e5087668b4215b353bc0d07049ff5f1329a19e6b0c361046fa4c53b",
}
COMPACT = {
    "rotated": "sha256:c5e7753b262d2f7db3bb30d3989cac69278f97f97a429bdf7d697f4c62a3292b",
    "semq": "sha256:bfaed9c9e82593a3f6994ff82f8d9636cf9248e3cecaf554fabb58cfcf0283fa",
    "transform": "sha256:f3746dc56de86543afdf52d3fe55ac632f8745a06bdaeeaa0adaf852764c27e9",
    "uniform": "sha256:0987e3365702f3272b6b2d958e5ec28531882825c90c9fa08d085c489a34698c",
}
PREDICTOR = Path(__file__).parent / "golden" / "predictor-3.safetensors"
V1, V2, _, V4, V5 = ([path for path in GOLDEN if path.stem.startswith(version)] for version in STATE_IDS)


def test_there_is_a_file_of_every_version_and_codec() -> None:
    names = {path.stem for path in ALL}
    new = {f"v3-{codec}" for codec in ("exact-predicted", *COMPACT)} | {"v4-signed", "v5-semq"}
    assert names == {f"{v}-{codec}" for v in STATE_IDS for codec in ("exact", "exact-max", "raw")} | new


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_file_has_its_identity(path: Path, tmp_path: Path) -> None:
    version = path.stem.partition("-")[0]
    snapshot = sq.load(path, predictor=PREDICTOR)
    assert snapshot.state_id == STATE_IDS[version]
    assert "predicted" in path.stem or sq.verify(path).passed
    assert sq.inspect(path).as_dict()["format_version"] == int(version[1:])
    # The state is the same, and so its identity, in whatever version it is saved again.
    assert sq.save(snapshot, tmp_path / "again.safetensors").state_id == STATE_IDS[version]


@pytest.mark.parametrize("path", V4, ids=lambda path: path.stem)
def test_golden_file_of_version_4_is_read(path: Path) -> None:
    trace = sq.load(path).trace
    assert trace is not None and trace.structure()["begin"] == 4
    assert trace.tokens.tolist() == [[4, 5, 6], [11, 12, 13]]
    assert symbols_of(trace.prints[0], trace.rule).tolist()[1] == [12, 1, 3, 2, 10, 2, 1, 3]
    assert compare_traces(trace, trace).equal


@pytest.mark.parametrize("path", V5, ids=lambda path: path.stem)
def test_golden_file_of_version_5_is_read(path: Path) -> None:
    hidden = sq.load(path).hidden
    assert sorted(hidden) == ["encoder", "sequence"]
    rows = hidden["sequence"]
    assert rows.rows.tolist() == [[0, 0], [0, 1], [0, 2], [0, 5], [1, 0], [1, 1], [1, 2], [1, 3]]
    assert rows.token_ids.tolist() == [0, 1, 2, 5, 9, 10, 11, -1]
    assert (rows.tokens, rows.pool, hidden["encoder"].pool) == ("0::", "", "mean")
    states = rows.states["hidden_states.2"]
    assert states[3, 0].isnan() and states[3, 1].isinf()
    assert torch.allclose(states[4], torch.sin(torch.arange(64.0, 80.0)) * 3, atol=1e-5)
    assert rows.states["model.layers.0.mlp"].dtype == torch.bfloat16
    assert hidden["encoder"].states["hidden_states.2"].equal(states[4:6])


def test_golden_file_of_hidden_states_as_symbols_is_read() -> None:
    path = Path(__file__).parent / "golden" / "v5-semq.safetensors"
    found, exact = sq.load(path), sq.load(path.with_name("v5-exact.safetensors"))
    assert (
        found.state_id == "sha256:7627f17945926d0a094cb78e1571b993dbe314cb22df1712fdd05abdf26ebf3f"
        and sq.verify(path).passed
    )
    assert found.coding is not None and found.coding.source == exact.without_cache().state_id
    for site, states in exact.hidden["sequence"].states.items():
        decoded = found.hidden["sequence"].states[site]
        assert decoded[3].nan_to_num(9).equal(states[3].nan_to_num(9)) or site != "hidden_states.2"
        others = [0, 1, 2, 4, 5, 6, 7]
        assert torch.nn.functional.cosine_similarity(decoded[others].float(), states[others].float()).min() > 0.97


def test_golden_index_file_is_read() -> None:
    index = sq.SymbolIndex.load(Path(__file__).parent / "golden" / "symbols-1.safetensors")
    assert index.index_id == "sha256:99ab26e1863f95de28d8569a89df91fea7404c94bba3024f3697ed401efaa0d2"
    assert index.ids.tolist() == [3, 7, 11, 19, 40]
    assert index.search(index.rows([11]), k=1).ids.tolist() == [[11]]


def test_golden_signature_still_holds() -> None:
    pytest.importorskip("securesystemslib")
    golden = Path(__file__).parent / "golden"
    found = sq.verify(golden / "v4-signed.safetensors", key=golden / "signer-4.pub")
    assert found.passed and found.vouched


@pytest.mark.parametrize("path", V2, ids=lambda path: path.stem)
def test_golden_file_of_version_2_is_read(path: Path) -> None:
    snapshot = sq.load(path)
    own, cross = snapshot.cache.parts["self"], snapshot.cache.parts["cross"]
    assert (snapshot.cache.kind, own.kind, cross.kind) == ("encoder-decoder", "static", "dynamic")
    assert [layer.family for layer in own.layers] == ["static", "linear", "indexed", "fp8"]
    assert own.layers[1].tensors["conv.0"].shape == (2, 4, 3)
    assert own.layers[3].tensors["keys"].dtype == torch.float8_e4m3fn
    assert cross.layers[0].tensors["keys"].equal(own.layers[0].tensors["keys"][:, :, :3])
    state = snapshot.generation
    assert state.search["scores"].tolist() == [[-3.0], [0.0]]
    assert state.companions["assistant"].layers[1].meta["window"] == 4
    assert state.attributes["model.rope_deltas"].tolist() == [[-3], [4]]
    assert (state.cache_argument, state.generator) == ("cache_params", "language_model")
    outputs = put_together(state.step_inputs, state.step_values)["encoder_outputs"]
    assert outputs.attentions is None and outputs[0].stride(1) == 1
    (checkpoint,) = snapshot.checkpoints
    assert checkpoint.n_tokens == 5
    assert checkpoint.cache.parts["self"].layers[1].tensors["recurrent.0"].shape == (2, 2, 4, 4)
    assert checkpoint.rng["cpu"].tolist() == list(reversed(range(200)))


@pytest.mark.parametrize("path", V1, ids=lambda path: path.stem)
def test_golden_file_of_version_1_is_read(path: Path) -> None:
    snapshot = sq.load(path)
    assert [layer.family for layer in snapshot.cache.layers] == ["dynamic", "sliding", "dummy"]
    full, sliding, _ = snapshot.cache.layers
    assert full.tensors["keys"].dtype == torch.bfloat16
    assert full.tensors["values"][0, 0, 0, :4].view(torch.int32).tolist() == [
        0x7FC00000,
        0x7F800000,
        -0x80000000,
        714,
    ]
    assert sliding.tensors["values"].dtype == torch.float8_e4m3fn
    assert sliding.meta == {"window": 4, "n_seen": 6, "filled": True}
    state = snapshot.generation
    assert state.input_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13]]
    assert state.finished.tolist() == [False, True]
    assert state.config == {"do_sample": True, "temperature": 0.7, "max_length": 20, "eos_token_id": [2, 3]}
    assert state.rng["cpu"].tolist() == list(range(200))
    (counting,) = state.processors
    assert (counting.role, counting.name, counting.meta) == ("logits", "Counting", {"n": 3})
    assert snapshot.provenance.dtype == "bfloat16"


def test_all_golden_files_of_a_version_hold_the_same_bits() -> None:
    for version in STATE_IDS:
        paths = [path for path in GOLDEN if path.stem.startswith(version)]
        first, *others = (sq.load(path, predictor=PREDICTOR).tensors() for path in paths)
        for other in others:
            for name, tensor in first.items():
                assert tensor.reshape(-1).view(torch.uint8).equal(other[name].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("codec", COMPACT)
def test_golden_file_of_symbols_is_read(codec: str) -> None:
    path = Path(__file__).parent / "golden" / f"v3-{codec}.safetensors"
    assert sq.verify(path).passed
    snapshot = sq.load(path)
    assert snapshot.state_id == sq.inspect(path).state_id == COMPACT[codec]
    assert snapshot.coding is not None and snapshot.coding.codec == codec
    whole = made.state() if codec == "transform" else guessing.snapshot_of(guessing.cache_of(40, 5))
    assert snapshot.coding.source == whole.state_id
    for name, exact in whole.cache.tensors().items():
        found = snapshot.cache.tensors()[name].float()
        assert found[..., :4, :].equal(exact[..., :4, :].float())
        error = torch.linalg.vector_norm(found[..., 4:, :] - exact[..., 4:, :].float())
        relative = float(error / torch.linalg.vector_norm(exact[..., 4:, :].float()))
        assert relative == pytest.approx(snapshot.coding.errors[name].relative, rel=0.05, abs=1e-3)
