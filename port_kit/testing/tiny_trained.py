"""The trained tiny model of Ovi: weights that were trained on the tiny world, under the published names.

``data/tiny_trained.safetensors`` holds the tensors of all components in bfloat16, as ``<component>/<original name>``,
and in its metadata the configurations that training decides: the statistics of the video VAE's latents.
``python -m benchmarks.tiny_world.release`` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.download import Recipe
from port_kit.errors import PortKitError
from port_kit.testing.tiny import (
    Tensors,
    TinyComponent,
    TinyModel,
    TinyPart,
    TinyTokenizer,
    expand,
    scale,
    tiny_repositories,
)
from port_kit.testing.tiny_fusion import components as random_components

if TYPE_CHECKING:
    import torch

RELEASE = Path(__file__).with_name("data") / "tiny_trained.safetensors"
#: Key of the metadata: JSON of ``{"configs": {component: changes}, "words": [...]}``.
METADATA = "tiny_trained"

WIDTH, HEADS, LAYERS, FFN = 96, 4, 5, 256
GATED_CONV = 256  # 8 * WIDTH / 3, rounded up to a multiple of 256
TEXT_WIDTH, VOCABULARY = 64, 512
#: Changes of the size to ``model_index.json``: the pixels of a frame, and the block that guidance omits.
INDEX = {"video_area": 64 * 96, "skip_block": 1}

_VAE, _AUDIO, _VOCODER = (8, 10), 16, 2


@dataclass(frozen=True)
class TrainedComponent(TinyComponent):
    """A component whose values are in a release file.

    Attributes:
        values: original names and tensors.
    """

    values: Mapping[str, Any] | None = None

    def tensors(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return the trained tensors in the dtypes of the published checkpoint."""
        import torch

        values = self.values or {}
        return {
            name: values[name].to(getattr(torch, dtype)).reshape(shape)
            for name, (shape, dtype) in self.manifest().items()
        }

    def manifest(self) -> Tensors:
        """Return names, shapes and dtypes."""
        return manifest(self)


def manifest(component: TinyComponent) -> Tensors:
    """Return names, shapes and dtypes of a tiny component's checkpoint."""
    return scale(expand(component.outline), sizes=component.sizes, layers=component.layers)


def components(recipe: Recipe) -> dict[str, TinyComponent]:
    """Return the sizes of the trained model, as changes to the recipe's configurations."""
    made = random_components(recipe)
    tower = {"dim": WIDTH, "num_heads": HEADS, "num_layers": LAYERS, "ffn_dim": FFN, "text_dim": TEXT_WIDTH}
    full = recipe.configs["transformer"]
    encoder, decoder = _VAE
    return {
        "transformer": replace(
            made["transformer"],
            sizes={3072: WIDTH, 4096: TEXT_WIDTH, 14336: FFN, 8192: GATED_CONV},
            layers={"blocks": LAYERS},
            config={name: {**full[name], **tower} for name in ("video", "audio")},
        ),
        "text_encoder": made["text_encoder"],
        "vae": replace(
            made["vae"],
            sizes={160: encoder, 256: decoder},
            config={"base_dim": encoder, "decoder_base_dim": decoder},
        ),
        "audio_vae": replace(made["audio_vae"], sizes={384: _AUDIO}, config={"hidden_dim": _AUDIO}),
        "vocoder": replace(made["vocoder"], sizes={24: _VOCODER}, config={"upsample_initial_channel": 64 * _VOCODER}),
    }


def trained_model(recipe: Recipe, folder: Path, *, release: Path = RELEASE) -> TinyModel:
    """Write the trained tiny model of Ovi into ``folder``, laid out as the recipe's Hub repositories.

    Args:
        recipe: of a variant of Ovi.
        folder: the files go to ``folder/<repository id>/<path>``.
        release: the trained weights.

    Raises:
        PortKitError: ``outline_invalid``; the release file does not exist, or lacks a tensor.
    """
    values, facts = read_release(release)
    parts: dict[str, TinyPart] = {"tokenizer": TinyTokenizer(VOCABULARY, words=tuple(facts["words"]))}
    for name, component in components(recipe).items():
        missing = set(manifest(component)) - set(values.get(name, ()))
        if missing:
            raise PortKitError(
                f"{release} lacks {len(missing)} tensors of {name}, such as {min(missing)}",
                code="outline_invalid",
                hint="pack the results again: python -m benchmarks.tiny_world.release FOLDER",
            )
        config = {**component.config, **facts["configs"].get(name, {})}
        parts[name] = TrainedComponent(component.outline, component.sizes, component.layers, config, values[name])
    tiny = tiny_repositories(recipe, parts, folder)
    return replace(tiny, model_index={key: value for key, value in INDEX.items() if key in recipe.model_index})


def read_release(release: Path = RELEASE) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Return the tensors of a release by component and original name, and the facts of its metadata."""
    from safetensors import safe_open

    if not release.is_file():
        raise PortKitError(
            f"there are no trained weights: {release} does not exist",
            code="outline_invalid",
            hint="train them: python -m benchmarks.tiny_world.train --help",
        )
    values: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(release, framework="pt") as file:
        facts = json.loads((file.metadata() or {})[METADATA])
        for key in file.keys():  # not a mapping
            component, _, name = key.partition("/")
            values.setdefault(component, {})[name] = file.get_tensor(key)
    return values, facts
