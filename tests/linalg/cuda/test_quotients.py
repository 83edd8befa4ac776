"""On the CPU Triton's interpreter runs the kernels; with ``--device cuda`` the GPU does."""

import math

import pytest
import torch
from torch import Tensor

from spectralnorm.linalg import MatrixView

pytest.importorskip("triton")
from spectralnorm.linalg.cuda import quotients
from spectralnorm.linalg.cuda.quotients import QuotientPlan

WEIGHTS = {
    "one entry": lambda: (torch.randn(1, 1), 0),
    "odd": lambda: (torch.randn(3, 5), 0),
    "a first convolution": lambda: (torch.randn(64, 3, 3, 3), 0),
    "more than one block": lambda: (torch.randn(130, 132), 0),
    "more than 128 parts": lambda: (torch.randn(1, 129 * 128), 0),
    "channels_last": lambda: (torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last), 0),
    "transposed": lambda: (torch.randn(6, 10, 3, 3), 1),
    "transposed channels_last": lambda: (torch.randn(6, 12, 3, 3).to(memory_format=torch.channels_last), 1),
    "bfloat16": lambda: (torch.randn(7, 12).to(torch.bfloat16), 0),
    "float16": lambda: (torch.randn(8, 16).to(torch.float16), 0),
}


def singular_triplet(weight: Tensor, out_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    matrix = MatrixView(out_dim).matrix(weight).double()
    u, sigmas, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, 0].float().contiguous(), vh[0].float().contiguous(), sigmas[0].float()


def differentiated(weight: Tensor, out_dim: int, grad: Tensor, u: Tensor, v: Tensor, coefficient: float) -> Tensor:
    """By autograd, through the division written out in float64."""
    weight = weight.double().requires_grad_()
    sigma = u.double() @ MatrixView(out_dim).matrix(weight) @ v.double()
    (weight / sigma * coefficient).backward(grad.double())
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("name", WEIGHTS)
def test_value_and_gradient_are_those_of_the_division_written_out(name: str, device: torch.device) -> None:
    weight, out_dim = WEIGHTS[name]()
    weight = weight.to(device)
    u, v, sigma = singular_triplet(weight, out_dim)
    plan = QuotientPlan([(weight, out_dim)], [0.7])
    divided = plan.divide(sigma[None])
    # The interpreter cuts bfloat16 off where a GPU rounds it: one unit in the last place instead of half of one.
    unit = torch.finfo(weight.dtype).eps
    value = divided.values[0]
    torch.testing.assert_close(value.double(), weight.double() / sigma * 0.7, rtol=max(unit, 1e-6), atol=0)
    assert (value.dtype, value.shape, value.stride()) == (weight.dtype, weight.shape, weight.stride())
    assert divided.active.all()
    torch.testing.assert_close(divided.divisors, sigma[None] / 0.7)
    grad = torch.randn_like(weight)
    result = plan.gradients([grad], [value], [u], [v], sigma[None])[0]
    expected = differentiated(weight, out_dim, grad, u, v, 0.7)
    assert (result.dtype, result.stride()) == (weight.dtype, weight.stride())
    scale = expected.abs().max().item()
    torch.testing.assert_close(result.double(), expected, rtol=max(2 * unit, 1e-5), atol=scale * max(2 * unit, 1e-5))


def test_float32_is_divided_as_torch_divides_it(device: torch.device) -> None:
    weight = torch.randn(65, 67, device=device)
    sigma = torch.linalg.matrix_norm(weight, 2)[None]
    divided = QuotientPlan([(weight, 0)], [1.0]).divide(sigma)
    assert torch.equal(divided.values[0], weight / divided.divisors[0])


def test_what_has_no_norm_is_not_divided_by_it(device: torch.device) -> None:
    zero, not_finite = torch.zeros(4, 4, device=device), torch.full((2, 3), math.nan, device=device)
    large = torch.full((3, 5), 1e37, device=device)  # is taken for one whose norm is beyond float32
    plan = QuotientPlan([(zero, 0), (not_finite, 0), (large, 0)], [2.0, 2.0, 2.0])
    sigmas = torch.tensor([0.0, math.nan, math.inf], device=device)
    divided = plan.divide(sigmas)
    assert divided.active.tolist() == [False, False, False]
    assert divided.divisors.tolist() == [0.5, 0.5, 0.5]
    assert torch.equal(divided.values[0], zero)
    assert torch.equal(divided.values[2], 2 * large)
    grads = [torch.rand_like(each) for each in (zero, not_finite, large)]
    nothing = [torch.full((size,), math.nan, device=device) for size in (4, 4, 2, 3, 3, 5)]
    results = plan.gradients(grads, divided.values, nothing[0::2], nothing[1::2], sigmas)
    torch.testing.assert_close(results, [2 * grad for grad in grads])


def test_a_cap_leaves_smaller_norms_alone(device: torch.device) -> None:
    weights = [torch.randn(6, 5, device=device) for _ in range(2)]
    triplets = [singular_triplet(weight, 0) for weight in weights]
    us, vs, sigmas = [list(part) for part in zip(*triplets, strict=True)]
    coefficients = [2 * float(sigmas[0]), 0.5 * float(sigmas[1])]
    plan = QuotientPlan([(weight, 0) for weight in weights], coefficients, [True, True])
    divided = plan.divide(torch.stack(sigmas))
    assert divided.active.tolist() == [False, True]
    assert torch.equal(divided.values[0], weights[0])
    norm = torch.linalg.matrix_norm(divided.values[1], 2)
    torch.testing.assert_close(norm, norm.new_tensor(coefficients[1]))  # up to rounding to float32
    grads = [torch.randn(6, 5, device=device) for _ in range(2)]
    results = plan.gradients(grads, divided.values, us, vs, torch.stack(sigmas))
    assert torch.equal(results[0], grads[0])
    expected = differentiated(weights[1], 0, grads[1], us[1], vs[1], coefficients[1])
    torch.testing.assert_close(results[1].double(), expected, rtol=1e-5, atol=1e-5)


def test_results_can_go_where_the_caller_wants_them(device: torch.device) -> None:
    weights = [torch.randn(9, 6, device=device), torch.randn(4, 4, device=device).to(torch.float16)]
    plan = QuotientPlan([(weight, 0) for weight in weights], [1.0, 1.0])
    us, vs, sigmas = (list(part) for part in zip(*(singular_triplet(weight, 0) for weight in weights), strict=True))
    expected = plan.divide(torch.stack(sigmas))
    outs = [torch.empty_like(weight) for weight in weights]
    assert plan.divide(torch.stack(sigmas), outs).values[1] is outs[1]
    torch.testing.assert_close(outs, expected.values, rtol=0, atol=0)
    grads = [torch.randn_like(weight) for weight in weights]
    gradients = plan.gradients(grads, outs, us, vs, torch.stack(sigmas))
    plan.gradients(grads, outs, us, vs, torch.stack(sigmas), grads)
    torch.testing.assert_close(grads, gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["one entry", "odd", "transposed", "transposed channels_last", "bfloat16"])
@pytest.mark.parametrize("grad_dtype", [None, torch.float16], ids=str)
def test_what_came_from_two_uses_is_added_up(name: str, grad_dtype: torch.dtype | None, device: torch.device) -> None:
    weight, out_dim = WEIGHTS[name]()
    weight = weight.to(device)
    other = torch.randn(5, 3, device=device, dtype=weight.dtype)
    triplets = [singular_triplet(weight, out_dim), singular_triplet(other, 0)]
    us, vs, sigmas = (list(part) for part in zip(*triplets, strict=True))
    plan = QuotientPlan([(weight, out_dim), (other, 0)], [0.7, 1.0])
    sigmas = torch.stack(sigmas)
    values = plan.divide(sigmas).values
    grads = [torch.randn_like(each, dtype=grad_dtype) for each in (weight, other)]
    more = torch.randn_like(weight, dtype=grad_dtype)
    unit = torch.finfo(weight.dtype).eps
    expected = differentiated(weight, out_dim, grads[0].double() + more.double(), us[0], vs[0], 0.7)
    tolerance = max(2 * unit, 1e-5)
    results = plan.gradients(grads, values, us, vs, sigmas, more_grads=[more, None])
    alone = plan.gradients(grads[:1], values[:1], us[:1], vs[:1], sigmas, more_grads=[more], places=[0])
    assert torch.equal(alone[0], results[0])
    assert results[0].dtype == weight.dtype
    # Of a single entry nothing is left: its two parts are equal.
    scale = float((grads[0].double() + more.double()).abs().max() / sigmas[0])
    torch.testing.assert_close(results[0].double(), expected, rtol=tolerance, atol=tolerance * scale)
    expected = differentiated(other, 0, grads[1], us[1], vs[1], 1.0)
    torch.testing.assert_close(
        results[1].double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", ["odd", "more than one block", "channels_last"])
def test_a_value_can_be_written_in_a_narrower_type_as_well(name: str, device: torch.device) -> None:
    weight, out_dim = WEIGHTS[name]()
    weight = weight.to(device)
    plan = QuotientPlan([(weight, out_dim)], [1.0])
    out, narrow = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.float16)
    addresses = [torch.tensor([each.data_ptr()]) for each in (out, narrow)]
    sigmas = torch.tensor([3.0], device=device)
    for _ in range(2):
        division = plan.prepared([out], targets=addresses[0], narrows=[narrow], narrow_targets=addresses[1])
        division.divide(sigmas)
        assert torch.equal(out, weight / sigmas[0])
        assert torch.equal(narrow, (weight / sigmas[0]).half())
        weight.normal_()


def test_a_write_into_one_value_is_not_one_into_the_others(device: torch.device) -> None:
    weights = [torch.randn(2, 3, device=device) for _ in range(2)]
    plan = QuotientPlan([(weight, 0) for weight in weights], [1.0, 1.0])
    first, second = plan.divide(torch.ones(2, device=device)).values
    version = second._version
    first.zero_()
    assert second._version == version
    torch.testing.assert_close(second, weights[1])


@pytest.mark.parametrize("number", [3, 40])
def test_launches_do_not_depend_on_the_number_of_weights(
    number: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(quotients, "launch", lambda kernel, *_, **__: names.append(kernel.fn.__name__))
    weights = [torch.randn(3 + index, 5 + index % 7, device=device) for index in range(number)]
    plan = QuotientPlan([(weight, 0) for weight in weights], [1.0] * number)
    sigmas = torch.ones(number, device=device)
    values = plan.divide(sigmas).values
    assert names == ["divide_kernel"]
    us, vs = [weight[:, 0].contiguous() for weight in weights], [weight[0] for weight in weights]
    plan.gradients(values, values, us, vs, sigmas)
    assert names == ["divide_kernel", "inner_kernel", "gradients_kernel"]


@pytest.mark.parametrize("places", [[1], [0, 1], [0, 3], [1, 2, 4]], ids=str)
def test_some_weights_have_the_gradients_that_they_have_among_all(
    places: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = (3, 5), (130, 9), (4, 6), (7, 2), (2, 150)
    weights = [torch.randn(shape, device=device) for shape in shapes]
    weights[2] = weights[2].half()
    plan = QuotientPlan([(weight, 0) for weight in weights], [1.0] * len(weights))
    us, vs, sigmas = (list(part) for part in zip(*(singular_triplet(weight, 0) for weight in weights), strict=True))
    norms = torch.stack(sigmas)
    values = plan.divide(norms).values
    grads = [torch.randn_like(weight) for weight in weights]
    whole = plan.gradients(grads, values, us, vs, norms)
    some = [[of_all[place] for place in places] for of_all in (grads, values, us, vs)]
    # Nothing is sent to the device but where things are: a captured graph cannot wait for more.
    monkeypatch.setattr(torch, "tensor", None)
    monkeypatch.setattr(quotients, "uploaded", lambda numbers, device: torch.as_tensor(numbers).to(device))
    found = plan.gradients(*some, norms, places=places)
    assert all(map(torch.equal, found, [whole[place] for place in places]))


def test_what_no_kernel_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        QuotientPlan([], [])
    with pytest.raises(ValueError, match="no gaps in memory"):
        QuotientPlan([(torch.zeros(4, 4)[:, :3], 0)], [1.0])
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        QuotientPlan([(torch.zeros(2, 2, dtype=torch.float64), 0)], [1.0])
    with pytest.raises(ValueError, match=r"count in 32 bits.*got 1 of 2 x 134217732"):
        QuotientPlan([(torch.empty(2, 2**27 + 4, device="meta"), 0)], [1.0])
    plan = QuotientPlan([(torch.ones(2, 3), 0)], [1.0])
    sigmas = torch.ones(1)
    with pytest.raises(ValueError, match=r"sigmas of shape \(1,\)"):
        plan.divide(torch.ones(2))
    with pytest.raises(ValueError, match="strides"):
        plan.gradients([torch.ones(3, 2).mT], [torch.ones(2, 3)], [torch.ones(2)], [torch.ones(3)], sigmas)
    with pytest.raises(ValueError, match="vector of 3"):
        plan.gradients([torch.ones(2, 3)], [torch.ones(2, 3)], [torch.ones(2)], [torch.ones(2)], sigmas)


def test_a_plan_fits_until_a_tensor_is_somewhere_else() -> None:
    weight = torch.ones(2, 3)
    plan = QuotientPlan([(weight, 0)], [1.0])
    assert plan.fits([(weight, 0)])
    assert not plan.fits([(weight, 1)])
    assert not plan.fits([(weight.clone(), 0)])


@pytest.mark.gpu
def test_a_captured_graph_divides_and_differentiates_the_weights_as_they_are() -> None:
    device = torch.device("cuda")
    weights = [torch.randn(16, 24, device=device), torch.randn(5, 7, device=device)]
    grads = [torch.randn_like(weight) for weight in weights]
    us = [torch.randn(len(weight), device=device) for weight in weights]
    vs = [torch.randn(weight.shape[1], device=device) for weight in weights]
    sigmas = torch.tensor([2.0, 3.0], device=device)
    plan = QuotientPlan([(weight, 0) for weight in weights], [1.0, 1.0])
    plan.gradients(grads, plan.divide(sigmas).values, us, vs, sigmas)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = plan.divide(sigmas).values
        results = plan.gradients(grads, values, us, vs, sigmas)
    for tensor in (*weights, *grads):
        tensor.normal_()
    graph.replay()
    torch.cuda.synchronize()
    expected = plan.divide(sigmas)
    torch.testing.assert_close(values, expected.values, rtol=0, atol=0)
    torch.testing.assert_close(results, plan.gradients(grads, expected.values, us, vs, sigmas), rtol=0, atol=0)
