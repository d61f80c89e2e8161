from pathlib import Path

import pytest

from optimize.methods.distill.logits import Logits
from optimize.methods.export.onnx import Onnx
from optimize.methods.prune.channels import Channels
from optimize.methods.quantize.static import Static
from optimize.model.errors import BadRecipe
from optimize.runs import recipe as recipes

EXAMPLES = sorted(Path("examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_and_come_back(path: Path, tmp_path: Path) -> None:
    recipe = recipes.load(path)
    (tmp_path / "copy.toml").write_text(recipe.toml())
    assert recipes.load(tmp_path / "copy.toml") == recipe
    # A workload may have several recipes.
    assert any(path.stem.startswith(source.stem) for source in path.parent.glob("*.py"))


def test_the_export_is_inserted() -> None:
    recipe = recipes.parse({"step": [{"use": "prune.channels"}, {"use": "distill.logits"}, {"use": "quantize.static"}]})
    assert recipe.steps == (Channels(), Logits(), Onnx(), Static())
    assert recipes.parse({"step": [{"use": "quantize.static"}]}).steps == (Onnx(), Static())
    assert recipes.parse({"step": [{"use": "prune.channels"}]}).steps == (Channels(), Onnx())


@pytest.mark.parametrize(
    ("text", "said", "fix"),
    [
        ("seed = -1\n[[step]]\nuse = 'prune.channels'", "seed is -1", ""),
        ("sede = 1\n[[step]]\nuse = 'prune.channels'", "unknown key 'sede'", "'seed'"),
        ("[[step]]\nuse = 'prune.channels'\nratoi = 0.5", "unknown key 'ratoi'", "'ratio'"),
        ("[[step]]\nuse = 'prune.channels'\nratio = 1.5", "ratio = 1.5", ""),
        ("[[step]]\nuse = 'prune.channels'\nratio = 'half'", "ratio = 'half'", ""),
        ("[[step]]\nuse = 'prune.chanels'", "no method 'prune.chanels'", "prune.channels"),
        ("[[step]]\nratio = 0.5", "has no `use`", "prune.channels"),
        ("seed = 1", "no steps", "[[step]]"),
        ("step = 3", "no steps", "[[step]]"),
        ("[target]\ndevice = 'tpu'\n[[step]]\nuse = 'prune.channels'", "device = 'tpu'", ""),
        ("[target]\nbatch = []\n[[step]]\nuse = 'prune.channels'", "batch = []", ""),
        ("[budget]\nkeep = 0.9\nmax_drop = 0.1\n[[step]]\nuse = 'prune.channels'", "both given", "one of them"),
        ("budget = 3\n[[step]]\nuse = 'prune.channels'", "not a table", ""),
        ("[[step]\n", "is not TOML", ""),
        (
            "[[step]]\nuse = 'quantize.static'\n[[step]]\nuse = 'prune.channels'",
            "out of order",
            "prune.channels, quantize.static",
        ),
    ],
)
def test_a_bad_recipe_names_the_key(tmp_path: Path, text: str, said: str, fix: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(BadRecipe) as error:
        recipes.load(path)
    assert said in error.value.what
    assert fix in error.value.fix
    assert str(path) in error.value.where
    assert error.value.exit_code == 2


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="no such recipe"):
        recipes.load(tmp_path / "absent.toml")
    with pytest.raises(BadRecipe, match="no such recipe"):
        recipes.load(tmp_path)


def test_how_the_result_is_served_stands_in_the_recipe() -> None:
    document = {
        "step": [{"use": "quantize.dynamic"}],
        "serve": {"queue_delay_us": 200, "buckets": {"tokens": [16, 32]}},
    }
    made = recipes.parse(document)
    assert (made.serve.queue_delay_us, made.serve.buckets) == (200, {"tokens": (16, 32)})
    assert recipes.parse(made.document()) == made
    assert "serve" not in recipes.parse({"step": document["step"]}).document()
    with pytest.raises(BadRecipe, match=r"\[serve\]: unknown key 'queue_delay'"):
        recipes.parse({**document, "serve": {"queue_delay": 200}})
