"""Token Recycling as a drafter: the likely successors of each token, as the target last saw them.

Luo et al. 2024, arXiv 2408.08696. Published for greedy decoding; its candidates are not drawn, so that they serve sampling as well (see
`decoding.walk`). One table serves all images of all calls, and grows better with each: a drafter object is worth keeping. With an exact
rule the tokens do not depend on what is in it; with a lossy one they do.
"""

import torch

from vistok.decoding.draft import Draft, TreeShape
from vistok.decoding.drafters.registry import register_drafter
from vistok.decoding.growth import Growth
from vistok.decoding.recycling import recycled_tree, updated_successors
from vistok.decoding.trees import TreeTemplate


@register_drafter("recycling")
class RecyclingDrafter:
    """`width` chains of `length` tokens that part at the root: its `width` likeliest successors, then the likeliest of each; or one chain,
    where that is found to pay more.

    Raises ValueError: width is more than the codes there are.
    """

    def __init__(self, target, *, length: int = 3, width: int = 1):
        if not 1 <= width <= target.vocab_size:
            raise ValueError(f"width={width} but there are {target.vocab_size} codes")
        tree = Growth(shape="tree", length=length, width=width).template
        chains = {n: TreeTemplate.chain(n) for n in range(1, length + 1)}
        self.plans = {**chains, length * width: tree} if width > 1 else None
        self._templates = {**chains, length * width: tree}
        self._shapes = {n: TreeShape.from_template(template, target.device) for n, template in self._templates.items()}
        self.num_nodes = length * width
        self.successors = torch.zeros(target.vocab_size, width, dtype=torch.int32, device=target.device)

    def start(self, state) -> None:
        """The table stays: what followed a token in other images is the best guess for this one."""

    def propose(self, state, budget: int) -> Draft:
        if budget not in self._templates:
            raise ValueError(f"num_draft_tokens={budget} but this drafter makes {', '.join(map(str, self._templates))} tokens")
        tokens = recycled_tree(self.successors, state.root, self._templates[budget])[:, 1:]
        return Draft(tokens, self._shapes[budget], "deterministic")

    def observe(self, state, verdict, target) -> None:
        live = verdict.emitted > 0  # finished images have nothing to teach
        self.successors = updated_successors(self.successors, target.ids[live].flatten(), target.logits()[live].flatten(0, 1))
