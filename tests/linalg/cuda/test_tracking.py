"""On the CPU Triton's interpreter runs the kernels; with ``--device cuda`` the GPU does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralnorm.linalg import Frame, MatrixView, TrackedTriplet, probe_rows, track_together
from spectralnorm.linalg.tracking import complete_frame

pytest.importorskip("triton")
from spectralnorm.linalg.cuda import tracking
from spectralnorm.linalg.cuda.tracking import TrackingPlan, track_together_cuda

# Each (batch, out, *columns).
SHAPES = {
    "one entry": lambda: torch.randn(1, 1, 1),
    "one row": lambda: torch.randn(1, 1, 9),
    "one column": lambda: torch.randn(1, 9, 1),
    "smaller than the frame": lambda: torch.randn(1, 3, 5),
    "a first convolution": lambda: torch.randn(1, 64, 3, 3, 3),
    "more than one part of either side": lambda: torch.randn(1, 130, 70),
    "more than 32 spans": lambda: torch.randn(1, 2, 8300),
    "aligned": lambda: torch.randn(1, 24, 136),
    "channels_last": lambda: torch.randn(1, 20, 3, 3, 8).permute(0, 1, 4, 2, 3),
    "transposed": lambda: torch.randn(1, 12, 10, 3, 3).transpose(1, 2),
    "transposed channels_last": lambda: torch.randn(1, 12, 3, 3, 16).permute(0, 4, 1, 2, 3),
    "in blocks": lambda: torch.randn(3, 10, 4, 3, 3),
    "bfloat16": lambda: torch.randn(1, 16, 24).to(torch.bfloat16),
    "float16": lambda: torch.randn(1, 9, 21).to(torch.float16),
}


def in_memory_order(matrices: Tensor) -> Tensor:
    """(batch, out, in) with the columns as they lie in memory, in float64."""
    columns = sorted(range(2, matrices.ndim), key=lambda dim: -matrices.stride(dim))
    return matrices.permute(0, 1, *columns).flatten(2).double()


def random_frame(matrices: Tensor, is_left: bool) -> Frame:
    size = matrices.shape[1] if is_left else matrices[0, 0].numel()
    rows = torch.randn(matrices.shape[0], 8, size, device=matrices.device)
    return Frame(F.normalize(rows, dim=-1), is_left)


def reference(matrices: Tensor, frame: Frame, probe: Tensor | None = None, num_iterations: int = 1) -> TrackedTriplet:
    probe = None if probe is None else probe.double()
    frame = Frame(frame.rows.double(), frame.is_left)
    return track_together([in_memory_order(matrices)], [frame], [probe], num_iterations)[0]


def assert_same(found: TrackedTriplet, expected: TrackedTriplet, matrices: Tensor) -> None:
    torch.testing.assert_close(found.sigma.double(), expected.sigma, rtol=2e-5, atol=1e-6)
    # The vectors up to their common sign, v in the order of the matrix' own dimensions.
    ordered = found.u.double() @ matrices.flatten(2).double() @ found.v.double()[..., None]
    torch.testing.assert_close(ordered.diagonal(dim1=0, dim2=1)[0], expected.sigma, rtol=2e-5, atol=1e-6)
    ones = torch.ones_like(expected.sigma)
    for vectors, of_reference in ((found.u, expected.u), (found.frame.rows[:, 0], _leading(expected))):
        torch.testing.assert_close((vectors.double() * of_reference).sum(-1).abs(), ones, rtol=0, atol=1e-4)
    assert found.frame.is_left is expected.frame.is_left
    if min(matrices.shape[1], matrices[0, 0].numel()) >= 8:
        torch.testing.assert_close(_span(found.frame.rows), _span(expected.frame.rows), rtol=0, atol=1e-3)


def _leading(triplet: TrackedTriplet) -> Tensor:
    return triplet.frame.rows[:, 0]


def _span(rows: Tensor) -> Tensor:
    """The orthogonal projection onto it."""
    basis = torch.linalg.qr(rows.double().mT).Q
    return basis @ basis.mT


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched; none runs."""
    names: list[str] = []
    monkeypatch.setattr(tracking, "launch", lambda kernel, *_, **__: names.append(kernel.fn.__name__))
    return names


@pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_iteration_is_that_of_track_together(name: str, is_left: bool, device: torch.device) -> None:
    # Moved by `to`, a view keeps its strides only if it is dense; all of these are.
    matrices = SHAPES[name]().to(device)
    frame = random_frame(matrices, is_left)
    probe = 0.1 * torch.randn(8, frame.rows.shape[-1], device=device)
    found = track_together_cuda([matrices], [frame], [probe])[0]
    assert_same(found, reference(matrices, frame, probe), matrices)


def test_iterations_that_go_on_from_each_other_find_the_largest_singular_values(device: torch.device) -> None:
    # The frames of the last two are complete: they span the short side, and stay there.
    matrices = [torch.randn(shape, device=device) for shape in ((1, 14, 19), (2, 5, 11), (1, 9, 8))]
    u, _, vh = torch.linalg.svd(matrices[0], full_matrices=False)
    matrices[0] = (u * 0.7 ** torch.arange(14, device=device)) @ vh
    plan = TrackingPlan(matrices)
    frames = [complete_frame(each) or random_frame(each, True) for each in matrices]
    tracked = plan.track(frames, num_iterations=2)
    tracked = plan.track(tracked, num_iterations=2)
    for each, frame, found in zip(matrices, frames, tracked.triplets, strict=True):
        torch.testing.assert_close(found.sigma.double(), torch.linalg.matrix_norm(each.double(), 2), rtol=1e-5, atol=0)
        torch.testing.assert_close(found.u.norm(dim=-1), torch.ones(len(each), device=device))
        torch.testing.assert_close(found.v.norm(dim=-1), torch.ones(len(each), device=device))
        if frame is not frames[0]:
            assert found.frame.is_left is frame.is_left
            assert torch.equal(found.frame.rows, frame.rows)


def test_going_on_from_what_was_found_is_going_on_from_its_frames(device: torch.device) -> None:
    matrices = [torch.randn(2, 4, 6, device=device), torch.randn(1, 9, 10, device=device)]
    plan = TrackingPlan(matrices)
    tracked = plan.track([random_frame(each, True) for each in matrices])
    on_from_frames = plan.track([each.frame for each in tracked.triplets])
    on = plan.track(tracked)
    assert on.sides == on_from_frames.sides
    for mine, theirs in zip(on.triplets, on_from_frames.triplets, strict=True):
        for each, other in zip((*mine[:3], mine.frame.rows), (*theirs[:3], theirs.frame.rows), strict=True):
            assert torch.equal(each, other)


def test_directions_are_rolled_by_each_ones_age(device: torch.device) -> None:
    matrices = [torch.randn(1, 10, 14, device=device), torch.randn(2, 9, 3, device=device)]
    directions = [(torch.randn(10, device=device), torch.randn(14, device=device))]
    directions += [(torch.randn(9, device=device), torch.randn(3, device=device))]
    plan = TrackingPlan(matrices, directions)
    for ages in ((17, 5), (3, 30)):
        frames = [random_frame(matrices[0], True), random_frame(matrices[1], False)]
        tracked = plan.track(frames, ages)
        for each, frame, pair, age, found in zip(matrices, frames, directions, ages, tracked.triplets, strict=True):
            probe = 10 * probe_rows(pair[0] if frame.is_left else pair[1], 8).roll(age, dims=-1)
            assert_same(found, reference(each, frame, probe), each)


def test_a_zero_and_a_nan_weight_have_such_norms_and_leave_the_others_alone(device: torch.device) -> None:
    matrices = [torch.zeros(1, 5, 6), torch.full((1, 4, 3), torch.nan), torch.randn(1, 9, 11)]
    matrices = [each.to(device) for each in matrices]
    frames = [random_frame(each, True) for each in matrices]
    zero, not_finite, other = TrackingPlan(matrices).track(frames).triplets
    assert zero.sigma.item() == 0
    assert zero.u.isfinite().all()
    assert zero.v.isfinite().all()
    assert not_finite.sigma.isnan().item()
    assert_same(other, reference(matrices[2], frames[2]), matrices[2])


def test_a_matrix_gets_the_same_bits_whatever_else_is_in_the_plan(device: torch.device) -> None:
    matrices = [torch.randn(1, 33, 70, device=device), torch.randn(2, 12, 17, device=device)]
    frames = [random_frame(matrices[0], True), random_frame(matrices[1], False)]
    together = TrackingPlan(matrices).track(frames).triplets
    for each, frame, found in zip(matrices, frames, together, strict=True):
        alone = TrackingPlan([each]).track([frame]).triplets[0]
        for mine, theirs in zip((*alone[:3], alone.frame.rows), (*found[:3], found.frame.rows), strict=True):
            assert torch.equal(mine, theirs)


def programs_of(plan: TrackingPlan, sides: tuple[bool, ...]) -> list[Tensor]:
    """The tables of the programs of all launches."""
    tables = plan._tables_of(sides)
    return [programs for _, programs, _ in (*tables.image_blocks, *tables.other_blocks)]


@pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])
def test_no_order_of_the_programs_changes_a_bit(is_left: bool, device: torch.device) -> None:
    # Several blocks of several parts each, whichever side is summed over.
    matrices = [torch.randn(1, 140, 300, device=device), torch.randn(1, 20, 2100, device=device)]
    frames = [random_frame(each, is_left) for each in matrices]
    plan = TrackingPlan(matrices)
    first = plan.track(frames)
    for programs in programs_of(plan, (is_left, is_left)):
        programs.copy_(programs.flip(0))
    for mine, theirs in zip(first.triplets, plan.track(frames).triplets, strict=True):
        for each, other in zip((*mine[:3], mine.frame.rows), (*theirs[:3], theirs.frame.rows), strict=True):
            assert torch.equal(each, other)


def test_counters_are_at_zero_between_launches(device: torch.device) -> None:
    matrices = [torch.randn(1, 140, 300, device=device), torch.randn(2, 3, 2100, device=device)]
    plan = TrackingPlan(matrices)
    tracked = plan.track([random_frame(each, True) for each in matrices], num_iterations=2)
    for sides in ((True, True), tracked.sides):
        counters = plan._tables_of(sides).counters
        assert counters.numel() > 10
        assert not counters.any()


def test_a_large_set_gets_the_same_bits_from_more_launches(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = [torch.randn(1, 9, 1200, device=device), torch.randn(2, 140, 30, device=device), torch.randn(1, 5, 4)]
    matrices = [each.to(device) for each in matrices]
    frames = [random_frame(each, index % 2 == 0) for index, each in enumerate(matrices)]
    in_two = TrackingPlan(matrices).track(frames, num_iterations=2)
    names: list[str] = []
    launch = tracking.launch
    monkeypatch.setattr(tracking, "launch", lambda kernel, *a: names.append(kernel.fn.__name__) or launch(kernel, *a))
    in_four = TrackingPlan(matrices, is_split=True).track(frames, num_iterations=2)
    assert names == 2 * ["images_kernel", "turned_kernel"] + ["others_kernel", "ends_kernel"]
    for mine, theirs in zip(in_four.triplets, in_two.triplets, strict=True):
        for each, other in zip((*mine[:3], mine.frame.rows), (*theirs[:3], theirs.frame.rows), strict=True):
            assert torch.equal(each, other)


def test_a_division_is_given_the_norms(device: torch.device) -> None:
    matrices = [torch.randn(1, 9 + index, 20, device=device) for index in range(5)]
    frames = [random_frame(each, index % 2 == 0) for index, each in enumerate(matrices)]
    divided: list[Tensor] = []

    class Division:
        def divide(self, sigmas: Tensor) -> None:
            divided.append(sigmas)

    tracked = TrackingPlan(matrices).track(frames, num_iterations=2, division=Division())
    assert len(divided) == 1
    assert torch.equal(divided[0], tracked.sigmas)


@pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])
def test_whole_vectors_are_those_of_the_largest_block(is_left: bool, device: torch.device) -> None:
    grouped = torch.randn(12, 3, 3, device=device)
    grouped[4:8] *= 3
    transposed = torch.randn(9, 4, 3, device=device)
    single = torch.randn(5, 4, device=device)
    weights = [(grouped, MatrixView(0, 3)), (transposed, MatrixView(1, 3)), (single, MatrixView(0, 1))]
    matrices = [grouped.view(3, 4, 3, 3), transposed.view(3, 3, 4, 3).transpose(1, 2), single.unsqueeze(0)]
    plan = TrackingPlan(matrices)
    tracked = plan.track([random_frame(each, is_left) for each in matrices])
    us, vs, sigmas = plan.whole(tracked, [view.out_dim for _, view in weights])
    for (weight, view), u, v, sigma, triplet in zip(weights, us, vs, sigmas, tracked.triplets, strict=True):
        assert (u.shape[0], v.shape[0]) == view.whole_shape(weight)
        assert sigma == triplet.sigma.amax()
        torch.testing.assert_close(u @ view.whole_matrix(weight) @ v, sigma)
        torch.testing.assert_close(torch.stack([u.norm(), v.norm()]), torch.ones(2, device=device))


def test_the_norm_of_a_weight_with_one_nan_block_is_nan(device: torch.device) -> None:
    matrices = torch.randn(3, 4, 5, device=device)
    matrices[1] = torch.nan
    plan = TrackingPlan([matrices])
    *_, sigmas = plan.whole(plan.track([random_frame(matrices, True)]), [0])
    assert sigmas.isnan().all()


@pytest.mark.parametrize("number", [3, 40])
def test_launches_do_not_depend_on_the_number_of_weights(
    number: int, device: torch.device, launches: list[str]
) -> None:
    matrices = [torch.randn(1 + index % 2, 4 + index, 7 + index % 5, device=device) for index in range(number)]
    frames = [random_frame(each, index % 3 == 0) for index, each in enumerate(matrices)]
    plan = TrackingPlan(matrices)
    tracked = plan.track(frames)
    assert launches == ["images_kernel", "others_kernel"]
    plan.whole(tracked, [0] * number)
    assert launches == ["images_kernel", "others_kernel", "wholes_kernel"]
    launches.clear()
    plan.track(frames, num_iterations=3)
    assert launches == ["images_kernel"] * 3 + ["others_kernel"]  # what the vectors are is asked of the last alone


def test_a_plan_fits_until_a_tensor_is_somewhere_else() -> None:
    matrices = [torch.randn(1, 4, 5), torch.randn(1, 3, 3)]
    plan = TrackingPlan(matrices)
    matrices[0].mul_(2)
    assert plan.fits(matrices)
    assert not plan.fits([matrices[0], matrices[1].clone()])
    assert not plan.fits(matrices[:1])


def test_what_no_kernel_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        TrackingPlan([])
    with pytest.raises(ValueError, match=r"float32.*got torch\.float64"):
        TrackingPlan([torch.zeros(1, 2, 2, dtype=torch.float64)])
    for shape in ((1, 2, 2**27 + 4), (1, 2**28, 1), (2**26, 1, 3), (1, 2**18 + 1, 2**17)):
        with pytest.raises(ValueError, match=r"count in 32 bits take sides of up to 134217728"):
            TrackingPlan([torch.empty(shape, dtype=torch.bfloat16, device="meta")])
    plan = TrackingPlan([torch.ones(1, 2, 3)])
    with pytest.raises(ValueError, match=r"shape \(1, 8, 2\)"):
        plan.track([Frame(torch.ones(1, 8, 3), True)])
    with pytest.raises(ValueError, match="without directions"):
        plan.track([Frame(torch.ones(1, 8, 3), False)], [0])


@pytest.mark.gpu
@pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])
def test_every_call_gives_the_same_bits(is_left: bool) -> None:
    # Many programs at a time, in an order that is another one in each call.
    shapes = [(512, 513, 3, 3), (8, 4), (512, 8192), (64, 64), (1, 8192), (512, 512, 3, 3), (3, 2100)] * 2
    matrices = [torch.randn(1, *shape, device="cuda") for shape in shapes]
    frames = [random_frame(each, is_left) for each in matrices]
    plan = TrackingPlan(matrices)
    first = plan.track(frames, num_iterations=2)
    for _ in range(50):
        again = plan.track(frames, num_iterations=2)
        assert torch.equal(again.sigmas, first.sigmas)
        for mine, theirs in zip(again.vector_pairs, first.vector_pairs, strict=True):
            assert all(map(torch.equal, mine, theirs))
    expected = torch.cat([reference(*pair, num_iterations=2).sigma for pair in zip(matrices, frames, strict=True)])
    # Not their vectors: of so many matrices some have values that the iterations do not tell apart.
    torch.testing.assert_close(first.sigmas.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_weights(device: torch.device) -> None:
    device = torch.device("cuda")
    matrices = [torch.randn(1, 64, 96, device=device), torch.randn(4, 10, 3, 3, device=device)]
    plan = TrackingPlan(matrices)
    frames = [random_frame(each, True) for each in matrices]
    plan.whole(plan.track(frames), [0, 0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tracked = plan.track(frames)
        *_, sigmas = plan.whole(tracked, [0, 0])
    for _ in range(3):
        for each in matrices:
            each.normal_()
        graph.replay()
        for each, frame, found in zip(matrices, frames, tracked.triplets, strict=True):
            assert_same(found, reference(each, frame), each)
        torch.testing.assert_close(sigmas, torch.stack([each.sigma.amax() for each in tracked.triplets]))


def test_in_place_it_goes_on_from_where_the_last_call_ended(device: torch.device) -> None:
    matrices = [SHAPES[name]().to(device) for name in ("smaller than the frame", "aligned", "in blocks")]
    directions = [
        (torch.randn(each.shape[1], device=device), torch.randn(each[0, 0].numel(), device=device)) for each in matrices
    ]
    plan = TrackingPlan(matrices, directions)
    starts = [random_frame(each, True) for each in matrices]
    frames, expected = plan.track(starts, [1, 1, 1]), plan.track(starts, [1, 1, 1])
    place, next_sides = frames.memory.data_ptr(), frames.next_sides
    plan.prepare_in_place(frames, [0, 0, 0])
    for age in (2, 4):
        mine = plan.track_in_place(frames, [age] * 3)
        for added in (0, 1):
            expected = plan.track(expected, [age + added] * 3)
        for found, wanted in zip(mine.triplets, expected.triplets, strict=True):
            assert all(map(torch.equal, (found.u, found.v, found.sigma), (wanted.u, wanted.v, wanted.sigma)))
        count = sum(each.frame.rows.numel() for each in expected.triplets)
        assert torch.equal(frames.memory[:count], expected.memory[:count])
    assert (frames.memory.data_ptr(), frames.next_sides) == (place, next_sides)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")], ids=["zero", "nan", "inf"])
def test_in_place_frames_of_a_matrix_without_a_norm_stay(value: float, device: torch.device) -> None:
    matrices = [torch.randn(1, 24, 40, device=device), torch.randn(2, 10, 12, device=device)]
    plan = TrackingPlan(matrices)
    frames = plan.track(plan.track([random_frame(each, True) for each in matrices]))
    plan.prepare_in_place(frames, [0, 0])
    before, good = frames.memory.clone(), matrices[1].clone()
    matrices[1][1] = value
    plan.track_in_place(frames, None)
    first_block, second_block = slice(8 * 24, 8 * (24 + 10)), slice(8 * (24 + 10), 8 * (24 + 20))
    assert torch.equal(frames.memory[second_block], before[second_block])
    assert not torch.equal(frames.memory[: 8 * 24], before[: 8 * 24])
    assert not torch.equal(frames.memory[first_block], before[first_block])
    matrices[1].copy_(good)
    sigmas = plan.track_in_place(frames, None).sigmas
    exact = torch.cat([torch.linalg.matrix_norm(each.double(), 2) for each in matrices])
    torch.testing.assert_close(sigmas.double(), exact, rtol=5e-2, atol=0)
