"""`serve deploy kubernetes`, `kserve` and `compose`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelathe.commandline import PATH, CommandGroup, document, emit, json_option
from modelathe.errors import UsageError
from serve.commands.versions import repository_option

if TYPE_CHECKING:
    from serve.deploy.write import Canary, Kind

name_option = click.option("--name", default="", help="Of all objects.  [default: the repository's folder]")
image_option = click.option("--image", help="NAME:TAG@sha256:... of the server.  [default: NVIDIA's 26.07, no digest]")
plan_option = click.option(
    "--plan", type=PATH, help="What `serve plan --json` printed: how many servers, and when more."
)
memory_option = click.option(
    "--memory", default="", metavar="4Gi", help="Of a server.  [default: a guess by file sizes]"
)
source_option = click.option(
    "--model-source",
    metavar="URI",
    required=True,
    help="This repository as the cluster finds it: oci://IMAGE@sha256:..., whose folder models it is, or pvc://CLAIM/PATH.",
)
monitoring_option = click.option(
    "--monitoring", default="monitoring", show_default=True, help="The namespace that may read metrics."
)
canary_option = click.option(
    "--canary", metavar="MODEL=PERCENT", help="Give MODEL's newest staged version so many of a hundred requests."
)


@click.group(cls=CommandGroup)
def deploy() -> None:
    """Write the manifests that serve this repository elsewhere, into a new folder.

    \b
    They were checked against the schemas of what reads them, and not run on a cluster by us.

    \b
    Example:
      serve deploy kubernetes build/cluster --model-source pvc://models --repository build/model_repository
    """


@deploy.command()
@click.argument("folder", type=PATH)
@repository_option
@source_option
@plan_option
@name_option
@image_option
@memory_option
@monitoring_option
@canary_option
@click.option(
    "--gateway", default="", metavar="[NAMESPACE/]NAME", help="The Gateway that splits requests for a canary."
)
@json_option
def kubernetes(folder: Path, repository: Path, as_json: bool, **said: Any) -> None:
    """A Deployment with what belongs to it, for `kubectl apply -k FOLDER`.

    A pod starts over files whose digests are those of this repository, or not at all; it takes requests when every
    model has answered one. With a plan there is an autoscaler by requests per second, which wants prometheus-adapter.

    \b
    Example:
      serve deploy kubernetes build/cluster --model-source pvc://models --plan plan.json
    """
    _write("kubernetes", folder, repository, said, as_json)


@deploy.command()
@click.argument("folder", type=PATH)
@repository_option
@source_option
@plan_option
@name_option
@image_option
@memory_option
@monitoring_option
@click.option(
    "--prometheus",
    metavar="URL",
    default="http://prometheus-operated.monitoring:9090",
    show_default=True,
    help="What KEDA asks.",
)
@canary_option
@json_option
def kserve(folder: Path, repository: Path, as_json: bool, **said: Any) -> None:
    """A ServingRuntime and an InferenceService in Standard mode, for KServe 0.20 or newer.

    With a plan it scales by requests per second, which wants KEDA. Nothing here compares the files that KServe mounts
    with this repository's digests.

    \b
    Example:
      serve deploy kserve build/kserve --model-source pvc://models --plan plan.json
    """
    _write("kserve", folder, repository, said, as_json)


@deploy.command()
@click.argument("folder", type=PATH)
@repository_option
@name_option
@image_option
@memory_option
@json_option
def compose(folder: Path, repository: Path, as_json: bool, **said: Any) -> None:
    """One server for `docker compose up` on this machine, over this very repository.

    \b
    Example:
      serve deploy compose build/compose --repository build/model_repository
    """
    _write("compose", folder, repository, said, as_json)


def _write(kind: "Kind", folder: Path, repository: Path, said: dict[str, Any], as_json: bool) -> None:
    from serve.deploy import plan, references
    from serve.deploy import write as manifests

    given: dict[str, Callable[[Any], Any]] = {
        "image": references.image,
        "plan": plan.read,
        "model_source": references.source,
        "name": manifests.checked,
        "memory": manifests.memory,
    }
    read = {key: given[key](value) if key in given else value for key, value in said.items() if value}
    if canary := _canary(kind, read.pop("canary", None), read.pop("gateway", "")):
        read["canary"] = canary
    if "model_source" in read:
        read["source"] = read.pop("model_source")
    options = manifests.Options(kind, **read)
    written = manifests.write(folder, repository, options)
    if as_json:
        emit(document(files=[str(path) for path in written], image=options.image))
        return
    click.echo(f"written: {', '.join(map(str, written))}")
    for line in manifests.next_steps(folder, repository, options):
        click.echo(f"  {line}")


def _canary(kind: "Kind", said: str | None, gateway: str) -> "Canary | None":
    from serve.deploy.write import Canary

    if not said:
        if gateway:
            raise UsageError("--gateway is for a canary", fix="say --canary MODEL=PERCENT, or leave --gateway away")
        return None
    model, _, percent = said.rpartition("=")
    if not model or not percent.isdecimal() or not 1 <= int(percent) <= 99:
        raise UsageError(f"--canary {said} is no share of a model", fix="write it as in --canary digits_cnn=10")
    if kind == "kubernetes" and not gateway.strip("/"):
        raise UsageError("--canary needs a Gateway, which splits the requests", fix="say --gateway NAMESPACE/NAME")
    return Canary(model, int(percent), gateway)
