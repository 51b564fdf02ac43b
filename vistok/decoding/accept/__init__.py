"""Acceptance rules: which drafted tokens are kept, as pure functions of laws, candidates and uniforms.

`make_rule(name, ...)` gives a rule by name; `list_rules()` lists them. A new rule is one function under `@accept_rule`.
"""

from vistok.decoding.accept.clusters import cluster, gsd
from vistok.decoding.accept.exact import greedy, k_seq, k_seq_constants, standard
from vistok.decoding.accept.lantern import accepts_greedily, lantern, lantern_budget, lantern_plus
from vistok.decoding.accept.neighbours import LatticeNeighbours, code_clusters, neighbour_table, token_neighbours
from vistok.decoding.accept.registry import AcceptRule, accept_rule, law_rule, list_rules, make_rule, rule_options
from vistok.decoding.accept.relaxed import cascade, distance, judge, mixture, typical, typical_paths
from vistok.decoding.accept.rounds import (
    Decision,
    Position,
    TreeDecision,
    Trial,
    decide,
    decide_rows,
    emitted_law,
    verify,
    walk_chain,
    walk_tree,
)

__all__ = [
    "AcceptRule",
    "Decision",
    "LatticeNeighbours",
    "Position",
    "TreeDecision",
    "Trial",
    "accept_rule",
    "accepts_greedily",
    "cascade",
    "cluster",
    "code_clusters",
    "decide",
    "decide_rows",
    "distance",
    "emitted_law",
    "greedy",
    "gsd",
    "judge",
    "k_seq",
    "k_seq_constants",
    "lantern",
    "lantern_budget",
    "lantern_plus",
    "law_rule",
    "list_rules",
    "make_rule",
    "mixture",
    "neighbour_table",
    "rule_options",
    "standard",
    "token_neighbours",
    "typical",
    "typical_paths",
    "verify",
    "walk_chain",
    "walk_tree",
]
