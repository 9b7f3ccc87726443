"""Files of quantised weights: round trips, models made from them alone, and what hostile ones end in."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_hostile import both, cases, drop, little_memory, put, put_together, signed, taken_apart
from transformers import AutoModelForCausalLM

import semq_state as sq
from conftest import SIZES, TINY, tiny_model
from semq_state.errors import (
    FormatError,
    IntegrityError,
    ModelMismatchError,
    SemqStateError,
    StoreError,
    UnknownCodecError,
)
from semq_state.fingerprint import fingerprint
from semq_state.provenance import Provenance
from semq_state.quantizers import grid
from semq_state.quantizers.spectrum import Branch
from semq_state.weights.building import WEIGHTS_FILE, build, open_weights, save_folder
from semq_state.weights.file import damage, inspect_weights, is_weights_file, load_weights, save_weights
from semq_state.weights.held import QuantizedWeights
from semq_state.weights.matrix import QuantizedMatrix
from semq_state.weights.table import structure_of

pytestmark = pytest.mark.timeout(120)

GOLDEN = Path(__file__).parent / "golden" / "weights-1.safetensors"


def by_hand(rows: int = 12, cols: int = 20) -> QuantizedWeights:
    """One of everything that a file can hold, from arithmetic alone."""
    values = torch.sin(torch.arange(rows * cols, dtype=torch.float32)).reshape(rows, cols)
    found = grid.fitted(values, 3, 8, grid.minmax)
    symbols = found.symbols(values)
    at = torch.tensor([3, 17, rows * cols - 1])
    counts = (torch.arange(rows) % 3 + 1).to(torch.int16)
    whole = QuantizedMatrix.made(
        symbols,
        found,
        torch.bfloat16,
        smoothing=torch.linspace(0.5, 2, cols).half(),
        branch=Branch(counts, torch.linspace(-1, 1, int((2 * counts.long() - 1).sum())).half()),
        escaped_at=at,
        escaped=values.flatten()[at].to(torch.bfloat16),
    )
    plain = grid.fitted(values, 8, cols, grid.minmax)
    none = QuantizedMatrix.made(
        plain.symbols(values),
        plain,
        torch.float32,
        escaped_at=torch.empty(0, dtype=torch.int64),
        escaped=torch.empty(0),
    )
    return QuantizedWeights(
        recipe={"method": "rtn", "bits": 3, "group": 8},
        origin=Provenance("sha256:" + "ab" * 32, {"n": 1}, {}, None, {}, {}, "bfloat16", "small", {"torch": "2"}),
        config={"model_type": "llama", "vocab_size": 7},
        generation_config={"max_length": 20},
        matrices={"a": whole, "a.b": none},
        plain={
            "norm.weight": torch.ones(20, dtype=torch.bfloat16),
            "steps": torch.tensor(3),
            "none": torch.empty(0),
        },
        tied={"head.weight": "a.weight"},
        activation_bits=4,
    )


def quantized(kind: str = "llama", **options: Any) -> Any:
    given: dict[str, Any] = {"bits": 3, "group": 8, **options}
    return sq.quantize(tiny_model(kind), "rtn", **given)


def assert_same(found: QuantizedWeights, expected: QuantizedWeights) -> None:
    ours, theirs = found.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert structure_of(found) == structure_of(expected)
    assert found.origin == expected.origin


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "weights"
    save_weights(by_hand(), path)
    return path.read_bytes()


# What comes back


def test_everything_comes_back(path: Path) -> None:
    info = save_weights(by_hand(), path)
    assert_same(load_weights(path), by_hand())
    assert info == inspect_weights(path)
    assert damage(path) == {}
    assert is_weights_file(path)


def test_large_matrices_stand_in_several_sections(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semq_state.content.CHUNK_BYTES", 50)
    save_weights(by_hand(), path)
    with safe_open(path, "np") as file:
        assert sum(name.startswith("matrix.a.symbols#") for name in file.keys()) == 6  # noqa: SIM118
    assert_same(load_weights(path), by_hand())


def test_the_same_weights_are_the_same_bytes(path: Path) -> None:
    save_weights(by_hand(), path)
    before = path.read_bytes()
    save_weights(load_weights(path), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("field", ["recipe", "config", "generation_config", "tied", "activation_bits", "matrices"])
def test_the_identity_is_of_every_field(field: str, path: Path) -> None:
    held = by_hand()
    other: dict[str, Any] = {
        "recipe": {"method": "gptq"},
        "config": {"model_type": "gpt2"},
        "generation_config": {},
        "tied": {},
        "activation_bits": 0,
        "matrices": {"a": held.matrices["a"], "c": held.matrices["a.b"]},
    }
    one = save_weights(held, path).weights_id
    assert save_weights(dataclasses.replace(held, **{field: other[field]}), path).weights_id != one


def test_the_identity_is_of_origin_and_tensors(path: Path) -> None:
    held = by_hand()
    plain = {**held.plain, "steps": torch.tensor(4)}
    others = (
        dataclasses.replace(held, origin=dataclasses.replace(held.origin, weights="sha256:" + "cd" * 32)),
        dataclasses.replace(held, plain=plain),
    )
    named = dataclasses.replace(held, origin=dataclasses.replace(held.origin, model_name="large", threads=7))
    one = save_weights(held, path).weights_id
    assert all(save_weights(other, path).weights_id != one for other in others)
    assert save_weights(named, path).weights_id == one


def test_info_counts_what_is_stored(path: Path) -> None:
    model = quantized()
    info = save_weights(model.semq_weights, path)
    told = info.as_dict()
    assert json.loads(json.dumps(told)) == told
    assert info.n_parameters == sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    assert info.n_bytes == path.stat().st_size
    assert info.bits_per_weight == 8 * info.n_bytes / info.n_parameters
    header = json.loads(path.read_bytes()[8:].split(b"\n")[0][: int.from_bytes(path.read_bytes()[:8], "little")])
    sizes = {name: e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items() if name[0] == "m"}
    matrices = {name: size for name, size in sizes.items() if name.startswith("matrix.")}
    assert sum(n_bytes for _, n_bytes in info.stored.values()) == sum(matrices.values())
    tables = ("matrix.model.embed_tokens.", "matrix.lm_head.")
    assert info.stored[8][1] == sum(size for name, size in matrices.items() if name.startswith(tables))
    assert told["origin"] == model.semq_weights.origin.weights and told["method"] == "rtn"


def test_progress_is_told(path: Path) -> None:
    told: list[tuple[int, int]] = []
    save_weights(by_hand(), path, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] and [d for d, _ in told] == sorted(d for d, _ in told)
    told.clear()
    load_weights(path, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]


# Models made from it


@pytest.mark.parametrize("dequantize", ["load", "call"])
@pytest.mark.parametrize("kind", TINY)
def test_a_model_is_made_from_the_file_alone(kind: str, dequantize: Any, path: Path) -> None:
    model, ids = quantized(kind), torch.arange(3, 30)[None]
    save_weights(model.semq_weights, path)
    before = torch.get_rng_state()
    made = open_weights(path, dequantize=dequantize)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(made) is type(model) and not made.training
    assert not any(t.device.type == "meta" for t in [*made.parameters(), *made.buffers()])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(made.generate(ids, **options), model.generate(ids, **options))
    assert fingerprint(made).identity() == fingerprint(model).identity()


def test_tied_embeddings_stay_one(path: Path) -> None:
    config = TINY["llama"]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = sq.quantize(AutoModelForCausalLM.from_config(config).eval(), "rtn", 4, 8)
    save_weights(model.semq_weights, path)
    made = open_weights(path)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert fingerprint(made).weights == fingerprint(model).weights


def test_rounded_inputs_come_back(path: Path) -> None:
    model = quantized(activation_bits=4)
    save_weights(model.semq_weights, path)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(open_weights(path)(ids).logits, model(ids).logits)


def test_a_folder_is_a_model_for_the_command_line(tmp_path: Path) -> None:
    from semq_state.cli.models import is_quantized_folder, load_alone

    model = quantized()
    info = save_folder(model.semq_weights, tmp_path / "made")
    assert json.loads((tmp_path / "made" / "config.json").read_text())["model_type"] == "llama"
    assert info.weights_id == inspect_weights(tmp_path / "made" / WEIGHTS_FILE).weights_id
    assert is_quantized_folder(str(tmp_path / "made")) and not is_quantized_folder(str(tmp_path))
    made = load_alone(str(tmp_path / "made"))
    assert fingerprint(made).weights == fingerprint(model).weights
    assert load_alone(str(tmp_path / "made"), dtype="bfloat16").dtype == torch.bfloat16


CONFIGS: dict[str, dict[str, Any]] = {
    "no type": {"model_type": None},
    "a type of ours": {"model_type": "semq_state.Snapshot"},
    "no such type": {"model_type": "llamb"},
    "layers without end": {"num_hidden_layers": 1 << 40},
    "more layers than tensors": {"num_hidden_layers": 2000},
    "one layer more": {"num_hidden_layers": 3},
    "wide": {"hidden_size": 1 << 30},
    "wider": {"hidden_size": 1 << 44, "head_dim": 1 << 40},
    "many words": {"vocab_size": 1 << 40},
    "a negative size": {"hidden_size": -4},
    "labels without end": {"num_labels": 1 << 40},
    "a dtype that is a function": {"dtype": "load"},
    "a method": {"to_dict": "x"},
    "a backbone": {"use_pretrained_backbone": True},
    "text for a number": {"hidden_size": "32"},
    "no activation": {"hidden_act": "os.system"},
    "another architecture": {"model_type": "gpt2"},
}


@cases(CONFIGS)
def test_hostile_configurations(case: dict[str, Any]) -> None:
    held = quantized().semq_weights
    lies = dataclasses.replace(held, config={**held.config, **case})
    with little_memory(), pytest.raises((FormatError, ModelMismatchError)) as refusal:
        build(lies, where="some file")
    assert "some file" in str(refusal.value) and len(str(refusal.value)) < 1000


def test_tables_of_a_configuration_are_bounded() -> None:
    held = sq.quantize(tiny_model("gpt2"), "rtn", 3, 8).semq_weights
    mapping = {"model_type": "gptj", "n_positions": 1 << 24, "n_embd": 4096, "rotary_dim": 4096}
    with little_memory(), pytest.raises(FormatError):
        build(dataclasses.replace(held, config={**held.config, **mapping}))


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_a_configuration_names_no_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = quantized().semq_weights
    lies = {
        **held.config,
        name: "someone/kernels",
        "auto_map": {"AutoModelForCausalLM": "someone/code--model.Model"},
    }
    # An origin without an attention that is known leaves the choice to transformers.
    origin = dataclasses.replace(held.origin, attention="someone/kernels")
    made = build(dataclasses.replace(held, config=lies, origin=origin))
    assert made.config._attn_implementation == "sdpa" and type(made).__module__.startswith("transformers.")


def test_settings_of_generation_are_settings() -> None:
    held = quantized().semq_weights
    lies = {**held.generation_config, "validate": 3, "to_dict": 4, "_private": 5, "unknown": 6, "top_k": 7}
    config = build(dataclasses.replace(held, generation_config=lies)).generation_config
    assert callable(config.validate) and config.top_k == 7 and not hasattr(config, "unknown")


# What is refused


def assert_refused(path: Path, data: bytes) -> SemqStateError:
    path.write_bytes(data)
    with little_memory():
        with pytest.raises((FormatError, UnknownCodecError)) as refusal:
            load_weights(path)
        assert str(path) in str(refusal.value) and len(str(refusal.value)) < 1000
        assert refusal.value.expected and refusal.value.found and refusal.value.do
        assert all(str(path) in words for words in damage(path).values()) and damage(path)
    return refusal.value


def test_every_flipped_byte_is_noticed(good: bytes, path: Path) -> None:
    rng = np.random.default_rng(0)
    path.write_bytes(good)
    weights_id = inspect_weights(path).weights_id
    places = {*rng.integers(0, len(good), 150).tolist(), 0, 7, 8, len(good) - 1}
    n_spaces = 0
    for place in sorted(places):
        data = bytearray(good)
        data[place] ^= 1 << int(rng.integers(8))
        # The header's own padding is free, as safetensors leaves it.
        if good[place : place + 1] == b" ":
            n_spaces += 1
            continue
        path.write_bytes(bytes(data))
        try:
            found = load_weights(path)
        except SemqStateError:
            continue
        # What is told beside the identity: who wrote it, with which versions.
        assert_same(dataclasses.replace(found, origin=by_hand().origin), by_hand())
        assert inspect_weights(path).weights_id == weights_id
        n_spaces += 1
    assert n_spaces < len(places) / 2


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_files(share: float, good: bytes, path: Path) -> None:
    assert_refused(path, good[: int(len(good) * share)])


def test_other_files(path: Path) -> None:
    path.write_bytes(b"no safetensors file at all")
    with pytest.raises(FormatError):
        load_weights(path)
    with pytest.raises(StoreError):
        load_weights(path.with_name("none"))
    save_weights(by_hand(), path)
    with pytest.raises(FormatError, match="semq_state weights"):
        sq.load(path)
    assert not sq.verify(path).passed


HOSTILE: dict[str, Any] = {
    "another format": put("manifest", "structure", "format", value="semq_state"),
    "a later version": put("manifest", "structure", "version", value=2),
    "a version that is true": put("manifest", "structure", "version", value=True),
    "no recipe": drop("manifest", "structure", "recipe"),
    "a field more": put("manifest", "structure", "more", value=1),
    "text for a config": put("manifest", "structure", "config", value="llama"),
    "activations of 9 bits": put("manifest", "structure", "activation_bits", value=9),
    "no rows": put("manifest", "structure", "matrices", "a", "rows", value=0),
    "other rows": put("manifest", "structure", "matrices", "a", "rows", value=11),
    "rows without end": put("manifest", "structure", "matrices", "a", "rows", value=1 << 40),
    "rows that are true": put("manifest", "structure", "matrices", "a", "rows", value=True),
    "9 bits": put("manifest", "structure", "matrices", "a", "bits", value=9),
    "too few bits": put("manifest", "structure", "matrices", "a", "bits", value=2),
    "no group": put("manifest", "structure", "matrices", "a", "group", value=0),
    "another group": put("manifest", "structure", "matrices", "a", "group", value=10),
    "integers for weights": put("manifest", "structure", "matrices", "a", "dtype", value="I64"),
    "a matrix that is a list": put("manifest", "structure", "matrices", "a", value=[]),
    "a field more of a matrix": put("manifest", "structure", "matrices", "a", "more", value=1),
    "a matrix without tensors": put("manifest", "structure", "matrices", "c", value={}),
    "a matrix less": drop("manifest", "structure", "matrices", "a"),
    "no symbols": drop("manifest", "tensors", "matrix.a.symbols"),
    "half a branch": both(drop("manifest", "tensors", "matrix.a.counts"), drop("sections", "matrix.a.counts")),
    "no scale": both(drop("manifest", "tensors", "matrix.a.scale"), drop("sections", "matrix.a.scale")),
    "tied to nothing": put("manifest", "structure", "tied", "head.weight", value="nothing"),
    "tied to a number": put("manifest", "structure", "tied", "head.weight", value=3),
    "tied and given": put("manifest", "structure", "tied", "norm.weight", value="a.weight"),
    "a codec of nobody": put("manifest", "tensors", "matrix.a.scale", "sections", 0, 3, value="none"),
    "a claim": both(
        put("manifest", "tensors", "plain.norm.weight", "shape", value=[1 << 35]),
        put("manifest", "structure", "recipe", value={}),
    ),
    "another name in the header": put("metadata", "model", value="large"),
    "another version in the header": put("metadata", "format_version", value="2"),
    "an origin without weights": drop("manifest", "provenance", "weights"),
    "a signature": put("sections", "signature", value={"dtype": "U8", "shape": [2], "data": b"{}"}),
    "a tensor of nothing": lambda draft: draft["manifest"]["tensors"].update(
        {"other.x": draft["manifest"]["tensors"].pop("plain.steps")}
    ),
    "a part of nothing": lambda draft: draft["manifest"]["tensors"].update(
        {"matrix.a.more": draft["manifest"]["tensors"].pop("plain.steps")}
    ),
    "scales for symbols": lambda draft: _exchange(draft, "matrix.a.scale", "matrix.a.zero", shape=[1, 1]),
}


def _exchange(draft: dict[str, Any], one: str, other: str, shape: list[int]) -> None:
    draft["manifest"]["tensors"][one]["shape"] = shape


@cases(HOSTILE)
def test_hostile_tables(case: Any, good: bytes, path: Path) -> None:
    draft = taken_apart(good)
    case(draft)
    assert_refused(path, put_together(signed(draft)))


def test_pieces_put_together_are_the_same_weights(good: bytes, path: Path) -> None:
    path.write_bytes(put_together(signed(taken_apart(good))))
    assert_same(load_weights(path), by_hand())


def test_an_exchanged_origin_is_noticed(good: bytes, path: Path) -> None:
    draft = taken_apart(good)
    draft["manifest"]["provenance"]["weights"] = "sha256:" + "cd" * 32
    assert type(assert_refused(path, put_together(draft))) is IntegrityError


def test_values_that_are_no_matrix(path: Path) -> None:
    held = by_hand()
    whole = held.matrices["a"]
    assert whole.smoothing is not None and whole.branch is not None
    for change in (
        {"scale": torch.full_like(whole.scale, torch.nan)},
        {"smoothing": -whole.smoothing},
        {"branch": Branch(whole.branch.counts * 0 + 11, whole.branch.coefficients)},
        {"zero": whole.zero[:, :1]},
        {"escaped": torch.ones(2, dtype=torch.bfloat16)},
    ):
        lies = dataclasses.replace(held, matrices={**held.matrices, "a": dataclasses.replace(whole, **change)})
        save_weights(lies, path)
        with pytest.raises(FormatError, match="matrix a"):
            load_weights(path)


def test_a_failed_save_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"before")
    held = by_hand()
    broken = copy.copy(held.matrices["a.b"])
    object.__setattr__(broken, "symbols", torch.empty(0, dtype=torch.uint8))
    with pytest.raises(Exception, match=r".*"):
        save_weights(dataclasses.replace(held, matrices={"a": held.matrices["a"], "b": broken}), path)
    assert path.read_bytes() == b"before" and list(path.parent.iterdir()) == [path]
    with pytest.raises(StoreError):
        save_weights(held, path.parent / "none" / "weights")


def test_what_is_read_again_must_be_what_was_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from semq_state.weights import file

    path.write_bytes(b"before")
    real = file.failures_of

    def failing(*arguments: Any) -> Any:
        return {**real(*arguments), "matrix.a.scale": IntegrityError("here")}

    monkeypatch.setattr(file, "failures_of", failing)
    with pytest.raises(IntegrityError, match="here"):
        save_weights(by_hand(), path)
    assert path.read_bytes() == b"before"


def test_the_golden_file() -> None:
    assert_same(load_weights(GOLDEN), by_hand())
    info = inspect_weights(GOLDEN)
    assert info.weights_id == "sha256:14e87881f65bcb73d2e0e2dcc1ab6b5cb54c1697169748166cc4d8fbd2d938fd"


def test_the_command_line(tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "weights"
    info = save_weights(by_hand(), path)
    code, out, _ = cli("inspect", path)
    assert code == 0 and info.weights_id in out and "rtn, 3 bits, groups of 8" in out
    code, out, _ = cli("inspect", path, "--json")
    assert json.loads(out)["weights_id"] == info.weights_id
    code, out, _ = cli("verify", path)
    assert code == 0 and out.startswith("whole: ")
    data = bytearray(path.read_bytes())
    data[-4000] ^= 1
    path.write_bytes(bytes(data))
    code, out, _ = cli("verify", path)
    assert code == 1 and "damaged" in out


assert SIZES["num_hidden_layers"] == 2  # what "one layer more" is held against
