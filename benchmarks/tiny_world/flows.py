"""Training of the fusion transformer on latents of both streams, and sampling as the port samples.

Shapes: B clips, C channels, F latent frames, h x w latent cells, L audio latents, T text tokens, D text width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tiny_world import parts
from benchmarks.tiny_world.clips import World
from benchmarks.tiny_world.codecs import small, start
from benchmarks.tiny_world.grammar import Description, held_back, training, words
from benchmarks.tiny_world.scores import Measured, measure, share
from benchmarks.tiny_world.stepper import Losses, Options, Stepper
from port_kit.models.ovi.config import TAGS, format_prompt
from port_kit.models.wan.components.text_encoder import load_tokenizer
from port_kit.models.wan.pipeline.prompts import tokenize
from port_kit.models.wan.pipeline.request import DEFAULT_AUDIO_NEGATIVE_PROMPT, DEFAULT_VIDEO_NEGATIVE_PROMPT
from port_kit.models.wan.pipeline.scheduler import build_scheduler
from port_kit.models.wan.transformer import fused_ops
from port_kit.models.wan.transformer.side_stream import SideStream
from port_kit.parallel.sequence import PaddedAttention
from port_kit.testing.tiny_trained import INDEX, VOCABULARY
from port_kit.testing.tokenizer import write_tokenizer

BATCH, UNGUIDED = 192, 32  # clips per step with their prompt, and with the negative prompts
SCENES_PER_PROMPT = 8
ENCODED = 256  # clips at once; the VAE takes them frame by frame, in many small steps
EVALUATED, STEPS = 48, 25
VIDEO_SCALE, AUDIO_SCALE = 4.0, 3.0  # the port's defaults
_SHIFT = 5.0  # of the noise levels of training, as of sampling: the direction is settled at high noise
_IMAGE_EVERY = 5  # steps of which one has a clean first frame


@dataclass(frozen=True)
class Codecs:
    """The frozen parts."""

    text_encoder: Any
    tokenizer: Any
    vae: Any
    audio_vae: Any
    vocoder: Any
    device: torch.device

    @classmethod
    def load(cls, options: Options) -> Codecs:
        """Read the results."""
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), size=VOCABULARY, words=words())
            tokenizer = load_tokenizer(folder)
        names = ("text_encoder", "vae", "audio_vae", "vocoder")
        found = {name: parts.load(options.output, name, options.device)[0] for name in names}
        return cls(tokenizer=tokenizer, device=options.device, **found)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return states ``[B, T, D]``, zeros after the end of a text, as the transformer pads them."""
        tokens = [tokenize(self.tokenizer, format_prompt(prompt, TAGS)) for prompt in prompts]
        states: list[Any] = [None] * len(tokens)
        for length in {len(each) for each in tokens}:  # those of a length at once, without padding
            chosen = [index for index, each in enumerate(tokens) if len(each) == length]
            ids = torch.tensor([tokens[index] for index in chosen], device=self.device)
            for index, state in zip(chosen, self.text_encoder(ids, torch.ones_like(ids)), strict=True):
                states[index] = state
        return nn.utils.rnn.pad_sequence(states, batch_first=True)

    @torch.no_grad()
    def encode(self, world: World, given: Sequence[Description], seed: int) -> tuple[Tensor, Tensor]:
        """Return latents of a scene per description, ``[B, C, F, h, w]`` and ``[B, L, C]``."""
        video, audio = [], []
        scenes = world.described(given, seed)
        for begin in range(0, len(given), ENCODED):
            part = scenes[begin : begin + ENCODED]
            video.append(self.vae.encode(world.pixels(part)[0]).to(torch.bfloat16))
            audio.append(self.audio_vae.encode(world.wave(part)).transpose(1, 2).to(torch.bfloat16))
        return torch.cat(video), torch.cat(audio)

    @torch.no_grad()
    def decode(self, video: Tensor, audio: Tensor) -> list[Measured]:
        """Return what the clips of latents show."""
        found = []
        for v, a in zip(video.float().split(16), audio.float().split(16), strict=True):
            found += measure(self.vae.decode(v), self.vocoder(self.audio_vae.decode(a.transpose(1, 2)))[:, 0])
        return found


def write_text_encoder(options: Options, seconds: float) -> None:
    """Write the text encoder's seeded values; they are not trained."""
    parts.save(options.output, "text_encoder", parts.build("text_encoder", options.device), {}, {})


def prepare(model: Any) -> None:
    """Make the port's transformer differentiable: plain forms of its fused steps, PyTorch's attention, one stream.

    The plain forms are the port's own; its tests compare the kernels with them.
    """
    vars(fused_ops).update(
        add_norms=fused_ops.add_norms_torch,
        rms_norm=fused_ops.rms_norm_torch,
        linear_gelu=lambda layer, x, _reader=None: F.gelu(layer(x), approximate="tanh"),
    )
    for module in model.modules():
        if isinstance(module, PaddedAttention) and next(model.parameters()).is_cuda:
            module.attention = module.sdpa_fallback  # FlashAttention has no gradient here
        if isinstance(getattr(module, "side_stream", None), SideStream):
            module.side_stream = SideStream(enabled=False)


@dataclass(frozen=True)
class Examples:
    """Latents and states of texts on the device.

    Attributes:
        video, audio: latents of all scenes, bfloat16.
        prompt: index of the first of a scene's two texts.
        texts: states of all texts ``[P, T, D]``.
        negatives: states of the negative prompts for the video and the audio ``[1, T, D]``.
    """

    video: Tensor
    audio: Tensor
    prompt: Tensor
    texts: Tensor
    negatives: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, codecs: Codecs, given: Sequence[Description], scenes: int, seed: int = 0) -> Examples:
        """Draw and encode scenes of each description."""
        order = [index for _ in range(scenes) for index in range(len(given))]
        video, audio = codecs.encode(World(codecs.device), [given[index] for index in order], seed)
        return cls(
            video,
            audio,
            2 * torch.tensor(order, device=codecs.device),
            codecs.texts([one.prompt(template) for one in given for template in (0, 1)]),
            negatives(codecs),
        )

    def losses(self, model: Any, count: int, *, guided: bool = True, image: bool = False) -> Losses:
        """Return the squared errors of the flows for random scenes, noises and noise levels."""
        device = self.prompt.device
        chosen = torch.randint(len(self.prompt), (count,), device=device)
        clean = self.video[chosen].float(), self.audio[chosen].float()
        uniform = torch.rand(count, device=device)
        level = _SHIFT * uniform / (1 + (_SHIFT - 1) * uniform)
        noise = [torch.randn_like(value) for value in clean]
        v, a = (_mix(value, one, level) for value, one in zip(clean, noise, strict=True))
        if image:
            v = torch.cat((clean[0][:, :, :1], v[:, :, 1:]), 2)
        texts = [self.texts[self.prompt[chosen] + torch.randint(2, (count,), device=device)]] * 2
        if not guided:
            texts = [text.expand(count, -1, -1) for text in self.negatives]
        flows = model(
            video=v,
            audio=a,
            timestep=level * 1000,
            video_text=texts[0],
            audio_text=texts[1],
            first_frame_clean=image,
            skip_layers=() if guided else (INDEX["skip_block"],),
        )
        errors = [(flow.float() - (n - c)).square() for flow, n, c in zip(flows, noise, clean, strict=True)]
        video = errors[0][:, :, 1:].mean() if image else errors[0].mean()
        audio = errors[1].mean()
        return {"loss": video + audio, "video": video, "audio": audio}


def _mix(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    share_of_noise = level.view(-1, *[1] * (clean.ndim - 1))
    return clean + share_of_noise * (noise - clean)


def negatives(codecs: Codecs) -> tuple[Tensor, Tensor]:
    """Return the states of the port's negative prompts."""
    return codecs.texts([DEFAULT_VIDEO_NEGATIVE_PROMPT]), codecs.texts([DEFAULT_AUDIO_NEGATIVE_PROMPT])


def train_transformer(options: Options, seconds: float) -> None:
    """Train both streams together; a part of each batch has the negative prompts and omits guidance's block."""
    codecs = Codecs.load(options)
    given = training() if options.on_gpu else training()[:4]
    examples = Examples.make(codecs, given, SCENES_PER_PROMPT if options.on_gpu else 1)
    options.log(stage="transformer", scenes=len(examples.prompt), text=list(examples.texts.shape))
    model: Any = _start(options)
    count, unguided = small(options, BATCH), small(options, UNGUIDED)

    def losses(image: bool) -> Losses:
        with options.autocast():
            found = examples.losses(model, count, image=image)
            other = examples.losses(model, unguided, guided=False)
        return {**found, "loss": found["loss"] + 0.25 * other["loss"], "unguided": other["loss"]}

    turns = [lambda: losses(False)] * (_IMAGE_EVERY - 1) + [lambda: losses(True)]
    stepper = Stepper(
        "transformer", dict(model.named_parameters()), turns, options, rate=1.5e-3, average=0.995, decay=0.01
    )
    stepper.run(seconds)
    stepper.use_averages()
    parts.save(options.output, "transformer", model, {}, {"step": stepper.step})
    codecs = Codecs.load(options)  # the vocoder's training may have ended meanwhile
    facts = evaluate(model, codecs, held_back(small(options, EVALUATED)), STEPS if options.on_gpu else 2, options)
    parts.save(options.output, "transformer", model, {}, {"step": stepper.step, **facts})
    options.log(stage="transformer", step=stepper.step, **facts)


def _start(options: Options) -> nn.Module:
    model = start("transformer", options)
    prepare(model)
    return model


def evaluate(
    model: Any, codecs: Codecs, given: Sequence[Description], steps: int, options: Options, scale: float = 1.0
) -> dict[str, float]:
    """Return the scores of clips that the port's solver samples with the port's guidance."""
    with options.autocast():
        video, audio = sample(model, codecs, given, steps, scale=scale)
    return share(codecs.decode(video, audio), given)


@torch.no_grad()
def sample(
    model: Any, codecs: Codecs, given: Sequence[Description], steps: int, *, scale: float = 1.0, seed: int = 5
) -> tuple[Tensor, Tensor]:
    """Return latents of a clip of each description.

    Args:
        model: the transformer.
        codecs: encode the texts.
        given: descriptions.
        steps: of the solver.
        scale: factor of both guidance scales.
        seed: of the noise.
    """
    count, device = len(given), codecs.device
    generator = torch.Generator().manual_seed(seed)
    latents = [
        torch.randn(shape, generator=generator).to(device) for shape in ((count, 48, 31, 4, 6), (count, 157, 20))
    ]
    solvers = [build_scheduler(steps=steps) for _ in latents]
    texts = codecs.texts([one.prompt() for one in given])
    others = [text.expand(count, -1, -1) for text in negatives(codecs)]
    omitted = (INDEX["skip_block"],)
    for time in solvers[0].timesteps:
        common = {"video": latents[0], "audio": latents[1], "timestep": time.to(device).float().expand(count)}
        wanted = model(**common, video_text=texts, audio_text=texts)
        unwanted = model(**common, video_text=others[0], audio_text=others[1], skip_layers=omitted)
        for index, strength in enumerate((VIDEO_SCALE, AUDIO_SCALE)):
            flow = unwanted[index].float() + scale * strength * (wanted[index].float() - unwanted[index].float())
            latents[index] = solvers[index].step(flow, time, latents[index], return_dict=False)[0]
    return latents[0], latents[1]
