import pytest
import torch

from vistok import rng
from vistok.tokens import PADDING_ID, TokenLayout, VisualTokens

SEQUENCE = TokenLayout("sequence", (6,))


def tokens(counts=(6, 3)):
    ids = torch.arange(12).view(2, 6)
    return VisualTokens.from_ids(ids, SEQUENCE, torch.tensor(counts))


def test_ids_beyond_a_count_are_padding():
    made = tokens()
    assert made.ids[1].tolist() == [6, 7, 8] + [PADDING_ID] * 3
    assert made.mask.sum(1).tolist() == [6, 3] and len(made) == 2


def test_values_beyond_a_count_are_zero():
    made = VisualTokens.from_values(torch.ones(2, 6, 4), SEQUENCE, torch.tensor([6, 2]))
    assert made.values[1].sum() == 8 and made.ids is None


def test_truncation_keeps_the_first_tokens_and_leaves_the_original_alone():
    made = tokens()
    short = made.truncate(torch.tensor([4, 1]))
    assert short.ids.tolist() == [[0, 1, 2, 3], [6, -1, -1, -1]] and short.counts.tolist() == [4, 1]
    assert made.ids.shape == (2, 6) and made.truncate(2).counts.tolist() == [2, 2]


def test_truncation_names_the_image_that_is_too_short():
    with pytest.raises(ValueError, match="image 1 has 3 tokens, so it cannot keep 5"):
        tokens().truncate(5)
    with pytest.raises(ValueError, match="image 0"):
        tokens().truncate(0)


def test_rows_can_be_taken_and_stacked_again():
    made = tokens()
    again = VisualTokens.stack([made[0], made[-1].truncate(3)])
    assert torch.equal(again.ids, made.ids) and torch.equal(again.counts, made.counts)
    assert torch.equal(made[torch.tensor([1, 0])].counts, torch.tensor([3, 6]))


def test_stacking_different_layouts_or_nothing_is_refused():
    other = VisualTokens.from_ids(torch.zeros(1, 4), TokenLayout("grid", (2, 2)))
    with pytest.raises(ValueError, match="one layout"):
        VisualTokens.stack([tokens(), other])
    with pytest.raises(ValueError, match="nothing"):
        VisualTokens.stack([])


def test_tokens_hold_exactly_one_of_ids_and_values_of_the_right_shape():
    counts = torch.tensor([6, 6])
    with pytest.raises(ValueError, match="exactly one"):
        VisualTokens(None, None, counts, SEQUENCE)
    with pytest.raises(ValueError, match="must be"):
        VisualTokens(torch.zeros(2, 6, 1), None, counts, SEQUENCE)
    with pytest.raises(ValueError, match="counts"):
        VisualTokens(torch.zeros(3, 6), None, counts, SEQUENCE)


@pytest.mark.parametrize("layout", [SEQUENCE, TokenLayout("grid", (2, 3)), TokenLayout("scales", ((1, 1), (1, 2), (3, 1)))])
def test_every_token_of_a_layout_has_a_place_in_the_unit_square(layout):
    places = layout.coordinates()
    assert layout.num_tokens == 6 and places.shape == (6, 2)
    assert places.min() >= 0 and places.max() < 1


def test_a_layout_survives_json_lists_and_refuses_nonsense():
    assert TokenLayout("scales", [[1, 1], [2, 2]]) == TokenLayout("scales", ((1, 1), (2, 2)))
    for kind, shape in (("ring", (3,)), ("grid", (3,)), ("sequence", ())):
        with pytest.raises(ValueError):
            TokenLayout(kind, shape)


def test_the_noise_of_image_i_does_not_depend_on_its_batch():
    alone = rng.randn((3,), rng.image_generators(5, [7]))
    together = rng.randn((3,), rng.image_generators(5, range(6, 9)))
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, rng.randn((3,), rng.image_generators(6, [7])))
