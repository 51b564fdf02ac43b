"""Token folders: read back as written, resumed shard by shard, and refused by name when anything does not fit the index."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vistok.data import TokenFolder, TokenPlan, TokenShards
from vistok.tokens import TokenLayout, VisualTokens

LAYOUT = TokenLayout("grid", (2, 3))


def plan(**changes) -> TokenPlan:
    values = dict(num_images=7, num_tokens=6, codebook_size=50, layout=LAYOUT, tokenizer_digest="abc", classes=("cat", "dog"), shard_size=3)
    return TokenPlan(**{**values, **changes})


def tokens_of(rows: range, *, add: int = 0) -> VisualTokens:
    ids = torch.tensor([[(7 * i + j + add) % 50 for j in range(6)] for i in rows])
    return VisualTokens.from_ids(ids, LAYOUT, torch.tensor([1 + i % 6 for i in rows]))


def write(folder, shards=None, **changes) -> TokenShards:
    writer = TokenShards(folder, plan(**changes))
    for shard in writer.missing if shards is None else shards:
        rows = writer.plan.rows(shard)
        flipped = tokens_of(rows, add=1) if writer.plan.has_flips else None
        texts = {"captions": [f"caption {i % 2}" for i in rows], "names": [f"{i}.png" for i in rows]}
        writer.write(shard, tokens_of(rows), labels=[i % 2 for i in rows], flipped=flipped, **texts)
    return writer


def test_a_token_folder_reads_back_what_was_written(tmp_path):
    write(tmp_path, has_flips=True)
    folder = TokenFolder(tmp_path)
    expected = tokens_of(range(7))
    assert torch.equal(folder.ids.long(), expected.ids) and torch.equal(folder.counts, expected.counts)
    assert folder.ids.dtype == torch.int32 and folder.labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and folder.classes == ["cat", "dog"]
    assert folder.captions == [f"caption {i % 2}" for i in range(7)] and folder.names[6] == "6.png"
    assert folder.layout == LAYOUT and folder.codebook_size == 50 and len(folder) == 7
    tokens = folder.read([2, 5], flips=torch.tensor([True, False]))
    assert torch.equal(tokens.ids[0], tokens_of(range(7), add=1).ids[2]) and torch.equal(tokens.ids[1], expected.ids[5])


def values_of(rows: range, *, add: float = 0.0) -> VisualTokens:
    values = torch.tensor([[[i + j + c / 4 + add for c in range(2)] for j in range(6)] for i in rows])
    return VisualTokens.from_values(values, LAYOUT, torch.full((len(rows),), 6))


def test_deviations_of_values_are_kept_beside_them_and_checked(tmp_path):
    continuous = dict(codebook_size=None, code_dim=2, has_flips=True, shard_size=7)
    writer = TokenShards(tmp_path / "a", plan(has_deviations=True, **continuous))
    tokens, flipped = values_of(range(7)), values_of(range(7), add=0.5)
    rest = dict(labels=[0] * 7, captions=[""] * 7, names=list("abcdefg"))
    writer.write(0, tokens, flipped=flipped, deviations=tokens.values / 8, flipped_deviations=flipped.values / 8, **rest)
    folder = TokenFolder(tmp_path / "a")
    flips = torch.tensor([True, False])
    assert json.loads((tmp_path / "a" / "index.json").read_text())["format"] == 3
    assert torch.equal(folder.read_deviations([2, 5], flips=flips) * 8, folder.read([2, 5], flips=flips).values)
    plain = TokenShards(tmp_path / "b", plan(**continuous))
    plain.write(0, tokens, flipped=flipped, **rest)
    assert TokenFolder(tmp_path / "b").read_deviations([0]) is None
    with pytest.raises(ValueError, match="other values of format, has_deviations"):
        TokenShards(tmp_path / "b", plan(has_deviations=True, **continuous))
    with pytest.raises(ValueError, match="ids have no deviations"):
        plan(has_deviations=True)
    (tmp_path / "a" / "shard_00000.safetensors").unlink()
    for wrong, message in (
        (dict(deviations=-tokens.values, flipped_deviations=flipped.values), "not negative"),
        (dict(deviations=tokens.values[:, :3], flipped_deviations=flipped.values), "deviations of shape"),
        (dict(deviations=tokens.values), "has_deviations=True"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(0, tokens, flipped=flipped, **wrong, **rest)


def test_writing_resumes_and_reading_waits_for_the_last_shard(tmp_path):
    write(tmp_path, shards=[1])
    with pytest.raises(FileNotFoundError, match="2 of 3 shards are missing"):
        TokenFolder(tmp_path)
    (tmp_path / "shard_00000.safetensors.tmp").write_bytes(b"left over")
    assert TokenShards(tmp_path, plan()).missing == [0, 2]
    before = (tmp_path / "shard_00001.safetensors").stat().st_mtime_ns
    write(tmp_path)
    assert len(TokenFolder(tmp_path)) == 7 and (tmp_path / "shard_00001.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other values of tokenizer_digest"):
        TokenShards(tmp_path, plan(tokenizer_digest="def"))
    assert not list(tmp_path.glob("*.tmp"))


def test_tokens_that_do_not_fit_the_plan_are_not_written(tmp_path):
    writer = TokenShards(tmp_path, plan())
    texts = {"labels": [0] * 3, "captions": [""] * 3, "names": ["a", "b", "c"]}
    with pytest.raises(ValueError, match="3 images"):
        writer.write(0, tokens_of(range(2)), **texts)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 50\)"):
        writer.write(0, VisualTokens.from_ids(torch.full((3, 6), 50), LAYOUT), **texts)
    with pytest.raises(ValueError, match="label"):
        writer.write(0, tokens_of(range(3)), **{**texts, "labels": [0, 1, 2]})
    with pytest.raises(ValueError, match="has_flips=False"):
        writer.write(0, tokens_of(range(3)), flipped=tokens_of(range(3)), **texts)
    assert writer.missing == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"num_images": 10**11},
        {"num_images": -1},
        {"num_images": 7.0},
        {"shards": ["../../etc/passwd"]},
        {"layout": {"kind": "grid", "shape": [2, 2]}},
        {"layout": {"kind": "cloud", "shape": [6]}},
        {"layout": 3},
        {"classes": [1, 2]},
        {"format": 2},
    ],
)
def test_a_changed_index_is_refused(tmp_path, change):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        TokenFolder(tmp_path)


def test_an_index_that_is_huge_or_deep_or_cut_is_refused_by_name(tmp_path):
    write(tmp_path)
    for text in ("[" * 10**6, json.dumps(list(range(10**6))), "{"):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="index.json"):
            TokenFolder(tmp_path)


def test_damaged_shards_are_refused_by_name(tmp_path):
    write(tmp_path)
    path = tmp_path / "shard_00001.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    huge = json.dumps({"ids": {"dtype": "I32", "shape": [10**9, 10**6], "data_offsets": [0, 4 * 10**15]}}).encode()
    damaged = [whole[:-5], whole[:20], b"", len(huge).to_bytes(8, "little") + huge, (10**12).to_bytes(8, "little") + b"{}"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="shard_00001.safetensors"):
            TokenFolder(tmp_path)
    for change in ({"ids": tensors["ids"][:, :5].contiguous()}, {"ids": tensors["ids"].long()}, {"more": tensors["ids"].clone()}):
        save_file({**tensors, **change}, path)
        with pytest.raises(ValueError, match="the plan says"):
            TokenFolder(tmp_path)
    save_file({**tensors, "ids": tensors["ids"] + 50}, path)
    with pytest.raises(ValueError, match="must lie in"):
        TokenFolder(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "shard_00002.json").write_text('{"captions": [], "names": ["6.png"]}')
    with pytest.raises(ValueError, match="shard_00002.json"):
        TokenFolder(tmp_path)


def test_values_of_a_continuous_tokenizer_are_kept_in_half_precision(tmp_path):
    values = torch.randn(7, 6, 5, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens.from_values(values, LAYOUT, torch.tensor([6, 6, 6, 4, 6, 6, 6]))
    writer = TokenShards(tmp_path, plan(codebook_size=None, code_dim=5, has_flips=True))
    for shard in writer.missing:
        rows = writer.plan.rows(shard)
        texts = {"captions": [""] * len(rows), "names": [str(i) for i in rows], "labels": [0] * len(rows)}
        part = tokens[slice(rows.start, rows.stop)]
        writer.write(shard, part, flipped=VisualTokens.from_values(-part.values, LAYOUT, part.counts), **texts)
    folder = TokenFolder(tmp_path)
    assert folder.ids is None and folder.codebook_size is None and folder.plan.code_dim == 5
    found = folder.read([3, 0], flips=torch.tensor([False, True]))
    assert found.ids is None and found.values.dtype == torch.float32 and found.counts.tolist() == [4, 6]
    torch.testing.assert_close(found.values, torch.stack([tokens.values[3], -tokens.values[0]]), atol=2e-3, rtol=1e-3)
    assert json.loads((tmp_path / "index.json").read_text())["format"] == 2


def test_values_that_half_precision_cannot_hold_are_not_written(tmp_path):
    writer = TokenShards(tmp_path, plan(codebook_size=None, code_dim=2))
    texts = {"labels": [0] * 3, "captions": [""] * 3, "names": ["a", "b", "c"]}
    with pytest.raises(ValueError, match="finite in half precision"):
        writer.write(0, VisualTokens.from_values(torch.full((3, 6, 2), 1e6), LAYOUT), **texts)
    with pytest.raises(ValueError, match="needs values"):
        writer.write(0, tokens_of(range(3)), **texts)
    with pytest.raises(ValueError, match=r"\[6, 2\] an image, got \[6, 3\]"):
        writer.write(0, VisualTokens.from_values(torch.zeros(3, 6, 3), LAYOUT), **texts)
    with pytest.raises(ValueError, match="ids or values"):
        plan(codebook_size=None)
