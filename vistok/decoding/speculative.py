"""Speculative decoding: a drafter proposes tokens, one pass of the target judges them all, a rule decides which stay.

    draft    tokens in a chain or a tree behind the last decided token, the root
    pass     features of the root and all draft tokens in one pass of the target; rows stand at places of their own
    walk     p = softmax(warp(guide(logits))) at visited nodes only; down the tree to the child that the rule accepts
    commit   the accepted path and one more token; the cache keeps the path's slots and forgets the others

Leviathan et al. 2023, arXiv 2211.17192; trees: SpecInfer, 2305.09781. Rows of a batch never wait for each other, and conditional and
unconditional rows share every decision. Numbers are used in this order: first the plain loop's uniforms, one a position, which draw every
token that is no accepted draft; then, step by step and for every row alike, the drafter's own and one for each draft token.

B images, R rows (2B under guidance), N tokens, M draft tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from vistok import rng
from vistok.decoding.draft import Draft, TreeShape
from vistok.decoding.generate import WORTH_PACKING, generate, guidance_schedule
from vistok.decoding.sampling import SamplingConfig, sample
from vistok.decoding.state import DecodingState, TargetPass
from vistok.decoding.stats import SpeculationStats, Tally
from vistok.decoding.trees import TreeTemplate
from vistok.decoding.tuning import Memory, Pace, clock_for, cost_table, memory_of
from vistok.decoding.uniforms import GivenUniforms, Uniforms
from vistok.decoding.walk import Verdict, walk, walk_chain
from vistok.decoding.walk_one import walk_one
from vistok.layers.packed import packed_linears
from vistok.layers.placement import PlacedCache
from vistok.tokens import VisualTokens

_LONGEST_AT_ONCE = 16  # tokens of a chain whose laws are all computed; behind a longer one's first rejection most would not be read


def check_target(model) -> None:
    """Raises ValueError: the generator does not predict one next token at a time, so there is nothing to draft."""
    if not hasattr(model, "extend"):
        raise ValueError(
            f"{type(model).__name__} does not predict one next token after another, so tokens cannot be drafted for it; "
            "leave the drafter out (it makes many tokens a pass already)"
        )
    if model.training:
        raise ValueError("the generator is in training mode; call .eval() first")


@torch.no_grad()
def speculate(
    model,
    condition,
    *,
    drafter,
    rule,
    generators: Sequence[torch.Generator] | None = None,
    uniforms: Tensor | None = None,
    num_tokens: int | None = None,
    num_draft_tokens: int | Literal["auto"] | None = None,
    sampling: SamplingConfig | None = None,
    guidance_scale: float | Callable[[int], float] = 1.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[VisualTokens, SpeculationStats]:
    """Tokens of B images, one image a generator, or a row of uniforms; arguments as for `generate`.

    drafter, rule: see `vistok.protocols`; `make_drafter` and `make_rule` build them by name. With an exact rule the tokens have the law of
    `generate`; where the drafter's tokens are not drawn, or temperature is 0, they are the very tokens of `generate` with those generators,
    up to rounding.
    num_draft_tokens: M; "auto" finds it while it drafts and goes back to plain decoding where drafting loses, or lost in the calls before
    (`decoding.tuning`). Of drawn drafts the tokens then depend on how quick the machine is, though not their law. None: "auto" where no
    token depends on it, else all that the drafter makes.
    uniforms: [B, n] on [0, 1), instead of generators, used in the order the head of this file says; n is at least N and enough.
    Every generator is advanced by `model.max_tokens` uniforms and one integer. Image i depends on its own generator alone.
    Raises ValueError: the generator is no next-token model or in training mode, a number is out of range, or not exactly one of generators
    and uniforms is given.
    """
    check_target(model)
    if (generators is None) == (uniforms is None):
        raise ValueError("give generators or uniforms, one of both")
    B, N = len(uniforms if generators is None else generators), model.max_tokens if num_tokens is None else num_tokens
    if isinstance(N, bool) or not isinstance(N, int) or not 1 <= N <= model.max_tokens:
        raise ValueError(f"num_tokens={num_tokens!r} but this generator makes 1 to {model.max_tokens} tokens")
    M = num_draft_tokens if isinstance(num_draft_tokens, int) else drafter.num_nodes
    if not 0 <= M <= drafter.num_nodes or not (num_draft_tokens in (None, "auto") or isinstance(num_draft_tokens, int)):
        raise ValueError(f"num_draft_tokens={num_draft_tokens!r} but this drafter makes 0 to {drafter.num_nodes}, or 'auto'")
    sampling = sampling or SamplingConfig()

    began = time.perf_counter()
    if generators is not None:
        of_position = rng.rand((model.max_tokens,), generators, device=model.device, dtype=torch.float64)
        stream = Uniforms.from_generators(generators, model.device)
    elif uniforms.shape[1] < N:
        raise ValueError(f"uniforms hold {uniforms.shape[1]} draws an image, but {N} tokens are asked for")
    else:
        of_position, stream = uniforms[:, :N].to(model.device), GivenUniforms(uniforms[:, N:].to(model.device))
    scale_of = guidance_scale if callable(guidance_scale) else guidance_schedule(model, guidance_scale)
    is_guided = any(float(scale_of(n)) != 1 for n in range(N))
    memory = memory_of(model, drafter, (M, num_draft_tokens, N, str(rule), sampling, B, is_guided))
    if M and N > 1 and not memory.should_try():
        plain = dict(num_tokens=N, sampling=sampling, guidance_scale=guidance_scale, on_step=on_step)
        tokens, cost = generate(model, condition, uniforms=of_position, **plain)
        return tokens, SpeculationStats.of_plain(cost, drafter=drafter, rule=rule, memory=memory)
    of_position = torch.cat([of_position[:, :N], of_position.new_zeros(B, M + 1)], dim=1)  # what overshoots is drawn and thrown away
    state = read_prefix(model, condition, B, num_tokens=N, margin=M + 1, sampling=sampling, guidance_scale=guidance_scale, stream=stream)
    _first_token(state, of_position)
    run = _Run(state, drafter, rule, of_position, on_step)
    plans, first = getattr(drafter, "plans", None), M
    if plans and not isinstance(num_draft_tokens, int):
        first = memory.best or max(n for n, plan in plans.items() if plan.levels[-1] == n)  # the longest chain
    with packed_linears(model, state.num_rows * (first + 1)) if N >= WORTH_PACKING else nullcontext():
        if M and N > 1:
            run.draft(
                first,
                paces=lambda draft: num_draft_tokens == "auto" or (num_draft_tokens is None and (plans or _is_free(draft, rule, sampling))),
                memory=memory,
            )
        run.finish()
    ids = state.ids[:, :N].clone()
    return VisualTokens.from_ids(ids, model.layout), run.stats(time.perf_counter() - began)


class _Run:
    """One call: steps that draft, then steps that do not."""

    def __init__(self, state: DecodingState, drafter, rule, of_position: Tensor, on_step):
        self.state, self.drafter, self.rule, self.of_position, self.on_step = state, drafter, rule, of_position, on_step
        self.tally = Tally(state.num_images, drafter.num_nodes, device=state.ids.device)
        self.pace: Pace | None = None
        self._reported = 0
        self._report()

    def draft(self, budget: int, *, paces: Callable[[Draft], bool], memory: Memory) -> None:
        """Draft and verify until every image is done, or drafting is found to lose. paces: whether that may be found, for such drafts."""
        self._draft(budget, paces, memory)
        if self.pace is not None:
            memory.learn(self.pace)

    def _draft(self, budget: int, paces: Callable[[Draft], bool], memory: Memory) -> None:
        state, drafter, N = self.state, self.drafter, self.state.num_tokens
        clock = clock_for(state.ids.device)
        began = clock()
        drafter.start(state)
        draft = drafter.propose(state, budget)
        drafting = clock() - began
        if paces(draft):
            self.pace = self._new_pace(draft, clock, memory)
        while True:
            verifying = clock()
            verdict, target = verify(state, draft, self.rule, self.of_position)
            self.tally.add(draft, verdict)
            observing = clock()
            drafter.observe(state, verdict, target)
            state.end_guidance()
            ended = clock()
            self.tally.drafter_seconds += drafting + ended - observing
            if self.pace is not None:
                self.pace.note(drafting + ended - verifying, state.span[0] - 1, verdict.path, verdict.emitted)
                budget = self.pace.budget
            self._report()
            if not budget or state.span[0] == N:
                return
            began = clock()
            draft = drafter.propose(state, budget)
            drafting = clock() - began

    def _new_pace(self, draft: Draft, clock: Callable[[], float], memory: Memory) -> Pace:
        """What finds the draft to make, where the first one is `draft`; t0 is measured, once a model and device."""
        state = self.state
        costs = cost_table(state.model, state.num_rows)

        def measure(n: int) -> float:
            return costs.measure(n, clock, lambda n: _logits_behind(state, n).sum().item())

        with packed_linears(state.model, state.num_rows):
            costs.measure(1, clock, lambda n: _next_token(state, self.of_position)[0].item(), repeats=3)
        plans, M, N = getattr(self.drafter, "plans", None), draft.shape.num_tokens, state.num_tokens
        if plans is not None:
            return Pace(plans, N, costs, start=M, seen=memory.seen, measure=measure)
        is_chain = draft.shape.is_chain
        return Pace({n: TreeTemplate.chain(n) for n in range(1, M + 1)} if is_chain else {M: None}, N, costs, only_shorter=True)

    def finish(self) -> None:
        """Plain decoding of what is left, a pass over the roots for a token each."""
        state = self.state
        with packed_linears(state.model, state.num_rows) if state.num_tokens - state.span[0] >= WORTH_PACKING else nullcontext():
            while state.span[0] < state.num_tokens:
                state.end_guidance()
                self.tally.add_plain(state.active)
                _take(state, _next_token(state, self.of_position))
                self._report()

    def stats(self, seconds: float) -> SpeculationStats:
        """The numbers of the call."""
        made = self.state.num_images * self.state.num_tokens
        return self.tally.stats(num_tokens=made, seconds=seconds, drafter=self.drafter, rule=self.rule, pace=self.pace)

    def _report(self) -> None:
        """Tell the callback of every position that all images have passed."""
        if self.on_step is not None:
            for step in range(self._reported, self.state.span[0]):
                self.on_step(step, self.state.ids[:, : step + 1])
        self._reported = self.state.span[0]


def read_prefix(
    model, condition, num_images: int, *, num_tokens: int, margin: int, sampling: SamplingConfig, guidance_scale, stream
) -> DecodingState:
    """A pass over the condition: the state in which no token is decided yet. margin: places in cache and ids beyond the last token."""
    B, N = num_images, num_tokens
    if not callable(guidance_scale):
        guidance_scale = guidance_schedule(model, guidance_scale)
    scales = [float(guidance_scale(step)) for step in range(N)]
    rows = 2 * B if any(scale != 1 for scale in scales) else B
    condition = condition.and_null() if rows > B else condition
    cache = model.new_cache(rows, N + margin)
    ids = torch.zeros(B, N + margin, dtype=torch.int64, device=model.device)
    features = model.features(ids.new_empty(rows, 0), condition, cache=cache)
    return DecodingState(
        model=model,
        condition=condition,
        sampling=sampling,
        scales=scales[0] if len(set(scales)) == 1 else torch.tensor(scales, device=ids.device),
        guided_tokens=max((n + 1 for n, scale in enumerate(scales) if scale != 1), default=0),
        num_images=B,
        num_rows=rows,
        num_tokens=N,
        stream=stream,
        ids=ids,
        counts=ids.new_zeros(B),
        span=(0, 0),
        cache=PlacedCache(cache),
        features=features[:, -1],
    )


def _first_token(state: DecodingState, of_position: Tensor) -> None:
    """Decide the first token from the condition, as the plain loop does."""
    law = state.law(state.model.head(state.features[:, None]), state.counts[:, None])[:, 0]
    state.ids[:, 0] = sample(law, of_position[:, 0])
    state.counts, state.span = state.counts + 1, (1, 1)


def verify(state: DecodingState, draft: Draft, rule, of_position: Tensor) -> tuple[Verdict, TargetPass]:
    """One step: the target's pass over a draft, the walk, and the commit. of_position: [B, N + margin] uniforms of the positions."""
    shape, B = draft.shape, state.num_images
    ids = torch.cat([state.root[:, None], draft.ids.clamp(min=0)], dim=1)
    prefix = state.cache.prefix_length
    placement = state.cache.behind(
        state.rows(shape.depths) if len(shape.depths) > 1 else shape.depths,
        state.rows(shape.ancestors) if len(shape.ancestors) > 1 else shape.ancestors,
        span=(prefix + state.span[0] - 1, prefix + state.span[1] - 1),
    )
    target = TargetPass(state, draft, ids, state.model.extend(state.rows(ids), placement, state.cache))
    steps = torch.arange(shape.depth + 1, device=ids.device)
    options = dict(
        coins=state.uniforms(shape.num_tokens),
        position_uniforms=of_position.gather(1, state.counts[:, None] + steps),
        active=state.active,
        room=state.num_tokens - state.counts,
    )
    at_once = shape.is_chain and 0 < shape.num_tokens <= _LONGEST_AT_ONCE
    if B == 1 and rule.gives_law and ids.device.type == "cpu":
        laws = target.law() if at_once else None

        def law_of(node: int) -> Tensor:
            return target.law(ids.new_tensor([[node]]))[:, 0] if laws is None else laws[:, node]

        verdict = walk_one(draft, law_of, rule, **options)
    else:
        hidden = target.features[:B] if rule.needs_hidden else None
        if at_once:
            verdict = walk_chain(draft, target.law(), rule, hidden=hidden, **options)
        else:
            verdict = walk(draft, lambda node: target.law(node[:, None])[:, 0], rule, hidden=hidden, **options)
    path, accepted = verdict.path.clamp(min=0), verdict.emitted - 1
    state.cache.keep(state.rows(path), state.rows(accepted), is_chain=shape.is_chain)
    # the accepted tokens, then the one after them; what stands behind that is overwritten before it is read
    new = torch.where(steps < verdict.accepted[:, None], ids.gather(1, path.roll(-1, 1)), verdict.token[:, None])
    where = state.counts[:, None] + steps
    keeps = steps < verdict.emitted[:, None]
    state.ids.scatter_(1, where, torch.where(keeps, new, state.ids.gather(1, where)))
    last = path.gather(1, accepted.clamp(min=0)[:, None])  # the node that decided the new root
    rows = torch.arange(state.num_rows, device=ids.device)
    state.features = target.features[rows, state.rows(last)[:, 0]]
    state.counts = state.counts + verdict.emitted
    state.span = tuple(torch.stack(state.counts.aminmax()).tolist())  # the step's one wait for the device
    return verdict, target


def _next_token(state: DecodingState, of_position: Tensor) -> Tensor:
    """[B] the token after each root, as the plain loop draws it; a pass over the roots alone."""
    where = state.counts[:, None]
    return sample(state.law(_logits_behind(state, 1), where)[:, 0], of_position.gather(1, where)[:, 0])


def _logits_behind(state: DecodingState, n: int) -> Tensor:
    """[R, n, V]: of a pass over a chain of the roots, each n times; what it writes to the cache is overwritten before it is read."""
    chain, prefix = TreeShape.chain(n - 1, state.ids.device), state.cache.prefix_length
    span = (prefix + state.span[0] - 1, prefix + state.span[1] - 1)
    placement = state.cache.behind(chain.depths, chain.ancestors, span=span)
    return state.model.head(state.model.extend(state.rows(state.root[:, None].expand(-1, n)), placement, state.cache))


def _take(state: DecodingState, token: Tensor) -> None:
    """Commit one token [B] to every image that still grows."""
    active = state.active.long()
    # a finished image takes one too, where nothing reads it
    state.ids.scatter_(1, state.counts[:, None], token[:, None])
    state.counts = state.counts + active
    state.cache.lengths = state.cache.lengths + state.rows(active)
    state.span = tuple(min(count + 1, state.num_tokens) for count in state.span)


def _is_free(draft: Draft, rule, sampling: SamplingConfig) -> bool:
    """Whether the tokens do not depend on what is drafted: those of the plain loop come out of any draft."""
    return rule.exact and (draft.drawn == "deterministic" or sampling.temperature == 0)
