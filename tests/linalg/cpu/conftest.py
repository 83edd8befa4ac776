import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from spectralnorm.linalg.cpu import compiled


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch, and with it the kernels, may use."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def teams() -> Iterator[list[int]]:
    """How many threads the kernels have asked for, call by call, where they want several; one does the work."""
    asked: list[int] = []
    job, number = ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.CFUNCTYPE(ctypes.c_int)

    def parallel(work: int, arguments: int, num_threads: int, flags: int) -> None:
        asked.append(num_threads)
        job(work)(arguments)

    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    functions = region(parallel), number(lambda: 0), number(lambda: 1)
    use = compiled.kernels().spectralnorm_use_threads_of
    use.argtypes, use.restype = [ctypes.c_void_p] * 3, None
    use(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    yield asked
    use(None, None, None)
    compiled._share_threads(compiled.kernels())
