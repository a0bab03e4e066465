"""Script that runs the original code of DreamID-Omni or Ovi on a model directory and records its outputs.

    python -I original_runner.py REQUEST.json

This file runs in the environment of the original code, which may not have port_kit. It imports only torch, safetensors
and the original package. REQUEST holds ``family`` (``dreamid_omni`` or ``ovi``), ``package`` (the original's name),
``path`` (folders from which it is imported), ``folder`` (its checkout: the original reads files relative to it),
``model`` (a model directory), ``output`` (a goldens folder), ``precision`` (``fp32`` or ``bf16``), ``device`` (``cpu``,
``cuda``, ``auto``) and ``seed``.

``bf16`` runs the unmodified original, which needs CUDA and flash-attn. ``fp32`` computes without bfloat16: casts and
autocast are disabled, and attention is computed exactly. Modules have the sizes of the model directory's
configurations and load its safetensors, whose names are the original's.

Shapes: video latents [C, F, h, w], audio latents [L, C], texts [T, D], pixels [B, 3, F, H, W], waves [B, samples].
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

#: Paths of checkpoints in a goldens folder; both families have the same components.
CHECKPOINTS = {
    "text_encoder": "ckpts/Wan2.2-TI2V-5B/models_t5_umt5-xxl-enc-bf16.safetensors",
    "vae": "ckpts/Wan2.2-TI2V-5B/Wan2.2_VAE.safetensors",
    "audio_vae": "ckpts/MMAudio/ext_weights/v1-16.safetensors",
    "vocoder": "ckpts/MMAudio/ext_weights/best_netG.safetensors",
    "tokenizer": "ckpts/Wan2.2-TI2V-5B/google/umt5-xxl",
}
FUSION_CHECKPOINT = {
    "dreamid_omni": "ckpts/DreamID_Omni/dreamid_omni.safetensors",
    "ovi": "ckpts/Ovi/model.safetensors",
}

GRID = (6, 4, 6)  # latent frames, rows, columns; any size runs every layer
AUDIO_TOKENS, TEXTS = 33, {"vid": 11, "audio": 9}
TIMESTEP = 833  # of 1000

#: Additional arguments per case; ``references`` are (number of images, tokens of each reference audio).
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "dreamid_omni": {
        "dreamid_two_refs": {"references": (2, (7, 5))},
        "dreamid_one_ref": {"references": (1, (8,))},
    },
    "ovi": {
        "ovi_t2v": {},
        "ovi_i2v_first_frame_clean": {"first_frame_is_clean": True},
        "ovi_slg": {"slg_layer": 1},
    },
}


class Request:
    """Content of REQUEST.json."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.family, self.package = content["family"], content["package"]
        self.model, self.output = Path(content["model"]), Path(content["output"])
        self.exact = content["precision"] == "fp32"
        self.word = content["precision"]
        self.seed = int(content["seed"])
        cuda = torch.cuda.is_available()
        self.device = torch.device(("cuda" if cuda else "cpu") if content["device"] == "auto" else content["device"])
        if not self.exact and self.device.type != "cuda":
            raise SystemExit("bf16 requires CUDA's autocast, and this process has no CUDA device")
        self.dtype = torch.float32 if self.exact else torch.bfloat16

    def module(self, name: str) -> Any:
        """Import a module of the original package."""
        return importlib.import_module(f"{self.package}.{name}")

    def config(self, component: str) -> dict[str, Any]:
        """Return the component's ``config.json``."""
        return json.loads((self.model / component / "config.json").read_text(encoding="utf-8"))

    def weights(self, component: str) -> Tensors:
        """Return the component's tensors under their original names."""
        tensors: Tensors = {}
        for path in sorted((self.model / component).glob("*.safetensors")):
            tensors.update(load_file(path))
        return tensors

    def normal(self, *shape: int, salt: int = 0) -> torch.Tensor:
        """Draw float32 values that are exact in bfloat16, so that both precisions use the same values."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + salt)
        return rounded(torch.randn(shape, generator=generator))

    def keep(self, name: str, inputs: Tensors, outputs: Tensors, document: str, content: Any) -> None:
        """Write the inputs and outputs of a case, and ``<document>.json``."""
        folder = self.output / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in inputs.items()}, folder / "inputs.safetensors")
        plain = {key: value.detach().cpu().contiguous() for key, value in outputs.items()}
        save_file(plain, folder / f"outputs_{self.word}.safetensors")
        write_json(folder / f"{document}.json", content)
        print(f"recorded {name} {self.word}", flush=True)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Round to bfloat16 and back with ``to``, which :func:`be_exact` does not replace."""
    return values.to(torch.bfloat16).to(torch.float32)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


# -- the original, without rounding ------------------------------------------------------------------------------


class NoAutocast(torch.amp.autocast_mode.autocast):
    """Autocast that is always disabled."""

    def __init__(self, device_type: str, *_: Any, **__: Any) -> None:
        super().__init__("cpu", enabled=False)


def be_exact() -> Callable[[], None]:
    """Disable casts to bfloat16 in torch, before the original is imported; return a function that restores them."""
    keep = torch.Tensor.bfloat16, torch.amp.autocast, torch.nn.Module.bfloat16
    torch.Tensor.bfloat16 = torch.Tensor.float  # type: ignore[method-assign, assignment]
    torch.nn.Module.bfloat16 = torch.nn.Module.float  # type: ignore[method-assign, assignment]
    torch.amp.autocast = NoAutocast  # type: ignore[misc, assignment]

    def restore() -> None:
        torch.Tensor.bfloat16, torch.amp.autocast, torch.nn.Module.bfloat16 = keep  # type: ignore[method-assign, misc]

    return restore


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: torch.Tensor | None = None,
    k_lens: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Replace the original's ``flash_attention``: softmax over the first ``k_lens`` keys, q [B, S, N, H]."""
    scores = torch.einsum("bqnh,bknh->bnqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    if k_lens is not None:
        beyond = torch.arange(k.shape[1], device=k.device)[None] >= k_lens.to(k.device)[:, None]
        scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
    return torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v.float()).to(q.dtype)


def replace_attention(package: str) -> None:
    """Replace ``flash_attention`` and ``attention`` in all modules of the original by :func:`exact_attention`."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            for function in ("flash_attention", "attention"):
                if callable(getattr(module, function, None)):
                    setattr(module, function, exact_attention)


# -- components --------------------------------------------------------------------------------------------------


def fusion(request: Request) -> dict[str, Any]:
    """Record the transformer's cases; return its sizes."""
    config = request.config("transformer")
    towers = {name: config[name] for name in ("video", "audio")}
    module = request.module("modules.fusion")
    if request.exact:
        replace_attention(request.package)
    with torch.device("meta"):
        model = module.FusionModel(towers["video"], towers["audio"])
    model.load_state_dict(request.weights("transformer"), strict=True, assign=True)
    model = model.to(dtype=request.dtype).to(device=request.device).eval()
    model.set_rope_params()
    write_json(request.output / "fusion" / "config.json", towers)
    for name, case in CASES[request.family].items():
        _fusion_case(request, model, name, dict(case), towers)
    return towers


def _fusion_case(request: Request, model: Any, name: str, case: dict[str, Any], towers: Mapping[str, Any]) -> None:
    frames, rows, columns = GRID
    inputs = {
        "vid.0": request.normal(towers["video"]["in_dim"], frames, rows, columns, salt=1),
        "audio.0": request.normal(AUDIO_TOKENS, towers["audio"]["in_dim"], salt=2),
        "vid_context.0": request.normal(TEXTS["vid"], towers["video"].get("text_dim", 4096), salt=3),
        "audio_context.0": request.normal(TEXTS["audio"], towers["audio"].get("text_dim", 4096), salt=4),
        "t": torch.tensor([TIMESTEP]),
    }
    call: dict[str, Any] = {"vid_seq_len": frames * rows * columns // 4, "audio_seq_len": AUDIO_TOKENS}
    facts: dict[str, Any] = {"case": name, "family": request.family, "batch": 1, "config": "../config.json", **call}
    if references := case.pop("references", None):
        images, audio_lengths = references
        scaling = request.config("transformer")["rope"]["freqs_scaling"]
        value = torch.tensor(scaling["num"] / scaling["den"], dtype=getattr(torch, scaling["dtype"]))
        call |= {"ref_ip_lengths": [[images]], "ref_audio_lengths": [list(audio_lengths)]}
        facts |= {**call, "freqs_scaling": scaling}
        call["freqs_scaling"] = value.to(request.device)
    facts |= {**case, "state": f"../../{FUSION_CHECKPOINT[request.family]}"}
    given = {key: value.to(request.device) for key, value in inputs.items()}
    lists = {key: [given[f"{key}.0"].to(request.dtype)] for key in ("vid", "audio", "vid_context", "audio_context")}
    with torch.inference_mode(), _autocast(request), _record_outputs(model) as seen:
        video, audio = model(t=given["t"], **lists, **call, **case)
    place = request.output / "fusion" / name / f"intermediates_{request.word}.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(seen, place)
    request.keep(f"fusion/{name}", inputs, {"vid.0": video[0], "audio.0": audio[0]}, "inputs", facts)


@contextmanager
def _record_outputs(model: Any) -> Iterator[Tensors]:
    """Record the outputs of submodules under the names of goldens, to locate the first module that diverges."""
    seen: Tensors = {}
    handles = []
    for stream, tower in (("vid", model.video_model), ("audio", model.audio_model)):
        hooked = {f"{stream}.context": tower.text_embedding, f"{stream}.head": tower.head}
        for index, block in enumerate(tower.blocks):
            hooked[f"{stream}.block{index}.self_attn"] = block.self_attn.o
            hooked[f"{stream}.block{index}.cross_attn"] = block.cross_attn.o
            hooked[f"{stream}.block{index}.ffn"] = block.ffn
        handles += [
            module.register_forward_hook(partial(_record_output, seen, name)) for name, module in hooked.items()
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _record_output(seen: Tensors, name: str, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
    seen[name] = output.detach().float().cpu().contiguous().clone()


@contextmanager
def _autocast(request: Request) -> Iterator[None]:
    """Enter the autocast of the original's engine in bf16; do nothing in fp32."""
    if request.exact:
        yield
        return
    with torch.amp.autocast("cuda", dtype=torch.bfloat16):
        yield


def text_encoder(request: Request) -> dict[str, Any]:
    """Record the encoder on seeded ids, one row of them padded; return its sizes under the original's names."""
    config = request.config("text_encoder")
    sizes = {
        "dim": config["d_model"],
        "dim_attn": config["d_kv"] * config["num_heads"],
        "dim_ffn": config["d_ff"],
        "num_heads": config["num_heads"],
        "encoder_layers": config["num_layers"],
        "num_buckets": config["relative_attention_num_buckets"],
        "vocab_size": config["vocab_size"],
    }
    build = request.module("modules.t5").umt5_xxl
    model = build(encoder_only=True, return_tokenizer=False, dtype=request.dtype, device="cpu", **sizes)
    model.load_state_dict(request.weights("text_encoder"), strict=True)
    model = model.to(dtype=request.dtype, device=request.device).eval()
    generator = torch.Generator().manual_seed(request.seed)
    ids = torch.randint(2, sizes["vocab_size"], (2, 40), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 23:] = 0
    ids[1, 23:] = 0
    with torch.inference_mode():
        hidden = model(ids.to(request.device), mask.to(request.device))
    inputs = {"ids": ids, "mask": mask}
    request.keep("umt5", inputs, {"hidden": hidden}, "config", {**sizes, "shared_pos": False})
    return sizes


def video_vae(request: Request) -> dict[str, Any]:
    """Record encoding and decoding with the weights of the file and with those that the engine rounds; fp32 only."""
    config = request.config("vae")
    names = ("z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")
    sizes = {"dim": config["base_dim"], "dec_dim": config["decoder_base_dim"], **{key: config[key] for key in names}}
    if not request.exact:
        return sizes
    module = request.module("modules.vae2_2")
    weights = request.weights("vae")

    def build(as_engine: bool) -> Any:
        model = module.WanVAE_(**sizes)
        kept = {key: rounded(value) if as_engine else value for key, value in weights.items()}
        model.load_state_dict(kept, strict=True)
        module._video_vae = lambda *_, **__: model.eval().requires_grad_(False).to(request.device)
        return module.Wan2_2_VAE(device=request.device)

    space, frames = 16, 9
    inputs = {
        "image": rounded(request.normal(1, 3, 1, 4 * space, 2 * space, salt=5).tanh()),
        "video": rounded(request.normal(1, 3, frames, 4 * space, 2 * space, salt=6).tanh()),
        "latents_image": request.normal(1, sizes["z_dim"], 1, 4, 2, salt=7),
        "latents": request.normal(1, sizes["z_dim"], 3, 4, 2, salt=8),
    }
    outputs: Tensors = {}
    for prefix, as_engine in (("", False), ("engine.", True)):
        vae = build(as_engine)
        for name, run, source in (
            ("encode_image", vae.wrapped_encode, "image"),
            ("encode_video", vae.wrapped_encode, "video"),
            ("decode_image", vae.wrapped_decode, "latents_image"),
            ("decode_video", vae.wrapped_decode, "latents"),
        ):
            with torch.inference_mode():
                outputs[prefix + name] = run(inputs[source].to(request.device)).float()
    request.keep("wan_vae", inputs, outputs, "config", sizes)
    return sizes


def audio(request: Request) -> dict[str, dict[str, Any]]:
    """Record the audio VAE and the vocoder in the sequence of the original's wrapper; return both sizes."""
    vae_sizes, vocoder_sizes = request.config("audio_vae"), request.config("vocoder")
    folder = request.output / "mmaudio"
    write_json(folder / "bigvgan.yml", vocoder_sizes)  # JSON is YAML
    autoencoder = request.module("modules.mmaudio.ext.autoencoder.autoencoder")
    vae = request.module("modules.mmaudio.ext.autoencoder.vae").VAE
    autoencoder.get_my_vae = lambda _mode, **_kw: vae(**vae_sizes)
    autoencoder.BigVGAN = partial(autoencoder.BigVGAN, config_path=folder / "bigvgan.yml")
    held = {"vae": request.weights("audio_vae"), "vocoder": {"generator": request.weights("vocoder")}}
    load, torch.load = torch.load, lambda place, *_, **__: held[str(place)]
    try:
        tools = request.module("modules.mmaudio.features_utils").FeaturesUtils(
            tod_vae_ckpt="vae", bigvgan_vocoder_ckpt="vocoder", mode="16k", need_vae_encoder=True
        )
    finally:
        torch.load = load
    tools = tools.to(request.device, request.dtype).eval()
    inputs = {
        "wav": 0.1 * request.normal(1, 16_000, salt=9),
        "latents": request.normal(1, vae_sizes["embed_dim"], 12, salt=10),
        "mel": request.normal(1, vae_sizes["data_dim"], 24, salt=11),
    }
    given = {name: value.to(request.device) for name, value in inputs.items()}
    typed = {name: value.to(request.dtype) for name, value in given.items()}
    with torch.inference_mode(), _autocast(request):
        outputs = {
            "wrapped_encode": tools.wrapped_encode(given["wav"]),
            "decode_mel": tools.decode(typed["latents"]),
            "vocode": tools.vocode(typed["mel"]),
            "wrapped_decode": tools.wrapped_decode(typed["latents"]),
        }
    request.keep("mmaudio", inputs, outputs, "config", {"vae": vae_sizes, "bigvgan": "bigvgan.yml"})
    return {"mmvae": vae_sizes, "bigvgan": vocoder_sizes}


def link_checkpoints(request: Request) -> None:
    """Create links in the goldens folder to the checkpoints of the model directory."""
    for component, place in {**CHECKPOINTS, "transformer": FUSION_CHECKPOINT[request.family]}.items():
        source = request.model / component
        if component != "tokenizer":
            (source,) = sorted(source.glob("*.safetensors"))
        target = request.output / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(source.resolve(), target_is_directory=source.is_dir())


def main(path: str) -> None:
    """Record all components, then their sizes in ``SET.json``."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    sys.path[:0] = content["path"]
    request = Request(content)
    os.chdir(content["folder"])
    restore = be_exact() if request.exact else lambda: None
    torch.manual_seed(request.seed)
    try:
        link_checkpoints(request)
        sizes = {"fusion": fusion(request), "t5": text_encoder(request), "vae": video_vae(request), **audio(request)}
    finally:
        restore()
    write_json(request.output / "SET.json", {**sizes, "torch": torch.__version__})


if __name__ == "__main__":
    main(sys.argv[1])
