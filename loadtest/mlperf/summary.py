"""The text of an MLPerf run, for a terminal and in the words of LoadGen's `mlperf_log_summary.txt`."""

from typing import Any

_LINE = "=" * 48


def lines(values: dict[str, Any]) -> list[str]:
    """Return what a terminal shows of a run's document; what breaks MLPerf's rules comes first."""
    if values["compliant"]:
        found = ["keeps MLPerf's rules (an official result needs MLCommons' own LoadGen)"]
    else:
        found = ["NOT COMPLIANT with MLPerf's rules:", *(f"  {text}" for text in values["broken"])]
    found.append(f"{values['scenario']}, {values['mode']} mode: {values['result']} by its own settings")
    found += [f"  {text}" for text in values["unmet"]]
    if values["mode"] == "accuracy":
        return [*found, *_accuracy(values)]
    metric = values["metric"]
    found.append(f"{metric['name']}: {_amount(metric)}")
    latency = values["latency_s"]
    shown = ("50.0%", "90.0%", "99.0%", "99.9%", "max")
    found.append("latency: " + ", ".join(f"{key} {_milliseconds(latency[key])}" for key in shown))
    queries = "one query" if values["queries"] == 1 else f"{values['queries']:,} queries"
    found.append(f"{queries}, {values['samples']:,} samples, {values['seconds']:.1f} s")
    return found


def _accuracy(values: dict[str, Any]) -> list[str]:
    gates = ", ".join(f"{name} {'reached' if met else 'NOT reached'}" for name, met in values["gates"].items())
    return [
        f"{values['metric']['name']}: {values['metric']['value']:.5f}, reference {values['reference']:.5f}",
        f"ratio {values['ratio']:.5f}: {gates}",
        f"{values['samples']:,} samples, each sent once",
    ]


def _amount(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "too few queries"
    return _milliseconds(metric["value"]) if metric["unit"] == "s" else f"{metric['value']:,.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def log(values: dict[str, Any]) -> str:
    """Return a performance run's document as LoadGen words it, so that the two can be laid side by side."""
    latency, early = values["latency_s"], values["early_stopping"]
    found = ["# Written by modelathe, not by LoadGen: no official result.", _LINE, "MLPerf Results Summary", _LINE]
    found += [f"SUT name : {values['model']} at {values['url']}", f"Scenario : {values['scenario']}"]
    found += ["Mode     : PerformanceOnly", *_result(values), f"Result is : {values['result']}"]
    found += [f"  {text}" for text in values["unmet"]]
    found += ["Early Stopping Result:", *_early(early)] if early else []
    found += ["", _LINE, "Additional Stats", _LINE]
    for key, name in (("min", "Min"), ("max", "Max"), ("mean", "Mean")):
        found.append(f"{name + ' latency (ns)':<32}: {_nanoseconds(latency[key])}")
    for key, value in latency.items():
        if key.endswith("%"):
            found.append(f"{float(key[:-1]):.2f} percentile latency (ns)   : {_nanoseconds(value)}")
    found += ["", _LINE, "Test Parameters Used", _LINE]
    found += [f"{key} : {value}" for key, value in values["settings"].items()]
    compliant = ["keeps them"] if values["compliant"] else ["NOT COMPLIANT", *values["broken"]]
    return "\n".join([*found, "", "MLPerf's rules : " + "\n  ".join(compliant)]) + "\n"


def _result(values: dict[str, Any]) -> list[str]:
    latency = values["latency_s"]
    if values["scenario"] == "SingleStream":
        return [f"90.0th percentile latency (ns) : {_nanoseconds(latency['90.0%'])}"]
    if values["scenario"] == "MultiStream":
        return [f"99.0th percentile latency (ns) : {_nanoseconds(latency['99.0%'])}"]
    name = "Completed samples per second    : " if values["scenario"] == "Server" else "Samples per second: "
    return [f"{name}{values['metric']['value']:.2f}"]


def _early(early: dict[str, Any]) -> list[str]:
    if "over" in early:
        return [f" * {early['over']} queries over the latency, {early['needed']} of {early['queries']} needed."]
    return [
        f" * Early stopping {float(share[:-1]):.1f}th percentile estimate: {_nanoseconds(seconds)}"
        for share, seconds in early["estimates_s"].items()
        if seconds is not None
    ] or [f" * Only processed {early['queries']} queries.\n * Need to process at least {early['needed']} queries."]


def _nanoseconds(seconds: float | None) -> str:
    return "-" if seconds is None else str(round(seconds * 1e9))
