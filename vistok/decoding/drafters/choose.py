"""From what a person types to a drafter and a rule."""

import difflib
import inspect
from collections.abc import Sequence

from vistok.decoding.accept import make_rule, rule_options
from vistok.decoding.drafters.registry import drafter_options, list_drafters, make_drafter

_HEADS = {"EagleHead": "eagle", "MedusaHeads": "medusa", "ChimeraHeads": "chimera"}


def choose_drafter(drafter, target, options: dict | None = None):
    """A drafter for a target.

    drafter: a drafter, returned as it is; the name of one; or a model, or where to load one from: a trained head, or a smaller generator.
    options: of a drafter named or loaded. Raises ValueError: there is no drafter and no model of that name, or it does not fit the target.
    """
    options = options or {}
    if hasattr(drafter, "propose"):
        return drafter
    if isinstance(drafter, str):
        if drafter in list_drafters():
            return make_drafter(drafter, target, **options)
        from vistok.registry import load

        try:
            drafter = load(drafter)
        except OSError as error:
            near = difflib.get_close_matches(drafter, list_drafters(), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"drafters: {', '.join(list_drafters())}; models: {error}"
            raise ValueError(f"{drafter!r} is no drafter and no model; {hint}") from error
    kind = type(drafter).__name__
    if kind in _HEADS:
        return make_drafter(_HEADS[kind], target, head=drafter, **options)
    model = getattr(drafter, "generator", drafter)
    if not hasattr(model, "extend"):
        raise ValueError(f"a {kind} cannot draft: it is no trained head ({', '.join(_HEADS)}) and no generator of one next token")
    return make_drafter("model", target, model=model.to(target.device), **options)


def choose_rule(rule, *, tokenizer=None, target=None, eps: float | None = None, options: dict | None = None):
    """An acceptance rule. rule: a rule, returned as it is; its name; or None: "standard", or "lantern_budget" where eps is given.

    eps: total variation a token may lose, of the rules that have it. Raises ValueError: no such rule, or an option it does not have.
    """
    if rule is not None and not isinstance(rule, str):
        if eps is not None:
            raise ValueError("eps is for a rule given by name; this one is made already")
        return rule
    name = rule or ("standard" if eps is None else "lantern_budget")
    if eps is not None:
        known = rule_options(name)
        if "eps" not in known:
            raise ValueError(f"rule {name!r} has no eps; its options: {', '.join(known) or 'none'}")
        options = {**(options or {}), "eps": eps}
    return make_rule(name, tokenizer=tokenizer, target=target, **(options or {}))


def read_options(texts: Sequence[str], known: dict, what: str) -> dict:
    """Options written as name=value, each of the type of its default. Raises ValueError: no "=", or not such a value."""
    options = {}
    for text in texts:
        name, has_value, value = text.partition("=")
        if not has_value:
            raise ValueError(f"{what} {text!r} must be written name=value; there are {', '.join(known) or 'none'}")
        default = known.get(name)
        kind = str if default is None or default is inspect.Parameter.empty else type(default)
        try:
            options[name] = value == "true" if kind is bool else kind(value)
        except ValueError as error:
            raise ValueError(f"{what} {name}={value!r} must be {'a whole number' if kind is int else 'a number'}") from error
    return options


def options_of(drafter: str) -> dict:
    """Options of a drafter by its name; of a model's folder those of the shapes a draft grows in."""
    return drafter_options(drafter if drafter in list_drafters() else "model")
