"""Token folders of tokens at hand, and the check that a stopped run goes on bit by bit."""

import torch

from vistok.data.shards import TokenFolder, TokenPlan, TokenShards

CLASSES = ("a", "b", "c")


def token_folder(path, tokens, *, codebook_size, captions=None, flipped=None, classes=CLASSES):
    """A folder of these tokens, image i in class i modulo 3. flipped: those of the mirrored images, where there are any."""
    B = len(tokens)
    plan = TokenPlan(
        num_images=B,
        num_tokens=tokens.ids.shape[1],
        codebook_size=codebook_size,
        layout=tokens.layout,
        tokenizer_digest="",
        classes=tuple(classes),
        has_flips=flipped is not None,
    )
    labels, names = [i % 3 for i in range(B)], [f"image {i}" for i in range(B)]
    options = {} if flipped is None else {"flipped": flipped}
    TokenShards(path, plan).write(0, tokens, labels=labels, captions=[""] * B if captions is None else captions, names=names, **options)
    return TokenFolder(path)


def assert_resumes_bit_by_bit(run):
    """run: (name of the run, steps, resume=False) -> the trained weights; checkpoints are saved every second step."""
    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, resume=True)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
