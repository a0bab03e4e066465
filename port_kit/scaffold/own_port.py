"""Write a port whose transformer is the model's own code: a small working skeleton, in four variants."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

import port_kit
from port_kit.inspect.adapted_classes import FAMILIES
from port_kit.remap.suggest import suggest
from port_kit.scaffold.checkpoint import main_component, read_checkpoint, require_readable
from port_kit.scaffold.diffusers_port import common_templates
from port_kit.scaffold.render import literal, render
from port_kit.scaffold.request import NewPort
from port_kit.scaffold.skeleton import skeleton_target
from port_kit.scaffold.source import Source, read_source

#: diffusers' release whose names a model directory of these paths says it was made by; nothing of it is used.
DIFFUSERS_VERSION = "0.40.0"
_VAE = FAMILIES["LTXVideoTransformer3DModel"].parts["vae"]
_PARTS = ("config", "parity", "pipeline", "recipe", "rules", "tiny", "transformer", "weights")
_REFERENCES = {
    "custom": "the original code, ported",
    "external": "the original code, ported; its decoder from the model's own repository",
    "bypass": "the original code, ported; the pipeline reads its weights itself",
    "hybrid": f"the original code, ported; {_VAE.class_name} of diffusers",
}


def own_files(port: NewPort) -> dict[str, str]:
    """Return a port's files by their paths.

    Raises:
        InspectError: what ``--from`` names is no model.
        DownloadError: it cannot be reached.
        ScaffoldError: its transformer is in files that nothing here reads.
    """
    source = read_source(port.source, f"your-org/{port.name}", endpoint=port.endpoint)
    require_readable(port, source)
    values = {**_names(port, source), **_decoder_values(port), **_loading_values(port), **_recipe_values(port, source)}
    values |= {**_tiny_values(port)}
    templates = {f"{port.name}/{part}.py": f"own/{part}.py" for part in _PARTS}
    variant = {"external": "_external", "hybrid": "_hybrid"}.get(port.path, "")
    templates[f"{port.name}/decoder.py"] = f"own/decoder{variant}.py"
    templates["record_goldens.py"] = "own/record_goldens.py"
    templates[f"{port.name}/parallel_subject.py"] = "own/parallel_subject.py"
    templates |= {path: name for path, name in common_templates(port.name, "video").items()}
    templates[f"original/{port.name}_original/__init__.py"] = "own/original_init.py"
    templates[f"original/{port.name}_original/model.py"] = "own/original_model.py"
    if port.path == "external":
        templates["tests/test_external.py"] = "own/test_external.py"
    files = {path: render(template, values) for path, template in sorted(templates.items())}
    return {**files, **_from_checkpoint(port, source)}


def _names(port: NewPort, source: Source) -> dict[str, str]:
    licence = source.licence or "see the repository's card"
    found = main_component(source)
    return {
        "name": port.name,
        "prefix": port.prefix,
        "title": port.name.replace("_", " "),
        "distribution": port.name.replace("_", "-"),
        "pipeline_class": port.pipeline_class,
        "path": port.path,
        "reference": _REFERENCES[port.path],
        "diffusers_version": DIFFUSERS_VERSION,
        "kit_version": port_kit.__version__,
        "output": "video",
        # the engine's processes need the code that stays outside of the port
        "environment": ', "PYTHONPATH": str(ROOT / "original")' if port.path == "external" else "",
        "output_word": "a_video",
        "output_text": "a video",
        "suffix": "mp4",
        "expected_size": "160x96" if port.path == "hybrid" else "36x20",
        "licence_text": licence,
        "licences": literal({"weights": licence}, 4),
        "weights_from": f"`{source.repository}`" + (f" at `{source.revision}`" if source.revision else ""),
        "transformer_size": f"{found.parameters / 1e9:.2f} B parameters" if found else "not measured",
        "file_rows": _file_rows(port),
        "notes": _notes(port, source),
    }


def _file_rows(port: NewPort) -> str:
    rows = {
        f"{port.name}/transformer.py": "the transformer, ported: parallel linears, sharded tokens",
        f"{port.name}/decoder.py": "latents to pixels",
        f"{port.name}/rules.py`, `weights.py": "which tensor of the checkpoint goes where",
        f"{port.name}/pipeline.py": "the steps from a prompt to pixels",
        f"original/{port.name}_original/": "a stand-in for the original code",
    }
    return "\n".join(f"| `{path}` | {text} |" for path, text in rows.items())


def _notes(port: NewPort, source: Source) -> str:
    """Say what is still a stand-in: all of it runs, none of it is the model."""
    lines = [
        "## What is still a stand-in",
        "",
        f"* `original/{port.name}_original`: put the model's own code here; the tests compare the port with it.",
        "* `transformer.py`: port the model's transformer into it, module by module; the tests say where it parts.",
        "* `rules.py`, `config.py`: the checkpoint's names and sizes.",
    ]
    found = main_component(source)
    if not source.inspection:
        lines.append(f"* `recipe.py`: the repository `{source.repository}` and its files.")
    else:
        lines.append(f"* `recipe.py`: the files of `{source.repository}` beside the transformer's.")
    if found and found.manifest:
        lines.append(
            f"* `{port.name}/checkpoint.json` lists the tensors of the real transformer, `suggested_rules.toml` what\n"
            "  `port-kit rules suggest` proposes for them and the skeleton; run it again once the transformer is yours."
        )
    if port.path == "external":
        lines.append("* `recipe.py`: the address and the commit of the git code.")
    return "\n".join(lines)


def _decoder_values(port: NewPort) -> dict[str, str]:
    hybrid = port.path == "hybrid"
    component = (
        ""
        if hybrid
        else (
            "    Component(\n"
            '        name="decoder",\n'
            f'        build="{port.name}.decoder:build_decoder",\n'
            f'        rules="{port.name}.rules:DECODER",\n'
            f'        config="{port.name}.config:DECODER_CONFIG",\n'
            "    ),\n"
        )
    )
    rules = (
        ""
        if hybrid
        else (
            "DECODER = RuleSet(\n"
            f'    name="{port.name}_decoder",\n'
            "    allow_downcast=True,\n"
            '    rules=(Rule(r"proj\\.(weight|bias)", r"proj.\\1"),),\n'
            ")"
        )
    )
    return {
        "vae_class": _VAE.class_name,
        "decoder_name": "vae" if hybrid else "decoder",
        "decoder_component": component,
        "decoder_rules": f"\n{rules}\n" if rules else "",
        "decoder_config": ""
        if hybrid
        else '#: ``decoder/config.json`` at full size.\nDECODER_CONFIG: Mapping[str, Any] = {"channels": 8}',
        "decoder_import": f"from {port.name}.decoder import " + ("decode, load_vae\n" if hybrid else "SCALE\n"),
        "decode_call": "decode(self.vae, latents)" if hybrid else "self.decoder(latents.to(self.dtype))",
        "scales": ("self.vae.spatial_compression_ratio, self.vae.temporal_compression_ratio" if hybrid else "SCALE, 1"),
        "dummy_frames": "9" if hybrid else "2",
        "default_frames": "17",
    }


def _loading_values(port: NewPort) -> dict[str, str]:
    """The standard loader, or the way around it."""
    bypass = port.path == "bypass"
    sources = "        self.weights_sources = weights_sources(od_config.model, COMPONENTS)\n"
    if port.path == "hybrid":
        sources = '        self.vae = load_vae(f"{od_config.model}/vae", self.dtype).to(self.device)\n' + sources
    if bypass:
        sources = "        self.filled = self.read_checkpoints(od_config.model)\n"
    method = _BYPASS if bypass else _STANDARD
    imports = ["build_components", "load_component_weights", "read_json", "weights_sources"]
    return {
        "built": "filled, from its checkpoints" if bypass else "empty, to be filled by the standard loader",
        "load_init": sources,
        "load_method": textwrap.indent(method, "    "),
        "loading_imports": "build_components, read_json" if bypass else ", ".join(imports),
        "load_imports": "from pathlib import Path\n" if bypass else "",
        "remap_import": "from safetensors import safe_open\n" if bypass else "",
        "resolve_import": "from port_kit.port import resolve\n" if bypass else "",
        "kit_import": "from port_kit import remap\n" if bypass else "",
        "tensors_function": _TENSORS if bypass else "",
        "iterators": "Callable, Iterable, Iterator" if bypass else "Callable, Iterable",
    }


_STANDARD = '''\
def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Fill all components; every tensor of the checkpoints is accounted for."""
    return load_component_weights(self, COMPONENTS, weights, self.od_config.model)
'''
_BYPASS = '''\
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


def _recipe_values(port: NewPort, source: Source) -> dict[str, str]:
    files: list[str] = []
    configs = {"transformer": "config.TRANSFORMER_CONFIG"}
    if port.path == "hybrid":
        files += ['FileRule("vae/config.json", folder="vae")', 'FileRule("vae/*.safetensors*", folder="vae")']
    else:
        files.append('FileRule("decoder.pth", folder="decoder", name="model.safetensors", convert=True)')
        configs["decoder"] = "config.DECODER_CONFIG"
    code = ""
    if port.path == "external":
        url = next(iter(source.inspection.card.code), "") if source.inspection else ""
        url = url or f"https://github.com/your-org/{port.name}"
        code = (
            "\n    code=(\n        GitCode(\n"
            f'            name="{port.name}_original",\n'
            f"            url={literal(url)},\n"
            f'            packages=("{port.name}_original",),\n'
            "        ),\n    ),"
        )
    checkpoint = read_checkpoint(source)
    return {
        "repository": source.repository,
        "revision": f'"{source.revision}"' if source.revision else "None",
        "licence": literal(source.licence or "see the repository's card"),
        "files": "\n".join([checkpoint.rule, *(f"                {rule}," for rule in files)]),
        "recipe_imports": ("FileRule, GitCode, " if code else "FileRule, ") + "Recipe, Repository",
        "recipe_configs": "{" + ", ".join(f'"{name}": {value}' for name, value in configs.items()) + "}",
        "recipe_code": code,
        "transformer_file": literal(checkpoint.file),
        "transformer_wrapper": f", wrapper={literal(checkpoint.wrapper)}" if checkpoint.wrapper else "",
    }


def _tiny_values(port: NewPort) -> dict[str, str]:
    hybrid = port.path == "hybrid"
    write = (
        'vae().save_pretrained(folder / "vae")'
        if hybrid
        else 'write_checkpoint(folder / "decoder.pth", decoder(seed).state_dict())'
    )
    imports = [
        *([f"from diffusers import {_VAE.class_name}"] if hybrid else []),
        "from port_kit.download import download",
        "from port_kit.testing.hub import Hub",
        "from port_kit.testing.tiny import fill, write_checkpoint",
    ]
    config = literal(dict(_VAE.config)) if hybrid else '{"channels": 8}'
    return {
        "tiny_imports": "\n".join(imports) + "\n",
        "tiny_decoder": f"{'VAE' if hybrid else 'DECODER'}: Mapping[str, Any] = {config}",
        "tiny_decoder_function": _TINY_VAE if hybrid else _TINY_DECODER,
        "tiny_write": f"    {write}",
        "tiny_configs": '{"transformer": TRANSFORMER}'
        if hybrid
        else '{"transformer": TRANSFORMER, "decoder": DECODER}',
        "tiny_height": "96" if hybrid else "20",
        "tiny_width": "160" if hybrid else "36",
        "tiny_frames": "17" if hybrid else "3",
        "decoder_maker": "vae" if hybrid else "decoder",
        "parity_imports": "REQUEST, denoiser, original, tiny_model, vae"
        if hybrid
        else "REQUEST, decoder, denoiser, original, tiny_model",
        "reference_decode": "vae().decode(latents, return_dict=False)[0].clamp(-1, 1)"
        if hybrid
        else "decoder()(latents)",
    }


_TINY_DECODER = '''\
def decoder(seed: int = 0) -> torch.nn.Module:
    """Return the original's decoder with seeded values."""
    return set_values(original().Decoder(**DECODER), seed)

'''
_TINY_VAE = f'''\
def vae(seed: int = 0) -> {_VAE.class_name}:
    """Return the tiny VAE with seeded values."""
    module = {_VAE.class_name}(**VAE)
    set_values(module, seed)
    return module

'''


def _from_checkpoint(port: NewPort, source: Source) -> dict[str, str]:
    """Keep the real transformer's tensors, and what can be proposed for them, beside the skeleton."""
    found = main_component(source)
    manifest: Any = found.manifest if found else {}
    if not manifest:
        return {}
    suggestion = suggest(manifest, skeleton_target(manifest))
    listed: Mapping[str, Any] = manifest.to_json()
    return {
        f"{port.name}/checkpoint.json": json.dumps(listed, indent=1) + "\n",
        "suggested_rules.toml": suggestion.to_toml(),
    }
