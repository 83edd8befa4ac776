import pytest
import torch

from spectralnorm.linalg.layout import layout_of

WHOLE = torch.arange(2 * 8 * 12 * 9, dtype=torch.float32)
VIEWS = {
    "linear": WHOLE[:96].view(8, 12).unsqueeze(0),
    "one entry": WHOLE[:1].view(1, 1, 1),
    "one row": WHOLE[:7].view(1, 1, 7),
    "one column": WHOLE[:7].view(1, 7, 1),
    "odd": WHOLE[:15].view(1, 3, 5),
    "convolution": WHOLE[: 8 * 4 * 9].view(1, 8, 4, 3, 3),
    "channels_last": WHOLE[: 8 * 4 * 9].view(1, 8, 3, 3, 4).permute(0, 1, 4, 2, 3),
    "transposed": WHOLE[: 6 * 8 * 9].view(1, 6, 8, 3, 3).transpose(1, 2),
    "transposed channels_last": WHOLE[: 6 * 8 * 9].view(1, 6, 3, 3, 8).permute(0, 4, 1, 2, 3),
    "grouped": WHOLE[: 4 * 3 * 2 * 9].view(4, 3, 2, 3, 3),
    "grouped transposed": WHOLE[: 4 * 3 * 2 * 9].view(4, 3, 2, 3, 3).transpose(1, 2),
    "transposed matrix": WHOLE[:96].view(8, 12).mT.unsqueeze(0),
    "part of a matrix": WHOLE[:96].view(8, 12)[1:6, 2:9].unsqueeze(0),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_layout_finds_every_entry(name: str) -> None:
    view = VIEWS[name]
    layout = layout_of(view)
    assert (layout.batch, layout.rows, layout.columns) == (view.shape[0], view.shape[1], view[0, 0].numel())
    matrices = view.flatten(2)
    start = view.storage_offset()
    for index in range(layout.batch):
        for row in range(layout.rows):
            for column in range(layout.columns):
                address = (
                    start
                    + index * layout.batch_stride
                    + layout.row_levels.offset(row)
                    + layout.column_levels.offset(column)
                )
                assert WHOLE[address] == matrices[index, row, layout.column_places.offset(column)]


@pytest.mark.parametrize(
    ("name", "is_aligned"),
    [
        ("linear", True),
        ("channels_last", True),
        ("transposed channels_last", True),
        ("transposed matrix", True),
        ("odd", False),
        ("transposed", False),
        ("part of a matrix", False),
        ("grouped", False),  # 18 entries in a row
    ],
)
def test_only_rows_that_all_begin_at_16_bytes_are_aligned(name: str, is_aligned: bool) -> None:
    assert layout_of(VIEWS[name]).is_aligned is is_aligned


def test_neighbours_in_memory_are_on_the_fast_side() -> None:
    assert layout_of(VIEWS["convolution"]).fast_is_columns
    assert not layout_of(VIEWS["transposed channels_last"]).fast_is_columns


def test_columns_in_three_levels_are_refused() -> None:
    scattered = torch.zeros(1, 2, 4, 4, 4)[..., :3, :3, :3]
    with pytest.raises(ValueError, match="more than two levels; pass a contiguous copy"):
        layout_of(scattered)
    assert layout_of(scattered.contiguous()).columns == 27


@pytest.mark.parametrize("shape", [(3, 4), (1, 0, 4)])
def test_what_is_no_batch_of_matrices_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="non-empty"):
        layout_of(torch.zeros(shape))
