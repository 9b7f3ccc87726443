"""A model as a reader of batches: padded tokens in, hidden states out, no further than they are needed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from semq_state.errors import IncompleteStateError, UnsupportedOperationError
from semq_state.hidden import HeardAllError, HiddenStates, Listener, Site, Streams, sites_of, streams_of
from semq_state.snapshot import ENCODER, SEQUENCE

_N_PROBE = 8


class Reader:
    """Runs the part of a model that gives the wanted states.

    Of an encoder-decoder that is the encoder; of a decoder no output embeddings, and no block behind the last that
    is wanted.

    Args:
        model: the `PreTrainedModel`.
        spec: what is wanted.

    Raises:
        UnsupportedOperationError: it is in training mode, or something is wanted that reading does not give.
    """

    def __init__(self, model: Any, spec: HiddenStates) -> None:
        if model.training:
            raise UnsupportedOperationError(
                "record, model",
                expected="a model in evaluation mode",
                found="training mode, in which dropout makes every run another",
                do="call model.eval()",
            )
        if spec.tokens == "generated":
            raise UnsupportedOperationError(
                "record, tokens='generated'",
                expected="tokens that are read",
                found="those that a model writes",
                do="use sq.capture around generate",
            )
        self._model = model
        self._is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
        self.stream = ENCODER if self._is_pair else SEQUENCE
        self._runs = model.get_encoder() if self._is_pair else model
        self.sites = self._wanted(sites_of(model, spec))
        base = getattr(model, "base_model", model)
        within = {id(module) for module in base.modules()}
        if not self._is_pair and all(id(site.module) in within for site in self.sites):
            self._runs = base
        words = model.get_input_embeddings()
        self._n_words: int | None = getattr(words, "num_embeddings", None)
        takes = inspect.signature(self._runs.forward).parameters
        self._takes = takes.keys()
        self.pads = "attention_mask" in takes
        self._pad = int(getattr(model.config, "pad_token_id", None) or 0)
        roots = streams_of(model).roots.get(self.stream, ())
        streams = Streams({self.stream: tuple({id(m): m for m in (self._runs, *roots)}.values())}, {})
        self._listener = Listener(self.sites, streams, self._runs)

    @property
    def pad(self) -> int:
        """The id that stands at padding."""
        return self._pad

    @property
    def max_tokens(self) -> int | None:
        """As many tokens as the model has positions for; None where it does not say."""
        config = self._model.config
        said = [config, *(getattr(config, name, None) for name in ("text_config", "encoder"))]
        names = ("max_position_embeddings", "n_positions", "max_source_positions", "n_ctx")
        found = [getattr(each, name, None) for each in said if each is not None for name in names]
        return next((n for n in found if type(n) is int and n > 0), None)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Hears the model in the `with`."""
        with self._listener.listening(), torch.no_grad():
            yield

    def probe(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """States of a few tokens by a pass to its end, which shows modules that are called twice.

        Raises:
            IncompleteStateError: a site is not heard once in each pass, or gives something else than states.
        """
        self._listener.stops = False
        return self.states(tokens[None, :_N_PROBE], None)

    def states(self, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What a pass over padded tokens `(batch, seq)` gives, `(batch, seq, dim)` by site.

        Raises:
            IncompleteStateError: as `probe`.
        """
        if self._n_words is not None and int(ids.max()) >= self._n_words:
            raise IncompleteStateError(
                "record, dataset",
                expected=f"token ids below {self._n_words}, the model's vocabulary",
                found=str(int(ids.max())),
                do="use the model's own tokenizer",
            )
        given: dict[str, Any] = {"input_ids": ids.to(self._model.device)}
        if mask is not None:
            given["attention_mask"] = mask.to(self._model.device)
        if "use_cache" in self._takes:
            given["use_cache"] = False
        with contextlib.suppress(HeardAllError):
            self._runs(**given)
        heard = [each for each in self._listener.take() if each.states]
        found = heard[0].settled() if len(heard) == 1 else {}
        silent = [site.name for site in self.sites if site.name not in found]
        if silent:
            raise IncompleteStateError(
                ", ".join(silent[:3]),
                expected="modules that are called once in each pass",
                found="no call" if not heard else f"{len(heard)} passes",
                do="name modules that every forward pass goes through",
            )
        self._listener.stops = True
        return found

    def _wanted(self, sites: list[Site]) -> list[Site]:
        found = [site for site in sites if site.stream == self.stream]
        others = [site.name for site in sites if site.stream != self.stream and site.reads == "output"]
        others = [name for name in others if not name.startswith("hidden_states.")]
        if others:
            raise UnsupportedOperationError(
                f"record, {others[0]}",
                expected="modules of the encoder, which reads the texts",
                found="a module of the decoder",
                do="use sq.capture around generate or forward",
            )
        return found
