"""Names of slides, files and patients in messages: as they are, or as pseudonyms. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Kind = Literal["slide", "file", "patient"]
_replacement: ContextVar[Callable[[str, Kind], str] | None] = ContextVar("replacement", default=None)


@contextmanager
def show_names_as(replacement: Callable[[str, Kind], str] | None) -> Iterator[None]:
    """Within this context, messages show what a function gives for a name; None for the name itself."""
    token = _replacement.set(replacement)
    try:
        yield
    finally:
        _replacement.reset(token)


def shown(name: str, kind: Kind = "slide") -> str:
    """Text for a name in a message. The content of tables that the user gives counts as a name."""
    replacement = _replacement.get()
    return name if replacement is None else replacement(name, kind)


def examples(names: Sequence[str], kind: Kind = "slide", *, limit: int = 3) -> str:
    """Text of the first names and the count of the others.

    Example:
        >>> examples(["a", "b", "c", "d", "e"])
        'a, b, c and 2 others'
    """
    rest = len(names) - limit
    first = ", ".join(shown(name, kind) for name in names[:limit])
    return first + (f" and {rest} other{'s' if rest > 1 else ''}" if rest > 0 else "")
