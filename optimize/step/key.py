"""Key: the digests of what a bundle was made from, by which it is known again."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Key:
    """By which a bundle is known again.

    Args:
        parts: the digest of each thing that it was made from, by its name; empty where that is not known.
    """

    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The one digest of all parts; empty for none."""
        return of(json.dumps(dict(self.parts), sort_keys=True)) if self.parts else ""

    def changed(self, now: "Key") -> str:
        """Return the names of the parts that differ, with commas."""
        names = sorted({*self.parts, *now.parts})
        return ", ".join(name for name in names if self.parts.get(name) != now.parts.get(name))


def of(*texts: str) -> str:
    """Return one digest of several texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
