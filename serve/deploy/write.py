"""Write: the folder of manifests, made from templates and put into place whole.

The same repository and options give the same bytes.
"""

import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelathe import files
from modelathe.errors import BadInput, UsageError
from serve.deploy import contents as reading
from serve.deploy import plan as planning
from serve.deploy import references
from serve.deploy.contents import Contents
from serve.deploy.plan import Plan
from serve.deploy.references import Source
from serve.server import options
from serve.watch.metrics import QUEUE, SUCCESS

Kind = Literal["kubernetes", "kserve", "compose"]
DRAIN, EXIT, SPARE = 15, 30, 15
"""Seconds: balancers forget a pod, the server answers what it still has, and some are left over."""
PROBE_TIMEOUT = 10
GUARD_US = 10_000
"""Microseconds of queue per request that call for more servers; more where the batcher itself waits longer. A rule of
ours, not measured: far above what a queue takes below the knee, far below what a client bears."""
KEY = {"compose": "${TRITON_ADMIN_KEY:?make one with openssl rand -hex 32}"}
"""How the secret that opens loading and tracing gets into the command; Kubernetes puts in what stands in $( )."""
FILES: dict[Kind, tuple[str, ...]] = {
    "kubernetes": ("deployment", "service", "policies", "podmonitor"),
    "kserve": ("servingruntime", "inferenceservice", "policies", "podmonitor"),
    "compose": ("compose",),
}


@dataclass(frozen=True)
class Canary:
    """A share of the requests for a version that is not live yet.

    Args:
        model: whose newest staged version gets them.
        percent: how many of a hundred.
        gateway: `NAME` or `NAMESPACE/NAME` of the Gateway that clients come through; KServe has its own.
    """

    model: str
    percent: int
    gateway: str = ""


@dataclass(frozen=True)
class Options:
    """What the user says of a cluster.

    Args:
        kind: whose manifests.
        name: of all objects; that of the repository's folder unless given.
        image: the server's, with its digest.
        source: where the cluster finds the repository; compose mounts it from here.
        plan: how many servers.
        memory: of a server, as Kubernetes writes it; a guess from the files' sizes unless given.
        monitoring: the namespace of Prometheus.
        prometheus: its URL, for KServe.
        canary: None for no second version.
    """

    kind: Kind
    name: str = ""
    image: str = references.STANDARD
    source: Source | None = None
    plan: Plan = planning.NONE
    memory: str = ""
    monitoring: str = "monitoring"
    prometheus: str = "http://prometheus-operated.monitoring:9090"
    canary: Canary | None = None


def write(folder: Path, repository: Path, said: Options) -> list[Path]:
    """Write the manifests for a repository into a new folder, all of them or none.

    Args:
        folder: must not exist, or be empty.
        repository: what is to be served.
        said: the options.

    Returns:
        The files, in the order in which one reads them.

    Raises:
        BadInput: the folder holds something, or the plan is for a model that the repository lacks.
        BadRepository: the repository has a fault, or no candidate for the canary.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(
            "is there already, and may hold changes of yours", where=str(folder), fix="name a new folder, or remove it"
        )
    texts = render(folder, repository, said)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part-{secrets.token_hex(4)}")
    try:
        for name, text in texts.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text)
        files.place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [folder / name for name in texts]


def render(folder: Path, repository: Path, said: Options) -> dict[str, str]:
    """Return the text of each file by its name; arguments and errors as for `write`."""
    now = reading.read(repository)
    if said.plan.model and said.plan.model not in now.configs:
        raise BadInput(
            f"is not a model of the repository, and the plan is for it: {said.plan.model}",
            where=str(repository),
            fix=f"plan for one of {', '.join(now.configs)}",
        )
    values = _values(now, folder, said)
    names = [f"{said.kind}/{name}.yaml" for name in FILES[said.kind]]
    if said.kind == "kubernetes":
        names += [f"kubernetes/{name}.yaml" for name in ("autoscaler",) if said.plan.per_pod_rate]
        names += [f"kubernetes/{name}.yaml" for name in ("canary",) if said.canary]
    resources = [name.partition("/")[2] for name in names]
    if said.kind != "compose":
        names.append("kustomization.yaml")
    if "kubernetes/autoscaler.yaml" in names:
        names.append("kubernetes/prometheus-adapter.yaml")
    templates, head = _environment(said.kind), _head(now, said)
    made = {
        name.rpartition("/")[2]: head + templates.get_template(name).render(**values, resources=resources)
        for name in names
    }
    probe = {"probe/ask.py": values["ask"], "probe/questions.json": values["questions"]}
    return made | (probe if said.kind == "compose" else {})


def _head(now: Contents, said: Options) -> str:
    """Return the comment with which each file begins."""
    reader = "by docker" if said.kind == "compose" else "on a cluster"
    lines = [f"Written by `serve deploy {said.kind}`: checked against schemas, not run {reader} by us."]
    lines.append(f"Serves {versions(now)}.")
    if said.kind != "compose":
        lines.append(_planned(said.plan))
    if references.UNKNOWN in said.image:
        lines.append(
            f"The image has no digest yet: put it in the place of {references.UNKNOWN[:15]}..., or say --image."
        )
    return "".join(f"# {line}\n" for line in lines)


def _planned(plan: Plan) -> str:
    if not plan.planned:
        return "Two servers, which nobody planned: `serve plan --json` says how many, and when there must be more."
    machine = f" of {plan.machine}" if plan.machine else ""
    scaling = "" if plan.per_pod_rate else "; the plan has no per_pod_rate, so nothing scales"
    return f"Planned: {plan.replicas} servers{machine}{scaling}."


def _values(now: Contents, folder: Path, said: Options) -> dict[str, Any]:
    """Return what the templates know."""
    from importlib.resources import files as package

    name = said.name or label(now.place.resolve().name)
    counted = [said.plan.model] if said.plan.model else now.asked
    models = "model=~" + json.dumps("|".join(map(re.escape, counted)))
    return {
        "kind": said.kind,
        "name": name,
        "image": said.image,
        "source": said.source,
        "inside": references.INSIDE,
        "plan": said.plan,
        "contents": now,
        "canary": _canary(now, said),
        "memory": said.memory or f"{now.memory_gib}Gi",
        "shared": reading.SHARED_GIB,
        "monitoring": said.monitoring,
        "prometheus": said.prometheus,
        "questions": "[\n" + ",\n".join(map(json.dumps, now.questions())) + "\n]\n",
        "ask": package("serve.deploy").joinpath("ask.py").read_text(),
        "success": SUCCESS,
        "queue": QUEUE,
        "ours": models,
        "pods": f"{models},pod=~{json.dumps(f'{name}-predictor-.*')}",
        "guard_us": max(GUARD_US, 4 * now.delay_us),
        "drain": DRAIN,
        "exit": EXIT,
        "grace": DRAIN + EXIT + SPARE,
        "probe_timeout": PROBE_TIMEOUT,
        "relative": os.path.relpath(now.place.resolve(), folder.resolve()),
    }


def _canary(now: Contents, said: Options) -> dict[str, Any] | None:
    if not said.canary:
        return None
    there, config = reading.candidate(now, said.canary.model)
    namespace, _, gateway = said.canary.gateway.rpartition("/")
    (number,) = there.versions[said.canary.model]
    return {
        "model": said.canary.model,
        "percent": said.canary.percent,
        "number": number,
        "label": f"v{number}",
        "config": config,
        "contents": there,
        # As many as carry their share of the planned load.
        "replicas": min(said.plan.replicas, max(1, -(-said.plan.replicas * said.canary.percent // 100))),
        "gateway": gateway,
        "namespace": namespace,
    }


def label(text: str) -> str:
    """Return a name that Kubernetes takes for every kind of object.

    Raises:
        UsageError: nothing is left of the text.
    """
    made = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    if not made:
        raise UsageError(f"no name for Kubernetes can be made of {text!r}", fix="say --name")
    return made if made[0].isalpha() else f"m-{made}"


def checked(name: str) -> str:
    """Return a name that was given for the objects.

    Raises:
        UsageError: Kubernetes does not take it.
    """
    if len(name) > 40 or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise UsageError(
            f"--name {name} cannot name a Service", fix="use a-z, 0-9 and '-', begin with a letter, 40 at most"
        )
    return name


def memory(text: str) -> str:
    """Return an amount of memory that was given.

    Raises:
        UsageError: it is none, or no more than the shared memory.
    """
    if not (found := re.fullmatch(r"([1-9]\d*)Gi", text)) or int(found[1]) <= reading.SHARED_GIB:
        raise UsageError(
            f"--memory {text} is no amount for a server",
            fix=f"write whole GiB as in --memory 4Gi, more than the {reading.SHARED_GIB} of shared memory in it",
        )
    return text


def next_steps(folder: Path, repository: Path, said: Options) -> list[str]:
    """Return the command lines that come next."""
    if said.kind == "compose":
        place = shlex.quote(str(folder / "compose.yaml"))
        return [f'TRITON_ADMIN_KEY="$(openssl rand -hex 32)" docker compose --file {place} up']
    name = said.name or label(repository.resolve().name)
    return [
        f'kubectl create secret generic {name}-admin --from-literal=key="$(openssl rand -hex 32)"',
        "kubectl label namespace NAMESPACE triton-client=allowed",
        f"kubectl apply -k {shlex.quote(str(folder))}",
    ]


def versions(contents: Contents) -> str:
    """Return the models and their versions in words."""
    return ", ".join(f"{model} {' and '.join(map(str, numbers))}" for model, numbers in contents.versions.items())


def _arguments(kind: Kind, contents: Contents, models: str) -> list[str]:
    """Return the server's arguments over the repository at `models`."""
    told = options.common(contents.configs, KEY.get(kind, "$(TRITON_ADMIN_KEY)"), options.LOOPBACK)
    return [
        f"--model-repository={models}",
        *told,
        # Summaries of several servers do not add up; histograms do.
        "--metrics-config=histogram_latencies=true",
        f"--exit-timeout-secs={EXIT}",
        *options.cache(contents.configs, None),
    ]


def _checksums(contents: Contents) -> str:
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(contents.digests.items()))


def block(text: str) -> str:
    """Return a text as a YAML value: as it reads where YAML keeps each of its letters, else as one JSON string."""
    whole = text.endswith("\n") and not text.endswith("\n\n") and not text.startswith((" ", "\n"))
    plain = all(line.isprintable() for line in text.split("\n"))
    return "|\n" + text.removesuffix("\n") if whole and plain else _json(text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def quantity(value: float) -> str:
    """Return a number as Kubernetes's quantity, to a thousandth: `12500m` is 12.5."""
    thousandths = max(1, round(1000 * value))
    return f"{thousandths // 1000}" if thousandths % 1000 == 0 else f"{thousandths}m"


def _environment(kind: Kind) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("serve.deploy", "templates"),
        autoescape=False,  # noqa: S701 -- YAML; every value is written as JSON
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    filters: Mapping[str, Any] = {
        "json": _json,
        "block": block,
        "number": _number,
        "quantity": quantity,
        "versions": versions,
        "checksums": _checksums,
        "arguments": lambda contents, models: _arguments(kind, contents, models),
    }
    environment.filters.update(filters)
    return environment
