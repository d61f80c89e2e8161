"""References: the image and the repository that a cluster fetches, by what is in them and not by a name that moves."""

import re
from dataclasses import dataclass

from modelathe.errors import UsageError
from serve.config import releases
from serve.server.container import IMAGE

DIGEST = r"sha256:[0-9a-f]{64}"
UNKNOWN = "sha256:" + "0" * 64
"""Stands where the image's digest belongs until someone gives it: no registry has such an image."""
STANDARD = f"{IMAGE.format(release=releases.CLOSED)}@{UNKNOWN}"
INSIDE = "models"
"""The folder of an OCI image that is the repository, as KServe wants it."""


def image(text: str) -> str:
    """Return a server's image as it was given.

    Raises:
        UsageError: it has no digest, or is a release of Triton with known holes.
    """
    if not re.fullmatch(rf"[\w./:-]+@{DIGEST}", text):
        raise UsageError(
            f"--image {text} has no digest, and a tag may be moved",
            fix=f"write NAME:TAG@sha256:..., as `docker buildx imagetools inspect {text.partition('@')[0]}` prints it",
        )
    release = re.search(r"tritonserver:(\d\d\.\d\d)-", text)
    if release and (count := len(releases.open_cves(release[1]))):
        raise UsageError(f"--image {text} has {count} known CVEs", fix=f"take {releases.CLOSED} or newer")
    return text


@dataclass(frozen=True)
class Source:
    """Where a cluster finds the repository.

    Args:
        kind: `oci`, an image whose folder `models` is the repository, or `pvc`, a PersistentVolumeClaim.
        name: the image with its digest, or the claim's name.
        path: below the claim; empty where the claim itself is the repository.
    """

    kind: str
    name: str
    path: str = ""

    @property
    def uri(self) -> str:
        """The source as KServe writes it; an image is mounted by Kubernetes itself, without a container beside ours."""
        return f"oci+native://{self.name}" if self.kind == "oci" else f"pvc://{self.name}/{self.path}".rstrip("/")


def source(text: str) -> Source:
    """Return the source that `oci://IMAGE@sha256:...` or `pvc://CLAIM/PATH` names.

    Raises:
        UsageError: it is neither, or the image has no digest.
    """
    kind, _, rest = text.partition("://")
    if kind == "oci" and re.fullmatch(rf"[\w./:-]+@{DIGEST}", rest):
        return Source(kind, rest)
    if kind == "pvc" and (
        found := re.fullmatch(r"([a-z0-9][a-z0-9.-]*)(?:/((?!\.\.)[\w.-]+(?:/(?!\.\.)[\w.-]+)*))?/?", rest)
    ):
        return Source(kind, found[1], found[2] or "")
    wrong = "has no digest, and a tag may be moved" if kind == "oci" else "is no source of a repository"
    raise UsageError(
        f"--model-source {text} {wrong}",
        fix="give oci://IMAGE@sha256:..., or pvc://CLAIM/PATH of a PersistentVolumeClaim",
    )
