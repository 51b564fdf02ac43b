"""Drafters: what proposes the tokens that a target verifies. A file each; names are given by `@register_drafter`."""

from vistok.decoding.drafters.registry import drafter_options, list_drafters, make_drafter, register_drafter

__all__ = ["drafter_options", "list_drafters", "make_drafter", "register_drafter"]
