"""Recognition of CLIP's encoders in the names of transformers, and their configurations from the shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from port_kit.inspect.report import Recognized
from port_kit.manifest import Manifest

#: Width of an attention head in all published CLIP models; the shapes do not tell.
_HEAD = 64
#: Roots of the encoders, and the projections beside them.
_ROOTS = {"text_model": "text_projection.weight", "vision_model": "visual_projection.weight"}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
#: A buffer that earlier versions of transformers wrote.
_IGNORED = "embeddings.position_ids"
Shapes = dict[str, tuple[int, ...]]


def recognize_clip(checkpoint: Manifest) -> Recognized | None:
    """Return CLIP, or its text or vision encoder, if the names and shapes are exactly those of one; else None."""
    shapes = {name: spec.shape for name, spec in checkpoint.items() if not name.endswith(_IGNORED)}
    parts = {root: {name: shape for name, shape in shapes.items() if _of(name, root)} for root in _ROOTS}
    text, vision = _text(parts["text_model"]), _vision(parts["vision_model"])
    if (
        text is not None
        and vision is not None
        and set(shapes) == {"logit_scale", *parts["text_model"], *parts["vision_model"]}
    ):
        configs = {"text_config": text[0], "vision_config": vision[0], "projection_dim": text[0]["projection_dim"]}
        return _recognized("clip", "CLIPModel", configs)
    for name, root, read in (("text_encoder", "text_model", _text), ("image_encoder", "vision_model", _vision)):
        # transformers 5 writes the encoders alone without their root
        named = {key if _of(key, root) else f"{root}.{key}": shape for key, shape in shapes.items()}
        found = read(named)
        if found is not None:
            projected = "WithProjection" if found[1] else ""
            kind = root.partition("_")[0]
            return _recognized(name, f"CLIP{kind.capitalize()}Model{projected}", found[0], f"clip_{kind}_model")
    return None


def _of(name: str, root: str) -> bool:
    """Return True for the names of an encoder, and of its projection."""
    return name.startswith(f"{root}.") or name == _ROOTS[root]


def _recognized(name: str, class_name: str, values: Mapping[str, Any], model_type: str = "clip") -> Recognized:
    return Recognized(
        name=name,
        kind="encoder",
        origin=f"transformers' {class_name}",
        pretrained=f"transformers:{class_name}",
        values={"architectures": [class_name], "model_type": model_type, **values},
    )


def _text(shapes: Shapes) -> tuple[Mapping[str, Any], bool] | None:
    """Return the configuration of a text encoder and whether it has a projection, or None."""
    table = shapes.get("text_model.embeddings.token_embedding.weight", ())
    positions = shapes.get("text_model.embeddings.position_embedding.weight", ())
    sizes = _sizes(shapes, "text_model")
    if sizes is None or len(table) != 2 or len(positions) != 2:
        return None
    values = {**sizes, "vocab_size": table[0], "max_position_embeddings": positions[0]}
    width = sizes["hidden_size"]
    expected = {
        "text_model.embeddings.token_embedding.weight": (table[0], width),
        "text_model.embeddings.position_embedding.weight": (positions[0], width),
        **dict(_pair("text_model.final_layer_norm", (width,))),
    }
    return _complete(shapes, expected, values, "text_model")


def _vision(shapes: Shapes) -> tuple[Mapping[str, Any], bool] | None:
    """Return the configuration of a vision encoder and whether it has a projection, or None."""
    patch = shapes.get("vision_model.embeddings.patch_embedding.weight", ())
    positions = shapes.get("vision_model.embeddings.position_embedding.weight", ())
    sizes = _sizes(shapes, "vision_model")
    if sizes is None or len(patch) != 4 or len(positions) != 2:
        return None
    width, side = sizes["hidden_size"], round((positions[0] - 1) ** 0.5)
    values = {**sizes, "num_channels": patch[1], "patch_size": patch[2], "image_size": side * patch[2]}
    expected = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, patch[1], patch[2], patch[2]),
        "vision_model.embeddings.position_embedding.weight": (side * side + 1, width),
        **dict(_pair("vision_model.pre_layrnorm", (width,))),  # transformers' spelling
        **dict(_pair("vision_model.post_layernorm", (width,))),
    }
    return _complete(shapes, expected, values, "vision_model")


def _sizes(shapes: Shapes, root: str) -> dict[str, Any] | None:
    """Return widths and number of layers; None if the names are not those of an encoder."""
    first = shapes.get(f"{root}.encoder.layers.0.mlp.fc1.weight", ())
    if len(first) != 2 or first[1] % _HEAD:
        return None
    layers = {int(found[1]) for name in shapes if (found := _LAYER.search(name))}
    return {
        "hidden_size": first[1],
        "intermediate_size": first[0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": first[1] // _HEAD,
        "projection_dim": shapes.get(_ROOTS[root], (512,))[0],
    }


def _complete(
    shapes: Shapes, expected: Shapes, values: Mapping[str, Any], root: str
) -> tuple[Mapping[str, Any], bool] | None:
    """Return the configuration if the tensors are exactly those that it makes; else None."""
    width, hidden = values["hidden_size"], values["intermediate_size"]
    for index in range(values["num_hidden_layers"]):
        expected |= _layer(f"{root}.encoder.layers.{index}", width, hidden)
    is_projected = _ROOTS[root] in shapes
    if is_projected:
        expected[_ROOTS[root]] = (values["projection_dim"], width)
    return (values, is_projected) if shapes == expected else None


def _layer(place: str, width: int, hidden: int) -> Shapes:
    parts: Shapes = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        parts |= _pair(f"{place}.self_attn.{name}", (width, width))
    for name in ("layer_norm1", "layer_norm2"):
        parts |= _pair(f"{place}.{name}", (width,))
    return parts | dict(_pair(f"{place}.mlp.fc1", (hidden, width))) | dict(_pair(f"{place}.mlp.fc2", (width, hidden)))


def _pair(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
