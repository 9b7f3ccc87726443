"""Lossless coding with guesses from other layers and heads: the arithmetic, the residuals, the fitted predictor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from guessing import DIM, HEADS, N_LAYERS, ROTARY, cache_of, held, predictor_of
from hypothesis import given, settings
from hypothesis import strategies as st

from semq_state import content
from semq_state.calibration import GuessSet, Predictor, Turn
from semq_state.calibration.predictor import LARGEST
from semq_state.codecs import Planes, predicted
from semq_state.codecs.residual import Residuals, Words, floats
from semq_state.content import TensorSpec
from semq_state.errors import CalibrationError, IntegrityError
from semq_state.measuring.predictor_fit import Held, fit
from semq_state.rotary import Rotary

SPECIAL = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x0001, 0x807F, 0x0080, 0x7F7F, 0xFF7F]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return predictor_of()


@pytest.fixture(scope="module")
def guesses(predictor: Predictor) -> GuessSet:
    return predictor.sets[0]


def words_of(cache: list[torch.Tensor]) -> list[Words]:
    return [content.raw_bytes(tensor).view("<u2").reshape(tensor.shape) for tensor in cache]


def there_and_back(guesses: GuessSet, cache: list[torch.Tensor], begin: int = 0) -> bytes:
    words = words_of(cache)
    payload = predicted.encode(guesses, begin, words)
    back = predicted.decode(guesses, begin, np.frombuffer(payload, np.uint8), content.spec_of(cache[0]))
    for found, expected in zip(back, words, strict=True):
        assert (found == expected).all()
    return payload


def size_in_planes(cache: list[torch.Tensor]) -> int:
    codec = Planes(layout="channel")
    return sum(codec.encode(content.raw_bytes(t), content.spec_of(t)).n_bytes for t in cache)


def test_guesses_from_other_layers_make_a_cache_a_quarter_smaller(guesses: GuessSet) -> None:
    cache = cache_of(700, 3)
    assert len(there_and_back(guesses, cache)) < 0.75 * size_in_planes(cache)


def test_a_window_is_guessed_from_its_own_positions(guesses: GuessSet) -> None:
    cache = [tensor[:, :, 900:] for tensor in cache_of(1600, 3)]
    at_its_place, elsewhere = (len(there_and_back(guesses, cache, begin)) for begin in (900, 0))
    assert at_its_place < 0.75 * size_in_planes(cache) < elsewhere


@pytest.mark.parametrize("shape", [(1, 1), (1, 1025), (3, 5), (2, 40)], ids=str)
def test_any_length_comes_back(guesses: GuessSet, shape: tuple[int, int]) -> None:
    there_and_back(guesses, cache_of(shape[1], 4, batch=shape[0]))


def test_any_bits_come_back(guesses: GuessSet) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 16, (2 * N_LAYERS, 1, HEADS, 300, DIM)).astype(np.int16)
    there_and_back(guesses, list(torch.from_numpy(bits).view(torch.bfloat16)))


def test_special_values_come_back(guesses: GuessSet) -> None:
    cache = cache_of(97, 5)
    for tensor in cache:
        odd = torch.from_numpy(np.resize(SPECIAL, 107).astype("<u2").view("<i2"))
        tensor.view(torch.int16).reshape(-1)[3::29] = odd
    there_and_back(guesses, cache)


def test_equal_values_are_padded_to_the_least_size(guesses: GuessSet) -> None:
    cache = [torch.zeros(1, HEADS, 1024, DIM, dtype=torch.bfloat16) for _ in range(2 * N_LAYERS)]
    payload = there_and_back(guesses, cache)
    assert len(payload) * 256 >= sum(t.nbytes for t in cache)
    with pytest.raises(IntegrityError, match="nothing but zeros"):
        predicted.decode(guesses, 0, np.frombuffer(payload + b"\1", np.uint8), content.spec_of(cache[0]))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    channels=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1e-38, 1e-6, 1.0, 300.0, 1e30]),
    noise=st.sampled_from([0.0, 1e-3, 0.3, 1e4]),
    special=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_residuals_of_any_guess_come_back(
    rows: int, channels: int, scale: float, noise: float, special: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    guess = (rng.standard_normal((rows, channels)) * scale).astype(np.float32)
    near = guess * (1 + noise * rng.standard_normal(guess.shape)).astype(np.float32)
    values = (near.view(np.uint32) >> 16).astype(np.uint16)
    if special:
        values = np.where(rng.random(values.shape) < 0.2, rng.choice(SPECIAL, values.shape), values)
    values = np.ascontiguousarray(values, np.uint16)
    residual_there_and_back(values, guess)


def residual_there_and_back(values: Words, guess: np.ndarray) -> bytes:
    payload = Residuals().encode(values, floats(values), guess)
    found, n_bytes = Residuals().decode(np.frombuffer(payload + b"more", np.uint8), guess)
    assert n_bytes == len(payload) and (found == values).all()
    return payload


def test_guesses_that_overflow_come_back() -> None:
    guess = np.full((300, 2), 3e38, np.float32)
    guess[::2, 1] = -1e30
    residual_there_and_back(np.zeros((300, 2), np.uint16), guess)
    tiny = np.full((300, 2), 1e-30, np.float32)
    tiny[7] = 3e38
    residual_there_and_back((np.full((300, 2), 1e-30, np.float32).view(np.uint32) >> 16).astype(np.uint16), tiny)


def test_values_past_the_range_of_steps_come_back() -> None:
    guess = np.random.default_rng(0).standard_normal((3000, 1)).astype(np.float32)
    values = ((guess + 0.2).view(np.uint32) >> 16).astype(np.uint16)
    values[::300] = 0x7FC0
    exponent = np.frombuffer(residual_there_and_back(values, guess)[16:17], np.int8)
    guess[::300] = np.ldexp(np.float32(1), 15 + exponent)  # where a NaN is clipped to
    assert residual_there_and_back(values, guess)[16:17] == exponent.tobytes()


def test_sums_are_exact_in_any_order(guesses: GuessSet) -> None:
    rng = np.random.default_rng(0)
    for layer in guesses.guesses:
        sums = np.abs(layer.before.astype(np.int64)).sum(axis=0)
        for i, block in enumerate(layer.of_within):
            sums[i * DIM : (i + 1) * DIM] += np.abs(block.astype(np.int64)).sum(axis=0)
        assert (LARGEST * sums < 1 << 24).all()
        for before in layer.of_before:
            features = rng.integers(-255, 256, (50, len(before))).astype(np.float32)
            expected = features.astype(np.int64) @ before.astype(np.int64)
            assert (features @ before == expected).all() and (features[:, ::-1] @ before[::-1] == expected).all()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_turns_are_those_of_the_rotary_embedding(layout: str) -> None:
    rotary = Rotary(layout, 2, 8, (1.0, 0.5, -0.25, 0.0))
    turn, positions = Turn.of(rotary), torch.arange(40_000, 40_050)
    values = torch.randn(50, 13, generator=torch.Generator().manual_seed(0))
    cos, sin = turn.table(40_000, 40_050)
    assert torch.allclose(
        torch.from_numpy(turn.turned(values.numpy(), cos, sin)), rotary.redo(values, positions), atol=5e-4
    )
    assert np.allclose(turn.turned(turn.turned(values.numpy(), cos, sin), cos, -sin), values.numpy(), atol=1e-4)


def test_angles_do_not_drift() -> None:
    turn = Turn.of(ROTARY)
    for start in (0, 1, 131_071, (1 << 24) - 10):
        cos, sin = turn.table(start, start + 10)
        angles = np.arange(start, start + 10)[:, None] * np.array(ROTARY.inv_freq)
        # A base is rounded to 2^-30, which a later position has so many times.
        assert np.abs(cos + 1j * sin - np.exp(1j * angles)).max() < 1e-6 + start * 2.0**-29


def test_layers_with_their_own_rotations_are_guessed_from_one_another() -> None:
    other = Rotary("interleaved", 4, 8, (0.9, 0.5, 0.1, 0.02))
    rotaries = {0: ROTARY, 1: other, 3: ROTARY}  # layer 2 does not turn
    caches = [cache_of(1500, seed, rotaries=rotaries) for seed in (1, 2)]
    guesses = fit([held(cache) for cache in caches], rotaries).sets[0]
    assert [guess.turn for guess in guesses.guesses] == [0, 1, -1, 0] and len(guesses.turns) == 2
    cache = cache_of(700, 3, rotaries=rotaries)
    assert len(there_and_back(guesses, cache)) < 0.75 * size_in_planes(cache)


def test_layers_of_one_shape_and_window_make_a_set() -> None:
    cache = held(cache_of(400, 1))
    cache[4] = Held(cache[0].keys[:, :1], cache[0].values[:, :1])
    cache[5] = Held(cache[0].keys.float(), cache[0].values.float())
    cache[6] = Held(cache[0].keys, cache[0].values[..., :8])
    found = fit([cache], {}, windows={1: 100, 3: 100})
    assert {each.layers for each in found.sets} == {(0, 2), (1, 3), (4,)}
    with pytest.raises(CalibrationError, match="bfloat16"):
        fit([{5: cache[5]}], {})


def test_digest_covers_every_part_of_a_predictor(predictor: Predictor) -> None:
    assert replace(predictor, model_name="x").digest == replace(predictor, weights="x").digest == predictor.digest
    guesses = predictor.sets[0]
    changed = [
        replace(guesses, layers=(0, 1, 2, 4)),
        replace(guesses, turns=(Turn("half", 0, guesses.turns[0].base + 1),)),
    ]
    changed.append(replace(guesses, turns=(Turn("interleaved", 0, guesses.turns[0].base),)))
    for name in ("before", "within", "unit", "mean", "fineness"):
        part = getattr(guesses.guesses[2], name).copy()
        part.reshape(-1)[0] += 1
        layers = list(guesses.guesses)
        layers[2] = replace(layers[2], **{name: part})
        changed.append(replace(guesses, guesses=tuple(layers)))
    digests = {replace(predictor, sets=(each,)).digest for each in changed}
    assert len(digests) == len(changed) and predictor.digest not in digests


def test_what_a_set_takes(guesses: GuessSet) -> None:
    spec = TensorSpec("BF16", (1, HEADS, 20, DIM))

    def takes(*, begins: tuple[int, ...] = (0, 0), other: TensorSpec = spec) -> bool:
        return predicted.takes(guesses, [spec, other], begins) and predicted.takes(guesses, [other], [begins[0]])

    assert takes() and takes(begins=((1 << 24) - 20,) * 2)
    assert not takes(begins=((1 << 24) - 19,) * 2) and not takes(begins=(0, 1))
    for dtype, shape in (
        ("F16", spec.shape),
        ("BF16", (1, HEADS, 21, DIM)),
        ("BF16", (HEADS, 20, DIM)),
        ("BF16", (1, 3, 20, DIM)),
        ("BF16", (1, HEADS, 20, 8)),
    ):
        assert not takes(other=TensorSpec(dtype, shape))
    assert not predicted.takes(guesses, [TensorSpec("BF16", (1, HEADS, 0, DIM))], [0])


def test_damage_is_refused_or_decodes_to_other_values(guesses: GuessSet) -> None:
    cache = cache_of(40, 8)
    payload, spec = np.frombuffer(there_and_back(guesses, cache), np.uint8), content.spec_of(cache[0])
    rng = np.random.default_rng(0)
    for n in (0, 1, 50, len(payload) - 1):
        with pytest.raises(IntegrityError):
            predicted.decode(guesses, 0, payload[:n], spec)
    refused = 0
    for _ in range(150):
        damaged = payload.copy()
        damaged[rng.integers(0, len(payload))] ^= np.uint8(1 << rng.integers(0, 8))
        try:
            predicted.decode(guesses, 0, damaged, spec)
        except IntegrityError:
            refused += 1
    assert refused > 10
