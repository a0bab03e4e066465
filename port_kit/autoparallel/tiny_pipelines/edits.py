"""Tiny pipelines that edit an image or a video, with the components of pipelines that generate one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from port_kit.autoparallel.tiny_pipelines import images, videos
from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline

_IMAGE = (32, 32)
#: Three of six steps are left out.
_HALF: dict[str, Any] = {"num_inference_steps": 6, "strength": 0.5}


def _edit(case: TinyPipeline, *, frames: int = 0, **sampling: Any) -> TinyPipeline:
    """Return a case whose request has an image, or a video with that many frames."""
    kept = {name: value for name, value in case.sampling.items() if not (frames and name == "num_frames")}
    return replace(case, sampling={**kept, **sampling}, image=_IMAGE, frames=frames)


CASES = {
    "FluxImg2ImgPipeline": _edit(images.CASES["FluxPipeline"], **_HALF),
    "FluxKontextPipeline": replace(
        _edit(images.CASES["FluxPipeline"]), arguments={"_auto_resize": False, "max_area": _IMAGE[0] * _IMAGE[1]}
    ),
    "StableDiffusion3Img2ImgPipeline": _edit(images.CASES["StableDiffusion3Pipeline"], **_HALF),
    "ChromaImg2ImgPipeline": _edit(images.CASES["ChromaPipeline"], **_HALF),
    "LTXImageToVideoPipeline": _edit(videos.CASES["LTXPipeline"]),
    "WanVideoToVideoPipeline": _edit(videos.CASES["WanPipeline"], frames=9, **_HALF),
}
