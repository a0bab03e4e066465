"""Parts of the templates of own code that depend on the output: video, image or audio.

Legend of the generated code: B batch, C latent channels, F latent frames, h and w latent rows and columns, L latent
positions of audio, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from port_kit.scaffold.render import literal, render

#: Modality of the output of a port.
Modality = Literal["audio", "image", "video"]
MODALITIES: tuple[str, ...] = get_args(Modality)
#: Expression of a pipeline for the channels of the latents.
CHANNELS = 'config.TRANSFORMER_CONFIG["channels"]'


@dataclass(frozen=True)
class Form:
    """Text and numbers of one modality.

    Attributes:
        text: the output in words, such as ``a video``.
        suffix: of its file.
        latents: shape of the latents, without batch and channels.
        legend: meaning of the letters in :attr:`latents`.
        grid: latent extents of the parity test; no two ranks can share their product evenly.
        example_prompt: of the port.
        decoder_shape: weight of the skeleton's decoder.
        tiny: sampling parameters of the tiny model.
        expected: what the line about the file of the tiny model contains.
        endpoint: of vLLM-Omni's server.
    """

    text: str
    suffix: str
    latents: str
    legend: str
    grid: tuple[int, ...]
    example_prompt: str
    decoder_shape: tuple[int, ...]
    expected: str
    endpoint: str
    tiny: Mapping[str, Any] = field(default_factory=dict)


_STEPS: Mapping[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
FORMS: Mapping[str, Form] = {
    "video": Form(
        "a video",
        "mp4",
        "F, h, w",
        "F latent frames, h and w latent rows and columns",
        (3, 3, 5),
        "a cat walks over a wet street at night",
        (48, 8, 3, 3),
        "36x20",
        "/v1/videos/sync",
        {"height": 20, "width": 36, "num_frames": 3, **_STEPS},
    ),
    "image": Form(
        "an image",
        "png",
        "h, w",
        "h and w latent rows and columns",
        (5, 9),
        "a cat on a wet street at night",
        (48, 8, 3, 3),
        "36x20",
        "/v1/images/generations",
        {"height": 20, "width": 36, **_STEPS},
    ),
    "audio": Form(
        "audio",
        "wav",
        "L",
        "L latent positions",
        (45,),
        "rain falls on a tin roof",
        (320, 8, 3),
        "0.50 s at 16000 Hz, mono",
        "/v1/audio/generate",
        {**_STEPS, "extra_args": {"audio_length": 0.5}},
    ),
}


def modality_values(output: str, *, size_multiple: int, frame_step: int, channels: str = CHANNELS) -> dict[str, str]:
    """Return the fields of the templates that differ between modalities.

    Args:
        output: one of :data:`MODALITIES`.
        size_multiple: pixels of a latent along height and width.
        frame_step: frames of a latent after the first.
        channels: expression for the channels of the latents.
    """
    form = FORMS[output]
    return {
        "output": output,
        "output_word": form.text.replace(" ", "_"),
        "output_text": form.text,
        "suffix": form.suffix,
        "latent_shape": f"[B, C, {form.latents}]",
        "latents": form.latents,
        "output_legend": "S samples" if output == "audio" else "H and W pixels",
        "latent_legend": form.legend,
        "grid": literal(form.grid),
        "grid_comment": f"Latent extents {form.latents}; 45 tokens, which no two ranks can share evenly.",
        "example_prompt": form.example_prompt,
        "options": _OPTIONS[output].format(size_multiple=size_multiple, frame_step=frame_step),
        "class_attributes": _ATTRIBUTES[output],
        "latents_body": _LATENTS[output].replace("$channels", channels),
        "decode_doc": _DECODED[output],
        "decoder_class": render(f"own/decoder_{output}", {}).rstrip("\n"),
        "functional_import": "" if output == "audio" else "from torch.nn import functional as F\n",
        "decoder_text": {"audio": "latents to samples"}.get(output, "latents to pixels"),
        "decoder_outline": f'{{"proj.weight": [{list(form.decoder_shape)}, "float32"], '
        f'"proj.bias": [[{form.decoder_shape[0]}], "float32"]}}',
        "decode_call": f'self.decoder(state.latents["{output}"].to(self.dtype))' + _FIRST[output],
        "subject_grid": _SUBJECT[output],
        "request_options": '    request_options={"audio_length": "float"},\n' if output == "audio" else "",
    }


_OPTIONS = {
    "video": """\
#: Frames per second.
FPS = 16
#: A latent voxel has ``size_multiple`` pixels along height and width, and ``frame_step`` frames after the first.
OPTIONS = PromptOptions(
    steps=20,
    guidance_scale=4.0,
    height=256,
    width=256,
    size_multiple={size_multiple},
    max_side=2048,
    frames=17,
    frame_step={frame_step},
)""",
    "image": """\
#: A latent pixel has ``size_multiple`` pixels along height and width.
OPTIONS = PromptOptions(
    steps=20,
    guidance_scale=4.0,
    height=256,
    width=256,
    size_multiple={size_multiple},
    max_side=2048,
)""",
    "audio": """\
#: Hz, and samples of a latent position.
SAMPLE_RATE = 16000
HOP = 320
#: Requests set the length as ``audio_length``, in seconds.
OPTIONS = PromptOptions(steps=20, guidance_scale=4.0, seconds=4.0, max_seconds=30.0)""",
}
_ATTRIBUTES = {
    "video": "    fps: ClassVar[int] = config.FPS\n",
    "image": "",
    "audio": "    audio_sample_rate: ClassVar[int] = config.SAMPLE_RATE\n",
}
_NOISE = """\
        return {{"{output}": draw_noise(shape, request.seed, device=self.device, dtype=torch.float32)}}"""
_LATENTS = {
    "video": """\
        request, scale = prepared.request, self.options.size_multiple
        frames = 1 + (request.frames - 1) // self.options.frame_step
        shape = ($channels, frames, request.height // scale, request.width // scale)
"""
    + _NOISE.format(output="video"),
    "image": """\
        request, scale = prepared.request, self.options.size_multiple
        shape = ($channels, request.height // scale, request.width // scale)
"""
    + _NOISE.format(output="image"),
    "audio": """\
        request = prepared.request
        length = max(1, round(request.seconds * config.SAMPLE_RATE / config.HOP))
        shape = ($channels, length)
"""
    + _NOISE.format(output="audio"),
}
_DECODED = {
    "video": "Return the frames (1, 3, frames, H, W) in [-1, 1].",
    "image": "Return the image (1, 3, H, W) in [-1, 1].",
    "audio": "Return the samples (S,) in [-1, 1]; (2, S) for stereo.",
}
#: Audio has no batch axis.
_FIRST = {"video": "", "image": "", "audio": "[0]"}
_SUBJECT = {"video": "3 + tokens.image, 3, 5", "image": "3 + tokens.image, 5", "audio": "15 + 3 * tokens.image"}
