"""What Kubernetes, KServe, the Prometheus operator, the Gateway API and docker compose take, each by its own types.

A key that none of them knows is a fault, and so is a kind. KServe's and the Gateway API's types are read from the files
that `make` fetches and does not install (see the Makefile).
"""

import ast
import functools
import importlib.resources
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest

SCHEMAS = Path(sys.prefix) / "schemas"
FETCHED = "`make` fetches it"
Schema = dict[str, Any]
# It reads all of Kubernetes' definitions again for each object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def of_kubernetes(manifest: dict[str, Any]) -> bool:
    """Whether Kubernetes itself knows the kind, and no add-on."""
    group = manifest["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.startswith(("gateway", "kustomize")))


def faults(manifest: dict[str, Any], release: str = kubernetes_validate.latest_version()) -> list[str]:
    """Return what is wrong with an object; empty where its API, of this release of Kubernetes, takes it."""
    group, kind = manifest["apiVersion"].rpartition("/")[0], manifest["kind"]
    if group == "kustomize.config.k8s.io":
        return [] if set(manifest) == {"apiVersion", "kind", "resources"} else [f"unknown keys: {set(manifest)}"]
    if group == "serving.kserve.io":
        return wrong(kserve(manifest["apiVersion"].rpartition("/")[2] + kind), manifest)
    if group == "monitoring.coreos.com":
        return wrong(pod_monitor(), manifest)
    if group == "gateway.networking.k8s.io":
        return wrong(http_route(), manifest)
    try:
        kubernetes_validate.validate(manifest, release, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'/'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    return []


def wrong(schema: Schema, document: Any) -> list[str]:
    """Return what a JSON schema says of a document."""
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'/'.join(map(str, error.path))}: {error.message[:200]}" for error in found]


def closed(schema: Any) -> Any:
    """Return a schema in which an object has no keys but those that it names."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and "type" in made:
        made.setdefault("additionalProperties", False)
    if made.pop("nullable", False) and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


@functools.cache
def core() -> dict[str, Schema]:
    """Kubernetes' own definitions, strict ones."""
    there = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    newest = f"v{kubernetes_validate.latest_version()}"
    file = there / f"{newest}-local-strict" / "_definitions.json"
    definitions: dict[str, Schema] = json.loads(file.read_text())["$defs"]
    return definitions


@functools.cache
def sdk() -> dict[str, Schema]:
    """The definitions of KServe's SDK, by their short names, read from its classes without running them."""
    wheels = sorted(SCHEMAS.glob("kserve-*.whl"))
    if not wheels:
        pytest.skip(f"KServe's SDK is not in {SCHEMAS}; {FETCHED}")
    found = {}
    with zipfile.ZipFile(wheels[-1]) as wheel:
        for name in wheel.namelist():
            if re.fullmatch(r"kserve/models/v1\w+\.py", name):
                text = wheel.read(name).decode()
                for node in ast.parse(text).body:
                    if isinstance(node, ast.ClassDef):
                        found[node.name] = of_class(node, text)
    return found


def of_class(node: ast.ClassDef, text: str) -> Schema:
    """Return the schema of a generated class: its attributes, their types, and those that it wants."""
    stated = {
        target.id: ast.literal_eval(entry.value)
        for entry in node.body
        if isinstance(entry, ast.Assign)
        for target in entry.targets
        if isinstance(target, ast.Name) and target.id in ("openapi_types", "attribute_map")
    }
    keys = stated["attribute_map"]
    wanted = re.findall(r"Invalid value for `(\w+)`, must not be `None`", text)
    return {
        "type": "object",
        "properties": {keys[name]: of_type(told) for name, told in stated["openapi_types"].items()},
        "required": sorted({keys[name] for name in wanted}),
        "additionalProperties": False,
    }


def of_type(told: str) -> Schema:
    """Return the schema of a type as the generator writes it."""
    if inner := re.fullmatch(r"list\[(.+)\]", told):
        return {"type": "array", "items": of_type(inner[1])}
    if inner := re.fullmatch(r"dict\(str, (.+)\)", told):
        return {"type": "object", "additionalProperties": of_type(inner[1])}
    plain = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "object": "object"}
    if told in plain:
        return {"type": plain[told]}
    return {"$ref": f"#/$defs/{defined(told)}"}


def defined(told: str) -> str:
    """Return the definition behind a class of KServe's SDK or of Kubernetes' client."""
    if told.startswith(("V1alpha1", "V1beta1")) and "MetricQuantity" not in told:
        return told
    if "Quantity" in told:
        return "io.k8s.apimachinery.pkg.api.resource.Quantity"
    parts = re.fullmatch(r"K8sIo(Api|ApimachineryPkg)(?:[A-Z][a-z]+?)(V\d)(\w+)|(V1)(\w+)", told)
    version, name = (parts[2] or parts[4], parts[3] or parts[5]) if parts else ("", told)
    known = [key for key in core() if key.endswith(f".{version.lower()}.{name}")]
    core_first = sorted(known, key=lambda key: (".core." not in key, key))
    return core_first[0] if core_first else f"unknown {told}"


def kserve(short: str) -> Schema:
    """The schema of a kind of KServe, as `v1beta1InferenceService`."""
    name = short[0].upper() + short[1:]
    if name not in sdk():
        return {"not": {}, "title": f"KServe knows no {short}"}
    return {"$ref": f"#/$defs/{name}", "$defs": {**core(), **sdk()}}


@functools.cache
def pod_monitor() -> Schema:
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor

    schema: Schema = closed(PodMonitor.model_json_schema(by_alias=True))
    return schema


@functools.cache
def http_route() -> Schema:
    packed = sorted(SCHEMAS.glob("kubernetes-models-gateway-api-*.tgz"))
    if not packed:
        pytest.skip(f"the types of the Gateway API are not in {SCHEMAS}; {FETCHED} where there is npm")
    with tarfile.open(packed[-1]) as archive:
        member = archive.extractfile("package/gateway.networking.k8s.io/v1/HTTPRoute.js")
        assert member
        _, _, behind = member.read().decode().partition("const schema = ")
    schema: Schema = closed(json.JSONDecoder().raw_decode(behind)[0])
    schema["properties"]["metadata"] = {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    return {**schema, "$defs": core()}


@functools.cache
def compose() -> Schema:
    there = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema: Schema = json.loads(there.read_text())
    return schema
