"""Wan 2.2's video VAE: ``AutoencoderKLWan`` with latents in the units of the fusion transformer.

Shapes: B videos, F frames and f latent frames (F = 4 (f - 1) + 1; an image is one frame), H x W pixels and h x w
latents (H = 16 h, W = 16 w), C = 48 latent channels.

Precision: the original's engine keeps weights, pixels and latents in bfloat16 and computes in float32. This module
rounds its inputs, and weights when they are loaded, to ``precision`` and computes in float32. bfloat16 reproduces the
original's engine; float32 rounds no value.

On CUDA, PyTorch computes float32 convolutions in TF32, whose mantissa has as many bits as that of float16. With
vLLM-Omni's ``vae_fast_path="channels_last"``, which is not bit-exact either, the decoder therefore works in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.initialization import no_init_weights
from vllm_omni.diffusion.distributed.autoencoders.autoencoder_kl_wan import DistributedAutoencoderKLWan
from vllm_omni.diffusion.distributed.autoencoders.wan_vae_fastpath import REPORT_ATTR
from vllm_omni.diffusion.distributed.parallel_state import model_parallel_is_initialized

from port_kit.errors import InputError, PortKitError
from port_kit.pipeline.precision import default_dtype
from port_kit.upstream.checks import require

require("video_vae")


class VideoVAE(DistributedAutoencoderKLWan):
    """Video VAE from pixels in [-1, 1] to normalized latents and back, computed in float32.

    The base class is vLLM-Omni's ``AutoencoderKLWan``: tiling and slicing, the fast decoder on CUDA, patch parallelism
    and checkpoints with diffusers' names work as for other Wan models. Unlike the base class, :meth:`encode` and
    :meth:`decode` accept and return tensors in the units of the fusion transformer.

    Patch parallelism (``vae_patch_parallel_size``) divides decoding. In the modes ``spatial_shard_height`` and
    ``spatial_shard_width`` ranks exchange the edges of their parts, and the result equals that of one rank. The mode
    ``tile`` equals tiled decoding, seams included. Encoding is not divided.

    Args:
        precision: dtype to which weights, pixels and latents are rounded.
        config: keys of ``AutoencoderKLWan``, with ``latents_mean`` and ``latents_std``.
    """

    use_tiling: bool

    def __init__(self, *, precision: torch.dtype, **config: Any) -> None:
        with default_dtype(torch.float32), no_init_weights():
            super().__init__(**config)
        self.precision = precision
        self.eval().requires_grad_(False)
        for parameter in self.parameters():
            parameter.weight_loader = self._load_rounded  # called by the weight loader, as in vLLM's layers

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.config.scale_factor_spatial

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame after the first latent frame, which is one frame."""
        return self.config.scale_factor_temporal

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode videos to the mean of their posterior, normalized per channel.

        Args:
            pixels: ``[B, 3, F, H, W]`` in [-1, 1], any float dtype; F is 1 + a multiple of 4, H and W multiples of 16.

        Returns:
            float32 ``[B, C, f, h, w]``.

        Raises:
            InputError: the shape is wrong.
        """
        self._check_pixels(pixels)
        tiling = self.use_tiling
        self.use_tiling = tiling and not self.is_distributed_enabled()
        try:
            mean = super().encode(self._rounded(pixels)).latent_dist.mode()
        finally:
            self.use_tiling = tiling
        latents_mean, latents_std = self._statistics(mean.device)
        return (mean - latents_mean) * (1.0 / latents_std)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalized latents ``[B, C, f, h, w]`` to float32 pixels ``[B, 3, F, H, W]``, clamped to [-1, 1].

        Under patch parallelism the first rank returns them; the others return no frames, ``[B, 3, 0, H, W]``.

        Raises:
            InputError: the number of dimensions or channels is wrong.
        """
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise InputError(
                f"latents have shape {tuple(latents.shape)}; expected [B, {self.config.z_dim}, f, h, w]",
                code="component_input",
            )
        latents_mean, latents_std = self._statistics(latents.device)
        raw = self._rounded(latents) / (1.0 / latents_std) + latents_mean
        if getattr(getattr(self, REPORT_ATTR, None), "channels_last", False):
            self.decode_in_float16()
        pixels = super().decode(raw.to(self.post_quant_conv.weight.dtype), return_dict=False)[0]
        if pixels.numel():
            return pixels.float()
        height, width = (size * self.spatial_factor for size in latents.shape[3:])
        return raw.new_empty(latents.shape[0], 3, 0, height, width)

    def decode_in_float16(self) -> None:
        """Convert the decoder's weights to float16, in which it computes from now on; encoding stays in float32."""
        self.decoder.to(torch.float16)
        self.post_quant_conv.to(torch.float16)

    def is_distributed_enabled(self) -> bool:
        """Return True if several ranks decode a clip together; always False outside of an engine."""
        return hasattr(self, "distributed_executor") and super().is_distributed_enabled()

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation ``[1, C, 1, 1, 1]``; not buffers, because no checkpoint holds them."""
        pair = torch.tensor((self.config.latents_mean, self.config.latents_std), dtype=torch.float32, device=device)
        mean, std = pair.view(2, 1, -1, 1, 1, 1)
        return mean, std

    def _load_rounded(self, parameter: torch.Tensor, weight: torch.Tensor) -> None:
        """Copy a checkpoint's tensor, rounded to :attr:`precision`, into its parameter."""
        parameter.data.copy_(self._rounded(weight))

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.precision).to(torch.float32)

    def _check_pixels(self, pixels: torch.Tensor) -> None:
        space, time = self.spatial_factor, self.temporal_factor
        good = pixels.ndim == 5 and pixels.shape[1] == 3 and (pixels.shape[2] - 1) % time == 0
        if not good or pixels.shape[3] % space or pixels.shape[4] % space or not pixels.numel():
            raise InputError(
                f"pixels have shape {tuple(pixels.shape)}; expected [B, 3, 1 + {time} n, {space} h, {space} w]",
                code="component_input",
                hint=f"crop the frames to multiples of {space} pixels and the clip to 1 + {time} n frames",
            )


def build_video_vae(config: Mapping[str, Any], *, precision: torch.dtype | None = None) -> VideoVAE:
    """Build the VAE with uninitialized weights on the current default device.

    Args:
        config: content of ``vae/config.json``.
        precision: see :class:`VideoVAE`; None for the current default dtype.

    Raises:
        PortKitError: the configuration has no latent statistics, or not one per channel.
    """
    statistics = [config.get(key, ()) for key in ("latents_mean", "latents_std")]
    if any(len(values) != config.get("z_dim") for values in statistics):
        raise PortKitError(
            f"the video VAE has z_dim={config.get('z_dim')} and {len(statistics[0])} latent means, "
            f"{len(statistics[1])} standard deviations; one of each per channel is required",
            code="component_config",
            hint="use the vae/config.json that `port-kit download` writes",
        )
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    vae = VideoVAE(precision=precision or torch.get_default_dtype(), **arguments)
    if model_parallel_is_initialized():
        vae.init_distributed()
    return vae
