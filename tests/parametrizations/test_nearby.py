"""Weights that were written and have moved little or not at all, whoever did it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spectralnorm as sn
from spectralnorm import spectral_norm


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def norm_of(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix.detach().flatten(1).double(), 2).item()


def with_spectrum(values: Tensor, *, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return (left * values.double()) @ right.T


def written(layer: nn.Module, change: Tensor) -> nn.Module:
    """The layer after its value was used and its weight changed."""
    layer.weight.sum().backward()
    with torch.no_grad():
        raw(layer).add_(change)
    return layer


@pytest.fixture
def anew(monkeypatch) -> list[None]:
    """One for each norm that was computed from nothing but the weight."""
    made: list[None] = []
    refined = sn.SpectralNorm.refined
    monkeypatch.setattr(sn.SpectralNorm, "refined", lambda *args: made.append(None) or refined(*args))
    return made


LAYERS = {
    "wide": lambda: nn.Linear(150, 40),
    "tall": lambda: nn.Linear(40, 150),
    "large": lambda: nn.Linear(300, 280),
    "channels last": lambda: nn.Conv2d(16, 24, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(16, 24, 3),
    "float64": lambda: nn.Linear(150, 40).double(),
}


@pytest.mark.parametrize("options", [{}, {"mode": "cap", "coefficient": 0.5}, {"mode": "learnable"}], ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_weight_that_moves_little_is_followed_to_the_accuracy_of_one_found_anew(make, options, anew, device):
    layer = make().to(device)
    with torch.no_grad():  # one that leads, as in trained networks
        layer.weight.copy_(layer.weight + 0.02)
    layer = spectral_norm(layer, **options)
    out_dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    anew.clear()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        change = torch.randn(raw(layer).shape, generator=generator, dtype=torch.float64).to(raw(layer))
        written(layer, 0.002 * change / change.norm())
        wanted = layer.parametrizations.weight[0].coefficient
        assert norm_of(layer.weight.movedim(out_dim, 0)) == pytest.approx(wanted, rel=1e-4)
    assert not anew


def test_a_weight_is_measured_whose_squares_vanish(device):
    layer = nn.Linear(40, 30).to(device)
    with torch.no_grad():
        layer.weight.mul_(1e-25)
    layer = spectral_norm(layer, eps=1e-40)
    written(layer, 0.01 * raw(layer).detach())
    assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)


def test_a_direction_that_a_step_of_an_optimizer_has_hidden_is_found_after_a_write(device):
    values = torch.linspace(1, 0.3, 40)
    weight = with_spectrum(values, rows=40, columns=40)
    left, _, right = torch.linalg.svd(weight)
    layer = nn.Linear(40, 40, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer = spectral_norm(layer.to(device))
    layer.weight.sum().backward()
    raw(layer).grad = -torch.outer(left[:, -1], right[-1]).to(raw(layer))
    torch.optim.SGD([raw(layer)], lr=1.0).step()
    layer.weight.sum().backward()
    for _ in range(2):
        with torch.no_grad():
            raw(layer).add_(1e-6)
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)


def test_what_overtakes_many_directions_of_one_length_is_found(device):
    """An orthogonal weight of which a few directions have become shorter."""
    values = torch.cat([torch.ones(291), torch.linspace(0.9, 0.5, 9)])
    layer = nn.Linear(300, 300, bias=False).to(device)
    with torch.no_grad():
        layer.weight.copy_(with_spectrum(values, rows=300, columns=300))
    layer = spectral_norm(layer)
    left = torch.randn(300, generator=torch.Generator().manual_seed(1)).to(raw(layer))
    right = raw(layer).detach().T @ left
    written(layer, 0.01 * torch.outer(left / left.norm(), right / right.norm()))
    assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)


def test_weights_that_are_written_together_are_renewed_together(renewals, device):
    layers = nn.ModuleList(spectral_norm(nn.Linear(30, 20).to(device)) for _ in range(5))
    unused = spectral_norm(nn.Linear(30, 20).to(device))
    for number in range(3):
        for layer in layers:
            layer.weight.sum().backward()
        renewals.clear()
        with torch.no_grad():
            for layer in (*layers, unused):
                raw(layer).add_(1e-4)
        for layer in layers:
            assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4), number
        assert set(renewals) == {len(layers)}
    assert norm_of(unused.weight) == pytest.approx(1, rel=1e-4)


def test_a_weight_that_moves_far_does_not_go_with_those_that_move_little(renewals, device):
    layers = nn.ModuleList(spectral_norm(nn.Linear(30, 20).to(device)) for _ in range(3))
    for layer in layers:
        layer.weight.sum().backward()
    renewals.clear()
    with torch.no_grad():
        for layer in layers:
            raw(layer).add_(1e-4)
        raw(layers[1]).normal_()
    for layer in layers:
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)
    assert set(renewals) == {2}


def test_a_layer_is_renewed_once_whose_parameter_was_replaced_by_another(renewals, device):
    shared = nn.Parameter(torch.randn(20, 30, device=device))
    layers = [nn.Linear(30, 20), nn.Linear(30, 20)]
    for layer in layers:
        layer.weight = shared
        spectral_norm(layer).weight.sum().backward()
    layer, _ = layers
    layer.parametrizations.weight.original = nn.Parameter(torch.randn(20, 30, device=device))
    layer.weight.sum().backward()
    renewals.clear()
    written(layer, torch.full((20, 30), 1e-4, device=device))
    assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)
    assert set(renewals) == {1}


def test_target_networks_are_followed_beside_what_is_trained(anew, device):
    critic = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30)).to(device))
    target = copy.deepcopy(critic)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    anew.clear()
    for _ in range(20):
        inputs = torch.randn(8, 12, device=device)
        with torch.no_grad():
            goal = target(inputs) + 1
        (critic(inputs) - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
            slow.data.mul_(0.995).add_(fast.data, alpha=0.005)
        for layer in target[::2]:
            assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)
    assert not anew


def test_both_norms_of_a_bidirectional_one_are_followed(anew, device):
    layer = nn.Conv2d(16, 24, 3).to(device)
    with torch.no_grad():
        layer.weight.add_(0.02)
    layer = spectral_norm(layer, norm="bidirectional")
    anew.clear()
    written(layer, 1e-4 * torch.ones_like(raw(layer)))
    norms = [norm_of(layer.weight), norm_of(layer.weight.transpose(0, 1))]
    assert sum(norms) / 2 == pytest.approx(1, rel=1e-4)
    assert not anew


@settings(deadline=None, max_examples=60)
@given(
    gap=st.floats(0, 0.9),
    decay=st.floats(0, 0.1),
    size=st.floats(0.001, 2),
    where=st.integers(0, 29),
    seed=st.integers(0, 2**20),
    rank=st.sampled_from([1, 30]),
)
def test_whatever_is_written_the_norm_is_right_to_1e_4(gap, decay, size, where, seed, rank):
    """What overtakes may be a direction that is among those that are followed, or none of them."""
    values = torch.cat([torch.ones(1), (1 - gap) * torch.exp(-decay * torch.arange(29))])
    layer = nn.Linear(40, 30, bias=False)
    weight = with_spectrum(values, rows=30, columns=40)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    if rank == 1:
        change = size * torch.outer(left[:, where], right[where])
    else:
        change = torch.randn(30, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        change *= size / change.norm()
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer = written(spectral_norm(layer), change.float())
    assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("change", [0.0, 1e-4])
def test_what_is_written_after_a_step_of_training_has_its_norm_found_to_the_same_accuracy(change, device):
    """A step is followed by one iteration, which may be off by more."""
    layer = spectral_norm(nn.Linear(60, 50).to(device))
    optimizer = torch.optim.Adam([raw(layer)], lr=0.02)
    for _ in range(3):
        (layer.weight * torch.randn(50, 60, device=device)).sum().backward()
        optimizer.step()
    assert norm_of(layer.weight) != pytest.approx(1, rel=1e-3)
    with torch.no_grad():
        raw(layer).add_(change)
    assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)


def test_what_was_written_and_is_the_same_keeps_its_value(anew, device):
    layer = spectral_norm(nn.Linear(40, 30).to(device))
    value = layer.weight
    anew.clear()
    with torch.no_grad():
        raw(layer).copy_(raw(layer).clone())
    raw(layer).data = raw(layer).data.clone()
    assert layer.weight.data_ptr() == value.data_ptr()
    assert not anew
    # Its second derivative asks whether the weight has been changed since.
    (gradient,) = torch.autograd.grad(layer.weight.pow(3).sum(), raw(layer), create_graph=True)
    gradient.square().sum().backward()
    assert raw(layer).grad.isfinite().all()


def test_the_second_derivative_of_what_was_trained_then_written_and_is_the_same(device):
    layer = spectral_norm(nn.Linear(40, 30).to(device))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.weight.square().sum().backward()
    optimizer.step()
    layer.weight  # noqa: B018 - a use, of two that there are nodes for
    with torch.no_grad():
        raw(layer).mul_(1)
    (gradient,) = torch.autograd.grad(layer.weight.pow(3).sum(), raw(layer), create_graph=True)
    gradient.square().sum().backward()
    assert raw(layer).grad.isfinite().all()


@pytest.mark.parametrize("options", [{"coefficient": 2.0}, {"mode": "cap", "coefficient": 100.0}], ids=str)
def test_what_was_written_and_is_the_same_is_divided_as_it_is_to_be_now(options, device):
    layer = spectral_norm(nn.Linear(40, 30).to(device))
    layer.weight.sum().backward()
    raw(layer).data = raw(layer).data.clone()
    layer.parametrizations.weight[0].set_options(**options)
    wanted = norm_of(raw(layer)) if "mode" in options else 2
    assert norm_of(layer.weight) == pytest.approx(wanted, rel=1e-4)


def test_entries_that_move_by_less_than_rounding_are_looked_at_once(device):
    layer = spectral_norm(nn.Linear(16, 16).to(device))
    layer.weight.sum().backward()
    raw(layer).data[0, 0] = 0
    layer.weight.sum().backward()
    raw(layer).data[0, 0] = 1e-9
    assert layer.weight[0, 0] > 0
    clock = layer.parametrizations.weight[0]._kept.moment.clock
    writes = clock.writes
    layer.weight.sum().backward()
    layer.weight  # noqa: B018 - a use
    assert clock.writes == writes


def test_a_parameter_that_takes_the_place_of_an_equal_one_gets_the_gradient(device):
    layer = spectral_norm(nn.Linear(40, 30).to(device))
    layer.weight.sum().backward()
    before = raw(layer)
    layer.parametrizations.weight.original = nn.Parameter(before.detach().clone())
    before.grad = None
    layer.weight.sum().backward()
    assert before.grad is None
    assert raw(layer).grad is not None


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: nn.Linear(40, 30), {}),
        (lambda: nn.Conv2d(16, 24, 3), {"strict": True}),
        (lambda: nn.Conv2d(16, 24, 3), {"norm": "operator", "input_size": (8, 8)}),
    ],
    ids=["default", "strict", "operator"],
)
def test_what_is_loaded_is_the_same_function_whatever_was_there_before(make, options, device):
    model = nn.Sequential(spectral_norm(make().to(device), **options))
    state = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    written(other[0], 0.1 * torch.randn_like(raw(other[0])))
    other[0].weight.sum().backward()
    for each in (model, other):
        each.load_state_dict(state)
    assert torch.equal(model[0].weight, other[0].weight)


def test_a_small_entry_is_divided_as_it_is_after_a_write_of_no_account_for_the_norm(device):
    layer = nn.Linear(30, 9, bias=False).to(device)
    with torch.no_grad():
        layer.weight[0] = 1e-8
    layer = spectral_norm(layer)
    for column in range(30):
        layer.weight  # noqa: B018 - a use
        with torch.no_grad():
            raw(layer)[0, column] = 2e-8
        divisor = torch.linalg.matrix_norm(raw(layer).detach().double(), 2)
        torch.testing.assert_close(layer.weight.detach().double(), raw(layer).double() / divisor, rtol=1e-4, atol=0)
