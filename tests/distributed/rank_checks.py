"""What the bodies of tests compare, on each rank."""

import torch
import torch.distributed as dist


def assert_ranks_agree(tensors):
    """On every rank alike, so that none waits for another that has failed."""
    for name, tensor in tensors:
        found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(found, tensor.detach().contiguous())
        assert torch.equal(*found), name


def signless(state):
    """Singular vectors are a pair up to a common sign, which rounding decides: here u has a positive sum of cubes."""
    signs = {name: state[name.removesuffix("_v") + "_u"].pow(3).sum().sign() for name in state if name.endswith("._v")}
    signs |= {name.removesuffix("_v") + "_u": sign for name, sign in signs.items()}
    return {name: value * signs.get(name, 1) for name, value in state.items()}


def assert_same_state(found, expected):
    """Of two state dicts of whole tensors in float64, up to rounding and the sign of each pair of vectors."""
    assert found.keys() == expected.keys()
    torch.testing.assert_close(signless(found), signless(expected), rtol=1e-7, atol=1e-9)
