"""Replaying what a snapshot says happened: from its start, from its tokens, and token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, T5Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import semq_state as sq
from conftest import tiny_model
from semq_state.audit.nulls import null_runs
from semq_state.audit.rerun import recomputed
from semq_state.snapshot import Snapshot

SAMPLED: Mapping[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}


def prompt(n: int = 12, rows: int = 2, *, padding: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    ids, mask = torch.randint(3, 190, (rows, n)), torch.ones(rows, n, dtype=torch.int64)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def captured(model: Any, n_new: int = 10, *, trace: bool = True, seed: int = 1, **options: Any) -> Snapshot:
    torch.manual_seed(seed)
    with sq.capture(model, trace=trace) as run:
        model.generate(**{**prompt(), **options}, max_new_tokens=n_new)
    return run.snapshot()


def told_otherwise(snapshot: Snapshot, **config: Any) -> Snapshot:
    generation = snapshot.generation
    return dataclasses.replace(
        snapshot, generation=dataclasses.replace(generation, config={**generation.config, **config})
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2", "qwen3"])
def test_a_sampled_run_is_replayed_bit_for_bit_from_its_file(kind: str, path: Path) -> None:
    model = tiny_model(kind)
    sq.save(captured(model, 30, **SAMPLED), path)
    found = sq.replay(sq.load(path), model)
    assert [verdict.outcome for verdict in found.verdicts.values()] == ["equal"] * 3
    assert found.passed
    assert found.as_dict()["determinism"] == {"passed": True, "outcome": "equal", "reasons": []}
    assert found.report is not None and found.report.first_token is None


def test_start_and_end_are_a_record(model: Any) -> None:
    start, end = captured(model, 1, trace=False, **SAMPLED), captured(model, 20, trace=False, **SAMPLED)
    assert sq.replay(end, model, parts=("determinism",)).determinism.outcome == "not evaluated"
    assert sq.replay(end, model, start=start, parts=("determinism",)).determinism.outcome == "equal"


def test_a_greedy_run_is_its_own_record(model: Any) -> None:
    found = sq.replay(captured(model, trace=False, do_sample=False), model)
    assert found.determinism.outcome == found.cold_equivalence.outcome == "equal"
    assert found.trace.outcome == "not evaluated" and "trace=True" in found.trace.reasons[0]
    assert found.passed


def test_a_forgetting_cache_without_its_start_says_so() -> None:
    found = sq.replay(captured(tiny_model("mistral"), 30, trace=False, do_sample=False), tiny_model("mistral"))
    assert found.determinism.outcome == "not evaluated" and found.cold_equivalence.outcome == "equal"


def test_a_run_that_was_cut_off_is_replayed_to_where_it_was(model: Any, path: Path) -> None:
    class CutError(Exception):
        pass

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        if ids.shape[1] == 17:
            raise CutError
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(CutError), sq.capture(model, trace=True, autosave=path, every=1) as run:
        model.generate(**prompt(), max_new_tokens=30, stopping_criteria=[stop], **SAMPLED)
    assert run.snapshot().n_tokens in (16, 17)
    assert sq.replay(sq.load(path), model).determinism.outcome == "equal"


def test_another_temperature_than_told_shows(model: Any) -> None:
    snapshot = captured(model, 30, do_sample=True, temperature=2.0, top_k=0)
    found = sq.replay(told_otherwise(snapshot, temperature=0.5), model)
    assert found.determinism.outcome == "different"
    assert found.determinism.reasons[0].startswith("tokens: part at ")
    # What the model computed of these tokens is not in doubt.
    assert found.cold_equivalence.outcome == "equal"
    assert not found.passed


def test_settings_that_contradict_the_start_show(model: Any) -> None:
    start, end = captured(model, 1, **SAMPLED), captured(model, 12, **SAMPLED)
    found = sq.replay(told_otherwise(end, top_p=0.8), model, start=start, parts=("determinism",))
    assert "top_p was 0.9 at the start and is 0.8 at the end" in found.determinism.reasons[0]


def test_another_seed_shows(model: Any) -> None:
    end = captured(model, 20, **SAMPLED)
    start = captured(model, 1, **SAMPLED)
    fresh = torch.Generator().manual_seed(99).get_state()
    other = dataclasses.replace(start, generation=dataclasses.replace(start.generation, rng={"cpu": fresh}))
    found = sq.replay(end, model, start=other, parts=("determinism",))
    assert found.determinism.outcome == "different"


def test_a_start_of_another_run_is_refused(model: Any) -> None:
    end = captured(model, 8, **SAMPLED)
    other = captured(model, 2, input_ids=prompt()["input_ids"] + 1, **SAMPLED)
    with pytest.raises(sq.IncompleteStateError, match="same run"):
        sq.replay(end, model, start=other)
    with pytest.raises(sq.IncompleteStateError, match="fewer than"):
        sq.replay(end, model, start=end)
    elsewhere = tiny_model(seed=1)
    foreign = dataclasses.replace(captured(model, 1, **SAMPLED), provenance=captured(elsewhere, 1).provenance)
    with pytest.raises(sq.IncompleteStateError, match="weights"):
        sq.replay(end, model, start=foreign)


def test_another_model_is_refused_and_with_allow_its_first_layer_named(model: Any) -> None:
    snapshot = captured(model, 12, **SAMPLED)
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    with pytest.raises(sq.ModelMismatchError, match="weights"):
        sq.replay(snapshot, other)
    found = sq.replay(snapshot, other, allow=("weights",))
    assert found.cold_equivalence.outcome == "different"
    assert found.cold_equivalence.reasons[0].startswith("different from layer 1, token ")
    assert found.report is not None and found.report.first_layer == 1
    assert found.trace.outcome == "different"


def test_a_state_that_was_changed_shows_layer_and_token(model: Any) -> None:
    snapshot = captured(model, 12)
    layers = list(snapshot.cache.layers)
    values = layers[1].tensors["values"].clone()
    values[1, 0, 7, 3] += 1e-3
    layers[1] = dataclasses.replace(layers[1], tensors={**layers[1].tensors, "values": values})
    changed = dataclasses.replace(snapshot, cache=dataclasses.replace(snapshot.cache, layers=tuple(layers)))
    found = sq.replay(changed, model, parts=("cold",))
    assert found.cold_equivalence.reasons == ("different from layer 1, token 7 on",)
    assert found.determinism.reasons == ("not asked for",)
    # It is in the recorded start as well, and what follows from that start is another state.
    assert sq.replay(changed, model, parts=("determinism",)).determinism.outcome == "different"


def test_another_prompt_than_told_shows_its_first_token(model: Any) -> None:
    snapshot = captured(model, 12)
    ids = snapshot.generation.input_ids.clone()
    ids[1, 6] = (ids[1, 6] + 1) % 190
    told = dataclasses.replace(snapshot, generation=dataclasses.replace(snapshot.generation, input_ids=ids))
    found = sq.replay(told, model, parts=("cold", "trace"))
    assert found.report is not None and found.report.first_token == 6 and found.report.first_layer == 0
    assert found.traces is not None and found.traces.first_token() == 12


def test_a_trace_finds_the_first_token_of_another_model(model: Any) -> None:
    snapshot, other = captured(model, 20), recomputed(captured(model, 20), tiny_model(seed=3))
    assert snapshot.trace is not None and other.trace is not None
    names = ("top_ids", "top_logits", "norms", "prints")
    mixed = {
        name: torch.cat([getattr(snapshot.trace, name)[:, :9], getattr(other.trace, name)[:, 9:]], dim=1)
        for name in names
    }
    changed = dataclasses.replace(snapshot, trace=dataclasses.replace(snapshot.trace, **mixed))
    for how in ("steps", "once"):
        found = sq.replay(changed, model, how=how, parts=("trace",))  # type: ignore[arg-type]
        assert found.trace.outcome == "different"
        assert found.trace.reasons[0].startswith(f"different from token {12 + 9} on")


def test_computed_at_once_it_is_within_rounding(model: Any) -> None:
    found = sq.replay(captured(model, 20), model, how="once", parts=("trace",))
    assert found.trace.outcome in ("equal", "within")
    assert found.traces is not None and found.traces.logits.max() < 1e-5


def test_a_floor_decides_where_rounding_differs(model: Any) -> None:
    snapshot = captured(model, 40, trace=False, do_sample=False)
    floor = sq.measure_floor(snapshot, [state for _, state in null_runs(snapshot, model, 4)])
    found = sq.replay(snapshot, model, how="once", floor=floor, parts=("cold",))
    assert found.cold_equivalence.passed
    without = sq.replay(snapshot, model, how="once", parts=("cold",)).cold_equivalence
    assert without.outcome == "different" and "a floor tells" in without.reasons[1]
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight.mul_(1.01)
    against = sq.diff(snapshot, recomputed(snapshot, other, in_steps=False), bins=floor.bins)
    verdict = against.within(floor)
    assert not verdict.passed and verdict.reasons[0].startswith("layers.1.values")


def test_null_runs_leave_the_model_as_it_was(model: Any) -> None:
    snapshot = captured(model, 30, trace=False)
    before = (torch.get_num_threads(), model.config._attn_implementation)
    words = [
        word for word, state in null_runs(snapshot, model, 6, vary=("threads", "chunks", "batch", "attention"))
    ]
    assert before == (torch.get_num_threads(), model.config._attn_implementation)
    assert len(set(words)) > 2 and all("neighbours" in word for word in words)
    with pytest.raises(ValueError, match="vary"):
        next(null_runs(snapshot, model, 1, vary=("weather",)))


def test_null_runs_of_another_model_are_refused(model: Any) -> None:
    snapshot = captured(model, 12, trace=False)
    with pytest.raises(sq.ModelMismatchError, match="weights"):
        next(null_runs(snapshot, tiny_model(seed=2), 1))


def test_null_runs_compute_the_same_tokens(model: Any) -> None:
    snapshot = captured(model, 30, trace=False)
    for _, state in null_runs(snapshot, model, 4):
        assert torch.equal(state.generation.input_ids, snapshot.generation.input_ids)
        for name, tensor in snapshot.cache.tensors().items():
            real = tensor[1]  # the other row begins with padding, whose states may be anything
            assert torch.allclose(state.cache.tensors()[name][1], real, atol=1e-5)


def test_an_encoder_decoder_is_replayed() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=199,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    found = sq.replay(captured(model, 12), model)
    assert [v.outcome for v in found.verdicts.values()] == ["equal"] * 3


def test_a_recurrent_model_is_replayed() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=199, hidden_size=32, state_size=4, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = sq.replay(captured(model, 12, **SAMPLED), model)
    assert found.determinism.outcome == found.cold_equivalence.outcome == "equal"


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 5}]
)
def test_other_caches_are_replayed(model: Any, options: dict[str, Any]) -> None:
    found = sq.replay(captured(model, 12, **SAMPLED, **options), model)
    assert found.determinism.outcome == "equal"
    assert found.cold_equivalence.outcome == found.trace.outcome == "equal"


def test_a_loop_by_hand_is_recomputed(model: Any) -> None:
    ids = prompt(padding=0)["input_ids"]
    with torch.no_grad():
        out = model(ids, use_cache=True)
    snapshot = sq.snapshot_of(model, out.past_key_values, ids, logits=out.logits)
    found = sq.replay(snapshot, model)
    assert found.determinism.outcome == "not evaluated" and "loop" in found.determinism.reasons[0]
    assert found.cold_equivalence.outcome == "equal"


def test_beams_are_not_evaluated_and_say_why(model: Any) -> None:
    snapshot = captured(model, 8, trace=False, num_beams=2)
    found = sq.replay(snapshot, model)
    assert {v.outcome for v in found.verdicts.values()} == {"not evaluated"}
    assert not found.passed and "beams" in found.cold_equivalence.reasons[0]


def test_a_compact_state_is_within_what_its_file_says(model: Any, path: Path) -> None:
    whole = captured(model, 40, do_sample=False)
    sq.save(whole, path, codec="rotated")
    found = sq.replay(sq.load(path), model, start=captured(model, 1, do_sample=False))
    assert found.determinism.outcome == "equal"
    assert found.cold_equivalence.outcome == "within"
    changed = tiny_model()
    with torch.no_grad():
        changed.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    assert sq.replay(sq.load(path), changed, allow=("weights",)).cold_equivalence.outcome == "different"


def test_circumstances_are_told(model: Any) -> None:
    snapshot = captured(model, 4)
    elsewhere = dataclasses.replace(snapshot.provenance, threads=64)
    found = sq.replay(dataclasses.replace(snapshot, provenance=elsewhere), model)
    assert [d.name for d in found.circumstances] == ["threads"]


def test_bad_arguments_are_refused(model: Any) -> None:
    snapshot = captured(model, 2)
    with pytest.raises(ValueError, match="parts"):
        sq.replay(snapshot, model, parts=("hot",))
    with pytest.raises(ValueError, match="how"):
        sq.replay(snapshot, model, how="twice")  # type: ignore[arg-type]


def test_what_stands_at_padding_is_not_compared(model: Any) -> None:
    snapshot = captured(model, 12)
    layers = list(snapshot.cache.layers)
    keys = layers[0].tensors["keys"].clone()
    keys[0, :, :3] = 1e9  # the first row begins with three tokens of padding
    layers[0] = dataclasses.replace(layers[0], tensors={**layers[0].tensors, "keys": keys})
    changed = dataclasses.replace(snapshot, cache=dataclasses.replace(snapshot.cache, layers=tuple(layers)))
    report = sq.diff(snapshot, changed)
    assert report.first_token is None and report.equal
    n_heads, n_tokens = keys.shape[1], keys.shape[2]
    assert report.cell("layers.0.keys").n_vectors == (2 * n_tokens - 3) * n_heads
    keys[0, :, 3] = 1e9
    report = sq.diff(snapshot, changed)
    assert report.first_token == 3 and report.cell("layers.0.keys").n_bits_changed == n_heads
    assert report.cell("layers.0.keys").mean_cosine < 1
    floor = sq.measure_floor(snapshot, null_runs(snapshot, model, 3, vary=("attention", "chunks")))
    assert all(cell.changed * 4 < cell.total for cell in floor.cells)


def test_command_line_answers_and_exit_codes(model: Any, tmp_path: Path) -> None:
    import json

    from typer.testing import CliRunner

    from semq_state.cli import app

    folder, file, part = tmp_path / "model", tmp_path / "end.safetensors", tmp_path / "plain.safetensors"
    model.save_pretrained(folder)
    torch.manual_seed(1)
    with sq.capture(model, trace=True) as run:
        model.generate(**prompt(rows=1, padding=0), max_new_tokens=9, **SAMPLED)
    sq.save(run.snapshot(), file)
    sq.save(dataclasses.replace(run.snapshot(), trace=None, checkpoints=()), part)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    write_tokenizer(folder)

    def asked(*words: Any) -> Any:
        return CliRunner().invoke(app, ["replay", *map(str, words), "--model", str(folder)])

    good = asked(file, "--json")
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["determinism"]["outcome"] == "equal"
    assert "cold equivalence  equal" in asked(file).stdout
    told = told_otherwise(run.snapshot(), temperature=5.0)
    sq.save(told, file)
    bad = asked(file, "--part", "determinism")
    assert bad.exit_code == 1 and "tokens: part at" in bad.stdout
    assert asked(part, "--part", "determinism").exit_code == 2
    assert asked(file, "--part", "luck").exit_code == 2


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"t{i}": i for i in range(199)}, unk_token="t0")).save(
        str(folder / "tokenizer.json")
    )
