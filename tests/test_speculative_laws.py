"""The joint law of whole sequences that the speculative loop emits, by chi-square against the law of the model, summed exactly.

Every row of one large batch is an image of its own with its own uniforms, so a test is one call. The quick set holds what covers most
(a drawn chain, a tree, a window, garbage); the whole matrix of drafters, rules and guidance is marked slow. Calls with one image and with
four are held to be those of the large batch, image by image, so that its law is theirs too.
"""

import itertools

import pytest
import torch

import vistok
from vistok.decoding import SamplingConfig
from vistok.decoding.accept import make_rule
from vistok.decoding.draft import Draft, TreeShape
from vistok.decoding.drafters import make_drafter
from vistok.decoding.heads import ChimeraHeads, EagleHead, MedusaHeads
from vistok.decoding.sampling import sample, warp
from vistok.decoding.speculative import speculate

V, N, IMAGES = 5, 3, 40_000


def tiny(seed=0, **overrides):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        shape = dict(codebook_size=V, layout_shape=(2, 2), width=8, depth=2, num_heads=1, hidden=8, num_classes=2)
        model = vistok.create("gpt-tiny", **{**shape, **overrides}).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(15)
    return model


class Garbage:
    """Drafts that know nothing: drawn from a law that has nothing to do with the target's and misses some of its tokens, or not drawn."""

    name = "garbage"

    def __init__(self, kind, num_nodes=3):
        self.kind, self.num_nodes = kind, num_nodes

    def start(self, state):
        self.step = 0

    def propose(self, state, budget):
        self.step += 1
        B = state.num_images
        if self.kind == "deterministic":
            ids = (state.root[:, None] + torch.tensor([1, 2, 1])) % V  # two children of the root, and one below the first
            return Draft(ids, TreeShape(torch.tensor([[0, 0, 1]])), "deterministic")
        q = torch.tensor([0.7, 0.0, 0.0, 0.25, 0.05]).roll(self.step).expand(B, budget, V)
        return Draft.chain(sample(q, state.uniforms(budget)), q)

    def observe(self, state, verdict, target):
        pass


@torch.no_grad()
def joint_law(model, condition, sampling, scale):
    """[V] * N probabilities of all sequences of the first image's condition."""
    ids = torch.tensor(list(itertools.product(range(V), repeat=N)))
    logits = model(ids[:, : N - 1], condition[:1][torch.zeros(len(ids), dtype=torch.long)])
    if scale != 1:
        null = model(ids[:, : N - 1], condition[:1].null()[torch.zeros(len(ids), dtype=torch.long)])
        logits = null + scale * (logits - null)
    p = warp(logits, sampling).double().softmax(-1)
    return p.gather(-1, ids[..., None])[..., 0].prod(1)


def surprise(ids, law):
    """z of the chi-square statistic of drawn sequences [n, N]; rare sequences share a cell."""
    n = len(ids)
    index = sum(ids[:, i] * V ** (N - 1 - i) for i in range(N))
    seen = torch.bincount(index, minlength=V**N).double()
    assert not seen[law == 0].any(), "a sequence of probability 0 was drawn"
    expected = law * n
    rare = expected < 5
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() else x for x in (seen, expected))
    seen, expected = seen[expected > 0], expected[expected > 0]
    cells = len(seen) - 1
    return float((((seen - expected) ** 2 / expected).sum() - cells) / (2 * cells) ** 0.5)


def drafted(model, case, rule, scale, sampling, uniforms):
    """Tokens and stats of as many images as there are rows of uniforms."""
    drafter = drafter_for(case, model)
    condition = model.make_condition(len(uniforms), labels=torch.ones(len(uniforms), dtype=torch.long))
    return speculate(
        model, condition, drafter=drafter, rule=make_rule(rule), uniforms=uniforms, num_tokens=N,
        num_draft_tokens=drafter.num_nodes, sampling=sampling, guidance_scale=scale,
    )  # fmt: skip


def z_of(case, rule="standard", scale=1.0, sampling=None, in_parts=0):
    """z of IMAGES images; so many of them are made again in calls of one and of four, and must be the same."""
    sampling = sampling or SamplingConfig()
    model = tiny()
    condition = model.make_condition(1, labels=[1])
    uniforms = torch.rand(IMAGES, 150, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = [drafted(model, case, rule, scale, sampling, part) for part in uniforms.split(8000)]
    ids = torch.cat([tokens.ids for tokens, _ in parts])
    for size in (1, 4):
        for part in range(0, in_parts, size):
            alone, _ = drafted(model, case, rule, scale, sampling, uniforms[part : part + size])
            assert torch.equal(alone.ids, ids[part : part + size])
    assert sum(sum(stats.accepted[1:]) for _, stats in parts) > 0.02 * IMAGES, "nothing was accepted, so nothing was tested"
    return surprise(ids[:, :N], joint_law(model, condition, sampling, scale))


CASES = {
    "garbage drawn": None,
    "garbage deterministic": None,
    "copy": dict(length=2),
    "recycling": dict(length=2, width=2),
    "jacobi": dict(length=2),
    "jacobi left": dict(length=3, fill="left"),
    "jacobi above": dict(length=2, fill="above"),
    "skip": dict(length=2),
    "model": dict(length=2),
    "model tree": dict(shape="tree", length=2, width=3),
    "model beams": dict(shape="beams", length=2, width=3),
    "model best": dict(shape="best", length=2, width=2, num_tokens=5),
    "model auto": dict(shape="auto", length=2, num_tokens=5),
    "eagle": dict(length=2),
    "eagle beams": dict(shape="beams", length=2, width=2),
    "medusa tree": dict(shape="tree", length=2, width=2),
    "chimera": dict(length=2),
}
HEADS = {"eagle": EagleHead, "medusa": MedusaHeads, "chimera": ChimeraHeads}


def drafter_for(case, model):
    name, _, kind = case.partition(" ")
    if name == "garbage":
        return Garbage(kind)
    more = dict(model=tiny(seed=3)) if name == "model" else {}
    if name in HEADS:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            more = dict(head=HEADS[name].for_target(model).eval())
    return make_drafter(name, model, **CASES[case], **more)


QUICK = [("model tree", "standard", 1.0), ("jacobi", "standard", 2.0), ("garbage drawn", "standard", 1.0)]


@pytest.mark.parametrize("case, rule, scale", QUICK)
def test_the_joint_law_is_that_of_the_model(case, rule, scale):
    assert abs(z_of(case, rule, scale)) < 5


INDEPENDENT = ("garbage drawn", "jacobi", "jacobi left", "jacobi above", "skip", "model", "eagle", "chimera")  # K-SEQ takes no other draws
MATRIX = [(case, "standard") for case in CASES] + [(case, "k_seq") for case in INDEPENDENT]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("case, rule", MATRIX)
def test_every_drafter_with_every_exact_rule_leaves_the_joint_law(case, rule, scale):
    assert abs(z_of(case, rule, scale, in_parts=64)) < 5


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_warped_laws_are_left_too(case):
    assert abs(z_of(case, sampling=SamplingConfig(temperature=0.8, top_k=3))) < 5
