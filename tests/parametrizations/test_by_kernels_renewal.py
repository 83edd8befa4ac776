"""What kernels write and leave alone from one step to the next."""

import copy

import pytest
import torch
from tests.parametrizations.kernel_runs import are_kept_by_kernels
from torch import Tensor, nn

import spectralnorm as sn
from spectralnorm.parametrizations import by_kernels
from spectralnorm.parametrizations.by_kernels import ByKernels


@pytest.mark.usefixtures("with_kernels")
def test_a_zero_and_a_nan_weight_leave_the_others_and_their_buffers_alone(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10) for _ in range(3))).to(device)
    x = torch.randn(4, 9, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step(grads: list[Tensor]) -> None:
        for layer, grad in zip(model, grads, strict=True):
            layer.parametrizations.weight.original.grad = grad
        optimizer.step()

    weights = [layer.parametrizations.weight.original for layer in model]
    sum(layer(x).sum() for layer in model).backward()
    before = [layer.parametrizations.weight[0]._u.clone() for layer in model]
    step([weights[0].detach().clone(), torch.full_like(weights[1], torch.nan), torch.zeros_like(weights[2])])
    sum(layer(x).sum() for layer in model).backward()
    after = [layer.parametrizations.weight[0]._u for layer in model]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert torch.equal(model[0].weight, torch.zeros_like(weights[0]))
    assert abs(float(torch.linalg.matrix_norm(model[2].weight.detach(), 2)) - 1) < 1e-3
    assert weights[0].grad.isfinite().all()
    # They recover.
    with torch.no_grad():
        weights[0].normal_()
        weights[1].normal_()
    for layer in model:
        assert abs(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) - 1) < 1e-3


@pytest.mark.usefixtures("with_kernels")
def test_buffers_are_written_after_a_backward_in_eval_mode(device: torch.device) -> None:
    model = nn.ModuleList([nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Linear(9, 10)])
    sn.add_spectral_norm(model.to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model.eval()
        sum(layer.weight.square().sum() for layer in model).backward()
        model.train()
        for layer in model:
            normalization, weight = layer.parametrizations.weight[0], layer.weight.detach()
            u, v = normalization._u, normalization._v
            torch.testing.assert_close(u @ normalization.view.whole_matrix(weight) @ v, torch.ones((), device=device))
        optimizer.step()


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("how", ["another tensor", "other memory", "in eval mode"])
def test_buffers_that_change_between_steps_are_written_where_they_are(how: str, device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10) for _ in range(2))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (layer.parametrizations.weight[0] for layer in model)
    left: list[Tensor] = []
    for step in range(5):
        sum(layer.weight.square().sum() for layer in model).backward()
        for layer, normalization in zip(model, (first, second), strict=True):
            weight = layer.parametrizations.weight.original.detach()
            found = normalization._u @ weight @ normalization._v
            if how != "in eval mode" or normalization is first or step < 2:
                torch.testing.assert_close(found, normalization.sigma(weight), rtol=1e-5, atol=0)
        optimizer.step()
        if step == 1 and how == "another tensor":
            left = [second._u, second._v]
            second._u, second._v = (torch.zeros_like(buffer) for buffer in left)
        elif step == 1 and how == "other memory":
            left = [second._u.detach(), second._v.detach()]
            second._u.data, second._v.data = (torch.zeros_like(buffer) for buffer in left)
        elif step == 1:
            model[1].eval()
            left = [second._u, second._v]
        if step == 1:
            copies = [buffer.clone() for buffer in left]
    assert all(map(torch.equal, left, copies))


@pytest.mark.usefixtures("with_kernels")
def test_values_are_written_over_only_when_nobody_holds_them(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10) for _ in range(2))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 9, device=device)

    def step() -> None:
        optimizer.zero_grad()
        sum(layer(x).sum() for layer in model).backward()
        optimizer.step()

    step()
    step()
    held = model[0].weight.detach()
    copied, address = held.clone(), model[1].weight.data_ptr()
    step()
    step()
    assert torch.equal(held, copied)
    assert model[0].weight.data_ptr() != held.data_ptr()
    assert model[1].weight.data_ptr() == address


@pytest.mark.usefixtures("with_kernels")
def test_an_interrupted_renewal_is_made_up_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10) for _ in range(2))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        sum(layer.weight.square().sum() for layer in model).backward()
        optimizer.step()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(by_kernels, "Division", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = model[0].weight
    for layer in model:
        assert abs(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) - 1) < 1e-3


@pytest.mark.usefixtures("with_kernels")
def test_another_coefficient_and_other_layers_are_followed_from_what_is_known(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 9))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, 12, device=device)
    for coefficient in (1.0, 2.0, 2.0, 0.5):
        sn.add_spectral_norm(model, coefficient=coefficient)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        for layer in model:
            norm = torch.linalg.matrix_norm(layer.weight.detach(), 2)
            assert abs(float(norm.detach()) / coefficient - 1) < 1e-2
        assert all(are_kept_by_kernels(model))
    # One layer's weight is written by hand: it is found anew, and the others go on.
    with torch.no_grad():
        model[0].parametrizations.weight.original.normal_()
    assert abs(float(torch.linalg.matrix_norm(model[0].weight, 2)) / 0.5 - 1) < 1e-3
    copied = copy.deepcopy(model)
    assert torch.equal(copied[1].weight, model[1].weight)


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("are_all", [True, False], ids=["all", "one"])
def test_what_is_set_after_a_step_holds_from_the_next_use_on(are_all: bool, device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 30))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.ones(2, 40, device=device)
    for coefficient in (1.0, 1.0, 2.0, 2.0, 0.5):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = model if are_all else model[:1]
        sn.add_spectral_norm(changed, coefficient=coefficient)  # as a schedule does
        for layer in model:
            wanted = coefficient if layer in changed else 1.0
            assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(wanted, rel=1e-2)
        assert all(are_kept_by_kernels(model))
    model(x).square().sum().backward()
    optimizer.step()
    sn.add_spectral_norm(changed, n_power_iterations=3)
    model(x)
    assert changed[0].parametrizations.weight[0]._kept.followed._options[0] == 3


@pytest.mark.usefixtures("with_kernels")
def test_graph_of_before_an_option_was_set_after_a_step_can_still_be_used(device: torch.device) -> None:
    layer = sn.spectral_norm(nn.Linear(40, 30, bias=False).to(device))
    raw = layer.parametrizations.weight.original
    optimizer, direction = torch.optim.SGD(layer.parameters(), lr=0.1), torch.randn(30, 40, device=device)

    def step() -> None:
        raw.grad = torch.randn_like(raw)
        optimizer.step()

    layer.weight  # noqa: B018 - a use
    step()
    loss = (layer.weight * direction).sum()
    before = torch.autograd.grad(loss, raw, retain_graph=True)[0].clone()
    step()
    sn.add_spectral_norm(layer, coefficient=2.0)
    layer.weight  # noqa: B018 - a use
    torch.testing.assert_close(torch.autograd.grad(loss, raw)[0], before)


@pytest.mark.usefixtures("with_kernels")
def test_weights_that_are_not_kept_do_not_hide_the_others(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))).to(device)
    sn.add_spectral_norm(model[2:], update="manual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    together = []
    for step in range(6):
        if step == 3:
            sn.add_spectral_norm(model[2:], update="step")
        model(torch.ones(1, 4, device=device)).sum().backward()
        optimizer.step()
        kept = model[0].parametrizations["weight"][0]._kept
        if step > 0:
            found = kept.followed.stepped_together(kept.moment.clock.last_step)
            together.append(None if found is None else len(found))
    assert together == [2, 2, None, 3, 3]


@pytest.mark.usefixtures("with_kernels")
def test_weights_are_found_at_once_again_after_others_came_and_went(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(device)
    sn.add_spectral_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(5):
        model(torch.ones(1, 4, device=device)).sum().backward()
        if step == 2:
            copy.deepcopy(model)
        optimizer.step()
        kept = model[0].parametrizations["weight"][0]._kept
        if isinstance(kept.followed, ByKernels):
            found.append(kept.followed.stepped_together(kept.moment.clock.last_step) is not None)
    assert found == [True, False, True, True]
