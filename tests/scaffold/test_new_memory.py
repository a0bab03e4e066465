"""``port-kit new`` of a large pipeline: no parameter of full size is allocated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scaffold.helpers import environment

#: Wan 2.1, 14.3 B parameters.
CONFIG = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
CLASS = "WanTransformer3DModel"
#: Elements of all parameters that inference of a plan, on a tiny module, may allocate; a full-size matrix has more.
MOST = 20_000_000
#: Count the elements of all parameters that are given to modules on a real device.
_SCRIPT = """
import sys
from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameter
allocated = []
def count(module, name, parameter):
    if parameter is not None and parameter.device.type != "meta":
        allocated.append(parameter.numel())
on_parameter(count)
MORE
from port_kit.cli import main
main(sys.argv[1:], standalone_mode=False)
print("allocated", sum(allocated))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "counted"),
    [
        pytest.param("", 0, id="new"),
        pytest.param(
            "import diffusers; diffusers.WanTransformer3DModel(**CONFIG)", 1, id="a model that is built is counted"
        ),
    ],
)
def test_a_large_class_is_never_built(more: str, counted: int, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.35.0", "transformer": ["diffusers", CLASS]}
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "transformer" / "config.json").write_text(json.dumps({"_class_name": CLASS, **CONFIG}))
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    tiny = {**CONFIG, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 8}
    script = _SCRIPT.replace("MORE", more.replace("CONFIG", repr(tiny)))
    options = ["new", "large_wan_of_memory_test", "--from", str(model), "--path", "diffusers"]
    done = subprocess.run(
        [sys.executable, "-c", script, *options, "--output-dir", str(tmp_path / "port")],
        env=environment(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    allocated = int(done.stdout.rpartition("allocated ")[2])
    assert counted <= allocated < MOST
    assert (tmp_path / "port" / "large_wan_of_memory_test" / "plan.toml").exists()
