"""A plugin of pytest (PYTEST_PLUGINS=slowed) for the test of ``fastkd bench --compare``: makes an operator's kernel slow.

The environment says which and by how much: FASTKD_TEST_SLOWED="gmm_fit 0.005" adds 5 ms to each call.
"""

from __future__ import annotations

import os
import time
from typing import Any

from fastkd.ops import gmm

_NAME, _SECONDS = os.environ["FASTKD_TEST_SLOWED"].split()
_CALL = gmm.call_by_name


def _slowed(name: str, *arguments: Any) -> Any:
    if name == _NAME:
        time.sleep(float(_SECONDS))
    return _CALL(name, *arguments)


gmm.call_by_name = _slowed  # type: ignore[assignment]
