"""Options, markers and defaults that every test shares."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import hypothesis
import pytest
import torch

# A busy machine is no defect.
hypothesis.settings.register_profile("any time", deadline=None)
hypothesis.settings.load_profile("any time")

# Two workers with two threads each on two cores wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors and modules under test live: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--device")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise pytest.UsageError(f"--device must be cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name} was asked for, but torch sees no CUDA device")
    # cuDNN's faster algorithms add up in another order each time; many tests ask for the same bits.
    torch.backends.cudnn.deterministic = True
    if device.type != "cuda":
        # Triton's kernels then run on the CPU. It looks at this once, when it is imported: not before the first test.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that take long come first: none of them is left to one worker when the others have nothing more to do.
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where tensors and modules under test live."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def vmap_of_bits() -> None:
    """Skips where torch cannot read numbers as bits under ``vmap``, as up to 2.11."""
    try:
        torch.vmap(lambda number: number.view(torch.int64))(torch.ones(1, dtype=torch.float64))
    except RuntimeError as error:
        pytest.skip(f"this torch cannot do it: {error}")


@pytest.fixture
def without_waiting() -> Callable[[], AbstractContextManager[None]]:
    """Makes a context in which it is an error to let the host wait for a GPU."""

    @contextmanager
    def context() -> Iterator[None]:
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Torch compiles a function anew so many times, and then refuses; here each test begins with the first."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 in cuDNN's products too, which otherwise round it to the 11 bits of TF32: to a part in 2,000."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give every test the same random numbers alone and in any order."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def renewals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each call of the engine has renewed."""
    from spectralnorm.parametrizations import engine

    sizes: list[int] = []
    refresh = engine.refresh_together

    def counted(members, **options):
        sizes.append(len(members))
        refresh(members, **options)

    monkeypatch.setattr(engine, "refresh_together", counted)
    return sizes
