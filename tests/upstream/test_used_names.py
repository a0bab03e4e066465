"""Names of upstream that the kit's source uses."""

from __future__ import annotations

import ast

from port_kit.upstream import used_names as module

SOURCE = """
from vllm_omni.diffusion.data import DiffusionOutput as Output
from os import path

def late():
    import vllm.envs
    from vllm.distributed import parallel_state as state
    state.group.size()
    Output.from_exception(path.join("a"))
    return vllm.envs.NAME, "vllm_omni.worker.module.Worker", "vllm.general_plugins"
"""


def test_imports_attributes_and_class_paths_are_found() -> None:
    found = set(module._names(ast.parse(SOURCE)))
    assert found == {
        "vllm_omni.diffusion.data.DiffusionOutput",
        "vllm_omni.diffusion.data.DiffusionOutput.from_exception",
        "vllm",
        "vllm.envs",
        "vllm.envs.NAME",
        "vllm.distributed.parallel_state",
        "vllm.distributed.parallel_state.group",
        "vllm.distributed.parallel_state.group.size",
        "vllm_omni.worker.module.Worker",
    }


def test_members_count_for_the_files_that_use_the_class() -> None:
    used = module.UsedNames(
        {"vllm.a.Class": frozenset({"one.py"})},
        {"one.py": frozenset({"called"}), "two.py": frozenset({"other"})},
    )
    assert used.users("vllm.a.Class.called") == ["one.py"]
    assert used.users("vllm.a.Class.other") == []


def test_the_kits_own_names_have_their_files() -> None:
    used = module.used_names()
    assert "models/wan/components/video_vae.py" in used.users(
        "vllm_omni.diffusion.distributed.parallel_state.model_parallel_is_initialized"
    )
    overridden = used.users("vllm_omni.diffusion.attention.layer.Attention._run_local_attention")
    assert {"port_kit/parallel/sequence.py", "registry entry attention_layer"} <= set(overridden)
