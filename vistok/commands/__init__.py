"""The commands of `vistok`: one dataclass of options each, with a method `run` that returns an exit code (None is 0).

Importing these modules loads no torch; `run` does.
"""
