"""Merge: the result files of workers that ran apart, as in a Kubernetes Job, made into one."""

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from loadtest.judge.summary import load_file
from loadtest.load.share import latest
from loadtest.plan.data.answers import MOST_SAMPLES
from loadtest.record.results import document_line
from modelathe import files
from modelathe.errors import BadInput

_SAME = ("model", "model_version", "parts")
"""What the first lines of one run's files have in common besides the plan."""
_FIX = "give the file of each worker of one run, once"


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
    _check_one_run(paths, headers)
    if lost := [str(path) for path, end in zip(paths, ends, strict=True) if end is None]:
        raise BadInput("the run was interrupted", where=", ".join(lost), fix="run it again")
    with files.writing(destination) as file:
        file.write(document_line(headers[0] | {"plan": headers[0]["plan"] | {"index": None}}))
        for place, path in enumerate(paths):
            with path.open("rb") as source:
                source.readline()
                # All of them read the same server.
                wanted = (b'{"n":', b'{"reading":') if place == 0 else b'{"n":'
                file.writelines(line for line in source if line.startswith(wanted))
        file.write(document_line(_one_end(ends)))


def _check_one_run(paths: Sequence[Path], headers: Sequence[dict[str, Any]]) -> None:
    sent = [header["plan"] | {"index": None} | {key: header.get(key) for key in _SAME} for header in headers]
    for path, one in zip(paths, sent, strict=True):
        if others := [key for key in one if one[key] != sent[0].get(key)]:
            why = f"{' and '.join(others)} of its run differ from {paths[0]}"
            raise BadInput(f"is of another run: {why}", where=str(path), fix=_FIX)
    indices = sorted(header["plan"].get("index") or 0 for header in headers)
    if indices != list(range(sent[0]["workers"])):
        why = f"these are workers {', '.join(map(str, indices))} of {sent[0]['workers']}"
        raise BadInput(why, where=", ".join(map(str, paths)), fix=_FIX)


def _edges(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the first line of a file and its last, None where the run did not come to it."""
    results, _ = load_file(path)
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
