"""Write a port whose transformer is the model's own code: a small working skeleton, in four variants."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.download import FileRule
from port_kit.scaffold.common import common_values, media_values
from port_kit.scaffold.file_rules import rule_text
from port_kit.scaffold.modality import FORMS, modality_values
from port_kit.scaffold.render import literal, render
from port_kit.scaffold.request import NewPort
from port_kit.scaffold.serving_files import serving_templates, serving_values
from port_kit.scaffold.source import Source

#: diffusers' release whose names a model directory of these paths says it was made by; nothing of it is used.
DIFFUSERS_VERSION = "0.40.0"
#: Class in diffusers of the decoder of a hybrid, and the configuration of a tiny one.
_VAE = "AutoencoderKLLTXVideo"
_TINY_VAE: Mapping[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": [8, 8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8, 8],
    "layers_per_block": [1, 1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1, 1],
    "decoder_causal": False,
}
#: Files of the port, and of its model library.
_PORT = ("__init__", "config", "pipeline", "recipe", "weights")
_LIBRARY = ("__init__", "transformer")
#: Tests of every port of these paths, by the folder of their templates.
_TESTS = {"common": ("conftest", "test_download", "test_generate"), "own": ("test_coverage", "test_parity")}
#: Files of git code with a plan, and what they replace.
_EXTERNAL = ("model/decoder", "model/original", "model/transformer", "weights")
#: Request of the tiny model of a hybrid, in the sizes of its VAE.
_HYBRID_REQUEST = {"height": 96, "width": 160, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 3.0}
#: Pixels and frames of a latent: of the skeleton's decoder, and of diffusers' VAE.
_LATENT: Mapping[str, Any] = {"size_multiple": 4, "frame_step": 1}
_HYBRID_LATENT: Mapping[str, Any] = {"size_multiple": 32, "frame_step": 8}
#: Layouts of the tests.
LAYOUTS = ("tp2", "ulysses2", "cfg2")
_REFERENCES = {
    "custom": "the original code, ported",
    "external": "the original code, a git dependency; its transformer is split over ranks by a plan",
    "bypass": "the original code, ported; the pipeline reads its weights itself",
    "hybrid": f"the original code, ported; {_VAE} of diffusers",
}


def own_files(port: NewPort) -> dict[str, str]:
    """Return the files of a port of the skeleton by their paths."""
    source = Source(f"your-org/{port.name}")
    values = {**common_values(port, source), **_names(port), **media_values(takes_image=False)}
    values |= {**_decoder_values(port), **loading_values(port), **_recipe_values(port)}
    values |= {"notes": _notes(port, source)}
    return {path: render(template, values) for path, template in sorted(_templates(port).items())}


def _templates(port: NewPort) -> dict[str, str]:
    """Return the templates by the paths of the files."""
    name = port.name
    templates = {f"{name}/{part}.py": f"own/{part}.py" for part in _PORT}
    templates |= {f"{name}/model/{part}.py": f"own/{_MODEL.get(part, part)}.py" for part in _LIBRARY}
    templates |= {f"tests/{part}.py": f"{folder}/{part}.py" for folder, parts in _TESTS.items() for part in parts}
    templates |= serving_templates(port.output)
    templates |= {
        "pyproject.toml": "common/pyproject.toml",
        "README.md": "own/README.md",
        "CARD.md": "common/CARD.md",
        f"download_{name}.py": "common/download.py",
        f"generate_{name}.py": "common/generate.py",
        f"original/{name}_original/__init__.py": "own/original_init.py",
        f"original/{name}_original/model.py": "own/original_model.py",
    }
    if port.path == "external":
        templates |= {f"{name}/{part}.py": f"external/{Path(part).name}.py" for part in _EXTERNAL}
        templates["tests/test_external.py"] = "external/test_external.py"
        return templates | {f"tests/{part}.py": f"common/{part}.py" for part in ("test_plan", "test_ranks")}
    templates |= {f"tests/{part}.py": f"own/{part}.py" for part in ("test_parallel", "test_cache")}
    if port.path != "hybrid":
        templates[f"{name}/model/decoder.py"] = "own/decoder.py"
    return templates


def _names(port: NewPort) -> dict[str, str]:
    external = port.path == "external"
    checks = "two ranks against one (tp, ulysses, cfg), age of the plan" if external else _HAND_WRITTEN_CHECKS
    return {
        "path": port.path,
        "reference": _REFERENCES[port.path],
        "reference_word": "original code",
        "down": "mlp" if external else "down",
        "git_code": f'\n    git_code="{port.name}_original",' if external else "",
        **modality_values(port.output, **(_HYBRID_LATENT if port.path == "hybrid" else _LATENT)),
        **serving_values(port.output, LAYOUTS),
        "tiny_request": literal(_HYBRID_REQUEST if port.path == "hybrid" else FORMS[port.output].tiny, 4),
        "diffusers_version": DIFFUSERS_VERSION,
        "original_path": '\nsys.path.append(str(ROOT / "original"))' if external else "",
        # the engine's processes need the code that stays outside of the port
        "environment": ', environment={"PYTHONPATH": str(ROOT / "original")}' if external else "",
        "expected_size": "160x96" if port.path == "hybrid" else FORMS[port.output].expected,
        "checks": "On a tiny model with seeded weights, on a CPU: download, coverage of every tensor, parity with the\n"
        f"reference, {checks}, {FORMS[port.output].text} through the engine.",
        "file_rows": _file_rows(port),
        "layouts": literal(LAYOUTS),
        "proven": literal(("tp2", "ulysses2")),
        "ranks": literal((1, 2)),
        "plan": '\n    plan="plan.toml",' if external else "",
        "planned": "PlannedComponents, " if external else "",
        "planned_import": "from port_kit.autoparallel.planned import PlannedComponents\n" if external else "",
    }


_HAND_WRITTEN_CHECKS = "two ranks against one (tp, ulysses, ring, cfg, hsdp), Cache-DiT"
#: Templates of the model library with another name than the file.
_MODEL = {"__init__": "model_init"}


def _file_rows(port: NewPort) -> str:
    rows = {f"{port.name}/model/transformer.py": "the transformer, ported: parallel linears, sharded tokens"}
    if port.path == "external":
        rows = {
            f"{port.name}/model/transformer.py": "the transformer of the git code, and `make_subject`, a tiny one",
            f"{port.name}/plan.toml": "the parallel plan that was inferred from the tiny one, with its proofs",
        }
    if port.path != "hybrid":
        rows[f"{port.name}/model/decoder.py"] = f"latents to {'samples' if port.output == 'audio' else 'pixels'}"
    rows[f"original/{port.name}_original/"] = "a stand-in for the original code"
    return "\n".join(f"| `{path}` | {text} |" for path, text in rows.items())


def _notes(port: NewPort, source: Source) -> str:
    """Say what is still a stand-in: all of it runs, none of it is the model."""
    lines = [
        "## What is still a stand-in",
        "",
        f"* `original/{port.name}_original`: put the model's own code here; the tests compare the port with it.",
        _EXTERNAL_NOTE if port.path == "external" else _PORTED_NOTE,
        "* `weights.py`, `config.py`: the checkpoint's names and sizes.",
    ]
    lines.append(f"* `recipe.py`: the repository `{source.repository}` and its files.")
    if port.path == "external":
        lines.append("* `recipe.py`: the address, the packages and the commit of the git code.")
    return "\n".join(lines)


_PORTED_NOTE = "* `model/transformer.py`: port the model's transformer, module by module; the tests say where it parts."
_EXTERNAL_NOTE = """\
* `model/transformer.py`: build the model's transformer, and write `make_subject` for it; then infer the plan again,
  with the commands in that file. `replace` of `PORT` puts hand-written modules in place of adapted ones."""


def _decoder_values(port: NewPort) -> dict[str, str]:
    """The decoder: a component of the port, or diffusers' own."""
    return {
        "weights_imports": "COMPONENTS",
        **dict.fromkeys(("experts_import", "experts_attribute", "expert_of_step"), ""),
        **(_hybrid_values(port.name) if port.path == "hybrid" else _component_values(port)),
    }


def _hybrid_values(name: str) -> dict[str, str]:
    vae = f"diffusers:{_VAE}"
    return {
        "port_imports": "Component, Pretrained",
        "weights_imports": "COMPONENTS, PRETRAINED",
        "components": f'(Component("transformer", package="{name}"),)',
        "weights_port_imports": "Component, Pretrained",
        "decoder_rules": "",
        "decoder_config": f"#: Of the tiny {_VAE}.\nTINY_VAE: Mapping[str, Any] = " + literal(dict(_TINY_VAE)),
        "pretrained": "#: Read by its own library.\nPRETRAINED: tuple[Pretrained, ...] = "
        f'(Pretrained("vae", "{vae}", kind="vae"),)\n',
        "pretrained_attribute": "    pretrained: ClassVar[tuple[Pretrained, ...]] = PRETRAINED\n",
        "decode_call": 'self.vae.decode(state.latents["video"].to(self.dtype), return_dict=False)[0].clamp(-1, 1)',
        "tiny_imports": "TinyComponent, TinyPart, TinyPretrained",
        "tiny_decoder": f'"vae": TinyPretrained("{vae}", TINY_VAE)',
        "original_decoder": "",
    }


def _component_values(port: NewPort) -> dict[str, str]:
    modality = modality_values(port.output, **_LATENT)
    return {
        "port_imports": "Component, resolve" if port.path == "bypass" else "Component",
        "components": _TWO_COMPONENTS.replace("$name", port.name),
        "weights_port_imports": "Component",
        "decoder_rules": _DECODER_RULES.replace("$name", port.name),
        "decoder_config": _DECODER_CONFIG.replace("$outline", modality["decoder_outline"]),
        "pretrained": "",
        "pretrained_attribute": "",
        "decode_call": modality["decode_call"],
        "tiny_imports": "TinyComponent, TinyPart",
        "tiny_decoder": '"decoder": TinyComponent(DECODER_OUTLINE, sizes={})',
        "original_decoder": _ORIGINAL_DECODER.replace("$name", port.name),
    }


_ORIGINAL_DECODER = """
            "decoder": {
                "build": "$name_original.model:Decoder",
                "inputs": {"latents": LATENTS},
            },"""
_TWO_COMPONENTS = """\
(
    Component("transformer", package="$name"),
    Component("decoder", package="$name", kind="vae"),
)"""
_DECODER_RULES = """\
DECODER = RuleSet(
    name="$name_decoder",
    allow_downcast=True,
    rules=(Rule(r"proj\\.(weight|bias)", r"proj.\\1"),),
)

"""
_DECODER_CONFIG = """\
#: ``decoder/config.json`` at full size, and the names of its checkpoint.
DECODER_CONFIG: Mapping[str, Any] = {"channels": 8}
DECODER_OUTLINE: Mapping[str, Any] = $outline"""


def loading_values(port: NewPort) -> dict[str, str]:
    """The standard loader, which the base class has, or the way around it."""
    bypass = port.path == "bypass"
    return {
        "load_method": textwrap.indent(_BYPASS, "    ") if bypass else "",
        "load_imports": "from collections.abc import Iterable, Iterator\nfrom pathlib import Path\n" if bypass else "",
        "kit_import": "from port_kit import remap\n" if bypass else "",
        "safetensors_import": "from safetensors import safe_open\n" if bypass else "",
        "engine_import": "from vllm_omni.diffusion.data import OmniDiffusionConfig\n" if bypass else "",
        "tensors_function": _TENSORS if bypass else "",
    }


_BYPASS = '''\
def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
    super().__init__(od_config=od_config, prefix=prefix)
    self.weights_sources = []
    self.filled = self.read_checkpoints(od_config.model)

def read_checkpoints(self, model: str) -> set[str]:
    """Fill all components without the standard loader; every tensor of the checkpoints is still accounted for.

    Returns:
        Names of what was filled, with the component's name in front.

    Raises:
        RemapError: a missing, unexpected, misshapen or repeated tensor.
    """
    filled: set[str] = set()
    for component in COMPONENTS:
        rules: Any = resolve(component.rules)
        folder = Path(model) / component.name
        module, prefix = getattr(self, component.name), f"{component.name}."
        filled |= remap.load_weights(module, _tensors(folder), rules, prefix=prefix, folder=folder)
    return filled

def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Say what was filled: the loader has no sources to stream, and checks the names."""
    return self.filled

'''


_TENSORS = """

def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
"""


def _recipe_values(port: NewPort) -> dict[str, str]:
    files: list[str] = []
    configs = {"transformer": "config.TRANSFORMER_CONFIG"}
    if port.path == "hybrid":
        files += ['FileRule("vae/config.json", folder="vae")', 'FileRule("vae/*.safetensors*", folder="vae")']
    else:
        files.append('FileRule("decoder.pth", folder="decoder", name="model.safetensors", convert=True)')
        configs["decoder"] = "config.DECODER_CONFIG"
    code = ""
    if port.path == "external":
        url = port.code or f"https://github.com/your-org/{port.name}"
        code = (
            "\n    code=(\n        GitCode(\n"
            f'            name="{port.name}_original",\n'
            f"            url={literal(url)},\n"
            f'            packages=("{port.name}_original",),\n'
            "        ),\n    ),"
        )
    checkpoint = rule_text(FileRule("model.safetensors", folder="transformer", name="model.safetensors"))
    return {
        "files": "\n".join([checkpoint, *(f"                {rule}," for rule in files)]),
        "recipe_imports": ("FileRule, GitCode, " if code else "FileRule, ") + "Recipe, Repository",
        "recipe_configs": "{" + ", ".join(f'"{name}": {value}' for name, value in configs.items()) + "}",
        "recipe_code": code,
    }
