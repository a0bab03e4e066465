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
_OWN = (
    *("attention", "config", "parallel_subject", "parity", "pipeline", "recipe", "rules", "tiny", "transformer"),
    "weights",
)


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
    templates = {f"{port.name}/{part}.py": f"diffusers/{part}.py" for part in _OWN}
    kind = ATTENTION_TEMPLATES[facts.attentions[0].processor]
    templates[f"{port.name}/attention.py"] = f"diffusers/{kind}"
    templates |= common_templates(port.name, facts.family.output)
    templates["record_goldens.py"] = "diffusers/record_goldens.py"
    return {path: render(template, values) for path, template in sorted(templates.items())}


def common_templates(name: str, output: str) -> dict[str, str]:
    """Return what every port has: ``{path: template}``."""
    templates = {f"tests/{part}.py": f"common/{part}.py" for part in _TESTS}
    return templates | {
        f"{name}/__init__.py": "common/__init__.py",
        "pyproject.toml": "common/pyproject.toml",
        "README.md": "common/README.md",
        "CARD.md": "common/CARD.md",
        f"download_{name}.py": "common/download.py",
        f"generate_{name}.py": f"common/generate_{output}.py",
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
        "diffusers_version": diffusers.__version__,
        "kit_version": port_kit.__version__,
        "file_rows": "\n".join(
            (
                f"| `{port.name}/transformer.py` | the class of diffusers, and what is exchanged in it |",
                f"| `{port.name}/attention.py` | its attentions, with fused projections |",
                f"| `{port.name}/rules.py`, `weights.py` | which tensor of the checkpoint goes where |",
                f"| `{port.name}/pipeline.py` | diffusers' pipeline around the transformer |",
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
    frames = ""
    if video:
        frames = (
            f"DEFAULT_FRAMES = {family.frames}\n#: Frames a second, of the pipeline's default.\nFPS = {family.fps}\n"
            f"#: A video has one frame and a multiple of this.\nFRAME_STEP = {family.frame_step}\n"
        )
    return {
        "output": family.output,
        "environment": "",
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
        "frame_constants": frames,
        "callback": family.callback,
        "image_import": "" if video else "from PIL import Image\n",
        "warm_up": ("    dummy_run_num_frames: ClassVar[int] = 1 + config.FRAME_STEP\n" if video else ""),
        "read_frames": _READ_FRAMES if video else "",
        "post_process": textwrap.indent(_POST_VIDEO if video else _POST_IMAGE, "        ").rstrip("\n"),
    }


_READ_FRAMES = """        # vLLM-Omni says 1 where a request says nothing.
        frames = check_integer("num_frames", sampling.num_frames, minimum=1)
        arguments["num_frames"] = frames if frames > 1 else config.DEFAULT_FRAMES
        if (arguments["num_frames"] - 1) % config.FRAME_STEP:
            wanted = f"1 and a multiple of {config.FRAME_STEP} are required"
            raise InputError(f"num_frames is {frames}; {wanted}", code="input_size", hint="use 9, 17, 25 and so on")
"""
_POST_VIDEO = """frames = output["video"]
frames = frames.cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
return {"payload": {"video": frames}, "metadata": {"video": {"fps": config.FPS}}}
"""
_POST_IMAGE = """pixels = output["image"]
pixels = pixels.cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
return {"payload": {"image": [Image.fromarray(pixels)]}, "metadata": {}}
"""


def _tiny_values(family: Family) -> dict[str, str]:
    of_diffusers = sorted({family.pipeline, family.parts["vae"].class_name, family.parts["scheduler"].class_name})
    tiny = sorted({family.transformer, family.parts["vae"].class_name, family.parts["scheduler"].class_name})
    encoder = family.parts["text_encoder"]
    entries = {name: [part.module, part.class_name] for name, part in family.parts.items()}
    entries |= {"tokenizer": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", family.transformer]}
    request = {key: value for key, value in family.request.items() if key != "guidance_scale"}
    return {
        "diffusers_imports": ", ".join(of_diffusers),
        "diffusers_tiny_imports": ", ".join(tiny),
        "vae_class": family.parts["vae"].class_name,
        "scheduler_class": family.parts["scheduler"].class_name,
        "text_encoder_class": encoder.class_name,
        "text_config_class": encoder.class_name.replace("EncoderModel", "Config"),
        "tiny_transformer": literal(dict(family.tiny)),
        "tiny_vae": literal(dict(family.parts["vae"].config)),
        "tiny_text_encoder": literal(dict(encoder.config)),
        "tiny_scheduler": literal(dict(family.parts["scheduler"].config)),
        "vocabulary": str(family.vocabulary),
        "request": literal({**request, "guidance_scale": family.guidance}),
        "index_entries": "\n".join(f'        "{name}": {literal(value)},' for name, value in sorted(entries.items())),
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
        "licences": literal({"weights": licence}, 4),
        "weights_from": f"`{source.repository}`" + (f" at `{source.revision}`" if source.revision else ""),
        "config": literal(config),
        "config_origin": origin,
        "files": "\n".join(rules),
        "transformer_size": f"{found.parameters / 1e9:.2f} B parameters" if found else "not measured",
    }
