"""A checkpoint with seeded values, in the published names and container, and a model directory made of it."""

from __future__ import annotations

from pathlib import Path

from port_kit.download import download
from port_kit.parallel.verify import ParallelTestCase
from port_kit.testing import Hub, Request, TinyComponent, tiny_repositories
from tidepool.recipe import RECIPE

#: The published checkpoint: names, shapes, dtypes. The model is tiny as it is, so nothing shrinks.
OUTLINE = {
    "patch.weight": [[64, 3, 1, 8, 8], "float32"],
    "bytes.weight": [[256, 64], "float32"],
    "time.weight": [[64, 64], "float32"],
    "layers.{0..1}.attn.{q,k,v,out}.weight": [[64, 64], "float32"],
    "layers.{0..1}.mlp.0.weight": [[256, 64], "float32"],
    "layers.{0..1}.mlp.2.weight": [[64, 256], "float32"],
    "layers.{0..1}.modulation.weight": [[256, 64], "float32"],
    "layers.{0..1}.attn.out.bias": [[64], "float32"],
    "layers.{0..1}.attn.{q,k,v}.bias": [[64], "float32"],
    "layers.{0..1}.{mlp.0,modulation}.bias": [[256], "float32"],
    "layers.{0..1}.mlp.2.bias": [[64], "float32"],
    "{patch,time}.bias": [[64], "float32"],
    "final.weight": [[192, 64], "float32"],
    "final.bias": [[192], "float32"],
}


def model_directory(scratch: Path) -> Path:
    """Serve the checkpoint on the loopback interface, download it as a user would, and return the directory."""
    tiny = tiny_repositories(RECIPE, {"transformer": TinyComponent(OUTLINE, sizes={})}, scratch / "hub")
    with Hub(tiny.repositories) as hub:
        report = download(RECIPE, scratch / "model", endpoint=hub.endpoint, token=False, use_cache=False)
    return report.directory


def subject(scratch: Path) -> ParallelTestCase:
    """Return what ``port-kit verify parallel tidepool`` runs."""
    request = Request("a crab", {"num_inference_steps": 2, "seed": 5})
    return ParallelTestCase(model_directory(scratch), [request], output_tolerance=1e-3)
