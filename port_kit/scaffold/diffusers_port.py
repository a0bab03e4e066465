"""Write a port whose transformer is a class of diffusers: the facts of the class, put into the templates."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import port_kit
from port_kit.errors import ScaffoldError
from port_kit.inspect.adapted_classes import ATTENTION_TEMPLATES, FAMILIES, Family
from port_kit.scaffold.diffusers_class import ClassFacts, read_class
from port_kit.scaffold.render import literal, render
from port_kit.scaffold.request import NewPort
from port_kit.scaffold.source import FOLDERS, Source, read_source

_TESTS = ("conftest", "test_download", "test_coverage", "test_parity", "test_parallel", "test_cache", "test_generate")
#: Files of the port, and of its model library.
_PORT = ("config", "pipeline", "recipe", "weights")
_LIBRARY = ("parity", "transformer")


def diffusers_files(port: NewPort) -> dict[str, str]:
    """Return a port's files by their paths.

    Raises:
        ScaffoldError: the class, or what ``--from`` names, cannot be adapted.
    """
    source = read_source(port.source, "", endpoint=port.endpoint)
    name = _transformer_class(port, source)
    facts = read_class(name)
    if not source.repository:
        source = Source(**{**vars(source), "repository": facts.family.repository})
    values = {**_names(port, facts, source), **_class_values(facts), **_output_values(facts.family)}
    values |= {**_tiny_values(facts.family), **_source_values(facts, source)}
    templates = {f"{port.name}/{part}.py": f"diffusers/{part}.py" for part in _PORT}
    templates |= {f"{port.name}/model/{part}.py": f"diffusers/{part}.py" for part in _LIBRARY}
    kind = ATTENTION_TEMPLATES[facts.attentions[0].processor]
    templates[f"{port.name}/model/attention.py"] = f"diffusers/{kind}"
    templates |= common_templates(port.name)
    templates["record_goldens.py"] = "diffusers/record_goldens.py"
    return {path: render(template, values) for path, template in sorted(templates.items())}


def common_templates(name: str) -> dict[str, str]:
    """Return what every port has: ``{path: template}``."""
    templates = {f"tests/{part}.py": f"common/{part}.py" for part in _TESTS}
    return templates | {
        f"{name}/__init__.py": "common/__init__.py",
        f"{name}/model/__init__.py": "common/model_init.py",
        "pyproject.toml": "common/pyproject.toml",
        "README.md": "common/README.md",
        "CARD.md": "common/CARD.md",
        f"download_{name}.py": "common/download.py",
        f"generate_{name}.py": "common/generate.py",
    }


def _transformer_class(port: NewPort, source: Source) -> str:
    """Return the class: as it was named, or as the source names it; both must agree."""
    found = source.inspection.component("transformer") if source.inspection else None
    listed = found.class_name if found else ""
    if port.transformer and listed and port.transformer != listed:
        raise ScaffoldError(
            f"--transformer is {port.transformer}, and the transformer of {port.source} is {listed}",
            code="scaffold_unsupported",
            hint=f"leave --transformer out, or give {listed}",
        )
    if source.inspection and not listed:
        raise ScaffoldError(
            f"{port.source} has no transformer of diffusers (it is {source.inspection.path})",
            code="scaffold_unsupported",
            hint=f"take --path {'hybrid' if source.inspection.path == 'hybrid' else 'custom'}",
        )
    name = port.transformer or listed
    if not name:
        raise ScaffoldError(
            "which transformer? neither --transformer nor --from was given",
            code="scaffold_unsupported",
            hint=f"give one of {', '.join(FAMILIES)}, or a repository",
        )
    pipeline = source.inspection.class_name if source.inspection else ""
    if name in FAMILIES and pipeline and pipeline != FAMILIES[name].pipeline:
        raise ScaffoldError(
            f"{port.source} is run by {pipeline}; a port of {name} is written around {FAMILIES[name].pipeline}",
            code="scaffold_unsupported",
            hint="take --path hybrid and write the pipeline's steps yourself",
        )
    return name


def _names(port: NewPort, facts: ClassFacts, source: Source) -> dict[str, str]:
    import diffusers

    return {
        "name": port.name,
        "prefix": port.prefix,
        "title": port.name.replace("_", " "),
        "distribution": port.name.replace("_", "-"),
        "pipeline_class": port.pipeline_class,
        "path": f"diffusers ({facts.family.transformer}, {facts.family.pipeline})",
        "reference": f"diffusers {diffusers.__version__}, `{facts.family.pipeline}`",
        "reference_word": "pipeline of diffusers",
        "diffusers_version": diffusers.__version__,
        "kit_version": port_kit.__version__,
        "file_rows": "\n".join(
            (
                f"| `{port.name}/model/transformer.py` | the class of diffusers, and what is exchanged in it |",
                f"| `{port.name}/model/attention.py` | its attentions, with fused projections |",
            )
        ),
        "notes": _notes(source),
    }


def _notes(source: Source) -> str:
    if source.inspection is None:
        return (
            f"Sizes are the defaults of the class, and the files are looked for in `{source.repository}` by\n"
            "diffusers' own names. `port-kit new NAME --from REPOSITORY` reads both from a repository instead."
        )
    return "Sizes, files, revision and licence were read from the repository."


def _class_values(facts: ClassFacts) -> dict[str, str]:
    family = facts.family
    kinds = {a.path: "CrossAttention" if a.cross else "SelfAttention" for a in facts.attentions}
    attentions = "".join(f'    "{path}": {kind},\n' for path, kind in kinds.items())
    dims = (3, *(dim for each in facts.sharded.values() for dim in each))
    return {
        "diffusers_class": family.transformer,
        "diffusers_pipeline": family.pipeline,
        "block_class": facts.block_class,
        "block_module": facts.block_module,
        "processor_module": facts.attentions[0].module,
        "blocks": facts.blocks,
        "linears": literal(dict(facts.linears)),
        "attentions": "{\n" + attentions + "}",
        "shard_dims": literal(dims),
        "run_blocks": _run_blocks(facts),
        "rules": "\n".join(_rules(facts)),
        "batched": literal(facts.batched),
    }


def _run_blocks(facts: ClassFacts) -> str:
    """Write the loop over the blocks; tuples of tables that belong to the tokens are split with them."""
    names = list(facts.sharded)
    arguments = "".join(f", {name}: tuple[Tensor, ...]" for name in names)
    unpacked = "".join(f", *{name}" for name in names)
    passed = "".join(f"{name}=tuple({name}), " for name in names)
    together = f"x{''.join(f', *{name}' for name in names)}" if names else "(x,)"
    body = f'''
        def run_blocks(self, hidden_states: Tensor{arguments}, **given: Any) -> Tensor:
            """Run all blocks over this rank's share of the tokens ``[B, S, D]``; return all tokens."""
            length = hidden_states.shape[1]
            {together} = self.shard(*map(pad_tokens, (hidden_states,{unpacked[1:] if unpacked else ""})))
            self.tokens.kv_length = padded_length(length)
            for block in self.blocks:
                x = block(x, {passed}**given)
            (x,) = self.gather(x)
            return x[:, :length]
    '''
    return textwrap.indent(textwrap.dedent(body).strip("\n "), "    ") + "\n"


def _rules(facts: ClassFacts) -> Iterator[str]:
    """Write the rules: fused projections, what else a block has, and everything around the blocks."""
    fused = []
    for attention in facts.attentions:
        path, leaf = attention.path.replace(".", r"\."), r"(weight|bias)"
        if len(facts.block_leaves[f"{attention.path}.to_q"]) == 1:
            leaf = "(weight)"
        if attention.cross:
            for slot, part in enumerate(("to_k", "to_v")):
                yield _rule(
                    rf'rf"{{_BLOCK}}\.{path}\.{part}\.{leaf}"', rf"blocks.\1.{attention.path}.to_kv.\2", str(slot)
                )
            fused += [f"{attention.path}.to_k", f"{attention.path}.to_v"]
        else:
            target = rf"blocks.\1.{attention.path}.to_qkv.\3"
            yield _rule(rf'rf"{{_BLOCK}}\.{path}\.to_([qkv])\.{leaf}"', target, r"\2")
            fused += [f"{attention.path}.to_{part}" for part in "qkv"]
    kept = [owner for owner in facts.block_leaves if owner and owner not in fused]
    for group in _grouped(kept):
        yield _rule(rf'rf"{{_BLOCK}}\.({group})\.(weight|bias)"', r"blocks.\1.\2.\3")
    for leaf in facts.block_leaves.get("", ()):
        yield _rule(rf'rf"{{_BLOCK}}\.{leaf}"', rf"blocks.\1.{leaf}")
    modules = [name for name in facts.top if name not in facts.top_parameters]
    for group in _grouped(modules):
        yield _rule(f'r"({group})\\.(.+)"', r"\1.\2")
    for leaf in facts.top_parameters:
        yield _rule(f'r"{leaf}"', leaf)


def _grouped(names: list[str]) -> Iterator[str]:
    """Join names to alternatives of a pattern, as many as fit into a line."""
    line = ""
    for name in (name.replace(".", r"\.") for name in names):
        if line and len(line) + len(name) > 48:
            yield line
            line = ""
        line = f"{line}|{name}" if line else name
    if line:
        yield line


def _rule(source: str, target: str, shard: str = "") -> str:
    slot = f', shard=r"{shard}"' if "\\" in shard else f', shard="{shard}"' if shard else ""
    line = f'        Rule({source}, r"{target}"{slot}),'
    if len(line) <= 120:
        return line
    parts = [source, f'r"{target}"', *([slot[2:]] if slot else [])]
    return "        Rule(\n" + "".join(f"            {part},\n" for part in parts) + "        ),"


def _output_values(family: Family) -> dict[str, str]:
    video = family.output == "video"
    return {
        "output": family.output,
        "environment": "",
        "original_path": "",
        "output_word": "a_video" if video else "a_picture",
        "output_text": "a video" if video else "a picture",
        "output_shape": "(frames, H, W, 3)" if video else "(H, W, 3)",
        "result": "frames" if video else "images",
        "suffix": "mp4" if video else "png",
        "expected_size": f"{family.request['width']}x{family.request['height']}",
        "steps": str(family.steps),
        "least_steps": str(family.least_steps),
        "guidance": repr(family.guidance),
        "multiple": str(family.multiple),
        "frame_constants": f"#: Frames per second, the pipeline's default.\nFPS = {family.fps}\n" if video else "",
        "frame_options": f"    frames={family.frames},\n    frame_step={family.frame_step},\n" if video else "",
        "frame_argument": "            num_frames=request.frames,\n" if video else "",
        "parallel_fields": _PARALLEL.replace("$least_steps", str(family.least_steps)),
        "callback": family.callback,
        "warm_up": _WARM_UP if video else "",
    }


_WARM_UP = """    dummy_run_num_frames: ClassVar[int] = 1 + config.OPTIONS.frame_step
    fps: ClassVar[int] = config.FPS
"""
_PARALLEL = """\
    # Guidance multiplies what rounding leaves of two branches, and every further step starts from there.
    parallel={"num_inference_steps": $least_steps, "guidance_scale": 1.5},
    output_tolerance=1.0,  # of whole pixel values, after a decoder of random weights
"""


def _tiny_values(family: Family) -> dict[str, str]:
    of_diffusers = sorted({family.pipeline, family.parts["scheduler"].class_name})
    encoder = family.parts["text_encoder"]
    entries = {name: [part.module, part.class_name] for name, part in family.parts.items()}
    entries |= {"tokenizer": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", family.transformer]}
    request = {key: value for key, value in family.request.items() if key != "guidance_scale"}
    return {
        "diffusers_imports": ", ".join(of_diffusers),
        "vae_class": family.parts["vae"].class_name,
        "scheduler_class": family.parts["scheduler"].class_name,
        "text_encoder_class": encoder.class_name,
        "tiny_transformer": literal(dict(family.tiny)),
        "tiny_vae": literal(dict(family.parts["vae"].config)),
        "tiny_text_encoder": literal(dict(encoder.config)),
        "tiny_scheduler": literal(dict(family.parts["scheduler"].config)),
        "vocabulary": str(family.vocabulary),
        "tiny_request": literal({**request, "guidance_scale": family.guidance}, 4),
        "index_entries": "\n".join(f'    "{name}": {literal(value)},' for name, value in sorted(entries.items())),
    }


def _source_values(facts: ClassFacts, source: Source) -> dict[str, str]:
    config: Mapping[str, Any] = facts.config
    origin = f"the defaults of {facts.family.transformer}"
    if source.transformer:
        config = {key: value for key, value in source.transformer.items() if not key.startswith("_")}
        origin = f"as {source.repository} has it"
    folders = ("transformer", *(name for name in facts.family.parts if name in FOLDERS), "tokenizer")
    rules = [
        f'                FileRule({literal(pattern)}, folder="{folder}"),'
        for folder in folders
        for pattern in source.patterns(folder)
    ]
    found = source.inspection.component("transformer") if source.inspection else None
    licence = source.licence or "see the repository's card"
    return {
        "repository": source.repository,
        "revision": f'"{source.revision}"' if source.revision else "None",
        "licence": literal(licence),
        "licence_text": licence,
        "weights_from": f"`{source.repository}`" + (f" at `{source.revision}`" if source.revision else ""),
        "config": literal(config),
        "height": str(_side(facts.family, config, facts.family.height)),
        "width": str(_side(facts.family, config, facts.family.width)),
        "config_origin": origin,
        "files": "\n".join(rules),
        "transformer_size": f"{found.parameters / 1e9:.2f} B parameters" if found else "not measured",
    }


def _side(family: Family, config: Mapping[str, Any], default: int) -> int:
    """Return a side of the pipeline's default size in pixels; of images it follows from the transformer's."""
    return int(config["sample_size"]) * family.multiple if family.output == "image" else default
