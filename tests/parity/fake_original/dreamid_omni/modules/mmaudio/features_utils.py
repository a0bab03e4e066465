"""The original's audio tools."""

from __future__ import annotations

from torch import Tensor, nn

from dreamid_omni.modules.mmaudio.ext.autoencoder.autoencoder import AutoEncoderModule


class FeaturesUtils(nn.Module):
    """Waves to latents and back."""

    def __init__(self, *, tod_vae_ckpt: str, bigvgan_vocoder_ckpt: str, mode: str, need_vae_encoder: bool) -> None:
        super().__init__()
        self.tod = AutoEncoderModule(
            vae_ckpt_path=tod_vae_ckpt,
            vocoder_ckpt_path=bigvgan_vocoder_ckpt,
            mode=mode,
            need_vae_encoder=need_vae_encoder,
        )

    def wrapped_encode(self, audio: Tensor) -> Tensor:
        """Wave [B, S] to the mean of its latents [B, 20, L]."""
        return self.tod.vae.inner.encode(audio)

    def decode(self, z: Tensor) -> Tensor:
        """Latents to mel frames."""
        return self.tod.vae.inner.decode(z)

    def vocode(self, mel: Tensor) -> Tensor:
        """Mel frames to a wave."""
        return self.tod.vocoder.inner(mel)

    def wrapped_decode(self, z: Tensor) -> Tensor:
        """Latents to a wave."""
        return self.vocode(self.decode(z))
