"""Acceptance rules: which drafted tokens are kept, as pure functions of laws, candidates and uniforms."""

from vistok.decoding.accept.exact import greedy, k_seq, k_seq_constants, recursive_rejection, standard
from vistok.decoding.accept.lantern import accepts_greedily, lantern, lantern_budget, neighbour_table
from vistok.decoding.accept.relaxed import mixture, typical_paths
from vistok.decoding.accept.rounds import Decision, TreeDecision, Trial, decide, emitted_law, walk_chain, walk_tree

__all__ = [
    "Decision",
    "TreeDecision",
    "Trial",
    "accepts_greedily",
    "decide",
    "emitted_law",
    "greedy",
    "k_seq",
    "k_seq_constants",
    "lantern",
    "lantern_budget",
    "mixture",
    "neighbour_table",
    "recursive_rejection",
    "standard",
    "typical_paths",
    "walk_chain",
    "walk_tree",
]
