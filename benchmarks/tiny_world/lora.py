"""Training of a LoRA for a colour that the base model does not know, in PEFT's form with the original's names."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tiny_world import parts
from benchmarks.tiny_world.codecs import small
from benchmarks.tiny_world.flows import STEPS, Codecs, Examples, evaluate, prepare
from benchmarks.tiny_world.grammar import NEW_COLOUR, Description, descriptions, training
from benchmarks.tiny_world.stepper import Losses, Options, Stepper

RANK, ALPHA = 8, 16
BATCH, SCENES, HELD_BACK = 128, 12, 20
_SEED = 11
#: Modules of a block of the port, and the original modules that each of them holds.
_BLOCK = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "self_attn.o": ("self_attn.o",),
    "cross_attn.q": ("cross_attn.q",),
    "cross_attn.kv": ("cross_attn.k", "cross_attn.v"),
    "cross_attn.o": ("cross_attn.o",),
    "ffn.up": ("ffn.0",),
    "ffn.down": ("ffn.2",),
}
_ADAPTER = {"text_embedding.up": ("text_embedding.0",), "text_embedding.down": ("text_embedding.2",)}


class Adapter:
    """Low-rank additions to the linears of the video tower.

    Attributes:
        tensors: ``{original module}.lora_A.weight`` and ``.lora_B.weight``.
    """

    def __init__(self, model: Any) -> None:
        self.tensors: dict[str, Tensor] = {}
        places = {f"video.{name}": ("video_model.{}", held) for name, held in _ADAPTER.items()}
        for index in range(len(model.blocks)):
            for name, held in _BLOCK.items():
                places[f"blocks.{index}.video.{name}"] = (f"video_model.blocks.{index}.{{}}", held)
        for place, (form, held) in places.items():
            self._adapt(model.get_submodule(place), [form.format(name) for name in held])

    def _adapt(self, linear: nn.Module, names: list[str]) -> None:
        weight: Any = linear.weight
        pairs = []
        for name in names:
            a = torch.randn(RANK, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5
            b = torch.zeros(weight.shape[0] // len(names), RANK, device=weight.device)
            self.tensors[f"{name}.lora_A.weight"], self.tensors[f"{name}.lora_B.weight"] = a, b
            pairs.append((a, b))

        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            changes = [nn.functional.linear(nn.functional.linear(inputs[0], a), b) for a, b in pairs]
            return output + (ALPHA / RANK) * torch.cat(changes, -1)

        linear.register_forward_hook(add)

    def save(self, folder: Path) -> None:
        """Write PEFT's two files."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        kept = {
            f"base_model.model.{name}": value.detach().to("cpu", torch.bfloat16) for name, value in self.tensors.items()
        }
        save_file(kept, folder / "adapter_model.safetensors")
        modules = sorted({name.partition(".lora_")[0] for name in self.tensors})
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def prompts() -> tuple[list[Description], list[Description]]:
    """Return the descriptions of the new colour: those for training, those held back."""
    given = random.Random(_SEED).sample(descriptions((NEW_COLOUR,)), len(descriptions((NEW_COLOUR,))))
    return given[HELD_BACK:], given[:HELD_BACK]


def train_lora(options: Options, seconds: float) -> None:
    """Train the LoRA on the new colour, and on a third of the known ones so that they stay."""
    codecs = Codecs.load(options)
    model: Any = parts.load(options.output, "transformer", options.device)[0]
    prepare(model)
    known, held = prompts()
    many = options.on_gpu
    new = Examples.make(codecs, known if many else known[:3], SCENES if many else 1, seed=1)
    old = Examples.make(codecs, training() if many else training()[:3], 1, seed=2)
    before = evaluate(model, codecs, held[: small(options, 32)], STEPS if many else 2, options)
    adapter = Adapter(model)
    count = small(options, BATCH)

    def losses() -> Losses:
        with options.autocast():
            found = new.losses(model, count)
            kept = old.losses(model, max(1, count // 2))
        return {**found, "loss": found["loss"] + 0.5 * kept["loss"], "kept": kept["loss"]}

    stepper = Stepper("lora", adapter.tensors, [losses], options, rate=2e-3)
    stepper.run(seconds)
    after = evaluate(model, codecs, held[: small(options, 32)], STEPS if many else 2, options)
    adapter.save(options.output / "lora")
    options.log(stage="lora", step=stepper.step, before=before, after=after)
