"""Several threads may use a model at once: what is kept of weights is changed by one of them at a time.

Kept values are shared by uses, and by the weights that are renewed together. So there is one lock for all. Where the
value is current it is held for the few microseconds of a use.
"""

from __future__ import annotations

import os
from threading import RLock

__all__ = ["one_at_a_time"]

one_at_a_time = RLock()
if hasattr(os, "register_at_fork"):
    # A child has one thread, which would wait forever for a lock that another one held.
    os.register_at_fork(
        before=one_at_a_time.acquire, after_in_parent=one_at_a_time.release, after_in_child=one_at_a_time.release
    )
