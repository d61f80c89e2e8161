"""Container: the same server as NVIDIA's image, by docker. It was not run here, where there is no docker."""

import re
import secrets
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from modelathe.errors import UsageError
from serve.repository import tree as repository
from serve.server import options
from serve.server.options import Listen

IMAGE = "nvcr.io/nvidia/tritonserver:{release}-py3"
INSIDE = {"http": 8000, "grpc": 8001, "metrics": 8002}
MODELS, CERTIFICATES = "/models", "/certificates"


def command(place: Path, release: str, listen: Listen) -> list[str]:
    """Return the docker command that serves the repository with NVIDIA's image.

    Client shared memory stays off and HTTP bodies bounded, as they are in images from 26.07 on.

    Args:
        place: the repository, mounted read-only.
        release: of the image, as in `26.07`.
        listen: where the ports are published; 0 stands for the usual ones.

    Raises:
        UsageError: that is no release.
    """
    if not re.fullmatch(r"\d\d\.\d\d", release):
        raise UsageError(f"--container {release} is no release", fix="write it as in --container 26.07")
    names = repository.models(place)
    repository.verify(place, names)
    configs = {name: repository.config(place, name) for name in names}
    on_gpu = any(
        group.kind == ModelInstanceGroup.KIND_GPU for config in configs.values() for group in config.instance_group
    )
    ports = {kind: getattr(listen, f"{kind}_port") or inside for kind, inside in INSIDE.items()}
    published = [f"--publish={listen.address(kind)}:{ports[kind]}:{inside}" for kind, inside in INSIDE.items()]
    files = listen.tls.files() if listen.tls else []
    told = options.common(configs, secrets.token_hex(32), listen)
    for file in files:
        told = [option.replace(str(file.absolute()), f"{CERTIFICATES}/{file.name}") for option in told]
    return [
        *("docker", "run", "--rm", "--init", "--shm-size=1g"),
        *(["--gpus=all"] if on_gpu else []),
        *published,
        f"--volume={place.absolute()}:{MODELS}:ro",
        *(f"--volume={file.absolute()}:{CERTIFICATES}/{file.name}:ro" for file in files),
        IMAGE.format(release=release),
        "tritonserver",
        f"--model-repository={MODELS}",
        *told,
        *options.cache(configs, None),
    ]
