"""Denoising steps of unmodified diffusers transformers under shipped plans, on several GPUs.

FLUX.1-dev, Wan2.1-T2V-14B and HunyuanVideo in their published sizes, with random bfloat16 weights that are the same in
all layouts and are loaded with the rules of the plan. A step is two guidance branches, one call each, their combination
and the scheduler's step, as in the pipelines of diffusers. Each layout runs in vLLM-Omni's own workers, one process per
GPU. Seconds are the slowest rank's median of ``--rounds`` after two steps; outputs are compared with those of one GPU.

``plain`` is the module without a plan, with FlashAttention-3 by diffusers' own dispatch; ``in_tree`` is the
transformer of vLLM-Omni, for Wan. Both are measured on one GPU in the process that measures ``single``, in turns with
it. Prints one JSON object.

    python benchmarks/autoparallel_speed.py
    python benchmarks/autoparallel_speed.py --model wan-480x832 --tiny --rounds 1     # small modules on CPU processes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # before vLLM is imported: stdout is for the result

import torch
from parallel_scaling import peak_bytes, profiled, random_weights, synchronize, timed
from torch import Tensor, nn
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.pipeline.precision import default_dtype

if TYPE_CHECKING:
    from port_kit.testing.workers import PrewarmedRanks

LAYOUTS = ("cfg2", "ulysses2", "tp2")
WARM_UP = 2
#: Relative error (L2) of outputs that two orders of summation leave.
TOLERANCE = {"bfloat16": 5e-2, "float32": 1e-4}


def flux_inputs(latent: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """Return arguments for an image of ``latent`` patches and 512 text tokens."""
    _, height, width = latent
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    random = _random(seed)
    return {
        "hidden_states": random(1, height * width, 64),
        "encoder_hidden_states": random(1, 512, 4096),
        "pooled_projections": random(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": positions,
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.tensor([3.5]),
    }


def wan_inputs(latent: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """Return arguments for a video of ``latent`` frames, rows and columns and 512 text tokens."""
    random = _random(seed)
    return {
        "hidden_states": random(1, 16, *latent),
        "encoder_hidden_states": random(1, 512, 4096),
        "timestep": torch.tensor([500]),
    }


def hunyuan_inputs(latent: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """Return arguments for a video of ``latent`` frames, rows and columns and 256 text tokens, 156 of them padding."""
    random = _random(seed)
    mask = torch.zeros(1, 256, dtype=torch.bool)
    mask[:, :100] = True
    return {
        "hidden_states": random(1, 16, *latent),
        "encoder_hidden_states": random(1, 256, 4096),
        "encoder_attention_mask": mask,
        "pooled_projections": random(1, 768),
        "timestep": torch.tensor([500]),
        "guidance": torch.tensor([6000.0]),
    }


@dataclass(frozen=True)
class Model:
    """A transformer class of diffusers at a size of its latents.

    Attributes:
        class_name: the class, whose defaults are the published configuration.
        inputs: returns the arguments of a call, for latents of a size and a seed.
        latent: latent frames, rows and columns; patches for FLUX.
        options: differences of the published configuration from the defaults.
        tiny: differences of a small configuration from the published one.
    """

    class_name: str
    inputs: Callable[[tuple[int, int, int], int], dict[str, Any]]
    latent: tuple[int, int, int]
    options: Mapping[str, Any]
    tiny: Mapping[str, Any]

    def settings(self, *, tiny: bool) -> dict[str, Any]:
        """Return the configuration and the size to run."""
        if not tiny:
            return {"config": dict(self.options), "latent": self.latent}
        return {"config": {**self.options, **self.tiny}, "latent": (min(self.latent[0], 3), 6, 8)}


_FLUX = "FluxTransformer2DModel", flux_inputs
_TINY_FLUX = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
MODELS: Mapping[str, Model] = {
    "flux-1024x1024": Model(*_FLUX, (1, 64, 64), {"guidance_embeds": True}, _TINY_FLUX),
    "flux-2048x2048": Model(*_FLUX, (1, 128, 128), {"guidance_embeds": True}, _TINY_FLUX),
    "wan-480x832": Model(
        "WanTransformer3DModel",
        wan_inputs,
        (21, 60, 104),
        {},
        {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 512},
    ),
    "hunyuan-544x960": Model(
        "HunyuanVideoTransformer3DModel",
        hunyuan_inputs,
        (17, 68, 120),
        {"guidance_embeds": True},
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2},
    ),
}


def _random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    # the loader has other defaults, with which other numbers are drawn
    return lambda *shape: torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)


class Guided:
    """Denoising steps of a transformer with two guidance branches, in the form that diffusers' pipelines have.

    Args:
        module: the transformer.
        branches: arguments of each branch.
    """

    def __init__(self, module: nn.Module, branches: list[dict[str, Any]]) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.module, self.branches = module, branches
        self.components = {"transformer": module, "scheduler": FlowMatchEulerDiscreteScheduler()}

    def step(self) -> Tensor:
        """Return the latents after one step."""
        scheduler: Any = self.components["scheduler"]
        scheduler.set_timesteps(2, device=self.branches[0]["hidden_states"].device)
        positive, negative = (self.module(**branch, return_dict=False)[0] for branch in self.branches)
        flow = negative + 4.0 * (positive - negative)
        latents = self.branches[0]["hidden_states"]
        return scheduler.step(flow, scheduler.timesteps[0], latents, return_dict=False)[0]


class SpeedPipeline(nn.Module):
    """A transformer alone in vLLM-Omni's worker; a request is a measurement."""

    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = []
    _vae_modules: ClassVar[list[str]] = []
    dummy_run_num_frames = 0

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        from port_kit.autoparallel.host.adapt import adapt

        super().__init__()
        self.od_config, self.device = od_config, get_local_device()
        self.settings: dict[str, Any] = json.loads((Path(od_config.model) / "settings.json").read_text())
        self.model = MODELS[self.settings["model"]]
        self.transformer = build(self.model, self.settings["config"], od_config.dtype)
        self.shapes = {name: tuple(value.shape) for name, value in self.transformer.named_parameters()}
        self.adapted = adapt(self.transformer, shipped(self.model), od_config, "transformer")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the transformer with random weights by the rules of the plan."""
        from port_kit.parallel.hsdp import shard_before_loading

        shard_before_loading(self.transformer, self.od_config, self.device)
        self._fill(self.transformer, self.adapted.rules)
        self.guided = Guided(self.transformer, self._branches())
        if self.od_config.parallel_config.cfg_parallel_size > 1:
            from port_kit.autoparallel.cfg import OmniGuidanceGroup, spread_guidance

            self.guidance = spread_guidance(self.guided, {"transformer": self.transformer}, OmniGuidanceGroup())

    def _fill(self, module: nn.Module, rules: Any) -> None:
        from port_kit.autoparallel.host.loading import buffers_to
        from port_kit.parallel.memory import materialize
        from port_kit.remap import load_weights

        materialize(module, self.device)
        buffers_to(module, self.device)
        load_weights(module, random_weights(self.shapes, self.device, self.od_config.dtype), rules)

    def _branches(self) -> list[dict[str, Any]]:
        dtype = self.od_config.dtype
        with torch.device("cpu"):
            made = [self.model.inputs(tuple(self.settings["latent"]), seed) for seed in (0, 1)]
        made[1]["hidden_states"] = made[0]["hidden_states"]
        return [
            {name: x.to(self.device, dtype if x.is_floating_point() else None) for name, x in branch.items()}
            for branch in made
        ]

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Time steps of the transformer and of its references; return the latents and this rank's figures."""
        given = req.sampling_params.extra_args
        contenders = {"adapted": self.guided} | {name: self._reference(name) for name in given["references"]}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _round in range(WARM_UP + given["rounds"]):
            for name, guided in contenders.items():
                seconds[name].append(timed(guided.step, self.device))
        figures = {
            "seconds": {name: statistics.median(each[WARM_UP:]) for name, each in seconds.items()},
            "launch_seconds": launch_seconds(self.guided.step, self.device),
            "peak_bytes": peak_bytes(self.device),
            "exchanges": self.adapted.sharded.exchanges() if self.adapted.sharded else {},
            **profiled(self.guided.step, self.device, given["kernels"]),
        }
        latents = {name: guided.step().float().cpu() for name, guided in contenders.items()}
        return DiffusionOutput(output={"latents": latents, "figures": figures})

    def _reference(self, name: str) -> Guided:
        """Build another implementation with the same weights."""
        from port_kit.autoparallel.host.adapt import SAME_NAMES

        if name == "in_tree":
            return Guided(self._compiled(self._in_tree()), self._branches())
        plain = build(self.model, self.settings["config"], self.od_config.dtype)
        self._fill(plain, SAME_NAMES)
        if self.device.type == "cuda":
            provide_flash_attention()
            masked = "encoder_attention_mask" in self.guided.branches[0]
            plain.set_attention_backend("_flash_varlen_3" if masked else "_flash_3")  # type: ignore[operator]
        return Guided(self._compiled(plain), self._branches())

    def _compiled(self, module: nn.Module) -> nn.Module:
        """Compile the blocks of a reference as vLLM-Omni's worker compiled those of the adapted module."""
        from vllm_omni.diffusion.compile import regionally_compile

        return module if self.od_config.enforce_eager else regionally_compile(module, dynamic=True)

    def _in_tree(self) -> nn.Module:
        """Build vLLM-Omni's own Wan transformer with this model's weights."""
        from load_in_tree import WAN
        from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel

        from port_kit.remap import load_weights

        dtype = self.od_config.dtype
        with torch.device(self.device), default_dtype(dtype):
            module = WanTransformer3DModel(**self.settings["config"])
        load_weights(module, random_weights(self.shapes, self.device, dtype), WAN)
        for layer in module.modules():
            if method := getattr(layer, "quant_method", None):
                method.process_weights_after_loading(layer)
        return module.eval().requires_grad_(False)


def launch_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds until a call returns, without waiting for the device."""
    torch.distributed.barrier()
    synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def shipped(model: Model) -> Any:
    """Return the shipped plan of a model."""
    from port_kit.autoparallel.plan import Plan
    from port_kit.autoparallel.shipped import shipped_plan

    path = shipped_plan(model.class_name)
    assert path is not None
    return Plan.load(path)


def build(model: Model, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Build the transformer of diffusers with its parameters on the meta device."""
    import diffusers
    from accelerate import init_empty_weights

    with default_dtype(dtype), init_empty_weights(include_buffers=False):
        module: nn.Module = getattr(diffusers, model.class_name)(**config)
    return module.eval().requires_grad_(False)


def provide_flash_attention() -> None:
    """Let diffusers call the FlashAttention-3 kernels of ``fa3_fwd``, which it looks for under another name."""
    import fa3_fwd_interface
    from diffusers.models import attention_dispatch

    def dense(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None, causal: bool, **_: Any) -> Any:
        out = fa3_fwd_interface.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)
        return out if isinstance(out, tuple) else (out, q.new_empty(q.shape[0], q.shape[2], q.shape[1]))

    def varlen(*, return_attn_probs: bool, **arguments: Any) -> Any:
        return fa3_fwd_interface.flash_attn_varlen_func(**arguments)

    attention_dispatch.flash_attn_3_func = dense
    attention_dispatch.flash_attn_3_varlen_func = varlen
    attention_dispatch._CAN_USE_FLASH_ATTN_3 = True


def register() -> None:
    """Register the pipeline in a worker, which imports this file by its name."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    os.dup2(2, 1)  # stdout is for the result
    sys.path.insert(0, str(Path(__file__).parent))
    register_diffusion_model(model_arch="SpeedPipeline", module_name=Path(__file__).stem, class_name="SpeedPipeline")


def write_model(folder: Path, model: str, options: argparse.Namespace) -> None:
    """Write a model directory without weights."""
    settings = {"model": model, **MODELS[model].settings(tiny=options.tiny)}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text("{}")
    index = {"_class_name": "SpeedPipeline", "_diffusers_version": "0.40.0"}
    (folder / "model_index.json").write_text(json.dumps(index))


def measure(
    folder: Path, layout: str, references: list[str], options: argparse.Namespace, prewarmed: PrewarmedRanks
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run a layout; return rank 0's latents per implementation, and the figures of all ranks."""
    from port_kit.parallel.layout import Layout
    from port_kit.testing.workers import Request, run_workers

    config = {
        "parallel_config": Layout.parse(layout).parallel_config,
        "dtype": options.dtype,
        "enforce_eager": not options.compile,
    }
    extra = {"rounds": options.rounds, "references": references, "kernels": options.kernels}
    request = Request("measure", {"extra_args": extra, "seed": 0})
    results = run_workers(
        str(folder), [request], config=config, setup=register, timeout=options.timeout, prewarmed=prewarmed
    )
    figures = [result.outputs[0]["figures"] for result in results]
    row = {
        "seconds": {name: max(each["seconds"][name] for each in figures) for name in figures[0]["seconds"]},
        "launch_seconds": max(each["launch_seconds"] for each in figures),
        "peak_bytes": [each["peak_bytes"] for each in figures],
        "communication": [round(each["communication"], 4) for each in figures],
        "exchanges": figures[0]["exchanges"],
        **({"kernels_rank_0": figures[0]["kernels"]} if options.kernels else {}),
    }
    return results[0].outputs[0]["latents"], row


def error(latents: Tensor, expected: Tensor) -> float:
    """Return the relative difference (L2)."""
    return ((latents - expected).norm() / expected.norm()).item()


def run_model(model: str, options: argparse.Namespace, prewarmed: PrewarmedRanks) -> dict[str, Any]:
    """Measure one GPU with its references, then the layouts."""
    with tempfile.TemporaryDirectory(prefix="port-kit-") as scratch:
        folder = Path(scratch)
        write_model(folder, model, options)
        in_tree = ["in_tree"] if MODELS[model].class_name == "WanTransformer3DModel" else []
        references = [] if options.only_layouts else ["plain", *in_tree]
        latents, single = measure(folder, "single", references, options, prewarmed)
        expected, seconds = latents["adapted"], single["seconds"]["adapted"]
        single["relative_error"] = {name: error(latents[name], expected) for name in references}
        single["adapted_to_plain"] = seconds / single["seconds"]["plain"] if references else None
        rows: dict[str, Any] = {"single": single}
        print(json.dumps({model: rows}), file=sys.stderr, flush=True)
        for layout in options.layout or LAYOUTS:
            latents, row = measure(folder, layout, [], options, prewarmed)
            difference = error(latents["adapted"], expected)
            speed_up = seconds / row["seconds"]["adapted"]
            rows[layout] = {**row, "speed_up": round(speed_up, 3), "relative_error": difference}
            rows[layout]["within_tolerance"] = difference <= TOLERANCE[options.dtype]
            print(json.dumps({model: {layout: rows[layout]}}), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Parse the options, measure, print."""
    from port_kit.testing.workers import PrewarmedRanks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--layout", action="append", help=f"default: {', '.join(LAYOUTS)}")
    parser.add_argument("--only-layouts", action="store_true", help="leave out the references on one GPU")
    parser.add_argument("--compile", action="store_true", help="compile blocks, as vLLM-Omni does by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", type=int, default=0, help="list so many of rank 0's kernels")
    parser.add_argument("--tiny", action="store_true", help="small modules in float32 on CPU processes")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one layout")
    options = parser.parse_args()
    options.dtype = "float32" if options.tiny else "bfloat16"
    models = options.model or list(MODELS)
    # On GPUs every layout has processes of its own, which import while others are measured.
    ranks = 0 if options.tiny else len(models) * (1 + 2 * len(options.layout or LAYOUTS))
    with closing(PrewarmedRanks(ranks)) as prewarmed:
        rows = {model: run_model(model, options, prewarmed) for model in models}
    print(json.dumps({"dtype": options.dtype, "rounds": options.rounds, "models": rows}, indent=1))


if __name__ == "__main__":
    main()
