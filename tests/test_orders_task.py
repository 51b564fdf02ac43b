import pytest
import torch

import vistok
from vistok.rng import image_generators
from vistok.training.tasks.generator import TokenBatch
from vistok.training.tasks.orders import MaskGITTask, RARTask, RARTaskConfig, random_share


@pytest.fixture
def batch():
    ids = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(0))
    return TokenBatch(ids=ids, labels=torch.tensor([0, 1, 2, -1]), captions=[""] * 4, indices=torch.arange(4), positions=torch.arange(4))


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create(name, codebook_size=20, num_classes=3)


def learn(task, batch, steps=40):
    optimizer = torch.optim.Adam(task.parameters(), lr=5e-3)
    losses = []
    for number in range(steps):
        loss, logs = task(batch, image_generators(number, 4), number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(logs["cross_entropy"]))
    return losses, logs


@pytest.mark.parametrize("name", ["maskgit-tiny", "rar-tiny"])
def test_it_learns_four_images_by_heart(name, batch):
    task = MaskGITTask(build(name)) if name == "maskgit-tiny" else RARTask(build(name), RARTaskConfig(random_steps=0, raster_steps=0))
    losses, _ = learn(task, batch)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("task_class, name", [(MaskGITTask, "maskgit-tiny"), (RARTask, "rar-tiny")])
def test_the_loss_of_an_image_depends_on_its_own_generator_alone(task_class, name, batch):
    task, rows = task_class(build(name)), torch.tensor([2])
    alone = TokenBatch(batch.ids[rows], batch.labels[rows], [""], batch.indices[rows], batch.positions[rows])
    together = sum(
        float(task(TokenBatch(batch.ids[i : i + 1], batch.labels[i : i + 1], [""], rows, rows), image_generators(0, [i]), 0)[0])
        for i in range(4)
    )
    assert float(task(batch, image_generators(0, 4), 0)[0]) == pytest.approx(together / 4, rel=1e-4)
    assert float(task(alone, image_generators(0, [2]), 0)[0]) > 0


def test_orders_go_from_random_to_raster(batch):
    assert [random_share(step, 100, 200) for step in (0, 99, 100, 150, 200, 999)] == [1, 1, 1, 0.5, 0, 0]
    task = RARTask(build("rar-tiny"), RARTaskConfig(random_steps=10, raster_steps=20))
    assert float(task(batch, image_generators(0, 4), 0)[1]["raster"]) == 0
    assert float(task(batch, image_generators(0, 4), 20)[1]["raster"]) == 1
    with pytest.raises(ValueError, match="raster_steps"):
        RARTaskConfig(random_steps=3, raster_steps=2)
