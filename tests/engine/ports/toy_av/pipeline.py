"""The toy's pipeline. B batch, V video tokens, A audio tokens, D width, N heads, H head size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.sp_plan import SequenceParallelInput, SequenceParallelOutput
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

WIDTH, HEADS, HEAD_DIM, LAYERS = 32, 4, 8, 2
VIDEO_TOKENS, AUDIO_TOKENS = 48, 16
FRAMES, SIZE, SAMPLE_RATE, FPS = 5, 160, 16000, 24


class Layer(nn.Module):
    """Attention of the video tokens over both streams, then of the audio tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = QKVParallelLinear(WIDTH, HEAD_DIM, HEADS, bias=False, return_bias=False)
        self.out = RowParallelLinear(HEADS * HEAD_DIM, WIDTH, bias=False, input_is_parallel=True, return_bias=False)
        self.heads = self.qkv.num_heads
        self.attention = Attention(num_heads=self.heads, head_size=HEAD_DIM, softmax_scale=HEAD_DIM**-0.5, causal=False)

    def forward(self, video_BVD: torch.Tensor, audio_BAD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both streams, each after attending to the other."""
        qv, kv, vv = self._project(video_BVD)
        qa, ka, va = self._project(audio_BAD)
        video = video_BVD + self.out(self.attention(qv, ka, va).flatten(2))
        audio = audio_BAD + self.out(self.attention(qa, kv, vv).flatten(2))
        return video, audio

    def _project(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(-1, (self.heads, HEAD_DIM)) for part in self.qkv(tokens).chunk(3, -1)]


class Boundary(nn.Module):
    """Boundary at which the plan shards and gathers; returns its tensors."""

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the arguments."""
        return tensors


class ToyTransformer(nn.Module):
    """Two streams, both split over the sequence-parallel ranks."""

    _sp_plan = {
        "split": {i: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True) for i in (0, 1)},
        "gather": [SequenceParallelOutput(gather_dim=1, expected_dims=3)] * 2,
    }

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.split, self.gather = Boundary(), Boundary()
        self.local_lengths = (0, 0)

    def forward(self, video: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two predictions."""
        video, audio = self.split(video, audio)
        self.local_lengths = (video.shape[1], audio.shape[1])
        for block in self.blocks:
            video, audio = block(video, audio)
        video, audio = self.gather(video, audio)  # the hook gives a list, which CFG would not take apart
        return video, audio


def get_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., dict[str, Any]]:
    """Return the function that names the payload's parts."""

    def post_process(output: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        video, audio = output
        return {
            "video": video.float().numpy(),
            "audio": audio.float().numpy(),
            "audio_sample_rate": SAMPLE_RATE,
            "fps": FPS,
        }

    return post_process


class ToyAVPipeline(nn.Module, CFGParallelMixin):
    """Two denoise steps on seeded noise; the prompt ``fail`` raises."""

    _dit_modules, _encoder_modules, _vae_modules, _resident_modules = ["transformer"], [], [], []
    support_audio_output = True
    dummy_run_num_frames = 0

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.transformer = ToyTransformer()
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=od_config.model, subfolder="transformer", revision=None, prefix="transformer."
            )
        ]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load q, k, v into the fused projection and the rest as it comes."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            stem, _, leaf = name.removesuffix(".weight").rpartition(".")
            fused = leaf in ("q", "k", "v")
            target = f"{stem}.{'qkv' if fused else leaf}.weight"
            parameters[target].weight_loader(parameters[target], tensor, *([leaf] if fused else []))
            loaded.add(target)
        return loaded

    def predict_noise(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the transformer's two predictions."""
        return self.transformer(**inputs)

    def forward(self, req: DiffusionRequestBatch, **_: object) -> DiffusionOutput:
        """Return (video [F, S, S, 3] in [0, 1], audio [samples])."""
        prompt = req.prompts[0]["prompt"] if isinstance(req.prompts[0], dict) else req.prompts[0]
        if prompt == "fail":
            raise ValueError("this prompt fails")
        generator = torch.Generator().manual_seed(req.sampling_params.seed or 0)
        video = torch.randn(1, VIDEO_TOKENS, WIDTH, generator=generator)
        audio = torch.randn(1, AUDIO_TOKENS, WIDTH, generator=generator)
        for _step in range(req.sampling_params.num_inference_steps or 2):
            positive, negative = {"video": video, "audio": audio}, {"video": -video, "audio": audio}
            steps = self.predict_noise_maybe_with_cfg(True, 2.0, positive, negative, cfg_normalize=False)
            video, audio = video + 0.1 * steps[0], audio + 0.1 * steps[1]
        return DiffusionOutput(output=_decode(video, audio))


def _decode(video: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand the tokens to images of more than a megabyte and to audio of the same duration."""
    pixels = FRAMES * SIZE * SIZE * 3
    pictures = torch.sigmoid(video.flatten()).repeat(-(-pixels // video.numel()))[:pixels]
    samples = SAMPLE_RATE * FRAMES // FPS
    sound = torch.tanh(audio.flatten()).repeat(-(-samples // audio.numel()))[:samples]
    return pictures.view(FRAMES, SIZE, SIZE, 3), sound
