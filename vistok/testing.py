"""Checks for people who write or port pruning methods and models; nothing in the library itself imports this module.

The yardstick for dropping tokens is the mask oracle: removing a token from layer k on, with every other token in its own place, is the
same as hiding it as a key from layer k on in the unpruned model. So a pruned run, with short caches, ragged rows and rebuilt masks, must
give the logits of one plain forward over the whole sequence, without a cache, with those columns masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.pruning import prune
from vistok.pruning.families import attention_of, family_of, text_model


@dataclass(frozen=True)
class OracleReport:
    """What the comparison saw."""

    max_difference: float
    """Largest difference from the oracle's logits."""
    distance_from_unpruned: float
    """Largest difference between the first logits of the pruned and of the unpruned model: had it been small, the check would be weak."""
    num_dropped: tuple[tuple[int, int], ...]
    """(layer, tokens that are gone from this layer on, over the batch) for each stage."""


def mask_oracle_logits(model: nn.Module, inputs: dict, drops: Sequence[tuple[int, Tensor]], new_tokens: Tensor) -> Tensor:
    """Logits of the unpruned model for each new token and the one after the last, with dropped tokens masked as keys.

    inputs: of the processor. drops: (layer, [B, L] bool) pairs; such tokens are hidden in that layer and all later ones. new_tokens: [B, T]
    that follow the prompt. Returns [B, T+1, V]: row t is the distribution after t of them.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    B, T = new_tokens.shape
    family = family_of(model)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    positions = model._prepare_position_ids_for_generation(ids, {**rest, "attention_mask": mask})
    positions = torch.cat([positions, positions[..., -1:] + 1 + torch.arange(T, device=ids.device)], dim=-1)
    if family.has_positions_from_one:
        positions = positions + 1
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in rest:
            rest[name] = torch.cat([rest[name], _types_of_text(model, name, rest[name], T)], dim=1)
    layers = text_model(model).layers
    hooks = [layer.register_forward_pre_hook(_hide(drops, number, ids.shape[1]), with_kwargs=True) for number, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            output = model(
                input_ids=torch.cat([ids, new_tokens], dim=1), attention_mask=torch.cat([mask, mask.new_ones(B, T)], dim=1),
                position_ids=positions, use_cache=False, **rest,
            )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    return output.logits[:, ids.shape[1] - 1 :]


def assert_matches_mask_oracle(
    model: nn.Module,
    inputs: dict,
    method,
    *,
    num_new_tokens: int = 3,
    second_turn: Tensor | None = None,
    suppress_tokens: Sequence[int] = (),
    tolerance: float = 2e-4,
    **options,
) -> OracleReport:
    """Prune `model`, generate, and hold every logit against the mask oracle; raises AssertionError with the largest difference.

    inputs: of the processor, a batch of any padding and any images. method, options: as for `vistok.prune`. second_turn: [B, T] ids of a
    second question, which is asked on the cache of the first answer. suppress_tokens: ids never to generate, for models of random weights
    that would write image placeholders. tolerance: allowed difference, times the largest logit where that is over 1.
    """
    generation = {
        "max_new_tokens": num_new_tokens, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
        "suppress_tokens": list(suppress_tokens) or None,
    }  # fmt: skip
    L = inputs["input_ids"].shape[1]
    with prune(model, method, **options) as pruned:
        result = model.generate(**inputs, **generation)
        drops = pruned.drops()
        tokens, logits = result.sequences[:, L:], torch.stack(result.logits, dim=1)
        if second_turn is not None:
            turn = {"input_ids": torch.cat([result.sequences, second_turn], dim=1)}
            more = turn["input_ids"].shape[1] - L
            for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
                if name in inputs:
                    turn[name] = torch.cat([inputs[name], _types_of_text(model, name, inputs[name], more)], dim=1)
            result = model.generate(**turn, past_key_values=result.past_key_values, **generation)
            tokens = result.sequences[:, L:]
            logits = torch.cat([logits, torch.stack(result.logits, dim=1)], dim=1)
    oracle = mask_oracle_logits(model, inputs, drops, tokens[:, :-1])
    steps = list(range(num_new_tokens)) + list(range(oracle.shape[1] - num_new_tokens, oracle.shape[1]))[: logits.shape[1] - num_new_tokens]
    difference = float((logits - oracle[:, steps]).abs().max())
    unpruned = mask_oracle_logits(model, inputs, [], tokens[:, :0])
    report = OracleReport(
        difference, float((logits[:, 0] - unpruned[:, 0]).abs().max()), tuple((layer, int(dropped.sum())) for layer, dropped in drops)
    )
    bound = tolerance * max(1.0, float(oracle.abs().max()))
    if not difference <= bound:
        raise AssertionError(f"the pruned model's logits are {difference:.2e} from the mask oracle, allowed {bound:.2e}: {report}")
    return report


def _types_of_text(model: nn.Module, name: str, types: Tensor, length: int) -> Tensor:
    """What a row of the inputs goes on with for text after the prompt; PaliGemma calls its answer, which is causal, type 1."""
    is_paligemma = family_of(model).has_positions_from_one and name == "token_type_ids"
    fill = 1 if name == "attention_mask" or is_paligemma else 0
    return types.new_full((types.shape[0], length), fill)


def _hide(drops: Sequence[tuple[int, Tensor]], number: int, length: int):
    """A pre-hook that masks the tokens which are gone by layer `number`."""
    gone = [dropped for layer, dropped in drops if layer <= number]

    def hook(layer: nn.Module, args: tuple, kwargs: dict):
        if not gone:
            return None
        if attention_of(layer) is None:
            raise ValueError(f"a {type(layer).__name__} has no keys to mask: dropping a token in it is another thing than hiding it")
        hidden = args[0] if args else kwargs["hidden_states"]
        B, Q = hidden.shape[:2]
        dropped = torch.zeros(B, Q, dtype=torch.bool, device=hidden.device)
        dropped[:, :length] = torch.stack(gone).any(dim=0)
        mask = kwargs.get("attention_mask")
        if mask is None:
            allowed = torch.ones(Q, Q, dtype=torch.bool, device=hidden.device).tril()[None, None]
        else:
            allowed = mask if mask.dtype == torch.bool else mask > -1
        allowed = allowed & ~dropped[:, None, None, :] | torch.eye(Q, dtype=torch.bool, device=hidden.device)  # a hidden row sees itself
        if (mask is not None and mask.dtype != torch.bool) or attention_of(layer).config._attn_implementation == "eager":
            allowed = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(
                ~allowed, torch.finfo(hidden.dtype).min
            )
        return args, {**kwargs, "attention_mask": allowed}

    return hook
