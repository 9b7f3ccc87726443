"""`sq.record`: a dataset's hidden states on disk, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, MambaConfig, PreTrainedTokenizerFast, T5Config, T5Model
from transformers.models.mamba.modeling_mamba import MambaForCausalLM
from workers.recording import OPTIONS, WANTED, documents

import semq_state as sq
from conftest import tiny_model
from semq_state.codecs import Semq
from semq_state.recording import RecordProgress
from semq_state.recording.windows import Window, batches, blocks, windows
from semq_state.symbolic.presets import policy_for

HERE = Path(__file__).parent
LAST = "hidden_states.2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "record"


def recorded(model: Any, dataset: Any, folder: Path, **options: Any) -> Any:
    return sq.record(model, dataset, folder, **{"progress": False, "weights": "sampled", **options})


def alone(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids[None], output_hidden_states=True).hidden_states[layer][0]
    return found


def words() -> PreTrainedTokenizerFast:
    rules = Tokenizer(models.WordLevel({f"w{i}": i for i in range(199)}, unk_token="w0"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="w0", pad_token="w0")


def text_of(ids: torch.Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.tolist())


def ended(ids: list[list[int]]) -> list[tuple[int, int]]:
    return [(d, p) for d, p in ids]


def test_rows_are_those_of_each_document_alone(model: Any, folder: Path) -> None:
    texts = documents(12)
    record = recorded(model, texts, folder, hidden_states=sq.HiddenStates(layers="all"))
    assert record.complete and record.n_documents == 12
    assert record.sites == ("hidden_states.0", "hidden_states.1", LAST)
    wanted = [(i, p) for i, ids in enumerate(texts) for p in range(len(ids))]
    assert ended(record.ids.tolist()) == wanted
    assert record.token_ids.tolist() == torch.cat(texts).tolist()
    for i, ids in enumerate(texts):
        for layer in range(3) if len(ids) else ():
            found = record.of(i).states[f"hidden_states.{layer}"]
            assert torch.allclose(found, alone(model, ids, layer), atol=1e-5), (i, layer)


def test_a_batch_of_one_is_the_plain_pass_bit_for_bit(model: Any, folder: Path) -> None:
    texts = documents(4)
    record = recorded(model, texts, folder, batch_tokens=1)
    for i, ids in enumerate(texts):
        assert torch.equal(record.of(i).states[LAST], alone(model, ids, 2))


def test_modules_are_heard_as_by_a_plain_hook(model: Any, folder: Path) -> None:
    heard = []
    texts = [ids for ids in documents(5) if len(ids)]
    record = recorded(
        model, texts, folder, hidden_states=sq.HiddenStates(modules="model.layers.1.mlp"), batch_tokens=1
    )
    with torch.no_grad():
        hook = model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: heard.append(out[0]))
        for ids in texts:
            model(ids[None])
        hook.remove()
    assert torch.equal(record["model.layers.1.mlp"][:], torch.cat(heard))


def test_long_documents_are_read_in_windows_that_start_afresh(model: Any, folder: Path) -> None:
    ids = documents(2)[1].repeat(4)[:50]
    record = recorded(model, [ids], folder, max_tokens=16, batch_tokens=1)
    assert record.ids.tolist() == [[0, p] for p in range(50)]
    for start in range(0, 50, 16):
        part = ids[start : start + 16]
        found = record[LAST][start : start + 16]
        assert torch.equal(found, alone(model, part, 2))


def test_every_kind_of_dataset_gives_the_same_record(model: Any, tmp_path: Path) -> None:
    texts = [ids for ids in documents(9) if len(ids)]
    n = max(map(len, texts))
    padded = torch.stack([torch.nn.functional.pad(ids, (0, n - len(ids))) for ids in texts])
    mask = torch.stack([torch.arange(n) < len(ids) for ids in texts]).long()
    left = torch.stack([torch.nn.functional.pad(ids, (n - len(ids), 0)) for ids in texts])
    datasets = {
        "tensors": texts,
        "lists": [ids.tolist() for ids in texts],
        "arrays": (ids.numpy() for ids in texts),
        "a batch": [{"input_ids": padded, "attention_mask": mask}],
        "two batches": [
            {"input_ids": padded[:3], "attention_mask": mask[:3]},
            {"input_ids": left[3:], "attention_mask": mask[3:].flip(1)},
        ],
        "rows": [{"input_ids": ids.tolist()} for ids in texts],
        "texts": [text_of(ids) for ids in texts],
        "tables": [{"text": text_of(ids), "n": 1} for ids in texts],
        "a generator of texts": (text_of(ids) for ids in texts),
    }
    found = {}
    for name, dataset in datasets.items():
        # A tokenizer would be part of the identity.
        given = words() if "text" in name or name == "tables" else None
        record = recorded(model, dataset, tmp_path / name.replace(" ", "-"), tokenizer=given)
        found[name] = record.record_id if given is None else None
        assert record.ids.tolist() == [[i, p] for i, ids in enumerate(texts) for p in range(len(ids))], name
        assert record.token_ids.tolist() == torch.cat(texts).tolist(), name
        assert torch.equal(record[LAST][:], sq.open_record(tmp_path / "tensors")[LAST][:]), name
    assert len(set(found.values()) - {None}) == 1


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pooling_over_windows_of_a_document(model: Any, tmp_path: Path, pool: str) -> None:
    texts = documents(15)
    whole = recorded(model, texts, tmp_path / "a", max_tokens=16, batch_tokens=64)
    wanted = sq.HiddenStates(pool=pool)
    # Blocks of 32 tokens, so that documents are longer than one.
    record = recorded(model, texts, tmp_path / "b", max_tokens=16, batch_tokens=4, hidden_states=wanted)
    present = [i for i, ids in enumerate(texts) if len(ids)]
    assert record.ids.tolist() == [[i, 0] for i in present]
    for row, i in enumerate(present):
        rows = whole.of(i).states[LAST]
        expected = rows.mean(0) if pool == "mean" else rows[-1]
        assert torch.allclose(record[LAST][row], expected, atol=1e-5)


def test_last_tokens_and_slices_from_the_end(model: Any, tmp_path: Path) -> None:
    texts = documents(15)
    options: dict[str, Any] = {"max_tokens": 16, "batch_tokens": 64}
    choices: list[Any] = ["last", slice(-3, -1)]
    for i, (tokens, cut) in enumerate(zip(choices, (slice(-1, None), slice(-3, -1)), strict=True)):
        record = recorded(model, texts, tmp_path / str(i), hidden_states=sq.HiddenStates(tokens=tokens), **options)
        wanted = [(d, p) for d, ids in enumerate(texts) for p in range(len(ids))[cut]]
        assert ended(record.ids.tolist()) == wanted


def test_only_what_is_wanted_is_run(model: Any, folder: Path) -> None:
    calls: list[str] = []
    for name in ("model.layers.0", "model.layers.1", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: calls.append(name))
    texts = [ids for ids in documents(8) if len(ids)]
    recorded(model, texts, folder, hidden_states=sq.HiddenStates(layers=1), batch_tokens=1)
    # The probe alone goes to the end.
    assert calls.count("model.layers.1") == 1 and calls.count("model.layers.0") == len(texts) + 1
    assert "lm_head" not in calls


def test_nothing_is_left_on_the_model(model: Any, folder: Path) -> None:
    recorded(model, documents(4), folder)
    with pytest.raises(sq.UnsupportedOperationError):
        recorded(model, documents(5), folder)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_encoders_hear_no_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertModel(BertConfig(vocab_size=199, **sizes)).eval()
    texts = documents(9)
    record = recorded(bert, texts, tmp_path / "bert")
    for i, ids in enumerate(texts):
        if len(ids):
            assert torch.allclose(record.of(i).states[LAST], alone(bert, ids, 2), atol=1e-5)
    pair = T5Model(T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=199)).eval()
    record = recorded(pair, texts, tmp_path / "t5")
    assert record.plan.stream == "encoder"
    for i, ids in enumerate(texts):
        if len(ids):
            with torch.no_grad():
                expected = pair.encoder(ids[None]).last_hidden_state[0]
            assert torch.allclose(record.of(i).states[LAST], expected, atol=1e-5)
    with pytest.raises(sq.UnsupportedOperationError, match="decoder"):
        recorded(pair, texts, tmp_path / "no", hidden_states=sq.HiddenStates(modules="decoder.block.0"))


def test_a_recurrent_model(folder: Path) -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=199, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    texts = documents(6)
    record = recorded(mamba, texts, folder)
    for i, ids in enumerate(texts):
        if len(ids):
            assert torch.allclose(record.of(i).states[LAST], alone(mamba, ids, 2), atol=1e-5)


def test_dtypes(tmp_path: Path) -> None:
    half = tiny_model(dtype=torch.bfloat16)
    record = recorded(half, documents(4), tmp_path / "own")
    assert record.dtype(LAST) == torch.bfloat16
    wanted = sq.HiddenStates(dtype=torch.float16)
    record = recorded(half, documents(4), tmp_path / "other", hidden_states=wanted)
    assert record.dtype(LAST) == torch.float16 and record.plan.dtype == "float16"


@pytest.mark.parametrize("codec", ["exact", "semq", "rotated"])
def test_codecs(model: Any, tmp_path: Path, codec: str) -> None:
    plain = recorded(model, documents(9), tmp_path / "raw")
    record = recorded(model, documents(9), tmp_path / codec, codec=codec)
    ours, theirs = record[LAST][:], plain[LAST][:]
    assert record.ids.tolist() == plain.ids.tolist()
    if codec == "exact":
        assert torch.equal(ours, theirs)
    else:
        cosine = torch.nn.functional.cosine_similarity(ours, theirs)
        assert cosine.min() > 0.97 and not torch.equal(ours, theirs)
    assert not record.verify()


def killed_recordings(folder: Path) -> int:
    """Kills a recording at random moments until it is done; how often that was."""
    kills, patience = 0, random.Random(5)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.recording", str(folder)], cwd=HERE.parent, env=environment,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        journal = folder / "shards.jsonl"
        n_before = journal.read_bytes().count(b"\n") if journal.exists() else 0
        while process.poll() is None:
            n = journal.read_bytes().count(b"\n") if journal.exists() else 0
            if n >= n_before + 2 and kills < 4:
                time.sleep(patience.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                process.wait()
        _, error = process.communicate()
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, error.decode()
        kills += 1
        partial = sq.open_record(folder)
        assert not partial.complete and not partial.verify() and len(partial) > 0


def test_a_killed_recording_goes_on_without_losing_or_doubling_a_row(model: Any, tmp_path: Path) -> None:
    whole = sq.record(model, documents(), tmp_path / "whole", progress=False, **OPTIONS)
    assert killed_recordings(tmp_path / "killed") >= 2
    found = sq.open_record(tmp_path / "killed")
    assert found.complete and found.record_id == whole.record_id
    assert found.ids.tolist() == [[i, p] for i, ids in enumerate(documents()) for p in range(len(ids))]
    for site in whole.sites:
        assert torch.equal(found[site][:], whole[site][:])


def stopped(model: Any, folder: Path, after: int = 20) -> None:
    """A recording whose dataset breaks off."""

    def broken() -> Any:
        yield from documents()[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.record(model, broken(), folder, progress=False, **OPTIONS)
    assert 0 < len(sq.open_record(folder)) < sum(map(len, documents()[:after])) + 1


def test_an_interrupt_leaves_whole_shards_and_goes_on(model: Any, tmp_path: Path) -> None:
    stopped(model, tmp_path / "stopped")
    found = sq.record(model, iter(documents()), tmp_path / "stopped", progress=False, **OPTIONS)
    whole = sq.record(model, documents(), tmp_path / "whole", progress=False, **OPTIONS)
    assert found.record_id == whole.record_id


def test_another_dataset_is_refused(model: Any, folder: Path) -> None:
    stopped(model, folder)
    before = sq.open_record(folder).record_id
    others = documents()
    others[0] = others[0].flip(0) if len(others[0]) > 1 else torch.tensor([5, 6])
    for dataset in (others, documents()[::-1], documents()[:3]):
        with pytest.raises(sq.UnsupportedOperationError, match="the dataset with which"):
            sq.record(model, dataset, folder, progress=False, **OPTIONS)
        assert sq.open_record(folder).record_id == before


def test_a_complete_record_takes_the_same_dataset_only(model: Any, folder: Path) -> None:
    texts = documents(9)
    whole = recorded(model, texts[:8], folder)
    assert recorded(model, texts[:8], folder).record_id == whole.record_id
    with pytest.raises(sq.UnsupportedOperationError, match="expected the 8 documents of the record"):
        recorded(model, texts, folder)
    with pytest.raises(sq.UnsupportedOperationError, match="dataset"):
        recorded(model, texts[:7], folder)
    assert sq.open_record(folder).record_id == whole.record_id


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_states": sq.HiddenStates(layers=0)},
        {"hidden_states": sq.HiddenStates(pool="mean")},
        {"hidden_states": sq.HiddenStates(tokens=slice(0, 4))},
        {"max_tokens": 8},
        {"batch_tokens": 64},
        {"codec": "exact"},
    ],
)
def test_a_folder_with_another_record_is_refused(model: Any, folder: Path, change: dict[str, Any]) -> None:
    before = recorded(model, documents(6), folder).record_id
    with pytest.raises(sq.UnsupportedOperationError):
        recorded(model, documents(6), folder, **change)
    with pytest.raises(sq.UnsupportedOperationError, match="weights"):
        recorded(tiny_model(seed=1), documents(6), folder)
    assert sq.open_record(folder).record_id == before


def test_rows_with_nan_stop_the_recording_unless_they_are_wanted(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = float("nan")
    texts = [torch.tensor([5, 6, 7]), torch.tensor([8, 77, 9]), torch.tensor([1, 2])]
    with pytest.raises(sq.IncompleteStateError, match=r"document 1, position 1.*NaN"):
        recorded(model, texts, tmp_path / "no", hidden_states=sq.HiddenStates(layers=0))
    assert len(sq.open_record(tmp_path / "no")) == 0
    for codec in ("raw", "exact", "semq"):
        record = recorded(model, texts, tmp_path / codec, nan="keep", codec=codec)
        # Attention gives NaN to earlier tokens too, as zero times NaN; other documents of the batch have none.
        assert record[LAST][:].isnan().any(-1).tolist() == [False] * 3 + [True] * 3 + [False] * 2


def test_infinity_is_no_state_either(model: Any, folder: Path) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = float("inf")
    with pytest.raises(sq.IncompleteStateError, match="position 0"):
        recorded(model, [torch.tensor([77])], folder, hidden_states=sq.HiddenStates(layers=0))


BAD: dict[str, tuple[Any, str]] = {
    "a text alone": ("some text", "put one text into a list"),
    "no tokenizer": (["some text"], "pass tokenizer="),
    "no iterable": (3, "an iterable"),
    "a number": ([3], "token ids"),
    "floats": ([torch.rand(4)], "whole numbers"),
    "three axes": ([torch.zeros(2, 2, 2, dtype=torch.int64)], "or .batch, n."),
    "negative ids": ([torch.tensor([3, -1])], "0 or more"),
    "ids beyond the vocabulary": ([torch.tensor([3, 199])], "below 199"),
    "a table of something else": ([{"label": 3}], "input_ids or text"),
    "a mask of another shape": ([{"input_ids": [[3, 4]], "attention_mask": [[1]]}], "attention_mask"),
    "ragged rows": ([[[3, 4], [5]]], "item 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_dataset_is_refused_by_name(model: Any, folder: Path, name: str) -> None:
    dataset, match = BAD[name]
    with pytest.raises(sq.SemqStateError, match=match):
        recorded(model, dataset, folder)


def test_an_item_in_the_middle_that_is_none_leaves_the_record_whole(model: Any, folder: Path) -> None:
    texts = documents()
    options = {**OPTIONS, "progress": False}
    with pytest.raises(sq.IncompleteStateError, match="item 30"):
        sq.record(model, [*texts[:30], torch.rand(3), *texts[30:]], folder, **options)
    partial = sq.open_record(folder)
    assert len(partial) and not partial.verify()
    assert sq.record(model, texts, folder, **options).complete


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "training": ({}, "model.eval"),
    "generated": ({"hidden_states": sq.HiddenStates(tokens="generated")}, "sq.capture"),
    "no module": ({"hidden_states": sq.HiddenStates(modules="model.layer.*.mlp")}, r"model\.layers\.\*\.mlp"),
    "no layer": ({"hidden_states": sq.HiddenStates(layers=3)}, "0 to 2"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens"),
    "batch_tokens": ({"batch_tokens": 1.5}, "batch_tokens"),
    "nan": ({"nan": "drop"}, "refuse"),
    "codec": ({"codec": "best"}, "codec"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_are_refused_before_anything_is_written(model: Any, folder: Path, name: str) -> None:
    options, match = ARGUMENTS[name]
    model.train(name == "training")
    with pytest.raises(sq.SemqStateError, match=match):
        recorded(model, documents(4), folder, **options)
    assert not list(folder.glob("shard*"))


def test_a_module_that_is_called_twice_is_refused(model: Any, folder: Path) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp
    wanted = sq.HiddenStates(modules="model.layers.0.mlp")
    with pytest.raises(sq.IncompleteStateError, match="more than once"):
        recorded(model, documents(4), folder, hidden_states=wanted)
    assert not folder.exists()


def test_a_module_that_is_not_called_is_refused(model: Any, folder: Path) -> None:
    model.model.spare = torch.nn.Linear(4, 4)
    with pytest.raises(sq.IncompleteStateError, match="no call"):
        recorded(model, documents(4), folder, hidden_states=sq.HiddenStates(modules="model.spare"))


FULL_DISK = """
import resource, sys
import semq_state as sq
from conftest import tiny_model
from workers.recording import OPTIONS, documents
model = tiny_model()
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    sq.record(model, documents(), sys.argv[1], progress=False, **{**OPTIONS, "batch_tokens": 16 * 8})
except sq.StoreError as error:
    print("refused:", error)
"""


def test_a_full_disk_leaves_what_was_whole(model: Any, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True, check=True,
        cwd=HERE.parent, env={**os.environ, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert done.stdout.startswith("refused:") and "free some space" in done.stdout, done.stderr
    partial = sq.open_record(folder)
    assert not partial.complete and not partial.verify()
    assert not list(folder.glob(".shard*.partial"))
    whole = {**OPTIONS, "batch_tokens": 16 * 8, "progress": False}
    assert sq.record(model, documents(), folder, **whole).complete


@pytest.mark.parametrize("codec", ["raw", "semq"])
def test_progress_tells_rate_and_size(model: Any, folder: Path, codec: str) -> None:
    told: list[RecordProgress] = []
    record = sq.record(model, documents(), folder, codec=codec, **{**OPTIONS, "progress": told.append})
    assert [each.n_documents for each in told] == sorted(each.n_documents for each in told)
    last = told[-1]
    assert (last.n_documents, last.n_all) == (60, 60)
    assert last.n_tokens == len(record) == sum(map(len, documents()))
    assert abs(last.n_bytes / record.n_bytes - 1) < 0.2
    assert last.tokens_per_second > 0
    # What a codec makes of rows is known from the first shard on.
    estimates = [each.estimated_bytes for each in told[len(told) // 2 :]]
    assert all(each is not None and 0.3 < each / last.n_bytes < 3 for each in estimates)


def test_the_plan_says_what_was_asked(model: Any, folder: Path) -> None:
    record = sq.record(model, documents(5), folder, progress=False, **OPTIONS)
    plan = record.plan
    assert plan.states == ("hidden_states.0", "hidden_states.1", LAST, "model.layers.0.mlp", "model.layers.1.mlp")
    assert (plan.tokens, plan.pool, plan.max_tokens, plan.batch_tokens) == ("all", "", 16, 48)
    assert WANTED.layers == (0, 1, -1)


def test_a_dataset_without_tokens(model: Any, folder: Path) -> None:
    record = recorded(model, [torch.zeros(0, dtype=torch.int64)] * 3, folder)
    assert record.complete and (len(record), record.n_documents) == (0, 3)
    assert len(recorded(model, [], folder.with_name("none"))) == 0


def window(n: int, document: int = 0, *, ends: bool = True) -> Window:
    return Window(document, 0, torch.zeros(n, dtype=torch.int64), ends, document + 1, "")


def test_batches_waste_little_and_lose_nothing() -> None:
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    block = [window(n, i) for i, n in enumerate(lengths)]
    found = list(batches(block, 128))
    assert sorted(w.document for batch in found for w in batch) == list(range(200))
    padded = [len(batch) * max(map(len, batch)) for batch in found]
    assert max(padded) <= 128 and sum(padded) < 1.15 * sum(lengths)
    assert all(len({len(w) for w in batch}) == 1 for batch in batches(block, 128, padded=False))
    assert [len(b) for b in batches([window(500), window(3)], 128)] == [1, 1]


def test_blocks_end_with_documents_where_they_must() -> None:
    cut = list(windows([(0, torch.arange(30), 1, "a"), (1, torch.arange(4), 2, "b")], 8, (0, 0)))
    assert [(w.document, w.begin, len(w), w.ends) for w in cut] == [
        (0, 0, 8, False), (0, 8, 8, False), (0, 16, 8, False), (0, 24, 6, True), (1, 0, 4, True),
    ]  # fmt: skip
    assert [len(b) for b in blocks(cut, 10, whole=False)] == [2, 2, 1]
    assert [len(b) for b in blocks(cut, 10, whole=True)] == [4, 1]
    assert [w.begin for w in windows([(0, torch.arange(30), 1, "a")], 8, (0, 16))] == [16, 24]
    assert [w.next for w in cut] == [(0, 8), (0, 16), (0, 24), (1, 0), (2, 0)]


def saved_model(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def test_command_line(cli: Any, tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    text, lines = tmp_path / "text.txt", tmp_path / "more.jsonl"
    text.write_text("w3 w4 w5\n\nw6 w7\n")
    lines.write_text(json.dumps({"text": "w8 w9"}) + "\n")
    into = tmp_path / "rows"
    options = ("--text", text, "--text", lines, "--into", into, "--layers", "0,-1", "--json")
    code, out, err = cli("record", model, *options)
    told = json.loads(out)
    assert code == 0, err
    assert (told["n_rows"], told["n_documents"], told["complete"]) == (7, 3, True)
    assert told["sites"] == {
        "hidden_states.0": {"dim": 32, "dtype": "float32"},
        LAST: {"dim": 32, "dtype": "float32"},
    }
    assert json.loads(cli("record", model, *options)[1])["record_id"] == told["record_id"]
    code, out, _ = cli("inspect", into)
    assert code == 0 and told["record_id"] in out and "7 of 3 documents" in out and "(7, 32) float32" in out
    assert cli("verify", into)[0] == 0
    code, _, err = cli("record", model, "--text", text, "--into", into, "--layers", "0,x")
    assert code == 2 and "0,x" in err
    lines.write_text('{"label": 1}\n')
    code, _, err = cli("record", model, "--text", lines, "--into", tmp_path / "no")
    assert code == 2 and "line 1" in err
    code, _, err = cli("record", model, "--into", tmp_path / "no")
    assert code == 2 and "--text" in err


def test_command_line_whole_files_and_pooling(cli: Any, tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("w3 w4 w5\nw6 w7\n")
    into = tmp_path / "rows"
    code, _, err = cli("record", model, "--text", text, "--into", into, "--whole-files", "--pool", "mean")
    assert code == 0, err
    assert sq.open_record(into).ids.tolist() == [[0, 0]]


def test_semq_scales_the_channels_of_hidden_states() -> None:
    policy = policy_for("semq", None, "")
    hidden, keys = policy.codecs["hidden"], policy.codecs["keys"]
    assert isinstance(hidden, Semq) and hidden.scaled
    assert isinstance(keys, Semq) and not keys.scaled
