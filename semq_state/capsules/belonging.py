"""Do these quantised weights belong to this state: were they made from those that made it, or did they make it?"""

from __future__ import annotations

from collections.abc import Callable

from semq_state.errors import Difference, ModelMismatchError
from semq_state.provenance import Provenance, identity_differences
from semq_state.weights.held import QuantizedWeights

MODES = {"sha256": "full", "sampled": "sampled"}


def check_belongs(
    made_by: Provenance, held: QuantizedWeights, weights_id: str, own_digest: Callable[[str], str]
) -> tuple[Difference, ...]:
    """Holds a state's origin against that of quantised weights.

    Args:
        made_by: the origin of the state.
        held: the weights that shall go on with it.
        weights_id: their identity.
        own_digest: from a mode, `full` or `sampled`, to the digest of the dequantised weights; asked only where the
            original ones are of another model.

    Returns:
        The difference of the weights where the state was made by the original ones, for whoever accepts it; nothing
        where these very weights made it.

    Raises:
        ModelMismatchError: neither; every difference is listed.
    """
    origin = held.origin
    others = [
        d for d in identity_differences(made_by, origin) if not d.name.startswith(("weights", "quantization"))
    ]
    mode = MODES.get(made_by.weights.partition(":")[0])
    words = f"{named(held)}, {weights_id}"
    if mode and made_by.weights == origin.weights and not others and not made_by.quantization:
        return (Difference("weights", made_by.weights, words),)
    if mode and made_by.weights != origin.weights and not others and made_by.weights == own_digest(mode):
        return ()
    differences = list(others)
    if not mode or made_by.weights != origin.weights:
        differences.insert(
            0, Difference("weights", made_by.weights or "recorded ones", f"{words} of {origin.weights}")
        )
    if made_by.weights == origin.weights and made_by.quantization:
        differences.append(Difference("quantization", str(dict(made_by.quantization)), words))
    raise ModelMismatchError(differences, do="quantise the model that made this state")


def named(held: QuantizedWeights) -> str:
    """How the weights were quantised, in words."""
    bits, method = held.recipe.get("bits"), held.recipe.get("method")
    return f"{held.origin.model_name or 'model'} as {method!s:.40}, {bits!s:.8} bits"
