"""Cold start: from a transformer's checkpoint of real size on the disk to the end of the first denoising step.

DreamID-Omni's transformer (2073 tensors, 23.3 GB in bfloat16, the original names) is written with random weights, then
loaded by vLLM-Omni's standard loader in a fresh process each time, with the system's page cache dropped before (cold)
and as the load before left it (warm):

* ``port``: the port's own way, what the engine runs; on a GPU it reads the files ahead into page-locked buffers;
* ``port_stream``: the same rules, fed by the loader's stream of mapped tensors;
* ``in_tree``: the loop of vLLM-Omni's own models over that stream: names replaced, ``param.weight_loader``.

``disk`` is the reading speed of the same files in the same run, the best of several numbers of threads, with the page
cache and around it (O_DIRECT). All ways must leave the same weights. The step has four branches, at a small size.
Prints one JSON object; bytes, and seconds since the process was started for ``to_first_step_s``.

    python benchmarks/load_cold.py --folder /scratch/model          # 23.3 GB are written there, and kept
    python benchmarks/load_cold.py --layers 8 --files 4 --rounds 3  # a third of it; medians of three
    python benchmarks/load_cold.py --tiny                           # seconds, on a CPU
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from full_size import HostMemory, cached_share, drop_caches, make_component

WAYS = ("port", "port_stream", "in_tree")
DEPTHS = (1, 4, 8, 16)
BLOCK = 16 << 20
#: Names as a model of vLLM-Omni's own tree would replace them, and the slots of fused parameters.
RENAMES = [
    (r"^(video|audio)_model\.blocks\.(\d+)\.", r"blocks.\2.\1."),
    (r"^(video|audio)_model\.", r"\1."),
    (r"\.modulation\.modulation$", ".modulation"),
    (r"^(\w+)\.patch_embedding\.(weight|bias)$", r"\1.patch_embedding.proj.\2"),
    (r"\.patch_embedding\.0\.", ".patch_embedding.proj."),
    (r"\.patch_embedding\.2\.w2\.", ".patch_embedding.gated.down."),
    (r"\.patch_embedding\.2\.(w[13])\.", r".patch_embedding.gated.\1."),
    (r"(text|time)_embedding\.0\.", r"\1_embedding.up."),
    (r"(text|time)_embedding\.2\.", r"\1_embedding.down."),
    (r"\.time_projection\.1\.", ".time_projection.linear."),
    (r"\.head\.head\.", ".head.proj."),
    (r"\.norm3\.", ".cross_attn.norm."),
    (r"\.ffn\.0\.", ".ffn.up."),
    (r"\.ffn\.2\.", ".ffn.down."),
]
STACKED = [
    (".self_attn.qkv.", ".self_attn.q.", "q"),
    (".self_attn.qkv.", ".self_attn.k.", "k"),
    (".self_attn.qkv.", ".self_attn.v.", "v"),
    (".cross_attn.kv.", ".cross_attn.k.", 0),
    (".cross_attn.kv.", ".cross_attn.v.", 1),
    (".cross_attn.kv_fusion.", ".cross_attn.k_fusion.", 0),
    (".cross_attn.kv_fusion.", ".cross_attn.v_fusion.", 1),
    (".gated.gate_up.", ".gated.w1.", 0),
    (".gated.gate_up.", ".gated.w3.", 1),
]


# -- the disk -------------------------------------------------------------------------------------------------------


def disk(files: list[Path], limit: int) -> dict[str, Any]:
    """Read the files' first ``limit`` bytes with a cold cache: bytes a second by kind and number of threads."""
    spans, left = [], limit
    for file in files:
        size = min(file.stat().st_size, left)
        spans += [(file, at) for at in range(0, size - size % 4096, BLOCK)]
        left -= size
    found: dict[str, Any] = {}
    for kind, flags in (("cached", 0), ("direct", os.O_DIRECT)):
        for depth in DEPTHS:
            drop_caches(files)
            try:
                found[f"{kind}_x{depth}"] = _read(spans, depth, flags)
            except OSError as error:
                found[f"{kind}_x{depth}"] = error.strerror
    speeds = {name: value for name, value in found.items() if isinstance(value, int)}
    best = max(speeds, key=lambda name: speeds[name])
    return {**found, "best": best, "bytes_per_s": speeds[best]}


def _read(spans: list[tuple[Path, int]], depth: int, flags: int) -> int:
    opened = {path: os.open(path, os.O_RDONLY | flags) for path in {path for path, _ in spans}}
    buffers = threading.local()

    def one(span: tuple[Path, int]) -> int:
        if not hasattr(buffers, "memory"):
            buffers.memory = mmap.mmap(-1, BLOCK)  # pages of its own: O_DIRECT wants them aligned
        return os.preadv(opened[span[0]], [buffers.memory], span[1])

    try:
        start = time.perf_counter()
        with ThreadPoolExecutor(depth) as pool:
            total = sum(pool.map(one, spans))
        return round(total / (time.perf_counter() - start))
    finally:
        for file in opened.values():
            os.close(file)


# -- one load, in a process of its own ------------------------------------------------------------------------------


def load(way: str, folder: Path, started: float) -> dict[str, Any]:
    """Build the transformer, load it in one of the ways, and make a step."""
    import torch
    from torch import nn
    from vllm.config import LoadConfig
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

    from port_kit.models.dreamid_omni.weights import COMPONENTS
    from port_kit.models.wan.weights.transformer_rules import TRANSFORMER
    from port_kit.pipeline.loading import build_components, load_component_weights, weights_sources
    from port_kit.remap import load_components
    from port_kit.runtime.single_process import single_rank

    component = next(one for one in COMPONENTS if one.name == "transformer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"

    class OneComponent(nn.Module):
        """What the loader sees of a pipeline."""

        _dit_modules = ("transformer",)

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.od_config = config
            self.transformer = build_components(folder, [component])["transformer"]
            self.weights_sources = weights_sources(folder, [component])
            self.eval().requires_grad_(False)

        def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
            if way == "port":
                return load_component_weights(self, [component], weights, folder)
            if way == "port_stream":
                return load_components({"transformer": (self.transformer, TRANSFORMER)}, weights, model=folder)
            return in_tree(self.transformer, weights)

    seconds = {"imports_s": time.time() - started}
    mark = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal mark
        if on_gpu:
            torch.cuda.synchronize()
        seconds[name], mark = time.perf_counter() - mark, time.perf_counter()

    dtype = torch.bfloat16 if on_gpu else torch.float32
    with single_rank(dtype=dtype, device=device) as config, torch.inference_mode():
        config.model = str(folder)
        torch.zeros(1, device=device)
        lap("device_s")
        pipeline = OneComponent(config)
        lap("build_s")
        loader = DiffusersPipelineLoader(LoadConfig(), od_config=config)
        with HostMemory() as memory:
            loader.load_weights(pipeline)
            lap("weights_s")
        reserved = torch.cuda.max_memory_reserved() if on_gpu else None
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        step(pipeline.transformer, device, dtype)
        lap("first_step_s")
        seconds["build_to_first_step_s"] = seconds["build_s"] + seconds["weights_s"] + seconds["first_step_s"]
        seconds["to_first_step_s"] = time.time() - started
        return {
            **{name: round(value, 4) for name, value in seconds.items()},
            **memory.report(),
            "gpu_peak_allocated": peak,
            "gpu_peak_reserved": reserved,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
            "parameters": sum(parameter.numel() for parameter in pipeline.parameters()),
            "checksum": checksum(pipeline.transformer),
        }


def in_tree(module: Any, weights: Iterable[tuple[str, Any]]) -> set[str]:
    """The loop that vLLM-Omni's diffusion models have, with this model's names."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    parameters = dict(module.named_parameters())
    loaded = set()
    for name, tensor in weights:
        name = name.removeprefix("transformer.")
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".patch_embedding." in name and tensor.dim() > 2:
            tensor = tensor.flatten(1)
        for fused, part, slot in STACKED:
            if part in name:
                name = name.replace(part, fused)
                parameters[name].weight_loader(parameters[name], tensor, slot)
                break
        else:
            loader = getattr(parameters[name], "weight_loader", default_weight_loader)
            loader(parameters[name], tensor)
        loaded.add(f"transformer.{name}")
    return loaded


def step(model: Any, device: Any, dtype: Any) -> None:
    """One denoising step of four branches, for two latent frames of 64x64 pixels and their sound."""
    import torch

    from port_kit.models.wan.transformer.modality_io import TextContext

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    config = model.config
    given = {
        "video": draw(1, config.video.in_channels, 3, 4, 4),
        "audio": draw(1, 10 + 31, config.audio.in_channels),
        "timestep": torch.tensor(500, device=device),
        "video_text": TextContext(draw(1, 20, config.video.text_dim)),
        "audio_text": TextContext(draw(1, 20, config.audio.text_dim)),
        "video_reference_frames": 1,
        "audio_reference_lengths": (31,),
    }
    for change in ({}, {}, {"unused": "audio"}, {"unused": "video"}):
        model(**{**given, **change})


def checksum(module: Any) -> int:
    """A number that depends on every bit of every parameter and on its place."""
    import torch

    total = 0
    for number, (_, parameter) in enumerate(sorted(module.named_parameters())):
        bits = parameter.detach().reshape(-1).contiguous().view(torch.uint8).to(torch.int64)
        if len(bits) > 1 << 24:  # of large ones, samples of 8 bytes
            bits = bits[: len(bits) // 1024 * 1024].view(-1, 1024)[:, :8].reshape(-1)
        weights = torch.arange(len(bits), device=bits.device) % 8191 + 1
        total += (number + 1) * int((bits * weights).sum())
    return total % (1 << 61)


# -- all of them ----------------------------------------------------------------------------------------------------


def child(*arguments: str) -> dict[str, Any]:
    """Run a part of this script in a fresh process and return what it found."""
    command = [sys.executable, __file__, *arguments, "--started", repr(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def median(runs: list[dict[str, Any]], size: int, speed: int) -> dict[str, Any]:
    """Medians of the figures of several runs, with rates of reading."""
    row: dict[str, Any] = {}
    for key, value in runs[0].items():
        if key.endswith("_s") or key.startswith(("peak", "gpu", "cached")):
            row[key] = round(statistics.median(run[key] for run in runs), 4) if value is not None else None
    row["bytes_per_s"] = round(size / row["weights_s"])
    row["of_disk"] = round(row["bytes_per_s"] / speed, 3)
    if len(runs) > 1:
        row["weights_s_all"] = [run["weights_s"] for run in runs]
    return row


def measure(given: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Write the checkpoint where it is missing, then measure the disk and every way of loading."""
    folder = model / "transformer"
    written = None
    if not (folder / "config.json").is_file():
        written = child("--part", "write", "--folder", str(model), *given.passed)
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    speeds = disk(files, min(size, int(given.disk_gigabytes * 1e9)))
    rows: dict[str, Any] = {}
    sums, how, first = {}, {}, {}
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(given.rounds):
        for way in given.way or WAYS:
            how = drop_caches(files)
            for state in ("cold", "warm"):
                cached = cached_share(files)
                found = child("--part", way, "--folder", str(model))
                found["cached_before"] = cached
                runs.setdefault((way, state), []).append(found)
                sums[way] = found["checksum"]
                first = first or found
    for (way, state), found in runs.items():
        rows.setdefault(way, {})[state] = median(found, size, speeds["bytes_per_s"])
    return {
        "device": first["device"],
        "torch": first["torch"],
        "cores": len(os.sched_getaffinity(0)),
        "bytes": size,
        "files": len(files),
        "parameters": first["parameters"],
        "written": written,
        "cache_dropped": how,
        "rounds": given.rounds,
        "disk": speeds,
        "loads": rows,
        "same_weights": len(set(sums.values())) == 1,
    }


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, help="a model directory to keep; used as it is if it is there")
    options.add_argument("--files", type=int, default=1, help="how many files hold the tensors")
    options.add_argument("--layers", type=int, default=0, help="fewer layers than 30, for a smaller disk")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the file")
    options.add_argument("--tiny", action="store_true", help="the tiny model")
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--way", action="append", choices=WAYS, help="only this one; may be given several times")
    options.add_argument("--disk-gigabytes", type=float, default=6.0, help="read at most so much to learn its speed")
    options.add_argument("--part", choices=("write", *WAYS), help=argparse.SUPPRESS)
    options.add_argument("--started", type=float, help=argparse.SUPPRESS)
    given = options.parse_args()
    given.passed = ["--files", str(given.files), "--layers", str(given.layers), "--dtype", given.dtype]
    given.passed += ["--tiny"] if given.tiny else []
    if given.part == "write":
        print(json.dumps(write(given)))
    elif given.part:
        stdout = os.dup(1)
        os.dup2(2, 1)  # what libraries print is no result
        found = load(given.part, given.folder, given.started)
        os.write(stdout, (json.dumps(found) + "\n").encode())
    elif given.folder:
        print(json.dumps(measure(given, given.folder), indent=1))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(given, Path(folder)), indent=1))


def write(given: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint; values come from a GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    size = make_component(
        given.folder / "transformer",
        "transformer",
        tiny=given.tiny,
        device=device,
        dtype=given.dtype,
        layers=given.layers,
        files=given.files,
    )
    return {"bytes": size, "seconds": round(time.perf_counter() - start, 2)}


if __name__ == "__main__":
    main()
