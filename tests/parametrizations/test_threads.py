"""Several threads that use one model at once: each gets what it would get alone."""

import copy
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import spectralnorm as sn

pytestmark = pytest.mark.usefixtures("engine_or_kernels", "restless")

NUM_THREADS = 4
NUM_STEPS = 30


@pytest.fixture
def restless():
    """Threads that take turns after a few operations."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Sequence(nn.LSTM):
    """Without the state behind the last of the inputs."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs)[0]


@pytest.fixture(params=["linear", "recurrent"])
def model(request, device) -> nn.Module:
    layers = [each for _ in range(4) for each in (nn.Linear(16, 16), nn.ReLU())]
    last = nn.Linear(16, 5) if request.param == "linear" else Sequence(16, 5, num_layers=2)
    return sn.add_spectral_norm(nn.Sequential(*layers, last).to(device))


@pytest.fixture
def inputs(device) -> torch.Tensor:
    return torch.randn(8, 16, device=device)


def in_threads(function: Callable[[int], object]) -> list:
    """What each thread gets for its number, all at once; its error if it has one."""
    barrier = threading.Barrier(NUM_THREADS)

    def together(number: int):
        barrier.wait()
        return function(number)

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(together, range(NUM_THREADS)))


def train(model: nn.Module, inputs: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def test_evaluations_after_a_step_see_one_weight(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    evaluate = torch.no_grad()(lambda number: model(inputs))
    for _ in range(NUM_STEPS):
        train(model, inputs, optimizer)
        outputs = in_threads(evaluate)
        assert all(torch.equal(each, evaluate(0)) for each in outputs)


def test_every_backward_gives_the_gradient_of_its_own_loss(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    directions, parameters = torch.randn(NUM_THREADS, 5, device=inputs.device), list(model.parameters())

    def gradients(number: int):
        return torch.autograd.grad((model(inputs) @ directions[number]).sum(), parameters)

    for _ in range(NUM_STEPS):
        train(model, inputs, optimizer)
        for number, found in enumerate(in_threads(gradients)):
            torch.testing.assert_close(found, gradients(number))


def test_others_may_look_copy_and_evaluate_while_one_trains(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def work(number: int) -> None:
        for _ in range(NUM_STEPS):
            if number == 0:
                train(model, inputs, optimizer)
            elif number == 1:
                sn.monitor(model)
            elif number == 2:
                copy.deepcopy(model)
            else:
                with torch.no_grad():
                    model(inputs)

    in_threads(work)
    assert abs(torch.linalg.matrix_norm(model[0].weight, 2) - 1) < 1e-4


def test_threads_that_train_models_of_their_own_do_not_wait_for_each_other(device):
    """On a GPU backwards run in a thread of the device's, for which nobody may wait who holds the lock."""
    linear = sn.add_spectral_norm(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))).to(device)
    convolution = sn.spectral_norm(nn.Conv2d(3, 4, 3, padding=1).to(device), norm="operator")
    images = torch.randn(2, 3, 8, 8, device=device)
    jobs = [(linear, torch.randn(8, 16, device=device)), (convolution, images)]

    def steps(model: nn.Module, inputs: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for _ in range(NUM_STEPS):
            train(model, inputs, optimizer)

    threads = [threading.Thread(target=steps, args=job, daemon=True) for job in jobs]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert not any(each.is_alive() for each in threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_of_a_fork_does_not_wait_for_a_thread_that_it_does_not_have():
    layer, is_done = sn.spectral_norm(nn.Linear(16, 16)), threading.Event()

    def evaluate() -> None:
        while not is_done.is_set():
            with torch.no_grad():
                layer.weight  # noqa: B018

    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                with torch.no_grad():
                    layer.weight  # noqa: B018
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        is_done.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_of_a_fork_does_not_wait_for_a_forward_that_it_does_not_have():
    has_begun, may_end = threading.Event(), threading.Event()

    class Slow(nn.LSTM):
        def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            has_begun.set()
            may_end.wait()
            return super().forward(inputs)

    layer = sn.spectral_norm(Slow(4, 3), "weight_hh_l0")
    thread = threading.Thread(target=layer, args=(torch.ones(2, 4),))
    thread.start()
    has_begun.wait()
    try:
        child = os.fork()
        if child == 0:
            copy.deepcopy(layer)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        may_end.set()
        thread.join()
