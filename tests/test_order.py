"""The tables of next-X prediction."""

import pytest
import torch

from vistok.generators.order import OrderConfig
from vistok.tokens import TokenLayout

SQUARE, LINE = TokenLayout("grid", (4, 4)), TokenLayout("sequence", (8,))
GRID = dict(layout_kind="grid", layout_shape=(4, 6))
SCALES = ((1, 1), (2, 3), (4, 6))
ORDERS = {
    "token": OrderConfig(kind="token", **GRID),
    "patch": OrderConfig(kind="patch", **GRID),
    "cell": OrderConfig(kind="cell", size=2, **GRID),
    "subsample": OrderConfig(kind="subsample", size=2, **GRID),
    "scale": OrderConfig(kind="scale", scales=SCALES, **GRID),
    "scales of tokens": OrderConfig(kind="scale", layout_kind="scales", layout_shape=SCALES),
    "image": OrderConfig(kind="image", **GRID),
    "group": OrderConfig(kind="group", size=5, layout_kind="sequence", layout_shape=(12,)),
    "random": OrderConfig(kind="random", size=3, seed=7, **GRID),
}


@pytest.fixture(params=ORDERS, ids=list(ORDERS))
def order(request):
    return ORDERS[request.param].build()


def test_packing_and_unpacking_changes_nothing(order):
    values = torch.randn(2, order.layout.num_tokens, 3, generator=torch.Generator().manual_seed(0))
    slots = order.pack(values)
    assert slots.shape == (2, order.num_slots, 3) and sum(order.lengths) == order.num_slots
    assert torch.equal(order.unpack(slots), values)
    assert torch.equal(order.partial(slots), values)


def test_a_learned_table_goes_to_raster_order_and_back(order):
    table = torch.randn(order.num_slots, 5)
    assert torch.equal(order.to_slots(order.to_raster(table)), table)
    assert torch.equal(order.to_raster(order.to_slots(table[None])), table[None])


def test_a_slot_sees_its_own_entity_and_all_before(order):
    mask = order.mask()
    for entity in range(order.num_entities):
        rows = mask[order.entity(entity)]
        assert rows[:, : order.ends[entity]].all() and not rows[:, order.ends[entity] :].any()
    assert order.entities_within(order.num_slots) == order.num_entities and order.entities_within(0) == 0


def test_coordinates_are_those_of_the_packed_tokens(order):
    if order.layout.kind == "grid" and not order.is_pyramid:
        h, w = order.layout.shape
        places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float()
        assert torch.equal(order.coordinates, order.pack(places[None])[0])
    assert order.coordinates.shape == (order.num_slots, 2)


def test_cells_and_subsamples_are_cut_as_the_paper_draws_them():
    cell, sub = (OrderConfig(kind=kind, size=2, **GRID).build() for kind in ("cell", "subsample"))
    assert cell.lengths == (4,) * 6 and sub.lengths == (6,) * 4
    assert cell.tokens[:8].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]
    assert sub.tokens[:12].tolist() == [0, 2, 4, 12, 14, 16, 1, 3, 5, 13, 15, 17]


def test_one_order_is_another_where_they_meet():
    token, patch, image = (ORDERS[name].build() for name in ("token", "patch", "image"))
    assert torch.equal(token.tokens, patch.tokens) and token.lengths == patch.lengths == (1,) * 24
    assert torch.equal(image.tokens, patch.tokens) and image.lengths == (24,)
    assert torch.equal(OrderConfig(kind="cell", size=1, **GRID).build().tokens, patch.tokens)
    square = dict(layout_shape=(4, 4))
    assert OrderConfig(kind="cell", size=4, **square).build().lengths == OrderConfig(kind="image", **square).build().lengths


def test_scales_of_a_grid_are_its_averages_and_sit_at_their_centres():
    order = ORDERS["scale"].build()
    values = torch.randn(2, 24, 3)
    assert order.lengths == (1, 6, 24)
    slots = order.pack(values)
    torch.testing.assert_close(slots[:, 0], values.mean(1))
    torch.testing.assert_close(slots[:, 1], values[:, [0, 1, 6, 7]].mean(1))
    assert order.coordinates[0].tolist() == [1.5, 2.5] and order.coordinates[1].tolist() == [0.5, 0.5]
    assert order.coordinates[7:].tolist() == ORDERS["patch"].build().coordinates.tolist()
    torch.testing.assert_close(order.partial(slots[:, :1]), slots[:, :1].expand(-1, 24, -1))


def test_the_last_group_may_be_shorter_and_ids_are_packed_like_values():
    order = ORDERS["group"].build()
    assert order.lengths == (5, 5, 2) and order.coordinates[-1].tolist() == [0, 11]
    cell, ids = ORDERS["cell"].build(), torch.arange(24)[None]
    assert torch.equal(cell.pack(ids)[0], cell.tokens) and torch.equal(cell.unpack(cell.pack(ids)), ids)


def test_what_is_not_known_yet_is_zero():
    order = ORDERS["cell"].build()
    shown = order.partial(torch.ones(1, 4, 1))[0, :, 0]
    assert shown.nonzero().flatten().tolist() == [0, 1, 6, 7]
    with pytest.raises(ValueError, match="inside an entity"):
        order.partial(torch.ones(1, 3, 1))


def test_a_random_order_is_a_permutation_fixed_by_its_seed():
    first, again = ORDERS["random"].build(), ORDERS["random"].build()
    other = OrderConfig(kind="random", size=3, seed=8, **GRID).build()
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    assert torch.equal(first.tokens.sort().values, torch.arange(24))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kind="spiral"), "no order"),
        (dict(kind="cell", size=5), "does not divide"),
        (dict(kind="cell", size=0), "at least 1"),
        (dict(kind="cell", layout_kind="sequence", layout_shape=(8,)), "needs a grid"),
        (dict(kind="scale"), "full grid"),
        (dict(kind="scale", scales=((1, 1), (8, 8))), "full grid"),
        (dict(kind="scale", scales=((20, 1), (16, 16))), "between"),
        (dict(kind="scale", layout_kind="sequence", layout_shape=(8,)), "sequence"),
        (dict(kind="image", scales=((16, 16),)), "has none"),
        (dict(kind="image", layout_shape=(0, 4)), "no tokens"),
    ],
)
def test_an_order_that_cannot_be_says_why(fields, message):
    with pytest.raises(ValueError, match=message):
        OrderConfig(**fields)


def test_ids_of_a_grid_have_no_coarser_scales():
    with pytest.raises(ValueError, match="needs values"):
        ORDERS["scale"].build().pack(torch.zeros(1, 24, dtype=torch.int64))


@pytest.mark.parametrize(
    "text, layout, lengths",
    [
        ("token", LINE, (1,) * 8),
        ("cell-2", SQUARE, (4,) * 4),
        ("subsample-2", SQUARE, (4,) * 4),
        ("scale", SQUARE, (1, 4, 16)),
        ("scale-2-4", SQUARE, (4, 16)),
        ("scale", TokenLayout("scales", ((1, 1), (2, 2))), (1, 4)),
        ("image", SQUARE, (16,)),
        ("group-3", LINE, (3, 3, 2)),
        ("random-4-7", SQUARE, (4,) * 4),
        (None, SQUARE, (4,) * 4),
        (None, LINE, (1,) * 8),
        (None, TokenLayout("grid", (3, 5)), (1,) * 15),
    ],
)
def test_a_text_names_an_order(text, layout, lengths):
    order = OrderConfig.parse(text, layout)
    assert order.layout == layout and order.build().lengths == lengths
    assert OrderConfig.parse("random-4-7", SQUARE) == OrderConfig(kind="random", size=4, seed=7, layout_shape=(4, 4))


@pytest.mark.parametrize(
    "text, layout, message",
    [
        ("cells-2", SQUARE, "allowed: token, patch, cell-K"),
        ("cell", SQUARE, "has 0 numbers"),
        ("cell-3", SQUARE, "does not divide"),
        ("cell-x", SQUARE, "allowed"),
        ("token-2", SQUARE, "has 1 numbers"),
        ("cell-2", LINE, "needs a grid"),
        ("scale-1-2", SQUARE, "must end in the full grid"),
        ("scale-1", TokenLayout("scales", ((1, 1), (2, 2))), "have their own"),
    ],
)
def test_a_text_that_names_no_order_is_refused(text, layout, message):
    with pytest.raises(ValueError, match=message):
        OrderConfig.parse(text, layout)
