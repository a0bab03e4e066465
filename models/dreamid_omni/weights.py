"""Which weights fill which module: the components of DreamID-Omni and their rule sets, by name only."""

from __future__ import annotations

from port_kit.port import Component

_FAMILY = "port_kit.models.wan_fusion"

#: In loading order. The folder in the model directory, the pipeline's attribute and the prefix of the target
#: names are all the component's name. The tokenizer has no weights and is no component.
COMPONENTS: tuple[Component, ...] = (
    Component(
        name="transformer",
        build=f"{_FAMILY}.transformer:build_transformer",
        rules=f"{_FAMILY}.rules_transformer:TRANSFORMER",
        config=f"{_FAMILY}.config:TRANSFORMER_CONFIG",
    ),
    *(
        Component(
            name=name,
            build=f"{_FAMILY}.{module}:build_{module}",
            rules=f"{_FAMILY}.rules_components:{name.upper()}",
            config=f"{_FAMILY}.component_configs:{name.upper()}_CONFIG",
        )
        for name, module in (
            ("text_encoder", "text_encoder"),
            ("vae", "video_vae"),
            ("audio_vae", "audio_vae"),
            ("vocoder", "vocoder"),
        )
    ),
)
