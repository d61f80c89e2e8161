"""`--allow-overlap`, for every command that reads more than the evaluation set."""

import click

overlap_option = click.option(
    "--allow-overlap", is_flag=True, help="Judge on samples that other sets hold too; lineage and page will say so."
)
