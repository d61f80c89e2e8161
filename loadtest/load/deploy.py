"""Deploy: a Kubernetes Job whose pods share a load."""

from collections.abc import Sequence
from datetime import datetime


def job(load: Sequence[str], *, image: str, claim: str, pods: int, begin: datetime, name: str = "loadtest") -> str:
    """Return the YAML of a Job with indexed completion, one pod for each worker.

    Args:
        load: the arguments of `loadtest run`.
        image: has modelathe in it.
        claim: a PersistentVolumeClaim that all pods can write to.
        pods: how many share the load.
        begin: when they begin.
        name: of the Job.
    """
    import jinja2

    own = ["--workers", str(pods), "--index", "$(JOB_COMPLETION_INDEX)"]
    own += ["--begin-at", begin.isoformat(timespec="seconds"), "--output", "/results/$(JOB_COMPLETION_INDEX).jsonl"]
    loader = jinja2.PackageLoader("loadtest.load", "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=False,  # noqa: S701 -- YAML; every value is written as JSON
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    arguments = ["run", *(argument.replace("$(", "$$(") for argument in load), *own]
    return environment.get_template("job.yaml").render(
        name=name, image=image, claim=claim, pods=pods, arguments=arguments
    )
