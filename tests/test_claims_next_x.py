"""The verdicts of eval.claims.next_x follow from its numbers; the whole of it runs, and goes on where it stopped."""

import json
import math

import pytest

from eval.claims.next_x import FAILS, HOLDS, UNDECIDED, Config, main, verdicts


def results(**distances):
    return {name.replace("_", "-").replace("--", " "): {str(i): {"frechet": d} for i, d in enumerate(ds)} for name, ds in distances.items()}


def test_a_difference_beyond_twice_its_spread_decides_and_a_smaller_one_does_not():
    table = results(cell_4__noisy=[10.0, 11.0], patch__noisy=[20.0, 21.0], image__noisy=[10.5, 11.0], scale__noisy=[5.0, 5.2])
    found = verdicts(table)
    assert found["cells of half the grid beat single patches"]["verdict"] == HOLDS
    assert found["cells of half the grid beat the whole image"]["verdict"] == UNDECIDED
    assert found["cells of half the grid beat scales"]["verdict"] == FAILS
    assert "cells of half the grid beat subsamples" not in found
    gain = found["cells of half the grid beat single patches"]["gain"]
    assert gain == pytest.approx((math.log(20) + math.log(21) - math.log(10) - math.log(11)) / 2)


def test_one_seed_decides_nothing_and_contexts_are_compared_within_an_order():
    table = results(cell_4__noisy=[1.0], cell_4__clean=[9.0])
    found = verdicts(table, ("cell-4", "patch"))
    assert list(found) == ["noisy context beats teacher forcing, cell-4"]
    assert found["noisy context beats teacher forcing, cell-4"]["verdict"] == UNDECIDED
    table = results(cell_4__noisy=[1.0, 1.1], cell_4__clean=[9.0, 9.5])
    assert verdicts(table, ("cell-4",))["noisy context beats teacher forcing, cell-4"]["verdict"] == HOLDS


def test_models_of_noisy_context_are_judged_once_more_by_what_they_draw_from_noisy_entities():
    table = results(cell_4__noisy=[9.0, 9.5], cell_4__clean=[3.0, 3.1], image__noisy=[2.0, 2.1])
    table["cell-4 noisy@0.2"] = {"0": {"frechet": 1.0}, "1": {"frechet": 1.1}}
    found = {claim: row["verdict"] for claim, row in verdicts(table, ("cell-4",)).items()}
    assert found == {
        "cells of half the grid beat the whole image": FAILS,
        "noisy context beats teacher forcing, cell-4": FAILS,
        "cells of half the grid beat the whole image (noisy@0.2)": HOLDS,
        "noisy context beats teacher forcing, cell-4 (noisy@0.2)": HOLDS,
    }


@pytest.mark.slow
def test_the_whole_table_is_made_and_nothing_is_trained_twice(tmp_path, capsys):
    small = dict(width=32, depth=2, steps=2, batch_size=8, num_samples=8, num_steps=2, device="cpu")
    orders = dict(orders=("cell-4", "image"), sequence_orders=("group-4",), clean_orders=("cell-4",))
    main(Config(out=tmp_path, seeds=(0,), **small, **orders))
    first = {path: path.read_text() for path in tmp_path.glob("seed*/*/result.json")}
    assert len(first) == 4
    main(Config(out=tmp_path, seeds=(0, 1), **small, **orders))
    assert all(path.read_text() == text for path, text in first.items()) and len(list(tmp_path.glob("seed*/*/result.json"))) == 8
    data = json.loads((tmp_path / "results.json").read_text())
    drawn_again = {"cell-4 noisy@0.2", "group-4 noisy@0.2"}
    assert set(data["results"]) == {"cell-4 noisy", "image noisy", "group-4 noisy", "cell-4 clean"} | drawn_again
    assert "| cell-4 | clean | 4 |" in (tmp_path / "table.md").read_text() and "undecided" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="use another --out"):
        main(Config(out=tmp_path, seeds=(0,), **{**small, "steps": 3}, **orders))
