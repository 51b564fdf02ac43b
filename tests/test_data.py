"""Data sets: what a folder means, that orders and batches are pure functions, that bad files are counted."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data import BatchLoader, ImageFolder, SampleOrder, loader, open_dataset
from vistok.data.emoji import emoji_table
from vistok.data.folder import list_folder
from vistok.image import BrokenImageError


def save_colour(path, value: int, size=(8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Ten images in two classes; the colour of image i is i."""
    for i in range(10):
        save_colour(tmp_path / "pictures" / ("cat" if i < 5 else "dog") / f"{i}.png", i)
    return tmp_path / "pictures"


def first_batches(batch_loader: BatchLoader, count: int) -> list:
    iterator = iter(batch_loader)
    return [next(iterator) for _ in range(count)]


# the bundled emoji


def test_emoji_have_captions_classes_and_pictures():
    dataset = open_dataset("emoji", image_size=64, split="all")
    assert len(dataset.classes) == 8 and set(dataset.labels) == set(range(8))
    index = dataset.captions.index("noto: red apple")
    assert dataset.classes[dataset.labels[index]] == "Food & Drink"
    image = dataset.read(index)
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
    assert (image[0].float() - image[2].float()).mean() > 30 and image[:, 0, 0].min() > 245
    assert open_dataset("emoji", image_size=(32, 48)).read(0).shape == (3, 32, 48)
    assert len(open_dataset("emoji", image_size=8, label="subcategory").classes) > 80


def test_held_out_emoji_are_unseen_in_every_style():
    parts = {split: open_dataset("emoji", image_size=64, split=split) for split in ("train", "test", "all")}
    names = {split: {entry["name"] for entry in dataset.entries} for split, dataset in parts.items()}
    assert not names["train"] & names["test"]
    assert len(parts["train"]) + len(parts["test"]) == len(parts["all"]) == 2 * len(emoji_table()["emoji"])
    assert 0.08 < len(parts["test"]) / len(parts["all"]) < 0.12
    assert parts["train"].classes == parts["test"].classes


def test_the_composition_split_shows_each_name_in_another_style():
    train = {(entry["name"], entry["style"]) for entry in open_dataset("emoji", image_size=64, split="composition-train").entries}
    test = {(entry["name"], entry["style"]) for entry in open_dataset("emoji", image_size=64, split="composition-test").entries}
    assert test and not train & test
    assert all(any((name, other) in train for other in ("noto", "twemoji") if other != style) for name, style in test)


def test_one_style_can_be_chosen_and_wrong_names_are_named():
    assert {entry["style"] for entry in open_dataset("emoji:noto", image_size=8).entries} == {"noto"}
    with pytest.raises(ValueError, match="noto, twemoji"):
        open_dataset("emoji:apple", image_size=8)
    with pytest.raises(ValueError, match="composition-test"):
        open_dataset("emoji", image_size=8, split="val")


# folders


def test_a_folder_of_folders_has_classes(folder):
    dataset = open_dataset(folder, image_size=4, split="all")
    assert dataset.classes == ["cat", "dog"] and dataset.labels == [0] * 5 + [1] * 5
    assert dataset.names == [f"cat/{i}.png" for i in range(5)] + [f"dog/{i}.png" for i in range(5, 10)]
    assert dataset.captions == ["cat"] * 5 + ["dog"] * 5
    assert dataset.read(7)[0].unique().tolist() == [7]


def test_a_flat_folder_has_no_classes_and_ignores_hidden_and_other_files(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", ".cache/c.png"):
        save_colour(tmp_path / name, 1)
    (tmp_path / "notes.md").write_text("hello")
    dataset = ImageFolder(tmp_path, image_size=4, split="all")
    assert dataset.names == ["a.jpg", "b.PNG"] and dataset.classes == [] and dataset.labels == [-1, -1] and dataset.captions == ["", ""]


def test_captions_come_from_json_lines_and_text_files(folder):
    (folder / "captions.jsonl").write_text('{"file_name": "cat/0.png", "text": "a grey cat"}\n\n{"file_name": "gone.png", "text": "x"}\n')
    (folder / "dog" / "metadata.jsonl").write_text('{"file_name": "6.png", "caption": "a wet dog"}\n')
    (folder / "cat" / "1.txt").write_text("an old cat\n")
    captions = ImageFolder(folder, image_size=4, split="all").captions
    assert captions[:3] == ["a grey cat", "an old cat", "cat"] and captions[5:7] == ["dog", "a wet dog"]


@pytest.mark.parametrize("line", ["not json", '{"file_name": "a.png"}', '{"file_name": 3, "text": "x"}', "[]"])
def test_a_bad_caption_line_is_an_error_that_names_the_line(folder, line):
    (folder / "captions.jsonl").write_text('{"file_name": "cat/0.png", "text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match="captions.jsonl, line 2"):
        ImageFolder(folder, image_size=4)


def test_split_folders_are_used_where_there_are_any(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "stray.png"):
        save_colour(tmp_path / name, 1)
    parts = {split: ImageFolder(tmp_path, image_size=4, split=split) for split in ("train", "test", "all")}
    assert parts["train"].names == ["train/cat/a.png", "train/dog/b.png"] and parts["test"].names == ["val/cat/c.png"]
    assert parts["train"].classes == parts["test"].classes == ["cat", "dog"] and parts["test"].labels == [0]
    assert len(parts["all"]) == 4


def test_the_hash_split_never_overlaps_and_is_stable_when_files_are_added(tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.png").touch()
    train, test = (ImageFolder(tmp_path, image_size=4, split=split).names for split in ("train", "test"))
    assert not set(train) & set(test) and len(train) + len(test) == 300 and 15 <= len(test) <= 48
    for i in range(300, 400):
        (tmp_path / f"{i}.png").touch()
    assert set(test) <= set(ImageFolder(tmp_path, image_size=4, split="test").names)
    assert len(ImageFolder(tmp_path, image_size=4, split="train", held_out=0).names) == 400


def test_empty_missing_and_wrong_folders_say_what_is_allowed(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images; allowed suffixes are .*\.webp"):
        open_dataset(tmp_path / "empty", image_size=4)
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        open_dataset(tmp_path / "absent", image_size=4)
    with pytest.raises(ValueError, match="train, test, all"):
        open_dataset(folder, image_size=4, split="validation")
    with pytest.raises(ValueError, match="skip, error"):
        open_dataset(folder, image_size=4, on_bad_image="ignore")


def test_link_loops_end_and_a_linked_folder_is_listed_once(folder):
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "again").symlink_to(folder / "dog")
    assert len(list_folder(folder).images) == 10


def test_names_that_are_not_utf8_are_read(tmp_path):
    save_colour(tmp_path / os.fsdecode(b"caf\xe9.png"), 3)
    dataset = ImageFolder(tmp_path, image_size=4, split="all")
    assert dataset.read(0)[0].unique().tolist() == [3]
    assert json.dumps(dataset.names, ensure_ascii=False).encode("utf-8")


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_a_hundred_thousand_files_are_listed(tmp_path):
    for j in range(100):
        (tmp_path / str(j)).mkdir()
        for i in range(1000):
            (tmp_path / str(j) / f"{i}.png").touch()
    assert len(ImageFolder(tmp_path, image_size=4, split="all")) == 100_000


# bad images


def test_a_bad_image_is_replaced_by_the_next_good_one_and_counted(folder):
    (folder / "cat" / "4.png").write_bytes(b"")
    (folder / "dog" / "9.png").write_text("text")
    dataset = ImageFolder(folder, image_size=4, split="all")
    assert dataset.locate(4)[0] == 5 and dataset.locate(9)[0] == 0
    assert dataset.bad_images.to_dict() == {
        "count": 2,
        "images": {"cat/4.png": "empty file", "dog/9.png": dataset.bad_images.reasons["dog/9.png"]},
    }
    batch = next(iter(BatchLoader(dataset, batch_size=10, seed=0, flip=False)))
    assert sorted(batch.indices.tolist()) == [0, 0, 1, 2, 3, 5, 5, 6, 7, 8]
    assert batch.labels.tolist() == [int(index >= 5) for index in batch.indices.tolist()]


def test_on_bad_image_error_names_the_file(folder):
    (folder / "cat" / "4.png").write_bytes(b"")
    with pytest.raises(BrokenImageError, match="4.png: empty file"):
        next(iter(BatchLoader(ImageFolder(folder, image_size=4, split="all", on_bad_image="error"), batch_size=4, seed=0)))


def test_a_folder_of_bad_images_only_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    with pytest.raises(BrokenImageError, match="none of the other 2 images"):
        ImageFolder(tmp_path, image_size=4, split="all").read(1)


@pytest.mark.slow
def test_ten_thousand_images_with_a_hundred_bad_are_counted_exactly_and_resume_in_order(tmp_path):
    good = tmp_path / "good.png"
    save_colour(good, 5)
    (tmp_path / "many").mkdir()
    for i in range(10_000):
        (tmp_path / "many" / f"{i:05d}.png").write_bytes(b"" if i % 100 == 0 else good.read_bytes())
    dataset = ImageFolder(tmp_path / "many", image_size=4, split="all")
    straight = first_batches(BatchLoader(dataset, batch_size=1000, seed=1), 10)
    assert len(dataset.bad_images) == 100 and dataset.bad_images.names[1] == "00100.png"
    again = ImageFolder(tmp_path / "many", image_size=4, split="all")
    assert torch.equal(first_batches(BatchLoader(again, batch_size=1000, seed=1, start=7000), 1)[0].indices, straight[7].indices)


# order, batches


def test_an_epoch_shows_every_image_once_and_the_next_differs():
    order = SampleOrder(100, seed=3)
    first, second = order.indices(0, 100), order.indices(100, 100)
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    assert SampleOrder(100, seed=4).indices(0, 100) != first
    assert SampleOrder(5, seed=0, shuffle=False).indices(3, 4) == [3, 4, 0, 1]


def test_the_order_can_be_sliced_anywhere():
    order = SampleOrder(7, seed=0)
    whole = order.indices(0, 50)
    assert all(SampleOrder(7, seed=0).indices(start, 50 - start) == whole[start:] for start in range(50))
    with pytest.raises(ValueError, match="at least one"):
        SampleOrder(0)


def test_batches_resume_from_one_number(folder):
    dataset = ImageFolder(folder, image_size=6, split="all")
    straight = first_batches(BatchLoader(dataset, batch_size=4, seed=2, shift=2), 6)
    resumed = first_batches(BatchLoader(dataset, batch_size=4, seed=2, shift=2, start=12), 3)
    for a, b in zip(straight[3:], resumed, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.positions, b.positions) and a.captions == b.captions


def test_processes_share_the_global_batch(folder):
    dataset = ImageFolder(folder, image_size=6, split="all")
    whole = first_batches(BatchLoader(dataset, batch_size=4, seed=2, shift=1), 3)[2]
    for rank in range(2):
        part = first_batches(BatchLoader(dataset, batch_size=4, seed=2, shift=1, rank=rank, world_size=2), 3)[2]
        assert torch.equal(part.images, whole.images[rank::2]) and torch.equal(part.positions, whole.positions[rank::2])
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        BatchLoader(dataset, batch_size=4, seed=0, world_size=3)


def test_threads_and_kept_images_give_the_same_batches(folder, monkeypatch):
    (folder / "cat" / "2.png").write_bytes(b"")
    kept = first_batches(BatchLoader(ImageFolder(folder, image_size=6, split="all"), batch_size=4, seed=2, shift=1), 5)
    monkeypatch.setattr(loader, "KEEP_DECODED_BYTES", 0)
    for workers in (0, 2):
        other = first_batches(
            BatchLoader(ImageFolder(folder, image_size=6, split="all"), batch_size=4, seed=2, shift=1, workers=workers), 5
        )
        assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(kept, other, strict=True))


def test_a_thread_that_meets_a_bad_image_raises_in_the_caller(folder, monkeypatch):
    monkeypatch.setattr(loader, "KEEP_DECODED_BYTES", 0)
    (folder / "cat" / "2.png").write_bytes(b"")
    dataset = ImageFolder(folder, image_size=6, split="all", on_bad_image="error")
    with pytest.raises(BrokenImageError, match="2.png"):
        first_batches(BatchLoader(dataset, batch_size=5, seed=0, workers=2), 2)


def test_one_image_fills_any_batch(tmp_path):
    save_colour(tmp_path / "only.png", 9)
    batch = next(iter(BatchLoader(ImageFolder(tmp_path, image_size=4, split="all"), batch_size=16, seed=0)))
    assert len(batch) == 16 and batch.indices.unique().tolist() == [0] and batch.positions.tolist() == list(range(16))


def test_flips_and_shifts_are_what_the_batch_says(tmp_path):
    ramp = np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    dataset = ImageFolder(tmp_path, image_size=32, split="all")
    batch = next(iter(BatchLoader(dataset, batch_size=400, seed=0)))
    original = torch.from_numpy(ramp).permute(2, 0, 1).float() / 127.5 - 1
    assert 160 < int(batch.flips.sum()) < 240
    assert torch.equal(batch.images[batch.flips][0], original.flip(-1)) and torch.equal(batch.images[~batch.flips][0], original)
    moved = next(iter(BatchLoader(dataset, batch_size=400, seed=0, flip=False, shift=2))).images
    columns = ((moved[:, 0, 0, 16] + 1) * 127.5 / 8).round().long()  # which column came to the middle
    counts = torch.bincount(columns - 14, minlength=5)
    assert not batch.images.isnan().any() and counts.sum() == 400 and counts.min() > 50
    assert moved.min() >= -1 and moved[:, 0, 0, 0].min() == -1


# Hugging Face data sets


@pytest.mark.slow
def test_a_hugging_face_image_folder_is_indexed_and_streamed(tmp_path, folder):
    pytest.importorskip("datasets")
    from vistok.data import HubDataset, HubStream

    (folder / "dog" / "7.png").write_bytes(b"not an image")
    dataset = HubDataset(str(folder), image_size=4, cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 10 and dataset.classes == ["cat", "dog"] and dataset.labels == [0] * 5 + [1] * 5
    assert dataset.read(3)[0].unique().tolist() == [3] and dataset.locate(7)[0] == 8
    assert "row 7" in dataset.bad_images.names[0]

    def stream():
        return HubStream(str(folder), image_size=4, cache_dir=str(tmp_path / "cache"))

    straight = stream()
    batches = straight.batches(4)
    found = [next(batches) for _ in range(2)]
    state = json.loads(json.dumps(straight.state_dict()))
    found += [next(batches) for _ in range(4)]
    assert straight.classes == ["cat", "dog"] and len(straight.bad_images) == 1
    resumed = stream()
    resumed.load_state_dict(state)
    batches = resumed.batches(4)
    for batch in found[2:]:
        again = next(batches)
        assert torch.equal(batch.images, again.images) and torch.equal(batch.positions, again.positions)
    assert found[0].indices.tolist() == [0, 1, 2, 3] and found[0].images[0, 0].unique().item() == -1


@pytest.mark.slow
def test_parquet_and_webdataset_files_give_classes_and_captions(tmp_path):
    datasets = pytest.importorskip("datasets")
    from vistok.data import HubDataset, HubStream

    (tmp_path / "parquet").mkdir()
    (tmp_path / "tar").mkdir()
    files = []
    for i in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (i, 0, 0)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"]), "text": datasets.Value("string")})
    rows = {
        "image": [{"bytes": file, "path": None} for file in files],
        "label": [i % 2 for i in range(6)],
        "text": [f"text {i}" for i in range(6)],
    }
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "parquet" / "train.parquet")
    with tarfile.open(tmp_path / "tar" / "train.tar", "w") as archive:
        for i, file in enumerate(files):
            for suffix, data in (("png", file), ("txt", f"text {i}".encode()), ("cls", str(i % 2).encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    options = {"image_size": 4, "cache_dir": str(tmp_path / "cache")}
    for kind, classes in (("parquet", ["x", "y"]), ("tar", ["0", "1"])):
        dataset = HubDataset(str(tmp_path / kind), **options)
        assert dataset.classes == classes and dataset.labels == [0, 1] * 3 and dataset.captions[4] == "text 4"
        assert dataset.read(5)[0].unique().tolist() == [5]
    parts = [next(HubStream(str(tmp_path / "parquet"), rank=rank, world_size=2, **options).batches(4)) for rank in range(2)]
    assert [part.captions for part in parts] == [["text 0", "text 2"], ["text 1", "text 3"]]
    with pytest.raises(ValueError, match="no image column; its columns are text"):
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "words" / "train.parquet")
        HubDataset(str(tmp_path / "words"), **options)
