"""A model quantised by llmcompressor's GPTQ, in a Python of its own: it wants an older transformers than ours.

    PYTHON benchmarks/weights_peers.py MODEL_FOLDER WINDOWS OUT BITS GROUP

`WINDOWS` is a safetensors file with the calibration windows as `ids`, `OUT` gets the dequantised weights. A Python
for it: `pip install llmcompressor==0.14.0.1`, which brings what else it needs. It imports nothing of ours.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    folder, windows, out, bits, group = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = load_file(windows)["ids"]
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    # Asymmetric, minimum to maximum, as ours; for groups it refuses sizes that do not divide a row.
    weights = {"num_bits": int(bits), "type": "int", "symmetric": False}
    weights |= {"strategy": "group", "group_size": int(group)} if int(group) else {"strategy": "channel"}
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    oneshot(
        model=model, dataset=dataset, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
        pipeline="sequential", log_dir=None,
    )  # fmt: skip
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    save_file({name: module.weight.detach().contiguous() for name, module in linears.items()}, out)


if __name__ == "__main__":
    main()
