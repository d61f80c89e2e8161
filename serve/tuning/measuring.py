"""Measuring: the times of calls by number of threads, then what server and client add and take; kept as they come."""

from dataclasses import dataclass, replace
from pathlib import Path

from serve.planning.engines.calls import largest_batch
from serve.simulate.configuration import Configuration
from serve.tuning import kept, measure, trial
from serve.tuning.known import Known, Tried
from serve.tuning.live import Model, Seen, Traffic
from serve.tuning.measure import Asked, Tell
from serve.tuning.trial import Subject, inputs

LARGEST, MOST_INSTANCES = 32, 16
"""The largest batch that is tried of a model that takes more than its configuration has, and the most instances."""
FIT = "overheads"
"""The name of the copy that the overheads are fitted with."""
FIT_SECONDS, FASTEST = 5.0, 2000.0
"""Of the live run for the overheads, and its highest rate: beyond it the load generator takes the server's cores."""
SHARES = (0.3, 0.7)
"""How many requests should come during a call of one sample in that run, at the least and at the most."""
CLIENTS, PRESSED = 64, 2.0
"""Clients that ask without a pause to learn what a request takes of the cores, and for how many seconds."""
RUNS = 2
"""Live runs that it makes."""


@dataclass(frozen=True)
class Place:
    """Where it is measured, and what is kept.

    Args:
        subject: the model.
        today: its present configuration.
        cores: how many server and client may use.
        path: the file that is kept.
    """

    subject: Subject
    today: Configuration
    cores: int
    path: Path

    @property
    def folder(self) -> Path:
        """Where logs and results of live runs are written."""
        return self.path.parent

    def keep(self, known: Known, chosen: Configuration | None = None) -> None:
        """Write down what is known; `serve plan` reads the times of the chosen configuration, else of today's."""
        kept.write(self.path, self.subject, known, chosen or self.today)


def measured(place: Place, traffic: Traffic, tell: Tell) -> Known:
    """Return what is known once calls and overheads were measured; what was kept is not measured again.

    Raises:
        MachineError: the machine is too busy to measure, or the server died.
    """
    subject, today = place.subject, place.today
    known, most = kept.read(place.path, subject, place.cores), largest(subject)
    missing = _missing(place, known)
    if not missing and known.first:
        return known
    whole = replace(today, max_batch=max(1, most), delay=0.0, preferred=(), dynamic=False)
    # With one thread a call takes the most even times, and a core while it lasts.
    busy = replace(whole, dynamic=most > 0, instances=1, threads=1)
    counts = {number: min(MOST_INSTANCES, max(2, place.cores // number)) for number in missing}
    configs = {
        f"threads-{number}": trial.edited(subject.config, replace(whole, threads=number, instances=count))
        for number, count in counts.items()
    }
    configs[FIT] = trial.edited(subject.config, busy)
    tell("measuring calls: starting a server", 0.0)
    with trial.served(subject, configs, place.folder / "measuring.log") as endpoint:
        specs = inputs(subject, endpoint.plain, FIT)
        for step, (number, count) in enumerate(counts.items()):
            asked = Asked(endpoint, f"threads-{number}", specs, count, most)
            found = measure.curve(asked, part(tell, step / len(counts) * 0.7, (step + 1) / len(counts) * 0.7))
            known = replace(known, curves={**known.curves, number: found})
            place.keep(known)
        tell(f"live: {FIT}, {FIT_SECONDS + PRESSED:g} s", 0.7)
        known = _with_overheads(known, Model(endpoint, FIT, specs, place.folder), busy, traffic)
    place.keep(known)
    return known


def complete(place: Place) -> bool:
    """Whether all of it was measured before."""
    known = kept.read(place.path, place.subject, place.cores)
    return bool(known.first) and not _missing(place, known)


def _missing(place: Place, known: Known) -> list[int]:
    """Return the numbers of threads whose times are not known."""
    numbers = {place.today.threads, place.cores, *(2**power for power in range(place.cores.bit_length()))}
    return sorted(numbers - set(known.curves))


def part(tell: Tell, first: float, last: float) -> Tell:
    """Return what tells of a part of the whole, from one share of it to another."""
    return lambda text, share: tell(text, first + share * (last - first))


def largest(subject: Subject) -> int:
    """Return the largest batch to try."""
    now = int(subject.config.max_batch_size)
    axes = [spec.largest_batch for spec in subject.inputs() or () if spec.batched]
    return min(min(axes), max(now, LARGEST)) if now and axes else now


def _with_overheads(known: Known, model: Model, configuration: Configuration, traffic: Traffic) -> Known:
    """Return what is known with what server and client add, and what they take of the cores.

    The first from a live run at which batches form, the second from one that gets all the cores to work.
    """
    call = float(known.curve(configuration.threads).calls[1].mean())
    rate = min(max(traffic.rate, SHARES[0] / call), SHARES[1] / call, FASTEST)
    load = Traffic(rate, seed=traffic.seed)
    seen = model.run(load, FIT_SECONDS)
    pressed = model.pressed(CLIENTS, PRESSED)
    request = taken(known, configuration, pressed)
    return replace(known, request=request, first=Tried(configuration, load, FIT_SECONDS, seen)).fitted()


def taken(known: Known, configuration: Configuration, pressed: Seen) -> float:
    """Return the seconds of a core that server and client spend on a request beside its share of a call."""
    answered = max(1, len(pressed.answered))
    batch = min(largest_batch(configuration), max(1, round(answered / max(1, pressed.calls))))
    calls = known.curve(configuration.threads).calls
    size = min(calls, key=lambda one: abs(one - batch))
    return max(0.0, pressed.used.ours * pressed.used.seconds / answered - float(calls[size].mean()) / size)
