"""`walk` for one image on a CPU: Python numbers in place of tensors of one number, and one sum over the vocabulary a rejection.

Recursive rejection of x_1, x_2, ..., drawn from q / z_k, in the standard form subtracts and norms the residual after each of them. Not
normed it is R_k = [R_(k-1) - c_k q]+ with c_k = S_(k-1) / z_k and S_k the sum of R_k, and since [[a]+ - b]+ = [a - b]+ for b >= 0,

    R_k = [p - C_k q]+                 C_k = c_1 + ... + c_k
    accept x_(k+1) with  [p(x) - C_k q(x)]+ z_(k+1) / (S_k q(x))

so p and q are read off at the candidates once, and a rejection costs S_k alone: a subtraction, a clamp and a sum.

M draft tokens, D depth, C candidates, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vistok.decoding.accept.rounds import Position
from vistok.decoding.draft import Draft
from vistok.decoding.sampling import sample
from vistok.decoding.walk import Verdict


def reject_in_turn(p: Tensor, q: Tensor, candidates: Sequence[int], coins: Sequence[float], *, replaces: bool) -> tuple[int, Tensor]:
    """What `decide_rows(verify(...))` decides of one position: the accepted candidate, -1 for none, and the law that the token is drawn
    from where none was, not normed.

    p, q: [V]. candidates: the tokens in the order of drawing, -1 for none. replaces: whether they are independent draws of q.
    """
    real = [x for x in candidates if x >= 0]
    at_p, at_q = p[real].tolist(), q[real].tolist()
    mass_left = 0.0 if replaces or len(real) == 1 else q.sum(dtype=torch.float64).item()
    rest, taken, total = p, 0.0, 1.0  # R, C, S
    seen: set[int] = set()
    for index, (x, a, b) in enumerate(zip(real, at_p, at_q)):
        if b <= 0 or (not replaces and x in seen):  # not one of the draft's, and never accepted
            continue
        z = max(mass_left, b) if mass_left else 1.0
        if coins[index] * total * b < max(a - taken * b, 0.0) * z:
            return index, rest
        if not replaces:
            seen.add(x)
            mass_left -= b
        less = torch.sub(p, q, alpha=taken + total / z).clamp_(min=0)
        if (left := less.sum().item()) > 0:  # else q covers what was left, and nothing can have been rejected
            rest, taken, total = less, taken + total / z, left
    return -1, rest


def walk_one(
    draft: Draft,
    law_of: Callable[[int], Tensor],
    rule,
    *,
    coins: Tensor,
    position_uniforms: Tensor,
    active: Tensor,
    room: Tensor,
) -> Verdict:
    """`walk` of one image, by a rule that verifies exactly against a law. law_of: a node -> p [1, V]. The rest as there."""
    shape, children, tokens = draft.shape, draft.shape.child_lists, draft.ids[0].tolist()
    coins, room, replaces = coins[0].tolist(), int(room), draft.drawn == "with_replacement"
    path, spent, token = [0], 0.0, 0
    while bool(active):
        node, depth = path[-1], len(path) - 1
        p, kids = law_of(node), children[node]
        q = draft.law_row(node) if kids and draft.q is not None else None
        ids = torch.tensor([[tokens[kid - 1] for kid in kids]], dtype=torch.int64)
        law = rule.law(Position(p, ids, q, draft.drawn if q is not None else "deterministic"))
        if law is not p and depth < room:
            spent += 0.5 * (law - p).abs().sum().item()
        after = -1
        if q is not None:
            found, law = reject_in_turn(law[0], q[0], ids[0].tolist(), [coins[kid - 1] for kid in kids], replaces=replaces)
            after = -1 if found < 0 else kids[found]
        if after < 0:
            token = int(sample(law.view(-1), position_uniforms[0, depth]))
            if q is None:
                after = next((kid for kid in kids if tokens[kid - 1] == token), -1)
        if after < 0:
            break
        path.append(after)
    accepted = len(path) - 1
    emitted = min(accepted + 1, room) if bool(active) else 0
    numbers = torch.tensor([accepted, token, emitted])[:, None]
    path = torch.tensor([path + [-1] * (shape.depth + 1 - len(path))])
    return Verdict(path, *numbers, torch.tensor([spent]))
