"""The training task of generators: what it reads, what it drops, what it learns, and that a run can stop and go on."""

import pytest
import torch
from token_toys import assert_resumes_bit_by_bit, token_folder

import vistok
from vistok import rng
from vistok.decoding import SamplingConfig, generate
from vistok.tokens import TokenLayout, VisualTokens
from vistok.training import TrainConfig, train
from vistok.training.recipes import Sources, get_recipe
from vistok.training.tasks.generator import GeneratorTask, GeneratorTaskConfig, TokenLoader, read_batch, token_loss

SEQUENCE = dict(layout_kind="sequence", layout_shape=(12,))


def make(**fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vistok.create("gpt-tiny", **{**SEQUENCE, "num_classes": 3, "text": "hash", **fields}).eval()


@pytest.fixture
def folder(tmp_path):
    """Eight images of 12 tokens, the last of them with 5, and their mirrored versions."""
    layout = TokenLayout("sequence", (12,))
    ids = torch.randint(200, (16, 12), generator=torch.Generator().manual_seed(3))
    counts = torch.full((8,), 12)
    counts[-1] = 5
    tokens, flipped = (VisualTokens.from_ids(part, layout, counts.clone()) for part in (ids[:8], ids[8:]))
    return token_folder(tmp_path / "tokens", tokens, codebook_size=200, captions=[f"noto: thing {i}" for i in range(8)], flipped=flipped)


def test_the_loader_is_a_function_of_the_position(folder):
    whole = iter(TokenLoader(folder, batch_size=6, seed=1, flip=True))
    batches = [next(whole) for _ in range(4)]
    resumed = next(iter(TokenLoader(folder, batch_size=6, seed=1, flip=True, start=12)))
    assert torch.equal(resumed.ids, batches[2].ids) and resumed.captions == batches[2].captions
    shares = [next(iter(TokenLoader(folder, batch_size=6, seed=1, flip=True, rank=r, world_size=2))) for r in range(2)]
    assert torch.equal(torch.stack([s.ids for s in shares], 1).flatten(0, 1), batches[0].ids)
    rows = [row.tolist() for batch in batches for row in batch.ids]
    assert any(row in folder.flipped_ids.tolist() for row in rows) and any(row in folder.ids.tolist() for row in rows)


def test_padding_counts_nowhere_and_images_count_equally(folder):
    logits = torch.randn(8, 12, 200, generator=torch.Generator().manual_seed(0))
    ids = folder.read(range(8)).ids
    loss, plain, _ = token_loss(logits, ids)
    logits[-1, 5:] = 1e4
    assert torch.allclose(token_loss(logits, ids)[0], loss) and torch.equal(loss, plain)
    expected = sum(
        torch.nn.functional.cross_entropy(logits[i, :n], ids[i, :n], label_smoothing=0.1) for i, n in enumerate(folder.counts.tolist())
    )
    assert torch.allclose(token_loss(logits, ids, label_smoothing=0.1)[0], expected / 8)


def test_what_is_dropped_depends_on_the_sample_alone(folder):
    model = make()
    task = GeneratorTask(model, GeneratorTaskConfig(dropout=0.2, token_dropout=0.3, condition_dropout=0.4)).train()
    task.on_start(folder)
    loss = lambda rows: task(read_batch(folder, rows), rng.image_generators(0, rows), 0)[0]  # noqa: E731
    together, alone = loss([0, 3, 5]), torch.stack([loss([i]) for i in (0, 3, 5)]).mean()
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(loss([0, 3, 5]), together)
    inputs, condition, keep = task.corrupt(read_batch(folder, range(8)), rng.image_generators(0, 8), 0)
    assert 0 < (inputs != folder.read(range(8)).ids[:, :11].clamp(min=0)).float().mean() < 0.5
    assert keep.shape == (2, 2, 8, 1, 64) and (condition.labels == -1).any() and (condition.labels >= 0).any()


def test_tokens_that_do_not_fit_the_generator_are_refused(folder):
    with pytest.raises(ValueError, match="was built for"):
        GeneratorTask(make(layout_kind="grid", layout_shape=(4, 4))).on_start(folder)
    with pytest.raises(ValueError, match="num_classes=2"):
        GeneratorTask(make(num_classes=2)).on_start(folder)


@pytest.mark.parametrize("recipe", ["var-tiny", "tokenflow-t2i-tiny"])
def test_a_recipe_refuses_the_tokens_of_another_tokenizer(folder, recipe):
    with pytest.raises(ValueError, match="needs the tokens of a .*; vistok/emoji-fsq2d is a FSQ2D"):
        get_recipe(recipe).build(Sources(tokenizer="vistok/emoji-fsq2d", tokens=folder))


@pytest.mark.parametrize("recipe", ["maskgit-tiny", "rar-tiny", "tokenflow-t2i-tiny"])
def test_a_recipe_refuses_a_folder_of_first_tokens(recipe, tmp_path):
    tokens = VisualTokens.from_ids(torch.zeros(4, 5, dtype=torch.int64), TokenLayout("sequence", (12,)))
    sources = Sources(tokenizer="vistok/emoji-tokenflow", tokens=token_folder(tmp_path / "tokens", tokens, codebook_size=200))
    with pytest.raises(ValueError, match="holds 5 of 12 tokens"):
        get_recipe(recipe).build(sources)


def test_a_hundred_steps_learn_eight_sequences_by_heart(folder):
    task = GeneratorTask(make(), GeneratorTaskConfig(condition_dropout=0.0, class_dropout=0.0, caption_dropout=0.0), held_out=folder)
    task.on_start(folder)
    task.train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    batches = iter(TokenLoader(folder, batch_size=8, seed=0))
    for step in range(100):
        batch = next(batches)
        loss, logs = task(batch, rng.image_generators(0, batch.positions.tolist()), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 and logs["accuracy"] > 0.99
    task.eval()
    assert task.held_out_loss() < 0.1
    model, batch = task.model, read_batch(folder, range(7))
    made, _ = generate(model, task.condition(batch), generators=rng.image_generators(0, 7), sampling=SamplingConfig(temperature=0))
    assert torch.equal(made.ids, batch.ids)


@pytest.mark.slow
def test_captions_are_read_through_a_transformers_model(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "text"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "noto", ":", "thing", *map(str, range(8))]
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(source / "vocab.txt")).save_pretrained(source)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=len(words))
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(source)
    task = GeneratorTask(make(text=str(source), caption_tokens=6, caption_width=16)).eval()
    task.on_start(folder)
    first, second = (task.condition(read_batch(folder, [i])) for i in (0, 1))
    start = torch.empty(1, 0, dtype=torch.int64)
    assert not torch.allclose(task.model(start, first.drop(torch.ones(1).bool(), torch.zeros(1).bool())), task.model(start, first))
    only_captions = [condition.drop(torch.tensor([True]), torch.tensor([False])) for condition in (first, second)]
    assert not torch.allclose(*[task.model(start, condition) for condition in only_captions])
    loss, _ = task.train()(read_batch(folder, range(8)), rng.image_generators(0, 8), 0)
    loss.backward()
    assert task.model.prefix.caption.mlp[0].weight.grad.abs().sum() > 0


def test_a_stopped_run_resumes_bit_by_bit(folder, tmp_path):
    def run(out, steps, resume=False):
        config = GeneratorTaskConfig(dropout=0.1, token_dropout=0.1, label_smoothing=0.05)
        task = GeneratorTask(make(), config, held_out=folder)
        fixed = dict(batch_size=4, gradient_accumulation=2, flip=True, preview_every=2, log_every=1, schedule="constant", progress=False)
        train(task, folder, TrainConfig(out=tmp_path / out, max_steps=steps, save_every=2, **fixed), resume=resume)
        return vistok.load(tmp_path / out).state_dict()

    assert_resumes_bit_by_bit(run)
    assert "held_out_cross_entropy" in (tmp_path / "whole" / "metrics.jsonl").read_text()
