"""The suites that every codec must pass, ours and yours.

A subclass that names a codec is a test class for pytest, which this package itself does not need:

```python
class TestMine(VectorCodecTests):
    codec, other, tolerance = Mine(bits=4), Mine(bits=2), 0.1
```

`broken_promises(TestMine)` runs it without pytest.
"""

from __future__ import annotations

from semq_state.testing.byte_codecs import ByteCodecTests as ByteCodecTests
from semq_state.testing.running import broken_promises as broken_promises
from semq_state.testing.vector_codecs import VectorCodecTests as VectorCodecTests
