"""Merge: the result files of workers that ran apart, as in a Kubernetes Job, made into one."""

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from loadtest import files
from loadtest.answers import MOST_SAMPLES
from loadtest.errors import BadInput
from loadtest.results import document_line, read
from loadtest.workers import latest


def merge(paths: Sequence[Path], destination: Path) -> None:
    """Put the result files of workers that ran elsewhere, each with its own, into one.

    The server's counts are those of the file that saw most: each holds what all the workers sent while it looked.

    Args:
        paths: one file for each worker of a plan.
        destination: the one file.

    Raises:
        BadInput: they are not the workers of one plan, or one of them was interrupted.
    """
    headers, ends = zip(*map(_edges, paths), strict=True)
    plans = [header["plan"] | {"index": None} for header in headers]
    indices = sorted(header["plan"].get("index") or 0 for header in headers)
    if any(plan != plans[0] for plan in plans) or indices != list(range(plans[0]["workers"])):
        raise BadInput(
            f"workers {', '.join(map(str, indices))} of {plans[0]['workers']}, or of several plans",
            where=", ".join(map(str, paths)),
            fix="give the file of each worker of one run, once",
        )
    if lost := [str(path) for path, end in zip(paths, ends, strict=True) if end is None]:
        raise BadInput("the run was interrupted", where=", ".join(lost), fix="run it again")
    with files.writing(destination) as file:
        file.write(document_line(headers[0] | {"plan": plans[0]}))
        for place, path in enumerate(paths):
            with path.open("rb") as source:
                source.readline()
                # All of them read the same server.
                wanted = (b'{"n":', b'{"reading":') if place == 0 else b'{"n":'
                file.writelines(line for line in source if line.startswith(wanted))
        file.write(document_line(_one_end(ends)))


def _edges(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the first line of a file and its last, None where the run did not come to it."""
    results = read(path)
    return results.header, results.end


def _one_end(ends: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts: Counter[tuple[str, str]] = Counter()
    for end in ends:
        counts.update({(error["verdict"], error["text"]): error["count"] for error in end["errors"]})
    servers = [end["server"] for end in ends if end.get("server")]
    missing = [end["server_error"] for end in ends if "server_error" in end]
    wrong = sorted((one for end in ends for one in end.get("mismatches", [])), key=lambda one: int(one["n"]))
    checks = {"checked": sum(end.get("checked", 0) for end in ends), "mismatches": wrong[:MOST_SAMPLES]}
    backlogs = [end["backlog"] for end in ends if "backlog" in end]
    whole = {"most": sum(one["most"] for one in backlogs), "full": max((one["full"] for one in backlogs), default=0.0)}
    return {
        "end": max(end["end"] for end in ends),
        "client_cpu": sum(end["client_cpu"] for end in ends),
        "client_cores": sum(end["client_cores"] for end in ends),
        "gone": any(end["gone"] for end in ends),
        "loop_lag_ms": reduce(latest, (end.get("loop_lag_ms") or {} for end in ends)),
        "errors": [{"verdict": key[0], "text": key[1], "count": count} for key, count in counts.most_common()],
        "server": max(servers, key=lambda server: int(server["success"]), default=None),
        "unknown": [*dict.fromkeys(what for end in ends for what in end.get("unknown", ()))],
        **({"backlog": whole} if backlogs else {}),
        **(checks if any("checked" in end for end in ends) else {}),
        **({"server_error": missing[0]} if missing and not servers else {}),
    }
