"""Apply: the tuned configuration, published as the model's next version."""

from collections.abc import Mapping
from typing import Any

from modelathe.errors import BadInput
from serve.config import settings
from serve.config.target import Target
from serve.repository import source, staging, tree
from serve.server import dryload
from serve.tuning.trial import Subject


def publish(subject: Subject, chosen: Mapping[str, Any], told: Mapping[str, Any]) -> int:
    """Publish the live version's files with the chosen configuration, and return the new version's number.

    It waits for `serve promote`.

    Args:
        subject: what was tuned.
        chosen: threads, instances, largest batch and delay, as the document has them.
        told: what its lineage says of the tuning.

    Raises:
        BadInput: the version was not published by us, so that nothing says what it is served with.
        ModelRefused: the server does not load it.
    """
    if not tree.published(subject.folder):
        raise BadInput(
            "has no lineage, so that it cannot be published anew",
            where=str(subject.folder),
            fix="change its config.pbtxt as the diff says, or add it with: serve add",
        )
    found = source.load(subject.folder, {})
    asked = {
        "threads": chosen["threads"],
        "instances": chosen["instances"],
        "queue_delay_us": chosen["delay_us"] if subject.config.max_batch_size else None,
        "max_batch": chosen["max_batch"] if subject.config.max_batch_size else 0,
    }
    wanted = settings.read({**found.settings, **asked}, "serve tune")
    target = found.target or Target()
    with staging.stage(subject.repository, subject.model, found, target, wanted) as staged:
        dryload.staged(staged)
        page = found.page.read_text() if found.page else None
        return staging.publish(staged, {**found.lineage, "tuned": dict(told)}, page).number
