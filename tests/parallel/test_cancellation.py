"""A request that is cancelled while several ranks compute one step."""

from __future__ import annotations

from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm_omni.diffusion.cancellation import request_cancellation_scope
from vllm_omni.diffusion.data import DiffusionOutput, DiffusionRequestAbortedError
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.parallel.cancellation import VOTES
from port_kit.parallel.layout import Layout
from port_kit.testing.workers import Request, run_workers
from tests.models.unequal_towers import FUSION, fusion_checkpoint
from tests.parallel.transformer_pipeline import INPUTS, TransformerOnlyPipeline, register, write_model

LAYERS = 2 * VOTES
#: Blocks before the request is cancelled, on the last rank; a vote follows within ``LAYERS / VOTES`` blocks.
BEFORE = 3


class CancelledPipeline(TransformerOnlyPipeline):
    """Its last rank cancels the request ``signal`` of ``extra_args`` while it runs a block."""

    def forward(self, req: DiffusionRequestBatch, **options: Any) -> DiffusionOutput:
        """Return the number of blocks that ran, and the flows if the request was not cancelled."""
        signal = req.sampling_params.extra_args["signal"]
        ran: list[int] = []
        written = SharedMemory(name=signal) if signal else None

        def count(*_: Any) -> None:
            ran.append(1)
            is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
            if written is not None and is_last and len(ran) == BEFORE:
                written.buf[0] = 1

        hooks = [block.register_forward_pre_hook(count) for block in self.transformer.blocks]
        output = None
        with request_cancellation_scope([signal]):
            try:
                output = super().forward(req, **options).output
            except DiffusionRequestAbortedError:
                pass
        for hook in hooks:
            hook.remove()
        return DiffusionOutput(output={"blocks": len(ran), "flows": output})


@pytest.mark.parametrize("layout", ["tp2", "ulysses2", "hsdp2", "cfg2"])
def test_all_ranks_stop_at_one_block_and_serve_the_next_request(layout: str, tmp_path: Path) -> None:
    config = {**FUSION, **{tower: {**FUSION[tower], "num_layers": LAYERS} for tower in ("video", "audio")}}
    transformer = write_model(tmp_path / "model", "CancelledPipeline", config)
    save_file(fusion_checkpoint(config), transformer / "model.safetensors")
    signal = SharedMemory(create=True, size=1)
    try:
        requests = [
            Request("x", {"num_inference_steps": 1, "seed": 1, "extra_args": {**INPUTS[1], "signal": name}})
            for name in (None, signal.name, None)
        ]
        ranks = run_workers(
            tmp_path / "model",
            requests,
            config={"parallel_config": Layout.parse(layout).parallel_config},
            setup=lambda: register("CancelledPipeline", __name__),
        )
    finally:
        signal.close()
        signal.unlink()
    whole, cancelled, again = zip(*(rank.outputs for rank in ranks), strict=True)
    counts = {output["blocks"] for output in cancelled}
    assert len(counts) == 1, "ranks stopped at different blocks"
    if layout == "cfg2":  # ranks compute branches of their own, and vote between steps only
        assert counts == {whole[0]["blocks"]}
    else:
        assert BEFORE <= counts.pop() <= BEFORE + LAYERS // VOTES < whole[0]["blocks"]
        assert all(output["flows"] is None for output in cancelled)
    for first, second in zip(whole, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first["flows"], second["flows"], strict=True))
