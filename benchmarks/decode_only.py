"""Seconds of decoding alone, in the forms that the decoder of the video has; ``end_to_end.py --decode-only``.

Modules of full size with random weights are built in this process, without an engine and without files. Each form
decodes the same latents; its pixels are compared with those of the first form.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """One form of the video's decoder.

    Attributes:
        level: of vLLM-Omni's ``vae_fast_path``.
        search: cuDNN tries its algorithms.
        dtype: of weights and activations.
        tf32: float32 convolutions round their operands to TF32, PyTorch's default.
    """

    level: str = "lossless"
    search: bool = False
    dtype: torch.dtype = torch.float32
    tf32: bool = True


FORMS = {
    "lossless": Form(),
    "lossless, cuDNN's search": Form(search=True),
    "lossless, no TF32": Form(tf32=False),
    "channels_last": Form("channels_last"),
    "channels_last, cuDNN's search": Form("channels_last", search=True),
    "lossless, float16": Form(dtype=torch.float16),
    "channels_last, bfloat16": Form("channels_last", dtype=torch.bfloat16),
    "channels_last, float16": Form("channels_last", dtype=torch.float16),
    "channels_last, float16, cuDNN's search": Form("channels_last", search=True, dtype=torch.float16),
}
AUDIO_LATENTS = 157
#: Kinds of kernels by parts of their names.
KINDS = {
    "convolutions": ("conv", "cudnn", "gemm", "cutlass", "xmma", "nvjet", "fprop"),
    "norms": ("rms", "norm"),
    "copies": ("copy", "cat", "pad", "nchw", "nhwc", "transpose", "dup", "upsample", "shift"),
}


def run(
    height: int, width: int, *, latent_frames: int, rounds: int, forms: list[str], tiny: bool, kernels: bool
) -> dict[str, Any]:
    """Return the figures of each form of the video's decoder, and of the audio's decoder."""
    from port_kit.models.wan.components.audio_vae import build_audio_vae
    from port_kit.models.wan.components.video_vae import build_video_vae
    from port_kit.models.wan.components.vocoder import build_vocoder
    from port_kit.runtime.single_process import single_rank

    on_gpu = torch.cuda.is_available() and not tiny
    device = torch.device("cuda" if on_gpu else "cpu")
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "size": f"{height}x{width}",
        "latent_frames": latent_frames,
        "forms": {},
    }
    with torch.inference_mode(), single_rank(torch.bfloat16, device, default_device=False):
        configs = component_configs(tiny=tiny)
        with device:
            audio_vae, vocoder = build_audio_vae(configs["audio_vae"]), build_vocoder(configs["vocoder"])
        audio_vae, vocoder = fill(audio_vae), fill(vocoder)
        channels = configs["vae"]["z_dim"]
        generator = torch.Generator(device).manual_seed(1)
        sizes = (1, channels, latent_frames, height // 16, width // 16)
        latents = torch.randn(sizes, generator=generator, device=device)
        expected: Tensor | None = None
        for name in forms or FORMS:
            form = FORMS[name]
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = form.search, form.tf32
            with device:
                vae = build_video_vae(configs["vae"], precision=torch.bfloat16)
            vae = fill(vae).to(form.dtype)
            installed = install(vae, form.level) if on_gpu else False
            vae.decode_in_float16 = lambda: None  # which the port does with channels_last; here the form decides
            figures, pixels = measure(lambda vae=vae: vae.decode(latents), device, rounds)
            pixels = pixels.float()
            expected = pixels if expected is None else expected
            figures |= {"fast_path": installed, **distance(pixels, expected)}
            if kernels:
                figures["kernels"] = profile(lambda vae=vae: vae.decode(latents[:, :, :3]), device)
            result["forms"][name] = figures
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, True
        length = AUDIO_LATENTS if not tiny else 10
        audio = torch.randn(1, configs["audio_vae"]["embed_dim"], length, device=device)
        result["audio"], _ = measure(lambda: vocoder(audio_vae.decode(audio)), device, rounds)
    return result


def component_configs(*, tiny: bool) -> dict[str, Any]:
    """Return the configurations of the decoders."""
    from port_kit.models.dreamid_omni.recipe import RECIPE
    from port_kit.testing.tiny_fusion import components

    configs: dict[str, Any] = {name: dict(RECIPE.configs[name]) for name in ("vae", "audio_vae", "vocoder")}
    if tiny:
        for name, small in components(RECIPE).items():
            if name in configs:
                configs[name] |= small.config
    return configs


def fill(module: nn.Module) -> nn.Module:
    """Fill a module with random weights that keep the size of activations."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() < 2 or parameter.shape[1:].numel() == 1:
            parameter.data.fill_(1.0 if parameter.dim() != 1 else 0.0)
        else:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return module


def install(vae: nn.Module, level: str) -> bool:
    """Install vLLM-Omni's fast path as its engine does; return whether it is."""
    from vllm_omni.diffusion.distributed.autoencoders.wan_vae_fastpath import install_wan_vae_fastpath

    return bool(install_wan_vae_fastpath(vae, level=level).installed)


def measure(call: Callable[[], Tensor], device: torch.device, rounds: int) -> tuple[dict[str, Any], Tensor]:
    """Return seconds of the first call and the median of the next, the peak of device memory, and the last result."""
    seconds = []
    for _ in range(1 + rounds):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "seconds": round(statistics.median(seconds[1:]), 4),
        "first_seconds": round(seconds[0], 4),
        "peak_gib": round(peak, 2),
    }, result


def distance(pixels: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the difference of two clips: relative L2, and largest and mean in levels of 255."""
    levels = (pixels - expected).abs() * 127.5
    return {
        "relative_error": ((pixels - expected).norm() / expected.norm()).item(),
        "largest_level": round(levels.max().item(), 3),
        "mean_level": round(levels.mean().item(), 4),
    }


def profile(call: Callable[[], Any], device: torch.device, shown: int = 12) -> dict[str, Any]:
    """Return milliseconds by kind of kernel, and the longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    on_gpu = device.type == "cuda"
    with watch(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as watched:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(watched.key_averages(), key=lambda event: -getattr(event, spent))
    sums: dict[str, float] = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in events:
        name = event.key.lower()
        kind = next((kind for kind, marks in KINDS.items() if any(mark in name for mark in marks)), "other")
        sums[kind] += getattr(event, spent) / 1e3
    longest = [
        {"kernel": event.key[:90], "calls": event.count, "ms": round(getattr(event, spent) / 1e3, 2)}
        for event in events[:shown]
    ]
    return {"sums_ms": {kind: round(ms, 1) for kind, ms in sums.items()}, "longest": longest}
