"""Components of the family's ports, by name only, so that listing ports imports no torch."""

from __future__ import annotations

from port_kit.port import Component

_FAMILY = "port_kit.models.wan"
#: Components that all ports have, with their modules.
_SHARED = {"text_encoder": "text_encoder", "vae": "video_vae", "audio_vae": "audio_vae", "vocoder": "vocoder"}


def components(transformer_config: str) -> tuple[Component, ...]:
    """Return a port's components in loading order.

    A component's name is also its folder in the model directory, its attribute of the pipeline and the prefix of its
    target names. The tokenizer has no weights and is not a component.

    Args:
        transformer_config: name of the full-size configuration in :mod:`port_kit.models.wan.transformer.config`.
    """
    transformer = Component(
        name="transformer",
        build=f"{_FAMILY}.transformer.model:build_transformer",
        rules=f"{_FAMILY}.weights.transformer_rules:TRANSFORMER",
        config=f"{_FAMILY}.transformer.config:{transformer_config}",
    )
    shared = (
        Component(
            name=name,
            build=f"{_FAMILY}.components.{module}:build_{module}",
            rules=f"{_FAMILY}.weights.component_rules:{name.upper()}",
            config=f"{_FAMILY}.components.configs:{name.upper()}_CONFIG",
            kind="encoder" if name == "text_encoder" else "vae",
        )
        for name, module in _SHARED.items()
    )
    return (transformer, *shared)
