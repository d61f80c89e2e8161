"""A run's folder holds the proof of the bundles that lie in it, or none."""

from pathlib import Path

from optimize.runs import resume
from optimize.runs.baseline import silent
from optimize.runs.recipe import Recipe


def test_a_new_run_takes_the_old_proof_away_first(tmp_path: Path) -> None:
    for name in (*resume.PROOF, "notes.txt"):
        (tmp_path / name).write_text("of the run before")
    (tmp_path / "0-trained").mkdir()
    resume.prepare(tmp_path, Recipe(()), ["0-trained"], silent)
    assert {path.name for path in tmp_path.iterdir()} == {"0-trained", "digests.json", "recipe.toml", "notes.txt"}
