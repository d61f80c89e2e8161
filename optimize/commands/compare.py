"""`optimize compare`: two models on the same samples, in pairs."""

import click

from modelathe.commandline import document, emit, json_option, quiet_option, reporting


@click.command()
@click.argument("first")
@click.argument("second")
@quiet_option
@json_option
def compare(first: str, second: str, as_json: bool) -> None:
    """Compare SECOND with FIRST, each a bundle or a workload, sample by sample.

    SECOND is worse, or better, where the whole interval of the difference says so.

    \b
    Example:
      optimize compare examples/digits_cnn.py:workload build/runs/digits_cnn/4-quantize.static
    """
    from optimize.commands.evaluate import choose
    from optimize.judge import evaluate as evaluation
    from optimize.predict.module import TorchPredictor
    from optimize.report import table
    from optimize.runs import open as sources
    from optimize.runs.baseline import counting

    with reporting() as progress:
        bundles = [sources.load(source) for source in (first, second)]
        workload = bundles[0].workload
        progress("evaluating the trained model", 0.0)
        with TorchPredictor(workload.build(), workload.outputs) as trained:
            reference, _ = evaluation.collect(trained, workload)
        scores = []
        for source, bundle in zip((first, second), bundles, strict=True):
            told = counting(progress, f"evaluating {source}", "samples", len(next(iter(reference.values()))))
            with choose(bundle, None, None) as predictor:
                scores.append(evaluation.evaluate(predictor, workload, reference, told=told).scores[0])
    difference = evaluation.compare(workload, scores[1], scores[0])
    result = document(
        first=scores[0].document(),
        second=scores[1].document(),
        difference=difference.value,
        low=difference.low,
        high=difference.high,
        verdict=difference.verdict,
        flipped=list(difference.flipped),
        worsened=list(difference.worsened),
    )
    if as_json:
        emit(result)
    else:
        table.difference(result, first, second)
