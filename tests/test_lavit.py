from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.convert.lavit import from_official, official_state, read_official, to_official
from vistok.quantizers import VQConfig
from vistok.tokenizers.lavit import LaVIT, LaVITConfig
from vistok.tokenizers.lavit_parts import AttentionPool, Merger, weighted_attention
from vistok.tokens import VisualTokens
from vistok.training.tasks.lavit import LaVITTask, LaVITTaskConfig, place_codes

OFFICIAL = LaVITConfig(
    image_size=(24, 24), patch_size=8, vision_width=16, vision_depth=1, vision_heads=2, vision_hidden=20, merger_depth=2, merger_heads=2,
    merger_hidden=20, quantizer=VQConfig(codebook_size=12, code_dim=4), decoder_width=16, decoder_depth=1, decoder_heads=2,
    decoder_hidden=20, feature_width=12, condition_sizes=(6,), llm_width=10, pool_heads=4,
)  # fmt: skip
HEADS = dict(vision_heads=2, merger_heads=2, decoder_heads=2, pool_heads=4)


def images(B=4, side=32, seed=0):
    return torch.rand(B, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def fresh(config=None, seed=0, **overrides):
    """A model whose selector says something about every patch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = vistok.create("lavit-tiny", **overrides) if config is None else LaVIT(replace(config, **overrides))
        for layer in model.selector.head[::2]:
            torch.nn.init.normal_(layer.weight, std=1.0)
    model.eval().calibrate(images(side=model.settings.image_size[0]), 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return fresh()


def generators(numbers, seed=0):
    return vistok.image_generators(seed, numbers)


def test_images_get_different_numbers_of_tokens_and_all_decode(model):
    tokens = model.encode(images())
    assert len(set(tokens.counts.tolist())) > 1 and tokens.ids.shape == (4, model.max_tokens)
    assert torch.equal(tokens.counts, model.selection(images()).sum((1, 2)))
    assert (tokens.ids[~tokens.mask] == -1).all()
    assert model.decode(tokens).shape == (4, 3, 32, 32)


def test_encoding_is_deterministic_and_gumbel_noise_belongs_to_the_image(model):
    x = images()
    noisy = model.encode(x, generators=generators(4))
    assert torch.equal(noisy.ids, model.encode(x, generators=generators(4)).ids)
    assert torch.equal(noisy.ids[2:], model.encode(x[2:], generators=generators([2, 3])).ids)
    assert not torch.equal(noisy.counts, model.encode(x, generators=generators(4, seed=1)).counts)
    assert torch.equal(model.encode(x).ids, model.encode(x).ids)


def test_a_number_of_tokens_keeps_the_patches_most_worth_keeping(model):
    x = images()
    log_probs = model.selector(model.patches(x))
    margin = log_probs[..., 0] - log_probs[..., 1]
    kept = model.selection(x, num_tokens=5).flatten(1)
    assert kept.sum(1).tolist() == [5] * 4
    assert (torch.where(kept, margin, torch.inf).amin(1) >= torch.where(kept, -torch.inf, margin).amax(1)).all()
    tokens = model.encode(x, num_tokens=5)
    assert tokens.ids.shape == (4, 5) and tokens.counts.tolist() == [5] * 4
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        model.encode(x, num_tokens=17)


def test_an_image_that_would_keep_nothing_keeps_its_likeliest_patch(model):
    log_probs = torch.tensor([[[-3.0, -0.1], [-2.0, -0.2]], [[-0.1, -3.0], [-0.1, -3.0]]])
    assert model.select(log_probs).tolist() == [[False, False], [True, True]]
    assert model.decide(log_probs).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_merging_kept_rows_alone_gives_the_rows_of_the_full_merger(eps):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        merger = Merger(16, 3, 2, 24, norm_eps=1e-5, eps=eps)
        x, keep = torch.randn(3, 9, 16) * 3, torch.rand(3, 9) > 0.5
    keep[1], keep[2] = True, False
    keep[2, 4] = True
    full = merger(x, keep.float())
    rows, counts = merger.kept(x, keep)
    assert counts.tolist() == keep.sum(1).tolist()
    torch.testing.assert_close(torch.cat([rows[i, :count] for i, count in enumerate(counts)]), full[keep], atol=1e-5, rtol=1e-5)


def test_without_epsilon_kept_rows_ignore_what_dropped_ones_become_but_read_what_they_were():
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        merger = Merger(16, 2, 2, 24, norm_eps=1e-5, eps=0.0)
        for parameter in merger.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(1, 6, 16)
    keep = torch.tensor([[True, False, True, True, False, False]])
    before, _ = merger.kept(x, keep)
    x[0, 2] = x[0, 2].flip(0)  # the second kept patch: later ones see it, the first does not
    after, _ = merger.kept(x, keep)
    assert torch.allclose(before[0, 0], after[0, 0], atol=1e-6) and not torch.allclose(before[0, 2], after[0, 2], atol=1e-3)
    x[0, 5] = x[0, 5].flip(0)  # a dropped patch: every kept one sees it, though it comes last
    assert not torch.allclose(after[0, 0], merger.kept(x, keep)[0][0, 0], atol=1e-3)


def test_attention_where_nothing_is_allowed_is_the_mean_of_all_values():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    for eps in (1e-6, 1e-30):
        out = weighted_attention(q, k, v, torch.zeros(1, 1, 1, 5), eps)
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(-1, -1, 5, -1).transpose(1, 2).flatten(2))


def test_pooling_is_clips_attention_of_the_mean_token():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pool, x = AttentionPool(6, 8, 2, 3), torch.randn(2, 6, 8)
    tokens = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positions
    expected, _ = F.multi_head_attention_forward(
        tokens[:, :1].transpose(0, 1), tokens.transpose(0, 1), tokens.transpose(0, 1), 8, 2, pool.qkv.weight, pool.qkv.bias, None, None,
        False, 0.0, pool.proj.weight, pool.proj.bias, need_weights=False,
    )  # fmt: skip
    torch.testing.assert_close(pool(x), expected[0])


def test_the_padding_of_a_batch_does_not_change_features_or_conditioning():
    model = fresh(OFFICIAL, condition_sizes=(6, 8))
    ids = torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens.from_ids(ids, model.layout, torch.tensor([3, 9]))
    (both, pooled), (one, pooled_one) = model.condition(tokens), model.condition(tokens[0].truncate(3))
    assert both.shape == (2, 9, 14) and pooled.shape == (2, 8)
    torch.testing.assert_close(both[:1], one, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pooled[:1], pooled_one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(6,), (6, 8)])
def test_official_files_are_read_back_bit_equal(tmp_path, sizes):
    model = fresh(OFFICIAL, condition_sizes=sizes)
    with torch.no_grad():
        for block in model.vision.blocks:
            block.attention.qkv.bias[16:32] = 0  # the official form has no bias on the keys
    to_official(model, tmp_path)
    again = from_official(tmp_path, condition="lowres" if len(sizes) == 1 else "highres", **HEADS)
    assert again.settings == model.settings
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    x = images(side=24)
    assert torch.equal(model.encode(x).ids, again.encode(x).ids)


def test_the_vision_transformer_may_come_from_its_own_pickled_file(tmp_path):
    model = fresh(OFFICIAL)
    state = official_state(model.settings, model.state_dict())
    parts = {
        "eva_vitg_psz14.bin": "tokenizer_encoder.encoder.",
        "tokenizer_encoder.bin": "tokenizer_encoder.",
        "tokenizer_decoder.bin": "tokenizer_decoder.",
    }
    for name, prefix in parts.items():
        part = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        if name.startswith("eva"):
            part |= {"norm.weight": torch.ones(16), "head.bias": torch.zeros(3)}
        torch.save(part, tmp_path / name)
    again = from_official(tmp_path, **HEADS)
    assert torch.equal(model.encode(images(side=24)).ids, again.encode(images(side=24)).ids)
    assert "tokenizer_encoder.encoder.norm.weight" in read_official(tmp_path)


def snapshot(folder, model, prefix="visual_tokenizer."):
    """The published layout: visual_tokenizer/ and language_model/visual_weight.bin, whose merger is twice the other's."""
    (folder / "language_model").mkdir(parents=True)
    to_official(model, folder / "visual_tokenizer")
    state = read_official(folder / "visual_tokenizer")
    other = {
        key.removeprefix("tokenizer_encoder."): 2 * value for key, value in state.items() if ".causal_encoder." in key or "vit_proj" in key
    }
    torch.save({prefix + key: value for key, value in other.items()}, folder / "language_model" / "visual_weight.bin")
    return state


@pytest.mark.parametrize("prefix", ["", "visual_tokenizer.", "model.visual_tokenizer."])
def test_the_merger_for_understanding_is_read_from_its_own_file(tmp_path, prefix):
    model = fresh(OFFICIAL)
    snapshot(tmp_path, model, prefix)
    writes, reads = from_official(tmp_path, **HEADS), from_official(tmp_path, weights="understanding", **HEADS)
    ours, theirs = writes.state_dict(), reads.state_dict()
    doubled = [key for key in ours if key.startswith(("merger.", "to_llm."))]
    assert doubled and all(torch.equal(theirs[key], 2 * ours[key] if key in doubled else ours[key]) for key in ours)
    same = from_official(tmp_path / "visual_tokenizer", weights="understanding", **HEADS)
    assert all(torch.equal(value, theirs[key]) for key, value in same.state_dict().items())


def test_a_merger_for_understanding_that_is_none_is_refused(tmp_path):
    state = snapshot(tmp_path, fresh(OFFICIAL))
    file = tmp_path / "language_model" / "visual_weight.bin"
    torch.save({"causal_encoder.norm.bias": torch.zeros(16), "quantize.embedding.weight": torch.zeros(12, 4)}, file)
    with pytest.raises(ValueError, match="it lacks causal_encoder.*it holds quantize.embedding.weight"):
        from_official(tmp_path, weights="understanding", **HEADS)
    with pytest.raises(ValueError, match="weights='both' is not known"):
        from_official(tmp_path, weights="both", **HEADS)
    torch.save(state, tmp_path / "all.bin")
    with pytest.raises(ValueError, match="a folder is needed"):
        from_official(tmp_path / "all.bin", weights="understanding", **HEADS)
    file.unlink()
    with pytest.raises(OSError, match="visual_weight"):
        from_official(tmp_path, weights="understanding", **HEADS)


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_key_at_fault(tmp_path):
    from safetensors.torch import save_file

    state = official_state(OFFICIAL, LaVIT(OFFICIAL).state_dict())
    file = tmp_path / "state.safetensors"
    for change, message in (
        (lambda s: s.pop("tokenizer_encoder.token_predictor.in_conv.1.bias"), "missing tokenizer_encoder.token_predictor.in_conv.1.bias"),
        (lambda s: s.update({"tokenizer_decoder.extra": torch.zeros(1)}), "unexpected tokenizer_decoder.extra"),
        (lambda s: s.update({"tokenizer_encoder.causal_encoder.norm.bias": torch.zeros(3)}), "has shape"),
        (lambda s: s.pop("tokenizer_decoder.pos_embed"), "no LaVIT tokenizer"),
    ):
        broken = dict(state)
        change(broken)
        save_file({key: value.contiguous().clone() for key, value in broken.items()}, file)
        with pytest.raises(ValueError, match=message):
            from_official(file, **HEADS)
    save_file({key: value.contiguous().clone() for key, value in state.items()}, file)
    with pytest.raises(ValueError, match="does not say vision_heads"):
        from_official(file)
    with pytest.raises(ValueError, match="no pixel decoder"):
        to_official(fresh(OFFICIAL, pixel_width=8), tmp_path)


def test_language_model_ids_go_there_and_back(model):
    tokens = model.encode(images())
    rows = model.llm_ids(tokens, frame=True)
    assert rows[0][0] == 32000 and rows[0][-1] == 32001 and len(rows[0]) == int(tokens.counts[0]) + 2
    again = model.tokens_of_llm_ids(rows)
    assert torch.equal(again.ids, tokens.ids) and torch.equal(again.counts, tokens.counts)
    with pytest.raises(ValueError, match="ids must be"):
        model.tokens_of_llm_ids([torch.tensor([32002 + 64])])


def test_continuous_features_have_the_tokens_counts():
    model = fresh(OFFICIAL)
    values, tokens = model.encode_features(images(side=24)), model.encode(images(side=24))
    assert values.values.shape == (4, 9, 10) and torch.equal(values.counts, tokens.counts)


def test_what_a_model_lacks_and_images_of_other_sizes_are_refused_with_the_reason(model):
    official = fresh(OFFICIAL)
    with pytest.raises(ValueError, match="no pixel decoder"):
        official.decode(official.encode(images(side=24)))
    with pytest.raises(ValueError, match="condition_sizes"):
        model.condition(model.encode(images()))
    with pytest.raises(ValueError, match="llm_width"):
        model.encode_features(images())
    with pytest.raises(ValueError, match="takes 32 x 32"):
        model.encode(images(side=40))
    with pytest.raises(ValueError, match="patch_size"):
        replace(model.settings, image_size=(30, 32))


class Batch:
    def __init__(self):
        self.images = images()


class Dataset:
    """The images of a Batch, as a data set reads them."""

    def __len__(self):
        return 4

    def read(self, row):
        return ((images()[row] + 1) * 127.5).round().to(torch.uint8)


def test_both_stages_train_all_that_they_should():
    model = fresh()
    task = LaVITTask(model, LaVITTaskConfig(quantize_start=3, keep_ratio=0.4)).train()
    task.dataset = Dataset()
    loss, logs = task(Batch(), generators(4), 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.selector.head[-1].weight.grad.abs().sum() > 0 and "codes" not in logs
    model.zero_grad(set_to_none=True)
    loss, logs = task(Batch(), generators(4), 3)
    loss.backward()
    assert abs(float(logs["keep_ratio"]) - 0.4) < 0.05  # calibrated on these images
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("vision.", "selector."))}
    assert int(logs["codes"].sum()) == round(float(logs["keep_ratio"]) * 4 * 16) and {"features", "rate", "commitment", "l1", "mse"} <= set(
        logs
    )


def test_codes_are_placed_once_over_more_vectors_than_a_batch_holds():
    torch.manual_seed(0)
    model = LaVIT(fresh().settings)
    model.calibrate(images(B=32), 0.5)
    place_codes(model, images(B=32))
    placed = model.quantizer.codebook.clone()
    ids = model.encode(images(B=32))
    assert ids.ids[ids.mask].unique().numel() > 0.8 * model.codebook_size
    place_codes(model, images(B=32, seed=1))
    assert torch.equal(model.quantizer.codebook, placed)


def test_the_rate_loss_pulls_the_mean_share_of_kept_patches_to_its_target():
    model = fresh()
    optimizer = torch.optim.SGD(model.selector.head[-1].parameters(), lr=2.0)
    shares = []
    for step in range(12):
        output = model(images(), generators=generators(range(4 * step, 4 * step + 4)), keep_ratio=0.2, quantize=False)
        optimizer.zero_grad()
        output.losses["rate"].backward()
        optimizer.step()
        shares.append(float(output.keep_ratio))
    assert shares[0] > 0.4 and sum(shares[-3:]) / 3 < 0.3


def test_the_saved_model_keeps_the_share_it_was_trained_for(tmp_path):
    task = LaVITTask(fresh(), LaVITTaskConfig(quantize_start=3, keep_ratio=0.25))
    task.dataset = Dataset()
    before = task.model.selector.head[-1].bias.clone()
    task.save_pretrained(tmp_path)
    assert abs(float(vistok.load(tmp_path).selection(images()).float().mean()) - 0.25) < 0.05
    assert torch.equal(before, task.model.selector.head[-1].bias)


def test_training_steps_do_not_depend_on_anything_but_the_generators():
    losses = []
    for _ in range(2):
        loss, _ = LaVITTask(fresh(), LaVITTaskConfig(quantize_start=5)).train()(Batch(), generators(4), 0)
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_of_the_tiny_recipe_writes_a_model_that_loads(tmp_path):
    from vistok.training.recipes import train_tokenizer

    run = train_tokenizer("lavit-tiny", out=tmp_path / "run", max_steps=2, batch_size=4, preview_every=2)
    again = vistok.load(run)
    tokens = again.encode(images())
    assert isinstance(again, LaVIT) and again.decode(tokens).isfinite().all()
