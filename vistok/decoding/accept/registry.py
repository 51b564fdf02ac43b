"""Acceptance rules by name: `make_rule("lantern_budget", eps=0.1, tokenizer=tokenizer)`.

A new rule is one function of a `Position` whose keyword arguments are its options: to `Trial`s, under `@accept_rule`; or, where it is exact
verification against a law that is near the target's, to that law, under `@law_rule`.
"""

import difflib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vistok.decoding.accept.rounds import Position, Trial, verify

MODEL_OPTIONS = ("neighbours", "clusters", "embeddings", "head")
"""Options that are tables or networks, not numbers; `make_rule` finds all but the head in the tokenizer or the target."""


@dataclass(frozen=True)
class AcceptRule:
    """A rule with its options filled in; calling it gives the trials of a position."""

    name: str
    function: Callable[..., Any]
    gives_law: bool
    """Whether the function gives the law that is verified exactly, instead of trials."""
    exact: bool
    """Whether the emitted law is the target's, whatever the draft."""
    bound: float | None
    """At most so much total variation a position between emitted and target law; None: nothing bounds it."""
    paper: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self, at: Position) -> Iterator[Trial]:
        """The trials of a position, lazily: each computed only where the one before was rejected."""
        if not self.gives_law:
            return self.function(at, **self.options)
        return verify(at, None if self.exact else self.law(at))

    def law(self, at: Position) -> Tensor | None:
        """The law [..., V] that the position emits, where the rule verifies exactly against one; None where it does not."""
        return self.function(at, **self.options) if self.gives_law else None

    @property
    def needs_hidden(self) -> bool:
        """Whether the rule reads the target's hidden states at the candidates."""
        return "head" in self.options

    def __str__(self) -> str:
        numbers = ", ".join(f"{k}={v}" for k, v in self.options.items() if isinstance(v, (int, float, str)))
        return f"{self.name}({numbers})" if numbers else self.name


RULES: dict[str, Callable[..., AcceptRule]] = {}


def accept_rule(name: str, *, exact: bool = False, bound: str | None = None, paper: str = "", gives_law: bool = False):
    """Decorator: register a rule. bound: name of the option that bounds the loss of a position."""

    def add(function):
        def build(**options) -> AcceptRule:
            limit = 0.0 if exact else None if bound is None else float(options[bound])
            return AcceptRule(name, function, gives_law, exact, limit, paper, options)

        build.function = function
        RULES[name] = build
        return function

    return add


def law_rule(name: str, **properties):
    """Decorator: register a rule that is exact verification against the law its function gives."""
    return accept_rule(name, gives_law=True, **properties)


def list_rules() -> list[str]:
    """Names of all rules, sorted."""
    return sorted(RULES)


def rule_options(name: str) -> dict[str, Any]:
    """Options of a rule that are numbers or words, with their defaults (`inspect.Parameter.empty`: must be given)."""
    parameters = list(inspect.signature(_function(name)).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.name not in MODEL_OPTIONS}


def make_rule(name: str, *, tokenizer=None, target=None, **options) -> AcceptRule:
    """The rule of that name.

    tokenizer: where the rule needs distances between codes. target: the generator, where the rule needs its embeddings.
    options: of the rule; what is not given has its default. Tables may be given too (neighbours, clusters, embeddings), and must be
    where no model is; a judge's head, or where to load it from, always.
    Raises ValueError: no such rule or option (the nearest is named), an option or a model is missing.
    """
    from vistok.decoding.accept import neighbours as tables
    from vistok.registry import load

    parameters = dict(list(inspect.signature(_function(name)).parameters.items())[1:])
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        numbers = ", ".join(rule_options(name)) or "none"
        near = difflib.get_close_matches(unknown[0], parameters, 1)
        raise ValueError(
            f"rule {name!r} has no option {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else f"; options: {numbers}")
        )
    filled = {key: p.default for key, p in parameters.items() if p.default is not p.empty} | options
    if "neighbours" in parameters and "neighbours" not in options:
        quantizer = tables.quantizer_of(_needed(tokenizer, name, "tokenizer"))
        most = quantizer.codebook_size - 2  # the reference residual of LANTERN looks one further
        if "k" in options and options["k"] > most:
            raise ValueError(f"k={options['k']} neighbours, but {quantizer.codebook_size} codes allow at most {most}")
        filled["k"] = min(filled["k"], most)
        filled["neighbours"] = tables.token_neighbours(tokenizer, filled["k"] + 1)
    if "clusters" in parameters and not isinstance(options.get("clusters"), Tensor):
        filled["clusters"] = tables.code_clusters(_needed(tokenizer, name, "tokenizer"), filled["clusters"])
    if "embeddings" in parameters and "embeddings" not in options:
        filled["embeddings"] = _needed(target, name, "target").embedding.weight.detach()
    if isinstance(options.get("head"), (str, os.PathLike)):
        filled["head"] = load(options["head"])
        if target is not None:
            filled["head"].to(target.device)
    missing = [key for key in parameters if key not in filled]
    if missing:
        raise ValueError(f"rule {name!r} needs the option {missing[0]!r}")
    for key in ("eps", "alpha", "tau", "threshold"):
        if key in filled and not 0 <= filled[key] <= 1:
            raise ValueError(f"{key}={filled[key]} must be in [0, 1]")
    return RULES[name](**filled)


def _needed(model, name: str, what: str):
    if model is None:
        raise ValueError(f"rule {name!r} needs the {what}: make_rule({name!r}, {what}=...)")
    return model


def _function(name: str) -> Callable:
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, 1)
        raise ValueError(f"no rule {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; rules: {', '.join(list_rules())}"))
    return RULES[name].function
