"""A beam search that starts in the middle.

The search keeps its state in local variables of one loop. That loop is walked to where it was, turn by turn from
the end of the prompt, without asking the model: its own methods are answered from the snapshot until then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput

from semq_state.errors import IncompleteStateError
from semq_state.generation import seams
from semq_state.snapshot import GenerationState

NAMES = (
    "running_sequences", "running_scores", "running_beam_indices", "sequences", "scores", "beam_indices",
    "finished", "can_improve", "is_done",
)  # fmt: skip
_BY_LENGTH = ("running_sequences", "sequences", "running_beam_indices", "beam_indices")
_FORWARD = "forward"


def check_search(state: GenerationState) -> None:
    """Refuses the state of a search whose parts are missing or contradict each other.

    Raises:
        IncompleteStateError: they do.
    """
    search = state.search
    shapes = {name: tuple(t.shape) for name, t in search.items()}
    scores = shapes.get("scores", (0, 0))
    lengths = {shapes[name][2] for name in ("running_sequences", "sequences") if len(shapes.get(name, ())) == 3}
    length = max(lengths, default=0)
    n_new = length - state.prompt_length
    two, three = (*scores,), (*scores, length)
    expected = {
        "running_sequences": three, "sequences": three, "scores": two, "running_scores": two, "finished": two,
        "running_beam_indices": (*scores, n_new), "beam_indices": (*scores, n_new),
        "can_improve": (scores[0], 1), "is_done": (),
    }  # fmt: skip
    rows = int(state.input_ids.shape[0])
    if shapes != expected or scores[0] * scores[1] != rows or length < state.input_ids.shape[1]:
        wrong = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise IncompleteStateError(
            f"beam search ({', '.join(wrong) or 'rows'})",
            expected=f"{', '.join(NAMES)} of {rows} running beams",
            found=f"{shapes!r:.300}",
            do="the search cannot go on without them; take the snapshot again",
        )


class BeamWalk:
    """The replacements that bring a fresh search to where the recorded one was.

    Args:
        state: of the recorded search.
        model: the `PreTrainedModel`.
        originals: the seams' own methods.
        max_length: of the sequences of this search.

    Attributes:
        n_turns: how many turns are walked.
        n_fed: tokens of each row that the first real forward pass was given; None before it.
    """

    def __init__(
        self, state: GenerationState, model: Any, originals: Mapping[str, Callable[..., Any]], max_length: int
    ) -> None:
        self.n_fed: int | None = None
        self._n_left = self.n_turns = int(state.input_ids.shape[1]) - state.prompt_length
        self._model = model
        self._originals = originals
        n_cut = max_length - int(state.search["sequences"].shape[2])
        fill = {"running_sequences": 0, "sequences": 0, "running_beam_indices": -1, "beam_indices": -1}
        self._search = {
            name: _resized(t, n_cut, fill[name]) if name in _BY_LENGTH else t
            for name, t in ((name, t.to(model.device)) for name, t in state.search.items())
        }
        self._n_rows = int(state.input_ids.shape[0])

    @property
    def is_walking(self) -> bool:
        return self._n_left > 0

    def replacements(self) -> dict[str, Callable[..., Any]]:
        return {
            seams.PREFILL: self._prefill,
            seams.NEXT_INPUTS: self._next_inputs,
            _FORWARD: self._forward,
            seams.STEP_TAKEN: self._step_taken,
            seams.TOP_CONTINUATIONS: self._top,
            seams.RUNNING_BEAMS: self._running,
            seams.FINISHED_BEAMS: self._finished,
            seams.EARLY_STOP: self._early_stop,
            seams.REORDER: self._reorder,
            seams.BEAMS_LEFT: self._left,
        }

    def processors(self, processors: Any) -> Any:
        """`processors`, left alone while walking."""
        return _Processors(self, processors)

    def criteria(self, criteria: Any) -> Any:
        """`criteria`, left alone while walking."""
        return _Criteria(self, criteria)

    def stripped(self, result: Any) -> Any:
        """The search's result without the turns that were only walked."""
        if isinstance(result, torch.Tensor):
            return result
        for name in (
            "scores", "logits", "attentions", "hidden_states", "decoder_attentions", "cross_attentions",
            "decoder_hidden_states",
        ):  # fmt: skip
            value = getattr(result, name, None)
            if isinstance(value, tuple):
                result[name] = value[self.n_turns :]
        return result

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer()

    def _next_inputs(self, *args: Any, **kwargs: Any) -> Any:
        return {} if self.is_walking else self._originals[seams.NEXT_INPUTS](*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_walking:
            return self._answer()
        if self.n_fed is None:
            given = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
            self.n_fed = 0 if given is None else int(given.shape[1])
        return self._originals[_FORWARD](*args, **kwargs)

    def _step_taken(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.is_walking:
            return model_kwargs
        return self._originals[seams.STEP_TAKEN](outputs, model_kwargs, *args, **kwargs)

    def _top(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_walking:
            return self._originals[seams.TOP_CONTINUATIONS](*args, **kwargs)
        scores, sequences, indices = (
            self._search[name][:, :1] for name in ("running_scores", "running_sequences", "running_beam_indices")
        )
        n = kwargs["beams_to_keep"]
        return scores.expand(-1, n), sequences.expand(-1, n, -1), indices.expand(-1, n, -1)

    def _running(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_walking:
            return self._originals[seams.RUNNING_BEAMS](*args, **kwargs)
        return tuple(
            self._search[name].clone() for name in ("running_sequences", "running_scores", "running_beam_indices")
        )

    def _finished(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_walking:
            return self._originals[seams.FINISHED_BEAMS](*args, **kwargs)
        return tuple(self._search[name].clone() for name in ("sequences", "scores", "beam_indices", "finished"))

    def _early_stop(self, *args: Any, **kwargs: Any) -> Any:
        return (
            self._search["can_improve"] if self.is_walking else self._originals[seams.EARLY_STOP](*args, **kwargs)
        )

    def _reorder(self, cache: Any, beam_idx: torch.Tensor) -> Any:
        if self.is_walking:
            return cache
        if seams.REORDER in self._originals:
            return self._originals[seams.REORDER](cache, beam_idx)
        cache.reorder_cache(beam_idx)
        return cache

    def _left(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_walking:
            return self._originals[seams.BEAMS_LEFT](*args, **kwargs)
        self._n_left -= 1
        return torch.ones_like(self._search["is_done"]) if self._n_left else ~self._search["is_done"]

    def _answer(self) -> Any:
        kind = Seq2SeqLMOutput if self._model.config.is_encoder_decoder else CausalLMOutputWithPast
        return kind(logits=torch.zeros((self._n_rows, 1, 1), device=self._model.device))


class _Processors(LogitsProcessorList):  # type: ignore[misc]
    def __init__(self, walk: BeamWalk, processors: Any) -> None:
        super().__init__(processors)
        self._walk = walk

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return scores if self._walk.is_walking else super().__call__(input_ids, scores, **kwargs)


class _Criteria(StoppingCriteriaList):  # type: ignore[misc]
    def __init__(self, walk: BeamWalk, criteria: Any) -> None:
        super().__init__(criteria)
        self._walk = walk
        self._criteria = criteria

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._walk.is_walking:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        answer: torch.Tensor = self._criteria(input_ids, scores, **kwargs)
        return answer


def _resized(tensor: torch.Tensor, n_more: int, fill: int) -> torch.Tensor:
    """`tensor` with its last axis longer or shorter."""
    if n_more <= 0:
        return tensor[..., : tensor.shape[-1] + n_more]
    return torch.nn.functional.pad(tensor, (0, n_more), value=fill)
