"""The compiled kernels against torch's own operations, for every layout that they read."""

import math

import pytest
import torch
from torch import Tensor

from spectralnorm.linalg import Frame, cpu, track_together
from spectralnorm.linalg.cpu import compiled, storing
from spectralnorm.linalg.layout import layout_of

pytestmark = pytest.mark.skipif(not cpu.is_trusted(), reason="there is no C compiler")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MATRICES = {
    "square": random(1, 64, 64),
    "wide": random(1, 37, 101),
    "tall": random(1, 101, 37),
    "shared by threads": random(1, 512, 1152),
    "convolution": random(1, 24, 9, 3, 3),
    "one channel": random(1, 17, 1, 3, 3),
    "channels_last": random(24, 9, 3, 3).contiguous(memory_format=torch.channels_last)[None],
    "transposed": random(12, 20, 4, 4).movedim(1, 0)[None],
    "transposed, odd": random(33, 21, 3, 3).movedim(1, 0)[None],
    "transposed, shared": random(80, 64, 4, 4).movedim(1, 0)[None],
    "transposed, channels_last": random(12, 20, 3, 3).contiguous(memory_format=torch.channels_last).movedim(1, 0)[None],
    "columns side by side": random(70, 51).t()[None],
    "blocks": random(3, 10, 5, 3, 3),
    "transposed blocks": random(3, 8, 7, 3, 3).movedim(2, 1),
    "few rows": random(1, 3, 50),
    "few columns": random(1, 50, 3),
    "one row": random(1, 1, 50),
    "one column": random(1, 50, 1),
    "one entry": random(1, 1, 1),
}


def in_memory_order(matrix: Tensor) -> Tensor:
    """(batch, out, in) with the columns as they lie in memory."""
    columns = sorted(range(2, matrix.ndim), key=lambda dim: -matrix.stride(dim))
    return matrix.permute(0, 1, *columns).reshape(*matrix.shape[:2], -1)


def frame_for(matrix: Tensor, is_left: bool, seed: int = 1) -> Frame:
    size = matrix.shape[1] if is_left else math.prod(matrix.shape[2:])
    return Frame(random(matrix.shape[0], 8, size, seed=seed), is_left)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_following_gives_what_torch_gives(name: str, is_left: bool, num_threads: int, threads) -> None:
    threads(num_threads)
    matrix, frame = MATRICES[name], frame_for(MATRICES[name], is_left)
    plan = cpu.TrackingPlan([matrix])
    for num_iterations in (1, 3):
        (found,) = plan.track([frame], None, num_iterations).triplets
        (wanted,) = track_together([in_memory_order(matrix)], [frame], [None], num_iterations)
        torch.testing.assert_close(found.sigma, wanted.sigma, rtol=2e-5, atol=0)
        flat = matrix.reshape(*matrix.shape[:2], -1)
        # One vector is the image of the other, to the last digits. A frame that spans its side stays on it.
        turns = 0 if frame.rows.shape[2] <= 8 else num_iterations - 1
        was_left = is_left != (turns % 2 == 1)
        image, other = (flat @ found.v[..., None], found.u) if was_left else (flat.mT @ found.u[..., None], found.v)
        scale = float(found.sigma.max())
        torch.testing.assert_close(image[..., 0], other * found.sigma[:, None], rtol=0, atol=1e-5 * scale)
        shown = torch.einsum("bi,bij,bj->b", found.u, flat, found.v)
        torch.testing.assert_close(shown, found.sigma, rtol=1e-5, atol=0)
        cosines = (found.u * wanted.u).sum(-1).abs()
        torch.testing.assert_close(cosines, torch.ones(len(matrix)), rtol=1e-4, atol=0)
        assert found.frame.is_left is wanted.frame.is_left
        if frame.rows.shape[2] <= 8:  # it spans its side, and stays
            assert torch.equal(found.frame.rows, frame.rows)
            continue
        # The same directions, whatever their signs. Rows without one of their own are of rounding alone.
        num_own = min(matrix.shape[1], flat.shape[2], 8)
        mine, its = (each.rows[:, :num_own] for each in (found.frame, wanted.frame))
        cosines = (mine @ its.mT).abs().diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=2e-3, atol=0)


def test_what_is_compared_on_several_threads_is_large_enough_for_them(threads, teams) -> None:
    threads(2)
    matrix, (weight, out_dim) = MATRICES["shared by threads"], WEIGHTS["large"]
    cpu.TrackingPlan([matrix]).track([frame_for(matrix, True)])
    assert teams == [2]
    plan, sigma = cpu.QuotientPlan([(weight, out_dim)], [1.0]), torch.ones(1)
    values = plan.divide(sigma).values
    assert teams == [2, 2]
    plan.gradients([weight], values, [random(750)], [random(700)], sigma)
    assert teams == [2, 2, 2]


def test_all_together_on_any_number_of_threads_give_the_bits_of_each_alone(threads) -> None:
    matrices = list(MATRICES.values())
    starts = [frame_for(matrix, place % 2 == 0) for place, matrix in enumerate(matrices)]
    alone = [
        cpu.TrackingPlan([matrix]).track([start]).triplets[0] for matrix, start in zip(matrices, starts, strict=True)
    ]
    for number in (1, 2, 5):
        threads(number)
        together = cpu.TrackingPlan(matrices).track(starts).triplets
        for mine, its in zip(together, alone, strict=True):
            for part, other in zip((*mine[:3], mine.frame.rows), (*its[:3], its.frame.rows), strict=True):
                assert torch.equal(part, other)


def test_without_the_threads_of_openmp_the_bits_are_the_same(threads) -> None:
    threads(2)
    matrix = MATRICES["shared by threads"]
    plan, start = cpu.TrackingPlan([matrix]), [frame_for(matrix, True)]
    before = plan.track(start)
    kernels = compiled.kernels()
    try:
        kernels.spectralnorm_use_threads_of(None, None, None)
        after = plan.track(start)
    finally:
        compiled._share_threads(kernels)
    assert torch.equal(before.memory, after.memory)


def test_a_plan_goes_on_from_what_it_found() -> None:
    matrices = [MATRICES[name] for name in ("convolution", "few rows", "blocks", "columns side by side")]
    starts = [frame_for(matrix, True) for matrix in matrices]
    plan = cpu.TrackingPlan(matrices)
    on = plan.track(plan.track(starts))
    twice = plan.track(starts, None, 2)
    assert torch.equal(on.memory[on.num_rows :], twice.memory[twice.num_rows :])
    again = plan.track([triplet.frame for triplet in plan.track(starts).triplets])
    assert torch.equal(again.memory[again.num_rows :], twice.memory[twice.num_rows :])


@pytest.mark.parametrize("name", ["wide", "channels_last", "few rows", "columns side by side"])
@pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("age", [0, 5, 1000])
def test_frames_are_stirred_by_the_rolled_direction(name: str, is_left: bool, age: int) -> None:
    matrix = MATRICES[name]
    sizes = matrix.shape[1], math.prod(matrix.shape[2:])
    directions = tuple(random(size, seed=size) for size in sizes)
    frame = frame_for(matrix, is_left)
    found = cpu.TrackingPlan([matrix], [directions]).track([frame], [age]).triplets[0]
    probe = torch.zeros(8, sizes[not is_left])
    probe[-1] = directions[not is_left]
    # A frame that spans its side is not stirred, because nothing is missing in it.
    probes = [None if sizes[not is_left] <= 8 else probe.roll(age, dims=-1)]
    (wanted,) = track_together([in_memory_order(matrix)], [frame], probes)
    torch.testing.assert_close(found.sigma, wanted.sigma, rtol=2e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_what_has_no_norm_says_so_and_leaves_the_others_alone(value: float, is_left: bool, is_whole: bool) -> None:
    good, bad = random(1, 20, 30), torch.full((1, 20, 30), value) if is_whole or not value else random(1, 20, 30)
    bad[0, 3, 4] = value
    starts = [frame_for(each, is_left) for each in (good, bad, good)]
    found = cpu.TrackingPlan([good, bad, good]).track(starts).sigmas
    assert torch.isfinite(found[[0, 2]]).all()
    assert found[0] == found[2] > 0
    assert found[1] == 0 if value == 0 else not torch.isfinite(found[1])


@pytest.mark.parametrize("scale", [1e-34, 1e-20, 1e-9, 1e18, 1e30, 1e36])
def test_scales_near_the_ends_of_the_range_are_followed(scale: float) -> None:
    matrix = random(1, 20, 30)
    frame = frame_for(matrix, True)
    scaled = matrix * scale  # a plan keeps no matrix alive
    found = cpu.TrackingPlan([scaled]).track([frame], None, 20).sigmas
    torch.testing.assert_close(found / scale, torch.linalg.matrix_norm(matrix, 2), rtol=1e-3, atol=0)


def test_the_largest_block_decides_and_nan_is_larger_than_any() -> None:
    blocks, frame = MATRICES["blocks"].clone(), frame_for(MATRICES["blocks"], True)
    for poisoned in (False, True):
        if poisoned:
            blocks[1, 0, 0, 0, 0] = math.nan
        plan = cpu.TrackingPlan([blocks])
        tracked = plan.track([frame], None, 30)
        (u,), (v,), sigmas = plan.whole(tracked, [0])
        if poisoned:
            assert sigmas.isnan().all()
            continue
        norms = torch.linalg.matrix_norm(blocks.flatten(2), 2)
        torch.testing.assert_close(sigmas, norms.max()[None], rtol=1e-4, atol=0)
        assert u.view(3, -1).count_nonzero(1).count_nonzero() == 1
        assert v.shape == (45,)


WEIGHTS = {
    "linear": (random(30, 21), 0),
    "large": (random(750, 700), 0),
    "second dimension": (random(30, 21), 1),
    "convolution": (random(9, 5, 3, 3), 0),
    "channels_last": (random(9, 5, 3, 3).contiguous(memory_format=torch.channels_last), 0),
    "transposed": (random(9, 6, 3, 3), 1),
    "transposed, channels_last": (random(9, 6, 3, 3).contiguous(memory_format=torch.channels_last), 1),
    "three axes": (random(4, 3, 2, 3, 5), 0),
    "a column": (random(7, 1), 0),
}


def matrix_of(weight: Tensor, out_dim: int) -> Tensor:
    return weight.movedim(out_dim, 0).flatten(1)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("cap", [False, True])
def test_quotients_and_gradients_are_the_formula(name: str, cap: bool, threads) -> None:
    weight, out_dim = WEIGHTS[name]
    left, values, right = torch.linalg.svd(matrix_of(weight, out_dim).double(), full_matrices=False)
    u, sigma, v = left[:, 0].float().contiguous(), values[:1].float(), right[0].float().contiguous()
    grad = torch.empty_like(weight).copy_(random(*weight.shape, seed=3))
    for coefficient in (0.5, 1e6):
        is_active = not cap or coefficient < sigma
        plan = cpu.QuotientPlan([(weight, out_dim)], [coefficient], [cap])
        found = plan.divide(sigma)
        divisor = float(sigma) / coefficient if is_active else 1.0
        assert found.active.tolist() == [bool(is_active)]
        assert torch.equal(found.values[0], weight / divisor)
        assert found.values[0].stride() == weight.stride()
        inner = (grad.double() * found.values[0].double()).sum() / sigma.double() * is_active
        outer = (
            torch.outer(u.double(), v.double()).unflatten(1, weight.movedim(out_dim, 0).shape[1:]).movedim(0, out_dim)
        )
        wanted = grad.double() / divisor - inner * outer
        results = []
        for number in (1, 2):
            threads(number)
            results += plan.gradients([grad], found.values, [u], [v], sigma)
        assert torch.equal(*results)
        torch.testing.assert_close(results[0].double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_a_weight_without_a_norm_is_not_divided_by_it() -> None:
    weight = random(4, 5)
    plan = cpu.QuotientPlan([(weight, 0)] * 4, [2.0] * 4)
    sigmas = torch.tensor([0.0, math.nan, math.inf, 3.0])
    found = plan.divide(sigmas)
    assert found.active.tolist() == [False, False, False, True]
    for value in found.values[:3]:
        assert torch.equal(value, weight / 0.5)
    vectors = [torch.full((size,), math.nan) for size in (4, 5)]
    pairs = [[vectors[0]] * 3 + [torch.ones(4) / 2], [vectors[1]] * 3 + [torch.ones(5) / 5**0.5]]
    grads = [random(4, 5, seed=1)] * 4
    gradients = plan.gradients(grads, found.values, *pairs, sigmas)
    for gradient in gradients[:3]:
        assert torch.equal(gradient, grads[0] * 2)
    assert all(each.isfinite().all() for each in gradients)


def test_gradients_of_some_in_any_order() -> None:
    weights = [weight for weight, _ in WEIGHTS.values()]
    plan = cpu.QuotientPlan(list(WEIGHTS.values()), [1.0] * len(weights))
    sigmas = torch.linspace(1, 2, len(weights))
    values = plan.divide(sigmas).values
    matrices = [matrix_of(*each) for each in WEIGHTS.values()]
    us, vs = [random(len(each)) for each in matrices], [random(each.shape[1]) for each in matrices]
    grads = [torch.empty_like(weight).copy_(random(*weight.shape, seed=5)) for weight in weights]
    whole = plan.gradients(grads, values, us, vs, sigmas)
    for places in ([3], [5, 1], list(range(len(weights)))[::-1]):
        some = [[each[place] for place in places] for each in (grads, values, us, vs)]
        found = plan.gradients(*some, sigmas, places=places)
        for place, each in zip(places, found, strict=True):
            assert torch.equal(each, whole[place])
    # In place of the gradients that came.
    outs = [grad.clone(memory_format=torch.preserve_format) for grad in grads]
    for each, wanted in zip(plan.gradients(outs, values, us, vs, sigmas, outs), whole, strict=True):
        assert torch.equal(each, wanted)


def test_gradients_of_two_uses_are_those_of_their_sum(threads) -> None:
    weights = [*WEIGHTS.values(), (random(750, 700), 0)]
    plan = cpu.QuotientPlan(weights, [1.0] * len(weights))
    sigmas = torch.linspace(1, 2, len(weights))
    values = plan.divide(sigmas).values
    matrices = [matrix_of(*each) for each in weights]
    us, vs = [random(len(each)) for each in matrices], [random(each.shape[1]) for each in matrices]
    grads, more = (
        [torch.empty_like(weight).copy_(random(*weight.shape, seed=seed)) for weight, _ in weights] for seed in (6, 7)
    )
    more[1] = None
    sums = [grad if other is None else grad + other for grad, other in zip(grads, more, strict=True)]
    for number in (1, 2):
        threads(number)
        wanted = plan.gradients(sums, values, us, vs, sigmas)
        for found, its in zip(plan.gradients(grads, values, us, vs, sigmas, more_grads=more), wanted, strict=True):
            assert torch.equal(found, its)


def test_dividing_while_following_gives_the_bits_of_dividing_after(threads) -> None:
    weights = [random(750, 700), random(20, 30), random(24, 4, 3, 3), random(9, 6, 3, 3)]
    views = [weights[0][None], weights[1][None], weights[2].unflatten(0, (3, 8)), weights[3].movedim(1, 0)[None]]
    tracking = cpu.TrackingPlan(views)
    quotients = cpu.QuotientPlan([*((weight, 0) for weight in weights[:3]), (weights[3], 1)], [1.0, 0.5, 2.0, 1.0])
    starts = [frame_for(view, True) for view in views]
    for number in (1, 2):
        threads(number)
        outs = [torch.empty_like(weight) for weight in weights]
        division = quotients.prepared(outs)
        tracked = tracking.track(starts, division=division)
        sigmas = tracking.whole(tracked, [0, 0, 0, 1])[2]
        after = quotients.divide(sigmas)
        for mine, its in zip(outs, after.values, strict=True):
            assert torch.equal(mine, its)


def test_vectors_are_stored_where_there_is_a_norm() -> None:
    vectors = [random(size, seed=size) for size in (3, 40, 5)]
    targets = [torch.zeros_like(vector) for vector in vectors]
    cpu.VectorStore().copy(vectors, [0, 1, 2], torch.tensor([1.0, math.nan, 1e-13]), targets, eps=1e-12)
    assert torch.equal(targets[0], vectors[0])
    assert not any(target.any() for target in targets[1:])


def test_norms_with_gaps_in_memory_are_there_until_they_have_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    vector, target = random(3), torch.zeros(3)
    library, others = storing.kernels(), []

    class Kernels:
        def spectralnorm_store(self, *arguments: object) -> None:
            others.extend(torch.full((1000,), math.nan) for _ in range(10))  # in memory that is free by now
            library.spectralnorm_store(*arguments)

    monkeypatch.setattr(storing, "kernels", Kernels)
    cpu.VectorStore().copy([vector], [5], torch.ones(2000)[::2], [target], eps=1e-12)
    assert torch.equal(target, vector)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu.TrackingPlan([]), "at least one matrix"),
        (lambda: cpu.TrackingPlan([random(1, 4, 5).double()]), "float32 on the CPU, got torch.float64"),
        (lambda: cpu.TrackingPlan([random(1, 8, 10)[:, ::2, ::2]]), "side by side"),
        (lambda: cpu.TrackingPlan([random(1, 4, 5)]).track([frame_for(random(1, 4, 6), False)]), "frame rows of shape"),
        (lambda: cpu.TrackingPlan([random(1, 4, 5)]).track([]), "a frame for each of 1"),
        (lambda: cpu.TrackingPlan([random(1, 4, 5)]).track([frame_for(random(1, 4, 5), True)], [0]), "with directions"),
        (lambda: cpu.QuotientPlan([], []), "at least one weight"),
        (lambda: cpu.QuotientPlan([(random(4, 10)[:, ::2], 0)], [1.0]), "no gaps"),
        (lambda: cpu.QuotientPlan([(random(4, 5).half(), 0)], [1.0]), "float32 on the CPU, got torch.float16"),
        (lambda: cpu.QuotientPlan([(random(4, 5), 0)], [1.0]).divide(torch.ones(2)), "sigmas of shape"),
        (lambda: cpu.QuotientPlan([(random(4, 5), 0)], [1.0]).divide(torch.ones(1), [random(5, 4)]), "as the weight"),
        (
            lambda: cpu.QuotientPlan([(random(4, 5), 0)], [1.0]).gradients(
                [random(4, 5)], [random(4, 5)], [random(5)], [random(5)], torch.ones(1)
            ),
            "vector of 4",
        ),
        (
            lambda: cpu.VectorStore().copy([random(3)], [0], torch.ones(1), [random(4)], eps=0.0),
            "targets of their sizes",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_usual_layout_has_a_form() -> None:
    for matrix in MATRICES.values():
        form = cpu.form_of(layout_of(matrix))
        assert form.rows * form.outers * form.inner == math.prod(matrix.shape[1:])
