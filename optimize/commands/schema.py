"""`optimize schema`: what may stand in a recipe, as a JSON Schema."""

from pathlib import Path

import click

from modelathe.commandline import PATH


@click.command()
@click.option("--output", type=PATH, help="The file to write.  [default: print it]")
def schema(output: Path | None) -> None:
    """Write the JSON Schema of recipes, with which an editor completes and checks them.

    A recipe names it in its first line: "#:schema recipe.schema.json".

    \b
    Example:
      optimize schema --output recipe.schema.json
    """
    import json

    from modelathe import files
    from optimize.runs import schema as schemas

    text = json.dumps(schemas.recipe(), indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        files.write(output, text)
