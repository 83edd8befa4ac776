"""Several threads may use a model at once: what is kept of weights is changed by one of them at a time.

Kept values are shared by uses, and by the weights that are renewed together. So there is one lock for all. Where the
value is current it is held for the few microseconds of a use.

A module that changes for the time of a call has a lock of its own, which is held for that long. Who holds the lock for
all waits for none of those.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["lock_of", "one_at_a_time"]

one_at_a_time = RLock()
# Not in the modules, which are copied and pickled.
_locks: WeakKeyDictionary[Any, AbstractContextManager[Any]] = WeakKeyDictionary()


def lock_of(module: Any) -> AbstractContextManager[Any]:
    """The lock of ``module`` alone; the thread that holds it may take it again."""
    with one_at_a_time:
        lock = _locks.get(module)
        if lock is None:
            lock = _locks[module] = RLock()
        return lock


def _go_on_in_child() -> None:
    _locks.clear()
    one_at_a_time.release()


if hasattr(os, "register_at_fork"):
    # A child has one thread, which would wait forever for a lock that another one held.
    os.register_at_fork(
        before=one_at_a_time.acquire, after_in_parent=one_at_a_time.release, after_in_child=_go_on_in_child
    )
