"""Kills a command before its n-th operation on files, for every n, and looks at what is left each time.

Run as a program: `python -m tests.serve.killing VERB REPOSITORY SERVER FOLDER [disk] [server]`; the last two say what
has the new version already when the verb `settle` begins. It prints one line of JSON for each n. The command runs in a
fork, against a stand-in for the server that keeps in a file what it has loaded.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from serve.config.target import Target
from serve.repository import staging
from serve.repository import tree as repository
from serve.repository.source import Source
from serve.rollout import promotion, rollout
from serve.server import control
from serve.server.endpoint import Endpoint
from tests.conftest import TINY_INPUTS, TINY_OUTPUTS

OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ENDPOINT = Endpoint("http://127.0.0.1:1", "grpc://127.0.0.1:1", "", 0, Path("/dev/null"), (), "secret")
armed = left = 0


def hook(event: str, values: tuple[Any, ...]) -> None:
    """Count what changes something; a kill at any other operation leaves the same as one at the next of these."""
    global left
    if armed and (event in OPERATIONS or (event == "open" and values[2] & WRITING)):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Server:
    """What a server would have loaded, in a file beside the repository; it serves what a configuration names."""

    def __init__(self, place: Path) -> None:
        self.place, self.path = place, place.with_name("server.json")

    def read(self) -> dict[str, list[int]]:
        return dict(json.loads(self.path.read_text()))

    def load(self, _url: str, _secret: str, model: str, _timeout: float = 0) -> None:
        self._set(model, repository.live(self.place, model))

    def unload(self, _url: str, _secret: str, model: str, _timeout: float = 0) -> None:
        self._set(model, [])

    def versions(self, _url: str, model: str) -> list[int]:
        return self.read().get(model, [])

    def states(self, _url: str, _secret: str, model: str) -> dict[int, tuple[str, str]]:
        return dict.fromkeys(self.read().get(model, []), ("READY", ""))

    def served(self) -> list[str]:
        return self.path.with_suffix(".log").read_text().split()

    def _set(self, model: str, numbers: list[int]) -> None:
        state = json.dumps(self.read() | {model: numbers})
        self.path.write_text(state)
        with self.path.with_suffix(".log").open("a") as log:
            log.writelines(f"{model}/{number}\n" for number in numbers)


def add(place: Path, endpoint: Endpoint | None) -> None:
    onnx = place / "tiny" / "1" / "model.onnx"
    with staging.stage(place, "added", Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)) as staged:
        staging.publish(staged, {})
    rollout.promote(place, "added", None, endpoint)


def interrupted(place: Path, endpoint: Endpoint | None, model: str = "tiny", number: int = 3) -> None:
    """Promote, and Ctrl-C when the server has just loaded the first new version: it is taken back."""
    loads = control.load

    def load(*arguments: Any) -> None:
        control.load = loads
        loads(*arguments)
        raise KeyboardInterrupt

    control.load = load
    with suppress(KeyboardInterrupt):
        rollout.promote(place, model, number, endpoint)


def settle(place: Path, endpoint: Endpoint | None) -> None:
    """Settle what is left, as the next command does."""
    with promotion.alone(place, repository.models(place), endpoint):
        pass


VERBS: dict[str, Callable[[Path, Endpoint | None], Any]] = {
    "promote": lambda place, endpoint: rollout.promote(place, "tiny", 3, endpoint),
    "together": lambda place, endpoint: rollout.promote(place, "whole", 2, endpoint),
    "rollback": lambda place, endpoint: rollout.roll_back(place, "tiny", endpoint),
    "remove": lambda place, endpoint: rollout.remove(place, "tiny", 1, endpoint),
    "remove all": lambda place, endpoint: rollout.remove_model(place, "tiny", endpoint),
    "add": add,
    "interrupted": interrupted,
    "interrupted together": lambda place, endpoint: interrupted(place, endpoint, "whole", 2),
    "settle": settle,
}


def leave(place: Path, disk: bool, server: bool) -> None:
    """Leave a release of version 3 half done, as a killed command does; what is named has the new version."""
    journal = promotion._begin(place, {"tiny": 3})
    now = (place / "tiny" / repository.CONFIG).read_text()
    (place / "tiny" / repository.CONFIG).write_text(repository.read_lineage(place, "tiny", 3)["config"])
    if server:
        Server(place).load("", "", "tiny")
    if not disk:
        (place / "tiny" / repository.CONFIG).write_text(now)
    assert journal.path.exists()


def killed(verb: str, place: Path, endpoint: Endpoint | None, number: int) -> bool:
    """Run the command in a fork that kills itself before its n-th operation; False if it came to its end."""
    global armed, left
    child = os.fork()
    if child == 0:
        armed, left = 1, number
        try:
            VERBS[verb](place, endpoint)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the command failed"
    return os.WIFSIGNALED(status)


def look(place: Path) -> dict[str, Any]:
    """What Triton could load now: every model must be whole."""
    repository.verify(place)
    found = {model: repository.live(place, model) for model in repository.models(place)}
    assert all(found.values()), found
    for model in found:
        for number in repository.numbers(place, model):
            lineage = repository.read_lineage(place, model, number)
            repository.verify_version(place, model, number, lineage)
    return found


def main(verb: str, template: Path, server: str, folder: Path, *left: str) -> None:
    sys.addaudithook(hook)
    os.fsync = lambda _handle: None  # a kill does not undo what the kernel was told
    endpoint = ENDPOINT if server == "server" else None
    for number in range(1, 10_000):
        work = folder / str(number)
        shutil.copytree(template, work)
        place = work / "repository"
        stand_in = Server(place)
        for name in ("load", "unload", "versions", "states"):
            setattr(control, name, getattr(stand_in, name))
        if verb == "settle":
            leave(place, "disk" in left, "server" in left)
        ended = not killed(verb, place, endpoint, number)
        seen = {"left": look(place), "promised": sorted(path.parent.name for path in place.glob("*/.promotion.json"))}
        seen["had"] = stand_in.read()
        settle(place, endpoint)
        seen |= {"settled": look(place), "loaded": stand_in.read(), "served": stand_in.served()}
        seen["numbers"] = {model: repository.numbers(place, model) for model in repository.models(place)}
        seen["back"] = rollout.before(place, "tiny") if (place / "tiny").exists() else 0
        if verb in ("promote", "together", "remove"):
            VERBS[verb](place, endpoint)
        seen["again"] = look(place)
        print(json.dumps(seen))
        shutil.rmtree(work)
        if ended:
            return


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), *sys.argv[5:])
