"""`serve doctor`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from modelathe.commandline import document, emit, json_option, say

if TYPE_CHECKING:
    from serve.server.doctor import Check

MITIGATION = (
    "so it listens on loopback alone, and keeps what loads, shares or logs behind a secret of each start",
    "for others: NVIDIA's image (serve up --container 26.07), or at least a proxy before it (serve proxy)",
)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check what serving works with, and list the known holes of the server that `serve install` brings.

    Ends with 0 where nothing is missing for work on a CPU, else with 5.

    \b
    Example:
      serve doctor
    """
    from serve.config import releases
    from serve.server import doctor as doctors

    holes = {
        f"CVE-{number}": {"closed_in": release, "note": releases.GRAVEST.get(number, "")}
        for release, numbers in releases.OPEN_CVES.items()
        for number in numbers
    }
    faults = report(doctors.checks(), as_json, cves=holes)
    if not as_json:
        last = max(releases.OPEN_CVES)
        say(f"\ntritonserver {releases.CARRIED} has {len(holes)} known CVEs, the last closed in {last};")
        for line in MITIGATION:
            say(f"  {line}")
        for name, hole in holes.items():
            say(f"  {name}  closed in {hole['closed_in']}  {hole['note']}".rstrip(), " " * 18)
    if faults:
        raise faults


def report(found: "Sequence[Check]", as_json: bool, **more: Any) -> Any:
    """Print the checks, or emit them; return the error to raise where something is missing that a CPU needs."""
    from modelathe.errors import MachineError
    from serve.server.doctor import broken

    faults = broken(found)
    result = {"checks": [asdict(check) for check in found], **more}
    if not as_json:
        for check in found:
            mark = "ok     " if check.ok else "BROKEN " if check.required else "absent "
            margin = " " * 33
            say(f"{mark} {check.name:24} {check.found or '-'}", margin)
            if not check.ok:
                say(f"{margin}{check.wanted}" + (f"; {check.fix}" if check.fix else ""), margin)
    elif not faults:
        emit(document(**result))
    if not faults:
        return None
    error = MachineError(
        f"{len(faults)} things that work on a CPU needs: {', '.join(check.name for check in faults)}", fix=faults[0].fix
    )
    error.partial = result
    return error
