"""A user's script in an environment of its own: make a private port's tiny model, and run it in a worker process.

Usage: run_private.py PORT FOLDER. The report is FOLDER/report.json, because engines write to stdout.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def run(name: str, scratch: Path) -> dict[str, Any]:
    """Start an engine whose worker is a process of its own, make a clip, and describe it."""
    import numpy as np
    import psutil
    from vllm_omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    import port_kit
    from port_kit.registry import find_port
    from port_kit.testing import download_tiny

    port = find_port(name)
    model = download_tiny(port, scratch / name).directory
    omni = Omni(model=str(model), dtype="float32", enforce_eager=True, distributed_executor_backend="mp")
    try:
        sampling = OmniDiffusionSamplingParams(height=24, width=40, num_frames=3, num_inference_steps=2, seed=3)
        (result,) = omni.generate("a crab", sampling)
        processes = len(psutil.Process().children(recursive=True))
    finally:
        omni.close()
    frames = np.asarray(result.images[0])
    return {
        "port": name,
        "origin": importlib.import_module(port.pipeline.partition(":")[0]).__file__,
        "kit": port_kit.__file__,
        "processes": processes,
        "shape": frames.shape,
        "deviation": float(frames.std()),
        "sum": float(frames.astype(np.float64).sum()),
    }


if __name__ == "__main__":
    target = Path(sys.argv[2])
    (target / "report.json").write_text(json.dumps(run(sys.argv[1], target)), encoding="utf-8")
