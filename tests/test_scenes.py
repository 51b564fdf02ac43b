import collections

import numpy as np
import pytest
import torch

from vistok.data import open_dataset
from vistok.data.scenes import (
    CELL,
    DIRECTIONS,
    EMPTY,
    FIRST_LETTER,
    GRID,
    KINDS,
    LETTERS,
    NUM_ASKED,
    TEST,
    WORDS,
    ObjectScenes,
    name_of,
    question_scene,
    vocabulary,
)  # fmt: skip

SCENES = [question_scene(number) for number in range(60)]


def solve(scene, text):
    """Answer a question from the contents alone, by another way than the one that made it."""
    words = text.split()[:-1]
    cells = {name_of(int(c)): divmod(i, GRID) for i, c in enumerate(scene.contents.ravel()) if c}
    if text == "read the word ?":
        return " ".join(name_of(int(c)) for row in scene.contents for c in row if c >= FIRST_LETTER)
    if words[:2] == ["how", "many"]:
        return str(sum(name_of(int(c)) == words[2] for c in scene.contents.ravel() if c))
    if "at" in words:
        return name_of(int(scene.contents["abcd".index(words[3][0]), int(words[3][1]) - 1]))
    down, right = DIRECTIONS[" ".join(words[2:-1])]
    row, column = cells[words[-1]]
    return name_of(int(scene.contents[row + down, column + right]))


def test_every_answer_follows_from_what_is_in_the_scene():
    for scene in SCENES:
        for question in scene.questions:
            assert solve(scene, question.text) == question.answer
            assert set(f"{question.text} {question.answer}".split()) <= set(vocabulary())


def test_questions_of_every_kind_are_asked_and_no_count_is_likelier():
    questions = [question for number in range(400) for question in question_scene(number, num_questions=3).questions]
    kinds = collections.Counter(question.kind for question in questions)
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 100
    counts = collections.Counter(question.answer for question in questions if question.kind == "count")
    assert set(counts) == set("01234") and max(counts.values()) < 2 * min(counts.values())
    assert {q.kind for q in question_scene(3, kinds=("read",)).questions} == {"read"}


def test_a_scene_is_a_function_of_its_number_and_split():
    again, other, held_out = question_scene(7), question_scene(8), question_scene(7, split=TEST)
    assert torch.equal(SCENES[7].image, again.image) and SCENES[7].questions == again.questions
    assert not torch.equal(again.image, other.image) and not torch.equal(again.image, held_out.image)


def test_pictures_show_what_the_contents_say():
    for scene in SCENES[:20]:
        dark = scene.image.unflatten(1, (GRID, CELL)).unflatten(3, (GRID, CELL)).float().amin(dim=(0, 2, 4))  # [rows, columns]
        assert np.array_equal(dark.numpy() < 245, scene.contents != EMPTY)
    assert len(set(WORDS)) == len(WORDS) and len(vocabulary()) == len(set(vocabulary())) and not set(WORDS[:NUM_ASKED]) & set(LETTERS)


def test_token_labels_lie_where_the_object_is():
    scenes = ObjectScenes(num_scenes=48)
    labels = scenes.token_labels(torch.arange(48), 12)
    assert labels.shape == (48, 144)
    for number in range(48):
        inside = labels[number] == scenes.labels[number]
        assert 16 <= int(inside.sum()) <= 81 and set(labels[number].tolist()) == {scenes.labels[number], 24}
    large = scenes.token_labels(torch.arange(4), 48)
    assert ((large != 24).float().mean(dim=1) - (labels[:4] != 24).float().mean(dim=1)).abs().max() < 0.15


def test_scenes_open_by_name_at_any_size():
    train, test = open_dataset("scenes", image_size=48), open_dataset("scenes", image_size=96, split="test")
    assert len(train.classes) == 24 and train.read(5).shape == (3, 48, 48) and test.read(5).shape == (3, 96, 96)
    assert not torch.equal(train.read(5), open_dataset("scenes", image_size=48, split="test").read(5))
    with pytest.raises(ValueError, match="train and test"):
        open_dataset("scenes", image_size=48, split="all")
