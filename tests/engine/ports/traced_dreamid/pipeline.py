"""The shipped pipeline, watched: for a request with a ``report``, every rank writes its latents and its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from vllm.distributed.parallel_state import get_world_group
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.models.dreamid_omni.pipeline import DreamIDOmniPipeline
from port_kit.parallel import recorder


class TracedDreamIDPipeline(DreamIDOmniPipeline):
    """Pipeline that keeps the latents of the last step and a report of this rank's work."""

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        recorder.install()
        super().__init__(od_config=od_config, prefix=prefix)
        self.steps: list[Any] = []
        self.on_step = self.steps.append

    def forward(self, req: DiffusionRequestBatch, **options: Any) -> DiffusionOutput:
        """Serve the request, then write the report that it asks for."""
        before = recorder.collect(self).calls
        output = super().forward(req, **options)
        report = req.sampling_params.extra_args.get("report")
        if report:
            self._write(Path(f"{report}.{get_world_group().rank_in_group}"), recorder.collect(self), before)
        return output

    def _write(self, path: Path, seen: recorder.Trace, before: int) -> None:
        last = self.steps[-1]
        save_file({name: latent.contiguous() for name, latent in last.latents.items()}, f"{path}.safetensors")
        figures = {
            "rank_coords": dict(seen.rank_coords),
            "calls": seen.calls - before,
            "tokens": {name: calls[-1].query for name, calls in seen.attention.items()},
            "parameter_bytes": seen.parameter_bytes,
            "collectives": {name: count for name, (count, _) in seen.collectives.items()},
        }
        Path(f"{path}.json").write_text(json.dumps(figures))
