"""Tidepool's pipeline: Euler steps from noise to frames, guided by the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.pipeline.loading import build_components, load_component_weights, weights_sources
from tidepool import config
from tidepool.weights import COMPONENTS


class TidepoolPipeline(nn.Module, CFGParallelMixin):
    """The pipeline as vLLM-Omni's registry builds it: empty, then filled by the standard loader."""

    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = []
    _vae_modules: ClassVar[list[str]] = []
    _resident_modules: ClassVar[list[str]] = []
    default_num_inference_steps: ClassVar[int] = config.DEFAULT_STEPS
    dummy_run_num_frames: ClassVar[int] = config.FRAMES

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.dtype, self.device = od_config.dtype, get_local_device()
        for name, module in build_components(od_config.model, COMPONENTS).items():
            self.add_module(name, module)
        self.weights_sources = weights_sources(od_config.model, COMPONENTS)
        self.eval().requires_grad_(False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the transformer; every tensor of the checkpoint is accounted for."""
        return load_component_weights(self, COMPONENTS, weights, self.od_config.model)

    def predict_noise(self, **inputs: Tensor) -> Tensor:
        """Run one pass; the CFG mixin spreads passes over ranks."""
        return self.transformer(**inputs)

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Serve one request; ``output`` is uint8 (frames, H, W, 3)."""
        sampling, given = req.sampling_params, req.prompts[0]
        text = given["prompt"] if isinstance(given, dict) else given
        steps = sampling.num_inference_steps or config.DEFAULT_STEPS
        scale = sampling.guidance_scale if sampling.guidance_scale_provided else config.DEFAULT_GUIDANCE
        generator = torch.Generator(self.device).manual_seed(sampling.seed or 0)
        shape = (1, 3, config.FRAMES, config.HEIGHT, config.WIDTH)
        video = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        prompt, nothing = self._bytes(text), self._bytes(" ")
        for step in range(steps):
            time = torch.full((1,), 1 - step / steps, device=self.device)
            velocity = self.predict_noise_maybe_with_cfg(
                scale != 1.0,
                scale,
                {"video": video, "time": time, "prompt": prompt},
                {"video": video, "time": time, "prompt": nothing},
                cfg_normalize=False,
            )
            video = video - velocity / steps
        frames = (video[0].float().sigmoid() * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
        return DiffusionOutput(output=frames)

    def _bytes(self, text: str) -> Tensor:
        return torch.tensor([list(text.encode() or b" ")], device=self.device)


def get_post_process_func(od_config: OmniDiffusionConfig) -> Callable[[Tensor], dict[str, Any]]:
    """Return what turns a worker's frames into vLLM-Omni's payload; runs in the engine's process."""

    def post_process(frames: Tensor) -> dict[str, Any]:
        return {"payload": {"video": frames.cpu().numpy()}, "metadata": {"video": {"fps": config.FPS}}}

    return post_process
