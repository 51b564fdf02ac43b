"""One script a set of the papers' claims: what it compares is trained in the same run, and its verdicts are computed from the numbers."""
