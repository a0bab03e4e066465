"""The tiny model of the world with random weights: the sizes, words and statistics of the trained one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from port_kit.download import Recipe
from port_kit.testing.tiny import TinyModel, TinyPart, TinyTokenizer, tiny_repositories
from port_kit.testing.tiny_trained import INDEX, VOCABULARY, components, read_release

SEED = 7


def random_model(recipe: Recipe, folder: Path) -> TinyModel:
    """Write the model into ``folder``, laid out as the recipe's Hub repositories."""
    facts = read_release()[1]
    parts: dict[str, TinyPart] = {"tokenizer": TinyTokenizer(VOCABULARY, words=tuple(facts["words"]))}
    for name, component in components(recipe).items():
        parts[name] = replace(component, config={**component.config, **facts["configs"].get(name, {})})
    tiny = tiny_repositories(recipe, parts, folder, seed=SEED)
    return replace(tiny, model_index={key: value for key, value in INDEX.items() if key in recipe.model_index})


def write_model(folder: Path, *, trained: bool) -> None:
    """Assemble a model directory from a loopback Hub, unless it is there."""
    from port_kit.models.ovi import PORT
    from port_kit.testing.tiny_port import download_tiny

    if (folder / "model_index.json").is_file():
        return
    port = PORT if trained else replace(PORT, trained_model=f"{__name__}:random_model")
    download_tiny(port, folder, trained=True)
