"""Subject of the two towers and the bridge of ``OpenMOSS/MOVA``, called by the pipeline's own code."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.autoparallel.attention_packages import attention_packages
from port_kit.autoparallel.diffusers_cases.case import randomize
from port_kit.autoparallel.original_code import bare_packages
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale


def _stand_in(name: str, **content: Any) -> None:
    sys.modules[name] = module = ModuleType(name)
    module.__dict__.update(content)


class _Registry:
    """Stand-in for a registry of classes: it registers nothing."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def register_module(self, *_args: Any, **_options: Any) -> Any:
        """Return a decorator that changes nothing."""
        return lambda kind: kind


# The denoisers use none of these: CUDA kernels, a registry, and the audio decoder, which imports audiotools.
_stand_in("yunchang", LongContextAttention=None)
_stand_in("yunchang.kernels", AttnType=SimpleNamespace(FA=None, FA3=None))
_stand_in("mmengine")
_stand_in("mmengine.registry", Registry=_Registry)
_stand_in("mova.diffusion.models.dac_vae", DAC=nn.Module)
bare_packages("mova", "mova.diffusion", "mova.diffusion.pipelines")  # they import training code

with attention_packages("flash_attn_interface"):  # else the code downloads a kernel
    from mova.diffusion.models import WanAudioModel, WanModel
    from mova.diffusion.models.interactionv2 import DualTowerConditionalBridge
    from mova.diffusion.pipelines.pipeline_mova import MOVA


class Towers(nn.Module):
    """The denoisers of the pipeline as one module."""

    inference_single_step = MOVA.inference_single_step
    forward_dual_tower_dit = MOVA.forward_dual_tower_dit
    _pre_forward = MOVA._pre_forward

    def __init__(self, scale: ModelScale) -> None:
        super().__init__()
        head_dim, heads, layers = 12 * scale.width, 4 * scale.heads, 2 * scale.depth
        common = {
            "text_dim": 10,
            "freq_dim": 32,
            "eps": 1e-6,
            "num_heads": heads,
            "has_image_input": False,
        }
        self.video_dit = WanModel(
            dim=head_dim * heads,
            in_dim=4,
            out_dim=4,
            ffn_dim=80 * scale.width,
            patch_size=(1, 2, 2),
            num_layers=layers + 1,
            **common,
        )
        self.audio_dit = WanAudioModel(
            dim=head_dim * heads,
            in_dim=6,
            out_dim=6,
            ffn_dim=56 * scale.width,
            patch_size=(1,),
            num_layers=layers,
            vae_type="dac",
            **common,
        )
        self.dual_tower_bridge = DualTowerConditionalBridge(
            visual_layers=layers + 1,
            audio_layers=layers,
            visual_hidden_dim=head_dim * heads,
            audio_hidden_dim=head_dim * heads,
            audio_fps=50.0,
            head_dim=head_dim,
            interaction_strategy="full",
            apply_cross_rope=True,
        )

    def forward(self, video: Tensor, audio: Tensor, text: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Denoise video [B, C, F, H, W] and audio [B, C, T] once."""
        result: tuple[Tensor, Tensor] = self.inference_single_step(
            self.video_dit, video, audio, text, timestep, None, video_fps=24.0
        )
        return result


def _build(scale: ModelScale) -> nn.Module:
    torch.manual_seed(0)
    model = Towers(scale)
    randomize(model)
    return model.float().eval()


def _inputs(tokens: TokenScale, _model: ModelScale | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batch = 1 + tokens.batch

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "video": draw(4, 3 + tokens.image, 6, 10),
        "audio": draw(6, 22 + 5 * tokens.audio),
        "text": draw(7 + 2 * tokens.text, 10),
        "timestep": torch.full((batch,), 400.0),
    }


def make_subject() -> Subject:
    """Return the subject."""
    return Subject("mova_subject:make_subject", _build, _inputs, output=tuple)
