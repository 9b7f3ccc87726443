"""Save, move, fork and resume the live state of a Transformer.

```python
import semq_state as sq

with sq.capture(model, tokenizer=tokenizer) as run:
    model.generate(**inputs, max_new_tokens=200)
sq.save(run.snapshot(), "chat.safetensors")

resumed = sq.restore(sq.load("chat.safetensors"), model)
tokens = resumed.generate(max_new_tokens=100)
```
"""

from __future__ import annotations

from semq_state.audit.diff import diff as diff
from semq_state.audit.floor import measure_floor as measure_floor
from semq_state.audit.replay import replay as replay
from semq_state.audit.signing import sign as sign
from semq_state.audit.verify import Verification as Verification
from semq_state.audit.verify import verify as verify
from semq_state.calibration import Calibration as Calibration
from semq_state.capsules import open_capsule as open_capsule
from semq_state.capsules import pack as pack
from semq_state.capture import capture as capture
from semq_state.capture import snapshot_of as snapshot_of
from semq_state.codecs import Transform as Transform
from semq_state.errors import CalibrationError as CalibrationError
from semq_state.errors import DecryptionError as DecryptionError
from semq_state.errors import FloorError as FloorError
from semq_state.errors import FormatError as FormatError
from semq_state.errors import IncompleteStateError as IncompleteStateError
from semq_state.errors import IntegrityError as IntegrityError
from semq_state.errors import ModelMismatchError as ModelMismatchError
from semq_state.errors import SemqStateError as SemqStateError
from semq_state.errors import SignatureError as SignatureError
from semq_state.errors import StoreError as StoreError
from semq_state.errors import UnknownCodecError as UnknownCodecError
from semq_state.errors import UnsupportedModelError as UnsupportedModelError
from semq_state.errors import UnsupportedOperationError as UnsupportedOperationError
from semq_state.files import inspect as inspect
from semq_state.files import load as load
from semq_state.files import save as save
from semq_state.hidden import HiddenStates as HiddenStates
from semq_state.measuring import calibrate as calibrate
from semq_state.provenance import Provenance as Provenance
from semq_state.recording import record as record
from semq_state.records import open_record as open_record
from semq_state.restore import Resumed as Resumed
from semq_state.restore import restore as restore
from semq_state.sealing import seal as seal
from semq_state.search import SymbolIndex as SymbolIndex
from semq_state.snapshot import Snapshot as Snapshot
from semq_state.support import Support as Support
from semq_state.support import supports as supports
from semq_state.symbolic import Policy as Policy
from semq_state.weights.quantize import quantize as quantize

__version__ = "0.1.0"
