"""Globs: which layers of a model, or nodes of a graph, a pattern of names means."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from optimize.model.errors import NoEffect


def matching(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    """Return those of `names` that match one of the globs, in their order."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in globs)]


def excluded(names: Sequence[str], globs: Sequence[str], kind: str = "layer") -> list[str]:
    """Return what a config's `exclude` means.

    Args:
        names: what there is to exclude.
        globs: the config's.
        kind: what the names are of, for the message.

    Raises:
        NoEffect: a glob matches none.
    """
    for pattern in globs:
        if not matching(names, [pattern]):
            raise NoEffect(
                f"exclude: no {kind} matches {pattern!r}", fix=f"the {kind}s are: {', '.join(names) or 'none'}"
            )
    return matching(names, globs)
