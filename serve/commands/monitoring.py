"""`serve monitoring`."""

from pathlib import Path

import click

from loadtest.plan.options import Number
from modelathe.commandline import PATH, document, emit, json_option
from serve.commands.versions import repository_option


@click.command()
@click.argument("folder", type=PATH)
@repository_option
@click.option("--url", default="127.0.0.1:8002", show_default=True, help="HOST:PORT of the metrics, for Prometheus.")
@click.option("--p99-ms", type=Number(0, min_open=True), help="Alert where a model's p99 is above it.")
@json_option
def monitoring(folder: Path, repository: Path, url: str, p99_ms: float | None, as_json: bool) -> None:
    """Write FOLDER/prometheus.yml, alerts.yml and dashboard.json for the models of the repository.

    Prometheus starts with the first, which names the second; Grafana imports the third. Write them again when a model
    joins the repository or leaves it.

    \b
    Example:
      serve monitoring build/monitoring --repository build/model_repository --p99-ms 50
    """
    from serve.watch import monitoring as files

    written = files.write(folder, repository, url, p99_ms)
    if as_json:
        emit(document(files=[str(path) for path in written]))
        return
    click.echo(f"written: {', '.join(map(str, written))}\n  prometheus --config.file {written[0]}")
