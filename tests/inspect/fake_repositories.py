"""Tiny models in the real formats, as ``{path: bytes}``, for a loopback Hub or a folder."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2), "float6": ("F6_E2M3", 1)}


def safetensors(tensors: Mapping[str, tuple[int, ...]], dtype: str = "bfloat16") -> bytes:
    """A safetensors file of zeros; by hand, as the library wants torch or numpy for it."""
    word, size = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + prod(shape) * size
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [start, end]}
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + bytes(end)


def torch_file(content: Any, *, legacy: bool = False) -> bytes:
    """Return the bytes that ``torch.save`` writes."""
    import torch

    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def torch_tensors(*names: str) -> dict[str, Any]:
    """A state dict of 4 x 3 zeros."""
    import torch

    return {name: torch.zeros(4, 3) for name in names}


def gguf(architecture: str, tensors: Mapping[str, tuple[tuple[int, ...], int]]) -> bytes:
    """A GGUF 3 header with one text, one array and a tensor table; ``tensors``: shape (torch's order) and ggml type."""
    values = [
        _text("general.architecture") + struct.pack("<I", 8) + _text(architecture),
        _text("tokens") + struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("b"),
        _text("general.alignment") + struct.pack("<II", 4, 32),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values)
    for name, (shape, kind) in tensors.items():
        head += (
            _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)) + struct.pack("<IQ", kind, 0)
        )
    return head + bytes(64)


def as_json(value: object) -> bytes:
    """JSON text."""
    return json.dumps(value).encode()


def index(weight_map: Mapping[str, str]) -> bytes:
    """A safetensors index."""
    return as_json({"metadata": {"total_size": 0}, "weight_map": weight_map})


def card(metadata: str, text: str = "") -> bytes:
    """A README with a metadata block."""
    return f"---\n{metadata}\n---\n{text}\n".encode()


def diffusers_model(pipeline: str = "SanaPipeline", transformer: str = "SanaTransformer2DModel") -> Files:
    """A complete diffusers repository: sharded transformer with its index, VAE, text encoder, tokenizer, scheduler."""
    first, second = (f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2))
    return {
        "README.md": card("license: apache-2.0\npipeline_tag: text-to-image"),
        "model_index.json": as_json(
            {
                "_class_name": pipeline,
                "_diffusers_version": "0.40.0",
                "transformer": ["diffusers", transformer],
                "vae": ["diffusers", "AutoencoderDC"],
                "text_encoder": ["transformers", "Gemma2Model"],
                "tokenizer": ["transformers", "GemmaTokenizerFast"],
                "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
                "image_encoder": [None, None],
            }
        ),
        "transformer/config.json": as_json({"_class_name": transformer, "num_layers": 2}),
        f"transformer/{first}": safetensors({"blocks.0.weight": (8, 8)}),
        f"transformer/{second}": safetensors({"blocks.1.weight": (8, 8), "proj.bias": (8,)}),
        "transformer/diffusion_pytorch_model.safetensors.index.json": index(
            {"blocks.0.weight": first, "blocks.1.weight": second, "proj.bias": second}
        ),
        "vae/config.json": as_json({"_class_name": "AutoencoderDC"}),
        "vae/diffusion_pytorch_model.safetensors": safetensors({"encoder.weight": (4, 4)}, "float32"),
        "text_encoder/config.json": as_json({"architectures": ["Gemma2Model"], "model_type": "gemma2"}),
        "text_encoder/model.safetensors": safetensors({"embed.weight": (16, 4)}),
        "tokenizer/tokenizer_config.json": as_json({"tokenizer_class": "GemmaTokenizer"}),
        "tokenizer/tokenizer.json": as_json({}),
        "scheduler/scheduler_config.json": as_json({"_class_name": "DPMSolverMultistepScheduler"}),
    }


def custom_model() -> Files:
    """Original weights as their authors publish them: pickles at the root, code in a git repository."""
    return {
        "README.md": card(
            "license: other\nlicense_name: my-research-licence\nlicense_link: LICENSE\nbase_model:\n- org/base",
            "Code: https://github.com/someone/original.git and [paper](https://huggingface.co/papers/1)\n"
            "Get the VAE from https://huggingface.co/org/vae. or `hf download org/text`",
        ),
        "fusion.pth": torch_file(torch_tensors("blocks.0.weight", "blocks.1.weight")),
        "best_netG.pt": torch_file({"generator": torch_tensors("conv_pre.weight"), "steps": 3}),
        "models_t5_enc.pth": torch_file(torch_tensors("token_embedding.weight"), legacy=True),
    }


def hybrid_model() -> Files:
    """A diffusers repository whose transformer is the model's own."""
    files = diffusers_model()
    index_file = json.loads(files["model_index.json"])
    index_file |= {"_class_name": "MyOwnPipeline", "transformer": ["my_package", "MyFusionTransformer"]}
    return {
        **files,
        "model_index.json": as_json(index_file),
        "transformer/config.json": as_json({"_class_name": "MyFusionTransformer"}),
        "pipeline_my_own.py": b"class MyOwnPipeline: ...\n",
    }


def supported_model() -> Files:
    """A repository whose pipeline is in vLLM-Omni's registry."""
    files = diffusers_model("QwenImagePipeline", "QwenImageTransformer2DModel")
    return {path: content for path, content in files.items() if not path.startswith("image_encoder")}


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    """Write the files into a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()
