"""The next turn after a resume computes what the model would have said had it chosen these tokens itself."""

from __future__ import annotations

import pytest

import semq_state as sq
from architectures import sweep
from architectures.cases import build
from architectures.sweep import MAPPINGS

KINDS = {
    "causal": (
        "llama", "mistral", "gemma3n_text", "llama4_text", "mamba", "mamba2", "falcon_mamba", "qwen3_next",
        "falcon_h1", "jamba", "zaya", "lfm2", "rwkv", "xlstm", "recurrent_gemma", "reformer", "xlnet", "minimax",
        "deepseek_v32", "deepseek_v4", "minimax_m3_vl_text", "blt", "moshi", "openai-gpt", "prophetnet", "whisper",
    ),
    "seq2seq": ("t5", "bart", "pegasus_x", "voxtral", "voxtral_realtime", "qwen2_audio"),
    "image-text": ("qwen2_vl", "mllama", "git", "idefics", "evolla", "blip-2", "gemma3", "unlimited_ocr", "llava"),
}  # fmt: skip
CASES = [(mapping, name) for mapping, names in KINDS.items() for name in names]
N_MORE = 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mapping", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_append(mapping: str, name: str) -> None:
    sweep.quiet()
    auto, cases = MAPPINGS[mapping]
    model = build(cases[name], name, auto)
    inputs = cases[name].inputs(model)
    whole, snapshot = sweep.generated(model, inputs), sweep.interrupted(model, inputs)
    more = whole.sequences[:, snapshot.n_tokens : snapshot.n_tokens + N_MORE]
    found = sq.restore(snapshot, model).generate(append=more, max_new_tokens=1, return_dict_in_generate=True)
    # Several tokens at once round otherwise than one after the other, but no more than that.
    at = sweep.STOP_AFTER + N_MORE
    scale = float((whole.logits[at] - whole.logits[at - 1]).abs().max())
    assert float((found.logits[0] - whole.logits[at]).abs().max()) < 0.01 * scale
