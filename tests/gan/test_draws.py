import pytest
import torch

from spectralnorm.gan.augment import AUGMENTATIONS, compose
from spectralnorm.gan.draws import PartOfDraws
from spectralnorm.gan.penalties import PENALTIES


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _part(whole: torch.Tensor, rank: int, *, batches: int) -> torch.Tensor:
    """Of each of the joined batches the half of a process."""
    return torch.cat([batch.chunk(2)[rank] for batch in whole.chunk(batches)])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("batches", [1, 2])
def test_an_augmented_part_is_the_part_of_the_augmented_whole(rank: int, batches: int):
    augment = compose(list(AUGMENTATIONS))
    images = torch.rand(8 * batches, 3, 16, 16) * 2 - 1
    whole_random, part_random = _random(), _random()
    whole = augment(images, whole_random)
    with PartOfDraws(rank=rank, size=2, rows=4):
        part = augment(_part(images, rank, batches=batches), part_random)
    torch.testing.assert_close(part, _part(whole, rank, batches=batches), rtol=0, atol=1e-6)
    assert torch.equal(whole_random.get_state(), part_random.get_state())


@pytest.mark.parametrize("name", sorted(set(PENALTIES) - {"dragan"}))
def test_the_penalties_of_the_parts_have_the_penalty_of_the_whole_as_mean(name: str):
    real, fake = torch.randn(2, 8, 1, 4, 4, dtype=torch.float64)

    def discriminator(images: torch.Tensor) -> torch.Tensor:
        return images.pow(3).flatten(1).sum(1)

    whole = PENALTIES[name](discriminator, real, fake, random=_random())
    parts = []
    for rank in (0, 1):
        with PartOfDraws(rank=rank, size=2, rows=4):
            parts.append(PENALTIES[name](discriminator, real.chunk(2)[rank], fake.chunk(2)[rank], random=_random()))
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_what_is_drawn_once_for_a_batch_or_without_a_generator_is_drawn_as_ever():
    with PartOfDraws(rank=1, size=2, rows=4):
        assert torch.equal(torch.rand(3, generator=_random()), torch.rand(3, generator=_random(), dtype=torch.float32))
        drawn = torch.rand((), generator=_random()), torch.rand(3, generator=_random())
        torch.manual_seed(0)
        without = torch.rand(4)
    assert torch.equal(drawn[0], torch.rand((), generator=_random()))
    assert torch.equal(drawn[1], torch.rand(3, generator=_random()))
    torch.manual_seed(0)
    assert torch.equal(without, torch.rand(4))


def test_every_way_of_giving_a_size_is_understood():
    whole = torch.rand(8, 2, generator=_random())
    integers = torch.randint(2, 9, (8,), generator=_random())
    with PartOfDraws(rank=1, size=2, rows=4):
        for part in (
            torch.rand(4, 2, generator=_random()),
            torch.rand((4, 2), generator=_random()),
            torch.rand(size=(4, 2), generator=_random()),
            torch.rand(torch.Size([4, 2]), generator=_random()),
        ):
            assert torch.equal(part, whole[4:])
        assert torch.equal(torch.randint(2, 9, (4,), generator=_random()), integers[4:])
        assert torch.equal(torch.randint(2, 9, size=(4,), generator=_random()), integers[4:])
