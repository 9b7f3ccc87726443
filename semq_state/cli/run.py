"""`semq-state run`: generate, and keep the state on disk while doing so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import semq_state as sq
from semq_state.cli import generating
from semq_state.cli.generating import Codec, Device, Dtype, Every, Json
from semq_state.cli.unlocking import SealPassphraseFile, SealTo, seal_of


def run(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, or a hub id.")] = "smollm2",
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="A file with that text.")] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate at most.")] = 200,
    save: Annotated[Path | None, typer.Option(help="Where to keep the newest state.")] = None,
    every: Every = 64,
    codec: Codec = "exact",
    sample: Annotated[bool, typer.Option(help="Sample instead of decoding greedily.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="With --sample; 0 for all.")] = 50,
    repetition_penalty: Annotated[float, typer.Option(help="1.0 for none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the random stream.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Keep evidence of each token, for `replay`.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seal_to: SealTo = None,
    seal_passphrase_file: SealPassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Generates from a prompt. With --save the newest state is always on disk, whatever happens."""
    import torch

    from semq_state.cli.models import load_model

    seal = seal_of(seal_to, seal_passphrase_file)
    text = prompt_file.read_text(encoding="utf-8") if prompt_file else prompt
    if not text:
        raise typer.BadParameter("give --prompt or --prompt-file")
    live, tokenizer = load_model(model, dtype=dtype, device=device)
    inputs = _encoded(tokenizer, text, chat).to(device)
    if seed is not None:
        torch.manual_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": tokens, "repetition_penalty": repetition_penalty}
    if sample:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    else:
        options |= {"do_sample": False}
    try:
        with (
            generating.streamer(tokenizer, tokens, as_json=as_json) as shown,
            sq.capture(live, tokenizer=tokenizer, autosave=save, every=every, codec=codec, seal=seal, trace=trace),
        ):
            out = live.generate(**inputs, streamer=shown, **options)
    except KeyboardInterrupt:
        raise generating.interrupted(save) from None
    # A decoder beside an encoder starts from one token of its own.
    n_prompt = 1 if live.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    generating.report(out, tokenizer, n_prompt, save, as_json=as_json, sealed=seal is not None)


def _encoded(tokenizer: Any, text: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(text, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
