"""The matrix of a layer against one built entry by entry, and its cost in copies."""

import pytest
import torch
from torch import Tensor, nn

from spectralnorm.linalg import MatrixView, view_of

CONVOLUTIONS = {
    "conv1d": nn.Conv1d(3, 5, 4),
    "conv2d": nn.Conv2d(3, 5, (2, 3)),
    "conv3d": nn.Conv3d(2, 3, 2),
    "grouped conv": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise conv": nn.Conv2d(4, 8, 3, groups=4),
    "transposed conv1d": nn.ConvTranspose1d(3, 5, 4),
    "transposed conv2d": nn.ConvTranspose2d(3, 5, (2, 3)),
    "grouped transposed conv": nn.ConvTranspose2d(4, 6, 3, groups=2),
    "depthwise transposed conv": nn.ConvTranspose1d(4, 8, 3, groups=4),
}


def blocks_entry_by_entry(layer: nn.Module) -> list[Tensor]:
    """One matrix per group, from the definition of a convolution's weight in torch's documentation."""
    weight, groups = layer.weight.detach(), layer.groups
    outputs, inputs = layer.out_channels // groups, layer.in_channels // groups
    found = []
    for group in range(groups):
        block = torch.zeros(outputs, inputs, *layer.kernel_size)
        for o in range(outputs):
            for i in range(inputs):
                if layer.transposed:
                    block[o, i] = weight[group * inputs + i, o]
                else:
                    block[o, i] = weight[group * outputs + o, i]
        found.append(block.reshape(outputs, -1))
    return found


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_matrix_has_outputs_as_rows_and_groups_as_blocks(layer):
    matrix = view_of(layer, layer.weight).matrix(layer.weight.detach())
    blocks = matrix if matrix.ndim == 3 else [matrix]
    for block, expected in zip(blocks, blocks_entry_by_entry(layer), strict=True):
        torch.testing.assert_close(block, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_whole_vectors_of_the_largest_block_give_its_norm_on_torchs_matrix(layer):
    weight = layer.weight.detach().double()
    view = view_of(layer, weight)
    left, values, right = torch.linalg.svd(view.memory_blocks(weight), full_matrices=False)
    u, v, sigma = view.whole_vectors(left[..., 0], right[..., 0, :], values[..., 0], weight)
    assert u.shape == (view.whole_shape(weight)[0],)
    assert v.shape == (view.whole_shape(weight)[1],)
    torch.testing.assert_close(sigma, values.max())
    torch.testing.assert_close(u @ view.whole_matrix(weight) @ v, sigma)


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_vectors_of_one_block_are_told_from_those_of_torchs_matrix(layer):
    weight = layer.weight.detach()
    view = view_of(layer, weight)
    left, values, right = torch.linalg.svd(view.memory_blocks(weight), full_matrices=False)
    u, v, _ = view.whole_vectors(left[..., 0], right[..., 0, :], values[..., 0], weight)
    assert view.is_of_one_block(u, v)
    largest = int(values[..., 0].argmax())
    block_u, block_v, is_theirs = view.block_vectors(u, v)
    assert is_theirs.tolist() == [index == largest for index in range(layer.groups)]
    block = view.matrix(weight).view(layer.groups, *view.matrix(weight).shape[-2:])[largest]
    torch.testing.assert_close(block @ block_v, values[..., 0].max() * block_u)
    left, _, right = torch.linalg.svd(view.whole_matrix(weight), full_matrices=False)
    assert view.is_of_one_block(left[:, 0], right[0]) == (layer.groups == 1)


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_outer_factors_are_the_gradient_of_u_w_v(layer):
    weight = layer.weight.detach().double().requires_grad_()
    view = view_of(layer, weight)
    rows, columns = view.whole_shape(weight)
    u, v = torch.randn(rows, dtype=torch.float64), torch.randn(columns, dtype=torch.float64)
    (u @ view.whole_matrix(weight) @ v).backward()
    left, right = view.outer_factors(u, v, weight.shape)
    torch.testing.assert_close((left * right).expand_as(weight), weight.grad)


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_orders_of_the_columns_are_each_others_inverse(layer):
    weight = layer.weight.detach().double()
    if weight.ndim == 4:
        weight = weight.to(memory_format=torch.channels_last)
    view = view_of(layer, weight)
    in_memory = view.memory_blocks(weight)
    torch.testing.assert_close(view.in_torch_order(in_memory, weight), view.matrix(weight).view_as(in_memory))
    assert torch.equal(view.in_memory_order(view.in_torch_order(in_memory, weight), weight), in_memory)


def test_channels_last_weight_is_not_copied():
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    view = MatrixView()
    assert view.memory_matrix(weight).data_ptr() == weight.data_ptr()
    torch.testing.assert_close(
        torch.linalg.svdvals(view.memory_matrix(weight)), torch.linalg.svdvals(view.matrix(weight))
    )


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Embedding(5, 3), nn.Conv2d(4, 8, 3, groups=2)])
def test_contiguous_weight_is_not_copied(layer):
    assert view_of(layer, layer.weight).matrix(layer.weight).data_ptr() == layer.weight.data_ptr()


def test_given_dim_becomes_the_rows():
    layer = nn.Conv2d(3, 5, 2)
    assert view_of(layer, layer.weight, dim=1).matrix(layer.weight).shape == (3, 20)
    assert view_of(layer, layer.weight, dim=-1).out_dim == 3


def test_dim_outside_of_the_weight_is_refused():
    with pytest.raises(IndexError, match=r"\[-2, 1\].*got 2"):
        view_of(nn.Linear(2, 2), torch.ones(2, 2), dim=2)
