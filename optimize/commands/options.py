"""Options of several commands."""

import click

from modelathe.commandline import PATH

overlap_option = click.option(
    "--allow-overlap", is_flag=True, help="Judge on samples that other sets hold too; lineage and page will say so."
)
"""For every command that reads more than the evaluation set."""
recipe_option = click.option("--recipe", "recipe_path", type=PATH, help="The recipe, a TOML file.")
preset_option = click.option(
    "--preset",
    help="A recipe that comes with modelathe: cpu-int8, cpu-small, gpu-fp16 or gpu-int8; the gpu ones were never run "
    "on a GPU.  [default: where there is no --recipe, cpu-int8, then cpu-small]",
)
"""Where no recipe is named."""
