"""Our exceptions. Catch `SemqStateError` to catch all of them.

* SemqStateError
  x FormatError                 the bytes are not a snapshot that we can read
    + IntegrityError            the bytes are a snapshot, but not the one that was written
  x UnknownCodecError           the file names a codec that is not installed
  x ModelMismatchError          the snapshot belongs to another model
  x IncompleteStateError        something that the next step needs is missing
  x UnsupportedModelError       no cache family can take or rebuild this model's state
  x UnsupportedOperationError   the state cannot do what was asked (an impossible crop, say)
  x CalibrationError            a calibrated codec lacks its calibration
  x QuantizationError           a layer's weights cannot be quantised
  x FloorError                  a noise floor is damaged, edited, or of another reference
  x SignatureError              nobody that we trust vouches for these bytes
  x DecryptionError             the sealed bytes do not open with this key
  x StoreError                  the disk, folder or path refused

Each message says where, what was expected, what was found and what to do; the same four stand on the
exception as fields. Each class is also the builtin that a caller would catch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class SemqStateError(Exception):
    """The root of the tree.

    Args:
        where: the file, section, layer or argument that this is about.
        expected: what should have been there.
        found: what was there.
        do: what the reader of the message can do about it.
    """

    def __init__(self, where: str, *, expected: str = "", found: str = "", do: str = "") -> None:
        self.where, self.expected, self.found, self.do = where, expected, found, do
        parts = [f"expected {expected}"] if expected else []
        parts += [f"found {found}"] if found else []
        text = f"{where}: {', '.join(parts)}" if parts else where
        super().__init__(f"{text}; {do}" if do else text)


class FormatError(SemqStateError, ValueError):
    """The bytes are not a snapshot that this version can read."""


class IntegrityError(FormatError):
    """A digest, a length or an identity in the file does not hold."""


class UnknownCodecError(SemqStateError, LookupError):
    """The file names a codec id that is not registered here."""


@dataclass(frozen=True)
class Difference:
    """One thing in which a live model differs from the one that a snapshot was taken from.

    Args:
        name: what differs: `weights`, `config.num_hidden_layers`, `tokenizer` …
        expected: the snapshot's value.
        found: the live model's value.
    """

    name: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found}"


class ModelMismatchError(SemqStateError, ValueError):
    """The snapshot belongs to another model; `differences` lists every one of them."""

    def __init__(self, differences: Iterable[Difference], *, do: str = "") -> None:
        self.differences = tuple(differences)
        lines = "\n  ".join(str(difference) for difference in self.differences)
        super().__init__(f"this snapshot belongs to another model\n  {lines}\n ", do=do)


class IncompleteStateError(SemqStateError, ValueError):
    """A tensor or value that the next step needs is missing."""


class UnsupportedModelError(SemqStateError, TypeError):
    """No registered cache family knows a layer of this model."""


class UnsupportedOperationError(SemqStateError, ValueError):
    """The state cannot do what was asked of it."""


class CalibrationError(SemqStateError, ValueError):
    """A calibration is missing, damaged or belongs to another model."""


class QuantizationError(SemqStateError, ValueError):
    """A layer's weights or inputs are such that it cannot be quantised."""


class FloorError(SemqStateError, ValueError):
    """A noise floor is damaged, was edited, or belongs to another reference."""


class SignatureError(SemqStateError, ValueError):
    """A signature is missing, invalid or by another key."""


class DecryptionError(SemqStateError, ValueError):
    """A sealed file does not open with this key, or was changed."""


class StoreError(SemqStateError, OSError):
    """The disk, the folder or the path refused; nothing was changed."""
