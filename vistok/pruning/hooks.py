"""What all adapters have in common: hooks on somebody else's model, and taking them off."""

from typing import TypeVar

_Hooked = TypeVar("_Hooked", bound="Hooked")


class Hooked:
    """Hooks on one model. A context manager: leaving it, by an exception too, takes them off; so does `remove`.

    A subclass puts handles (anything with `remove()`) into `self._handles`, which it makes first.
    """

    _handles: list

    def __enter__(self: _Hooked) -> _Hooked:
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def _attach_all(self) -> None:
        """`_attach`, of which nothing is left if it fails."""
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
