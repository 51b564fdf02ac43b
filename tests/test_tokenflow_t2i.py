"""The text-to-image model of TokenFlow at tiny sizes; parity with the reference is in tests/parity."""

import pytest
import torch

import vistok
from vistok.convert.tokenflow_t2i import FILE_NAME, from_official, to_official
from vistok.decoding.generate import generate
from vistok.decoding.multi_pass import PUBLISHED, generate_multi_pass, narrowing
from vistok.decoding.sampling import SamplingConfig
from vistok.generators.tokenflow_t2i import Prompt

PAD = 39


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vistok.create("tokenflow-t2i-tiny").eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def prompt():
    return Prompt(torch.tensor([[PAD, PAD, 3, 7, 1], [2, 4, 6, 8, 1]]), torch.tensor([[PAD, PAD, PAD, PAD, 1]]).expand(2, -1))


def draw(model, prompt, **options):
    options = {"guidance_scale": 3.0, **options}
    return generate_multi_pass(model, prompt, generators=vistok.image_generators(0, len(prompt.ids)), **options)


def test_scale_by_scale_with_a_cache_gives_the_logits_of_the_whole_sequence(model, prompt):
    codes = torch.randint(64, (2, 21), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, prompt_length=5)
    with torch.no_grad():
        parts = [model(codes[:, :0], prompt, cache=cache), model(codes[:, :1], cache=cache), model(codes[:, 1:5], cache=cache)]
        whole = model(codes, prompt)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_a_scale_sees_itself_whole_and_nothing_later(model, prompt):
    mask = model.mask(prompt.ids, 1)[1, 0]
    assert mask[5:9, 5:9].all() and not mask[4, 5:].any() and not mask[5:9, 9:].any() and mask[9, :25].all()
    assert not model.mask(prompt.ids, 1)[0, 0][:, :2].any()


def test_looking_again_leaves_later_scales_with_the_first_look(model, prompt):
    first, last = torch.zeros(2, 1, dtype=torch.int64), torch.arange(8).view(2, 4)
    logits = []
    for looks in (0, 1):
        cache = model.new_cache(2, prompt_length=5)
        with torch.no_grad():
            model(first[:, :0], prompt, cache=cache)
            before = model(first, cache=cache)
            if looks:
                assert not torch.allclose(model.look_again(last, cache=cache), before)
            logits.append(model(last, cache=cache))
    assert torch.equal(*logits)


def test_one_pass_is_the_plain_loop_and_three_are_the_published_count_of_runs(model, prompt):
    greedy = SamplingConfig(temperature=0)
    once, _ = draw(model, prompt, passes=[greedy])
    plain, _ = generate(model, prompt, generators=vistok.image_generators(0, 2), sampling=greedy, guidance_scale=3.0)
    assert torch.equal(once.ids, plain.ids)
    tokens, stats = draw(model, prompt)
    assert len(PUBLISHED) == 3 and stats.target_passes == 1 + 2 * 3
    assert not torch.equal(tokens.ids, once.ids)
    tokenizer = vistok.create("tokenflow-tiny").eval()
    assert tokenizer.decode(tokens).shape == (2, 3, 32, 32)


def test_the_published_setting_is_what_the_first_pass_of_it_narrows_to():
    assert narrowing(SamplingConfig(top_k=1200, top_p=0.8), 3, 32768) == PUBLISHED
    assert [each.top_k for each in narrowing(SamplingConfig(), 4, 48)[:3]] == [0, 4, 4]
    assert narrowing(SamplingConfig(top_k=5), 1, 48) == (SamplingConfig(top_k=5),)
    with pytest.raises(ValueError, match="at least one pass"):
        narrowing(SamplingConfig(), 0, 48)


def worded(**changes):
    rows = dict(vocab_size=44 + 64, image_token_start=44, text="hash", caption_tokens=2, num_classes=3, classes=("a", "b", "c"))
    return vistok.create("tokenflow-t2i-tiny", **{**rows, **changes}).eval()


def test_classes_and_words_become_prompts_that_can_be_dropped():
    model = worded()
    prompt = model.make_condition(3, labels=[2, -1, 0], captions=["red cat sits", "red", ""])
    red, cat = prompt.ids[0, 1:3].tolist()
    assert max(red, cat) < PAD and prompt.ids.tolist() == [[42, red, cat, 43], [PAD, PAD, red, 43], [40, PAD, PAD, 43]]
    assert torch.equal(model.make_condition(3).ids, prompt.null) and prompt.null.tolist() == [[PAD, PAD, PAD, 43]] * 3
    yes, no = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    assert torch.equal(prompt.drop(yes, yes).ids, prompt.null) and torch.equal(prompt.drop(no, no).ids, prompt.ids)
    assert torch.equal(prompt.drop(yes, no).ids, model.make_condition(3, captions=["red cat sits", "red", ""]).ids)
    assert torch.equal(prompt.drop(no, yes)[1:].ids, model.make_condition(2, labels=[-1, 0]).ids)


def test_prompts_that_cannot_be_say_why(model):
    with pytest.raises(ValueError, match="make a Prompt"):
        model.make_condition(1, captions=["a cat"])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        worded().make_condition(1, labels=[3])
    with pytest.raises(ValueError, match="codes cannot start at image_token_start=43"):
        worded(image_token_start=43)
    with pytest.raises(ValueError, match="num_classes=3"):
        worded(text="none")
    with pytest.raises(ValueError, match="this generator was built for"):
        model.read_codes_of(vistok.create("tokenflow-tiny", codebook_size=32))


def test_teacher_forcing_does_not_read_the_last_scale_and_dropout_factors_of_one_change_nothing(model, prompt):
    codes = torch.randint(64, (2, 21), generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, 2, 2, 1, 32)
    with torch.no_grad():
        assert torch.equal(model(codes[:, :5], prompt), model(codes, prompt))
        assert torch.equal(model(codes[:, :20], prompt, keep=keep), model(codes, prompt))
        assert not torch.equal(model(codes, prompt, keep=keep * torch.tensor([0.0, 1.0])[:, None, None, None]), model(codes, prompt))
    with pytest.raises(ValueError, match="from 5 to 21"):
        model(codes[:, :4], prompt)


def test_fewer_tokens_are_the_first_scales_and_end_at_one(model, prompt):
    full, _ = draw(model, prompt)
    part, _ = draw(model, prompt, num_tokens=5)
    assert torch.equal(part.ids, full.ids[:, :5])
    with pytest.raises(ValueError, match="whole scales end at"):
        draw(model, prompt, num_tokens=6)


def test_an_image_does_not_depend_on_its_neighbours(model, prompt):
    together, _ = draw(model, prompt)
    alone, _ = generate_multi_pass(
        model, Prompt(prompt.ids[1:], prompt.null[1:]), generators=vistok.image_generators(0, [1]), guidance_scale=3.0
    )
    assert torch.equal(together.ids[1:], alone.ids)


def test_saving_and_converting_keep_every_weight(model, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    again = vistok.load(tmp_path / "ours")
    to_official(model, tmp_path)
    options = dict(scales=(1, 2, 4), image_token_start=40, pad_token=PAD, norm_eps=model.settings.norm_eps)
    converted = from_official(tmp_path / FILE_NAME, **options)
    for other in (again, converted):
        assert other.settings == model.settings
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_codes_of_another_tokenizer_size_are_refused(model, tmp_path):
    to_official(model, tmp_path)
    with pytest.raises(ValueError, match="mm_projector.0.weight"):
        from_official(
            tmp_path,
            tokenizer=vistok.create("tokenflow-tiny", codebook_size=32, semantic_dim=4),
            scales=(1, 2, 4),
            image_token_start=40,
            pad_token=PAD,
        )
