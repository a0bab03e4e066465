"""Engines' workers forked from a server, in scripts that start several engines one after the other."""

from __future__ import annotations

import multiprocessing

#: Modules that the server imports once.
_PRELOADED = ("vllm_omni.entrypoints.omni", "vllm_omni.diffusion.worker", "diffusers", "transformers")


def fork_workers() -> None:
    """Fork workers from a server that has imported vLLM-Omni, instead of spawning each: imports take many seconds."""
    start = multiprocessing.set_start_method
    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    multiprocessing.set_start_method = lambda method, force=False: start("forkserver", force=True)
