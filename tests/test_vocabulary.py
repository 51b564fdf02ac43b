"""Image words in a stock tokenizer and language model: ids, embeddings, interleaving, generation, save and load."""

import pytest
import torch

from vistok.tokenizers.vocabulary import ImageVocabulary
from vistok.tokens import TokenLayout, VisualTokens

transformers = pytest.importorskip("transformers")
WORDS = ["<unk>", "<s>", "</s>", *"a red green apple and more text : .".split()]


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def vocabulary():
    return ImageVocabulary(codebook_size=20, layout_kind="sequence", layout_shape=(4,), min_tokens=4, max_tokens=4)


def tokens(*rows):
    return VisualTokens.from_ids(torch.tensor(rows), TokenLayout("sequence", (4,)))


def same(parts, others):
    assert [type(part) for part in parts] == [type(part) for part in others]
    for part, other in zip(parts, others):
        assert part == other if isinstance(part, str) else torch.equal(part.ids, other.ids) and part.layout == other.layout


def test_codes_follow_the_old_words_and_are_written_with_five_digits(tokenizer, vocabulary):
    vocabulary.extend(tokenizer)
    assert vocabulary.first_id(tokenizer) == len(WORDS)
    assert tokenizer.convert_tokens_to_ids("<img_00007>") == len(WORDS) + 7
    assert tokenizer.convert_tokens_to_ids(["<img>", "</img>"]) == [len(WORDS) + 20, len(WORDS) + 21]
    assert vocabulary.to_text(tokens([0, 7, 19, 7])) == ["<img><img_00000><img_00007><img_00019><img_00007></img>"]
    assert (
        tokenizer.encode(vocabulary.to_text(tokens([0, 7, 19, 7]))[0], add_special_tokens=False)
        == vocabulary.to_ids(tokens([0, 7, 19, 7]), tokenizer)[0]
    )


def test_interleaved_texts_and_images_come_back_from_their_ids(tokenizer, vocabulary):
    vocabulary.extend(tokenizer)
    parts = ["a red apple :", tokens([1, 2, 3, 4]), tokens([5, 6, 7, 8]), "and more text"]
    ids = vocabulary.encode(parts, tokenizer)
    assert ids[0] == tokenizer.bos_token_id and len(ids) == 1 + 4 + 6 + 6 + 3
    same(vocabulary.decode(ids, tokenizer), parts)
    same(vocabulary.decode(torch.tensor(ids), tokenizer), parts)
    both = VisualTokens.stack(parts[1:3])
    assert vocabulary.encode([parts[0], both, parts[3]], tokenizer) == ids


def test_broken_images_are_errors(tokenizer, vocabulary):
    vocabulary.extend(tokenizer)
    first = vocabulary.first_id(tokenizer)
    start, end, word = first + 20, first + 21, tokenizer.convert_tokens_to_ids("apple")
    for ids, message in [
        ([start, first, first, end], "exactly 4"),
        ([start, first], "stops after 1 codes"),
        ([word, first], "outside an image"),
        ([end], "outside an image"),
        ([start, word, end], "inside an image"),
        ([start, start], "inside an image"),
    ]:
        with pytest.raises(ValueError, match=message):
            vocabulary.decode(ids, tokenizer)
    with pytest.raises(ValueError, match="4 to 4 codes"):
        vocabulary.to_text(tokens([1, 2, 3, 20]))
    with pytest.raises(ValueError, match="continuous values"):
        vocabulary.to_text(VisualTokens.from_values(torch.zeros(1, 4, 2), vocabulary.layout))


def test_a_tokenizer_without_the_words_is_an_error_and_so_is_one_with_another_order(tokenizer, vocabulary):
    with pytest.raises(ValueError, match="lacks 22 of the image words"):
        vocabulary.first_id(tokenizer)
    tokenizer.add_tokens(["<img_00003>"])
    with pytest.raises(ValueError, match="another order"):
        vocabulary.extend(tokenizer)


def test_extending_a_model_adds_rows_and_keeps_the_old_ones(tokenizer, model, vocabulary):
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    vocabulary.extend(tokenizer, model)
    for old, table in zip(before, (model.get_input_embeddings().weight, model.get_output_embeddings().weight)):
        assert table.shape == (len(WORDS) + 22, 16) and torch.equal(table[: len(WORDS)], old)
        assert table[len(WORDS) :].std() < 2 * old.std() and len(table.unique(dim=0)) == len(table)
    assert model.config.vocab_size == len(tokenizer) == len(WORDS) + 22
    after = model.get_input_embeddings().weight.clone()
    vocabulary.extend(tokenizer, model)
    assert torch.equal(after, model.get_input_embeddings().weight)


def test_a_model_with_spare_rows_is_not_shrunk(tokenizer, model, vocabulary):
    model.resize_token_embeddings(128, mean_resizing=False)
    vocabulary.extend(tokenizer, model)
    assert model.get_input_embeddings().weight.shape[0] == 128


def test_similar_codes_start_as_similar_words(tokenizer, model, vocabulary):
    vectors = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    vectors[1] = vectors[0] + 0.01
    vocabulary.extend(tokenizer, model, code_vectors=vectors)
    rows = model.get_input_embeddings().weight[len(WORDS) :]
    distances = (rows[:20] - rows[0]).norm(dim=1)
    assert distances[1] < 0.2 * distances[2:].min()
    with pytest.raises(ValueError, match="code_vectors holds 3 rows"):
        vocabulary.extend(tokenizer, code_vectors=vectors[:3])


def test_a_stock_model_learns_interleaved_sequences(tokenizer, model, vocabulary):
    vocabulary.extend(tokenizer, model)
    ids = torch.tensor([vocabulary.encode(["a red apple :", tokens([3, 1, 4, 1])], tokenizer)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(50):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    prompt = vocabulary.encode(["a red apple :"], tokenizer)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=2)
    same(vocabulary.decode(out[0], tokenizer), ["a red apple :", tokens([3, 1, 4, 1])])


def test_the_grammar_makes_an_untrained_model_write_whole_images(tokenizer, model, vocabulary):
    vocabulary.extend(tokenizer, model)
    start = tokenizer.convert_tokens_to_ids("<img>")
    prompt = torch.tensor([[*vocabulary.encode(["a green apple"], tokenizer), start]] * 3)
    torch.manual_seed(0)
    out = model.generate(prompt, max_new_tokens=5, do_sample=True, pad_token_id=2, prefix_allowed_tokens_fn=vocabulary.grammar(tokenizer))
    for row in out:
        parts = vocabulary.decode(row, tokenizer)
        assert parts[0] == "a green apple" and parts[1].counts.tolist() == [4]
    allowed = vocabulary.grammar(tokenizer)
    assert allowed(0, out[0]) == [*range(len(WORDS)), start]  # after an image: words, or the next image


def test_an_image_of_any_allowed_length_ends_where_the_model_ends_it(tokenizer):
    flexible = ImageVocabulary(codebook_size=20, layout_kind="sequence", layout_shape=(4,), min_tokens=1, max_tokens=4)
    flexible.extend(tokenizer)
    first = flexible.first_id(tokenizer)
    allowed = flexible.grammar(tokenizer)
    codes, start, end = list(range(first, first + 20)), first + 20, first + 21
    assert allowed(0, torch.tensor([start])) == codes
    assert allowed(0, torch.tensor([start, first])) == [*codes, end]
    assert allowed(0, torch.tensor([start, *[first] * 4])) == [end]
    assert flexible.decode([start, first + 3, end], tokenizer)[0].ids.tolist() == [[3]]


def test_saving_and_loading_tokenizer_model_and_vocabulary_changes_nothing(tokenizer, model, vocabulary, tmp_path):
    vocabulary.extend(tokenizer, model)
    for part in (tokenizer, model, vocabulary):
        part.save_pretrained(tmp_path)
    again = ImageVocabulary.from_pretrained(tmp_path)
    assert again == vocabulary and again.layout == vocabulary.layout
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    parts = ["a red apple :", tokens([1, 2, 3, 4])]
    ids = vocabulary.encode(parts, tokenizer)
    assert again.encode(parts, words) == ids
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


def test_bad_vocabularies_and_files_are_refused(tmp_path):
    good = dict(codebook_size=8, layout_kind="sequence", layout_shape=(4,), min_tokens=4, max_tokens=4)
    for change in ({"codebook_size": 0}, {"min_tokens": 5}, {"max_tokens": 5}, {"template": "<img>"}, {"start": "</img>"}):
        with pytest.raises(ValueError):
            ImageVocabulary(**{**good, **change})
    with pytest.raises(OSError, match="image_vocabulary.json"):
        ImageVocabulary.from_pretrained(tmp_path)
    (tmp_path / "image_vocabulary.json").write_text('{"codebook_sizes": 8}')
    with pytest.raises(ValueError, match="did you mean 'codebook_size'"):
        ImageVocabulary.from_pretrained(tmp_path)


def test_any_discrete_tokenizer_of_the_package_has_a_vocabulary(tokenizer):
    import vistok

    fsq = vistok.create("fsq2d-tiny")
    vocabulary = ImageVocabulary.of(fsq, template="<v{}>")
    assert vocabulary.max_tokens == fsq.max_tokens and vocabulary.layout == fsq.layout
    with pytest.raises(ValueError, match="no codebook"):
        ImageVocabulary.of(vistok.create("vae-small"))
