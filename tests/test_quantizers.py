import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.quantizers import FSQ, FSQConfig, nearest_codes

LEVELS = st.lists(st.integers(2, 12), min_size=1, max_size=6).map(tuple)


@settings(max_examples=60, deadline=None)
@given(LEVELS, st.integers(0, 2**31))
def test_ids_become_codes_and_codes_the_same_ids(levels, seed):
    fsq = FSQ(FSQConfig(levels=levels))
    ids = torch.randint(fsq.codebook_size, (64,), generator=torch.Generator().manual_seed(seed))
    codes = fsq.decode(ids)
    assert codes.shape == (64, len(levels)) and codes.min() >= -1 and codes.max() <= 1
    # an input that FSQ maps onto the middle of a code's cell: invert the bound
    half = (torch.tensor(levels).double() - 1) * (1 + 1e-3) / 2
    offset = (torch.tensor(levels) % 2 == 0).double() / 2
    z = torch.atanh((codes.double() * (torch.tensor(levels) // 2) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(fsq(z.float()).ids, ids)


@settings(max_examples=30, deadline=None)
@given(LEVELS)
def test_every_id_is_in_the_codebook_and_its_code_is_what_quantizing_returned(levels):
    fsq = FSQ(FSQConfig(levels=levels))
    out = fsq(torch.randn(50, len(levels), generator=torch.Generator().manual_seed(0)) * 5)
    assert out.ids.min() >= 0 and out.ids.max() < math.prod(levels)
    torch.testing.assert_close(fsq.decode(out.ids), out.codes, rtol=0, atol=1e-6)


def test_the_first_level_runs_fastest():
    codes = FSQ(FSQConfig(levels=(4, 3))).decode(torch.arange(12))
    assert codes[:5, 0].tolist() == [-1.0, -0.5, 0.0, 0.5, -1.0] and codes[:5, 1].tolist() == [-1, -1, -1, -1, 0]


def test_gradients_pass_straight_through_the_rounding():
    z = torch.zeros(1, 2, requires_grad=True)
    fsq = FSQ(FSQConfig(levels=(8, 5)))
    fsq(z).codes.sum().backward()
    bounded = torch.zeros(1, 2, requires_grad=True)
    (fsq.bound(bounded) / torch.tensor([4.0, 2.0])).sum().backward()
    torch.testing.assert_close(z.grad, bounded.grad)


def test_half_precision_is_quantized_in_float32():
    fsq, z = FSQ(FSQConfig(levels=(8, 5, 5))), torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = fsq(z)
    assert out.codes.dtype == torch.bfloat16 and torch.equal(out.ids, fsq(z.float()).ids)


def test_nan_gives_an_id_in_the_codebook_and_leaves_its_neighbour_alone():
    fsq, z = FSQ(FSQConfig(levels=(8, 5))), torch.tensor([[0.3, -0.2], [math.nan, math.nan]])
    ids = fsq(z).ids
    assert 0 <= int(ids[1]) < 40 and ids[0] == fsq(z[:1]).ids[0]


def test_ids_outside_the_codebook_and_bad_levels_are_refused():
    for bad in (-1, 40):
        with pytest.raises(ValueError, match=r"\[0, 40\)"):
            FSQ(FSQConfig(levels=(8, 5))).decode(torch.tensor([bad]))
    for levels in ((), (8, 1), (1000,) * 5):
        with pytest.raises(ValueError, match="level"):
            FSQConfig(levels=levels)


@pytest.mark.parametrize("block_entries", [1, 100, 1 << 22])
def test_the_nearest_code_is_the_one_of_the_full_distance_matrix(block_entries):
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.randn(3, 17, 5, generator=generator), torch.randn(40, 5, generator=generator)
    expected = torch.cdist(vectors.view(-1, 5), codebook).argmin(1).view(3, 17)
    assert torch.equal(nearest_codes(vectors, codebook, block_entries=block_entries), expected)


def test_of_equally_near_codes_the_lowest_wins_and_widths_must_match():
    assert nearest_codes(torch.ones(1, 2), torch.ones(5, 2)).item() == 0
    assert nearest_codes(torch.ones(0, 2), torch.ones(5, 2)).shape == (0,)
    with pytest.raises(ValueError, match="width"):
        nearest_codes(torch.ones(1, 3), torch.ones(5, 2))
