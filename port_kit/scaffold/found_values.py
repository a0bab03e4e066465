"""Fields of the templates of an inspected model: recipe, components, configurations and tiny parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from port_kit.inspect.known_classes import library_version
from port_kit.inspect.roles import BOUNDARY, boundary_of
from port_kit.port import lookup
from port_kit.registry import list_ports
from port_kit.scaffold.file_rules import rule_text
from port_kit.scaffold.found_sizes import channels_key, config_of, open_keys, tiny_sizes
from port_kit.scaffold.git_code import FoundCode, own_prefix
from port_kit.scaffold.parts import Part
from port_kit.scaffold.render import WIDTH, literal
from port_kit.scaffold.request import NewPort

_SAME_NAMES = "port_kit.autoparallel.host.adapt:SAME_NAMES"
#: Entries of a tiny tokenizer.
_WORDS = 512


@dataclass(frozen=True)
class Found:
    """A found model.

    Attributes:
        port: the request.
        parts: folders of the model directory.
        code: the model's own code, or None.
    """

    port: NewPort
    parts: list[Part]
    code: FoundCode | None

    def class_of(self, part: Part) -> str:
        """Return ``"module:Class"`` of the git code, or an empty string."""
        return self.code.classes.get(part.name, "") if self.code else ""

    def is_original(self, part: Part) -> bool:
        """Return True if the port takes the module of the git code."""
        return bool(self.class_of(part)) and self.port.path == "external"

    @property
    def is_compared(self) -> bool:
        """True if there is git code that ported modules can be compared with."""
        return self.code is not None and self.port.path != "external"

    def module_template(self, part: Part) -> str:
        """Return the template of a part's module; empty for a transformer that is ported."""
        if part.kind == "transformer":
            if self.port.path != "external":
                return ""
            return "found/transformer.py"
        return "found/module.py"

    @property
    def boundary(self) -> float | None:
        """Share of the noise below which the second transformer runs; None if there is one transformer."""
        several = sum(part.kind == "transformer" for part in self.parts) > 1
        return boundary_of(self.parts[0].source.index) if several else None

    def module_text(self, part: Part) -> str:
        """Say where the module comes from, and who calls it if not the pipeline."""
        return self._origin_text(part) + (", called by the transformer" if part.kind == "partner" else "")

    def _origin_text(self, part: Part) -> str:
        if part.pretrained:
            return f"`{part.pretrained}`"
        if part.twin:
            return "that of `transformer`, with weights of its own"
        if part.recognized is not None:
            return part.recognized.text
        if part.component is None:
            return "no weights"
        origin = f", `{self.class_of(part)}` of the git code" if self.is_original(part) else ""
        return f"`{self.port.name}/model/{part.name}.py`{origin}"

    @property
    def listed(self) -> list[Part]:
        """The parts whose tensors lie beside the port."""
        return [part for part in self.parts if part.is_own or _is_resized(part)]

    @property
    def ruled(self) -> list[Part]:
        """The parts that need rules."""
        return [part for part in self.parts if part.is_own and not self.is_original(part)]


def _is_resized(part: Part) -> bool:
    return part.recognized is not None and part.recognized.misfits > 0


def found_values(found: Found) -> dict[str, str]:
    """Return the fields that depend on the parts."""
    return {**_recipe_values(found), **_weights_values(found), **_config_values(found), **_pipeline_values(found)}


# -- recipe ----------------------------------------------------------------------------------------------------------


def _recipe_values(found: Found) -> dict[str, str]:
    known = [part for part in found.parts if part.recognized and not _is_resized(part)]
    configs = {part.name: f"config.{part.name.upper()}_CONFIG" for part in found.listed}
    configs |= {part.name: "config.TRANSFORMER_CONFIG" for part in found.parts if part.twin}
    configs |= {part.name: _constant(part) for part in known}
    configs |= {
        part.name: f"config.{part.name.upper()}_CONFIG" for part in found.parts if part.pretrained and part.config
    }
    entries = "".join(f'        "{name}": {value},\n' for name, value in configs.items())
    index: dict[str, Any] = {
        "_class_name": found.port.pipeline_class,
        "_diffusers_version": library_version("diffusers").partition(" ")[2],
    }
    index |= {part.name: part.pretrained.split(":") for part in found.parts if part.pretrained}
    if found.boundary is not None:
        index[BOUNDARY] = found.boundary
    return {
        "repositories": "\n".join(_repositories(found.parts)),
        "recipe_imports": ("FileRule, GitCode, " if found.code else "FileRule, ") + "Recipe, Repository",
        "recipe_configs": f"{{\n{entries}    }}",
        "recipe_code": _code_text(found.code),
        "parity_import": "from port_kit.parity import OriginalImplementation\n" if found.is_compared else "",
        "original": _original_text(found) if found.is_compared else "",
        "config_imports": _imports(known),
        "model_index": literal(index, 4),
    }


def _constant(part: Part) -> str:
    """Return the name by which a recipe imports the configuration of a known component."""
    return f"{part.name.upper()}_CONFIG"


def _imports(parts: list[Part]) -> str:
    """Return the imports of the configurations of known components, in the order of ruff."""
    by_module: dict[str, list[str]] = {}
    for part in parts:
        module, _, attribute = part.recognized.config.partition(":") if part.recognized else ("", "", "")
        alias = "" if attribute == _constant(part) else f" as {_constant(part)}"
        by_module.setdefault(module, []).append(f"{attribute}{alias}")
    return "".join(f"from {module} import {', '.join(sorted(names))}\n" for module, names in sorted(by_module.items()))


def _repositories(parts: list[Part]) -> Iterator[str]:
    for source in dict.fromkeys(part.source.repository for part in parts):
        own = [part for part in parts if part.source.repository == source]
        first = own[0].source
        yield "        Repository("
        yield f"            {literal(source)},"
        yield f"            revision={literal(first.revision)},"
        if first.licence:
            yield f"            licence={literal(first.licence)},"
        yield _tuple("            files=", [rule_text(rule) for part in own for rule in part.rules], ",")
        yield "        ),"


def _tuple(head: str, items: list[str], end: str = "") -> str:
    """Return a tuple as ruff formats it: one item stays on its line where that is not too long."""
    line = f"{head}({items[0].strip()}){end}"
    if len(items) == 1 and "\n" not in items[0] and len(line) <= WIDTH:
        return line
    indent = " " * (len(head) - len(head.lstrip()))
    return f"{head}(\n" + "\n".join(items) + f"\n{indent}){end}"


def _code_text(code: FoundCode | None) -> str:
    if code is None:
        return ""
    fields = {"name": code.code.name, "url": code.code.url, "packages": code.code.packages, "commit": code.code.commit}
    fields |= {"path": code.code.path} if code.code.path else {}
    lines = "".join(f"            {key}={literal(value)},\n" for key, value in fields.items())
    return f"\n    code=(\n        GitCode(\n{lines}        ),\n    ),"


# -- weights ---------------------------------------------------------------------------------------------------------


def _original_text(found: Found) -> str:
    """Return the declaration of the run of the original code, without inputs and modules, which nothing tells."""
    cases = []
    for part in (part for part in found.parts if part.is_own):
        case = {"build": found.class_of(part), "inputs": {}, **({"modules": {}} if part.kind == "transformer" else {})}
        cases.append(f"            {literal(part.name)}: {literal(case, 12)},\n")
    return _ORIGINAL.format(code=literal(f"{found.port.name}_original"), cases="".join(cases))


_ORIGINAL = """
#: Run of the original code that ``port-kit verify parity`` compares with; see ``port_kit.parity.run_modules``.
ORIGINAL = OriginalImplementation(
    git_code={code},
    options={{
        "components": {{
{cases}        }},
    }},
)
"""


def _weights_values(found: Found) -> dict[str, str]:
    weighted = [part for part in found.parts if part.component is not None]
    pretrained = [part for part in weighted if part.pretrained]
    prefixed = [part for part in weighted if part.recognized and part.recognized.prefix]
    renamed = [part for part in weighted if found.is_original(part) and own_prefix(part)]
    rules = [_rules_of_file(part) for part in found.ruled] + [_prefixed_rules(part) for part in prefixed]
    rules += [_renaming_rules(part) for part in renamed]
    imports = [f"from port_kit.port import Component{', Pretrained' if pretrained else ''}"]
    if found.ruled or renamed:
        imports += [f"from port_kit.remap import {'Rule, RuleSet' if renamed else 'RuleSet'}"]
    imports += ["from port_kit.remap.rules import import_rules"] if prefixed else []
    imports += ["", f"from {found.port.name} import config"] if found.ruled else []
    return {
        "weights_imports_text": "\n".join(imports) + "\n",
        "rule_sets": (_READ_RULES if found.ruled else "") + "".join(rules),
        "components": _tuple(
            "COMPONENTS: tuple[Component, ...] = ",
            [_component_text(found, part) for part in weighted if not part.pretrained],
        ),
        "pretrained": _pretrained_text(pretrained),
        "own_parts": literal(tuple(part.name for part in found.listed)),
    }


_READ_RULES = """\
#: Written by ``port-kit rules suggest``; a float32 checkpoint may be run in bfloat16.
"""


def _rules_of_file(part: Part) -> str:
    return f'{part.name.upper()} = RuleSet.from_file(config.HERE / "{part.name}.toml", allow_downcast=True)\n'


def _prefixed_rules(part: Part) -> str:
    known = part.recognized
    assert known is not None
    return f'{part.name.upper()} = import_rules("{known.rules}").under({literal(known.prefix)})\n'


def _renaming_rules(part: Part) -> str:
    """Return the rules of an unmodified module whose names in the checkpoint have a prefix."""
    rule = f'Rule(r{literal(f"{re.escape(own_prefix(part))}(.+)")}, r"\\1")'.replace("\\\\", "\\")
    return f'{part.name.upper()} = RuleSet("{part.name}", ({rule},), allow_downcast=True)\n'


def _component_text(found: Found, part: Part) -> str:
    name = found.port.name
    fields: dict[str, str] = {"package": name} if part.is_own or _is_resized(part) else {}
    if part.twin:
        fields = {"build": f"{name}.model.transformer:build_transformer", "rules": f"{name}.weights:TRANSFORMER"}
        fields |= {"config": f"{name}.config:TRANSFORMER_CONFIG"}
    known = part.recognized
    if known is not None:
        rules = f"{name}.weights:{part.name.upper()}" if known.prefix else known.rules
        fields |= {"build": known.build, "rules": rules}
        fields |= {} if _is_resized(part) else {"config": known.config}
    elif found.is_original(found.parts[0] if part.twin else part) and not own_prefix(part):
        fields |= {"rules": _SAME_NAMES}
    fields |= {"kind": part.kind} if part.kind != "transformer" else {}
    given = [literal(part.name), *(f"{key}={literal(value)}" for key, value in fields.items())]
    line = f"    Component({', '.join(given)}),"
    return (
        line if len(line) <= WIDTH else "    Component(\n" + "".join(f"        {item},\n" for item in given) + "    ),"
    )


def _pretrained_text(parts: list[Part]) -> str:
    if not parts:
        return ""
    entries = [f'    Pretrained("{part.name}", "{part.pretrained}", kind="{part.kind}"),' for part in parts]
    return "#: Read by their own libraries.\n" + _tuple("PRETRAINED: tuple[Pretrained, ...] = ", entries) + "\n"


# -- configurations and tiny parts -----------------------------------------------------------------------------------


def _config_values(found: Found) -> dict[str, str]:
    texts, imports = [], {"TinyPart"}
    for part in found.listed:
        texts.append(_config_text(part))
    for part in (part for part in found.parts if part.pretrained and part.config):
        texts.append(f"{_constant(part)}: Mapping[str, Any] = {literal(part.config)}")
    entries = []
    for part in found.parts:
        helpers, text = _tiny_text(part)
        imports |= helpers
        entries.append(f'    "{part.name}": {text},')
    is_known = bool(channels_key(found.parts[0]))
    return {
        "configs": "\n".join(texts),
        "channels_function": "" if is_known else _CHANNELS.format(name=found.port.name),
        "error_import": "" if is_known else "from port_kit.errors import PortKitError\n",
        "tiny_imports": ", ".join(sorted(imports, key=lambda name: (name[0].islower(), name))),
        "tiny_parts": "\n".join(entries),
    }


_CHANNELS = '''

def latent_channels() -> int:
    """Return the channels of the latents."""
    raise PortKitError(
        "the channels of the latents of {name} are not known",
        code="port_unfinished",
        hint="return them from latent_channels in {name}/config.py",
    )
'''


def channels_expression(main: Part) -> str:
    """Return the expression of the pipeline for the channels of the latents."""
    key = channels_key(main)
    return f"config.TRANSFORMER_CONFIG[{literal(key)}]" if key else "config.latent_channels()"


def _config_text(part: Part) -> str:
    known = part.recognized
    values = lookup(known.config) if known is not None and not part.config else config_of(part)
    said = "copied from its repository" if part.config else "derived from the shapes of its tensors"
    if part.parameters and not part.config:
        said = "the defaults of its class, with the layers and the width of its tensors"
    if known is not None and not part.config:
        said = f"that of {known.origin}, but {known.misfits} tensors have other shapes: correct it"
    line = f"#: ``{part.name}/config.json``: {said}."
    if known is None and open_keys(part):
        line += f"\n#: Still to be filled in: {', '.join(open_keys(part))}."
    return f"{line}\n{_constant(part)}: Mapping[str, Any] = {literal(values)}"


def _tiny_text(part: Part) -> tuple[set[str], str]:
    """Return the helpers of a tiny part, and the part as Python."""
    if part.component is None:
        return {"TinyTokenizer"}, f"TinyTokenizer({_WORDS})"
    if part.pretrained:
        return {"TinyPretrained"}, f"TinyPretrained({literal(part.pretrained)}, {literal(_tiny_config(part), 4)})"
    known = part.recognized
    shared = _shared_parts(part) if known is not None and not known.misfits else ""
    if known is not None and shared:
        prefix = f", {literal(known.prefix)}" if known.prefix else ""
        return {"tiny_part"}, f"tiny_part({literal(shared)}, {literal(known.name)}{prefix})"
    tiny = tiny_sizes(part) if known is None else {}
    sizes = {"sizes": {}, **{key: value for key, value in tiny.items() if value}}
    listed = "transformer" if part.twin else part.name
    given = [f'read_outline(HERE / "{listed}.json")', *(f"{key}={_inline(value)}" for key, value in sizes.items())]
    line = f"TinyComponent({', '.join(given)})"
    if len(f'    "{part.name}": {line},') > WIDTH:
        line = "TinyComponent(\n" + "".join(f"        {item},\n" for item in given) + "    )"
    return {"TinyComponent", "read_outline"}, line


def _inline(values: Mapping[Any, Any]) -> str:
    return "{" + ", ".join(f"{literal(key)}: {literal(value)}" for key, value in values.items()) + "}"


def _tiny_config(part: Part) -> Mapping[str, Any]:
    """Return the tiny sizes of CLIP; other classes of libraries have their own defaults."""
    if part.component is None or part.component.recognized is None:
        return {}
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    return {
        key: tiny.get(key, value) for key, value in part.config.items() if key not in ("architectures", "model_type")
    }


def _shared_parts(part: Part) -> str:
    """Return the reference of the mapping of tiny parts that a known component's port shares; empty if it has none."""
    known = part.recognized
    assert known is not None
    declared = list_ports()[known.port].tiny_model
    for reference in (declared, f"{declared.partition(':')[0]}:SHARED"):
        parts = lookup(reference)
        if isinstance(parts, Mapping) and known.name in parts:
            return reference
    return ""


# -- pipeline --------------------------------------------------------------------------------------------------------


def _pipeline_values(found: Found) -> dict[str, str]:
    has_pretrained = any(part.pretrained for part in found.parts)
    bypass = found.port.path == "bypass"
    return {
        **_expert_values(found),
        "port_imports": "Component" + (", Pretrained" if has_pretrained else "") + (", resolve" if bypass else ""),
        "weights_imports": "COMPONENTS, PRETRAINED" if has_pretrained else "COMPONENTS",
        "pretrained_attribute": "    pretrained: ClassVar[tuple[Pretrained, ...]] = PRETRAINED\n"
        if has_pretrained
        else "",
        "decode_call": _decode_call(found),
    }


def _expert_values(found: Found) -> dict[str, str]:
    """Return the fields of a pipeline that chooses its transformer by the noise; empty for one transformer."""
    if found.boundary is None:
        return dict.fromkeys(("experts_import", "experts_attribute", "expert_of_step"), "")
    return {
        "experts_import": _EXPERTS_IMPORT,
        "experts_attribute": "    experts: ClassVar[NoiseExperts] = "
        f"NoiseExperts({literal(found.boundary)})  # {BOUNDARY} of the source's index\n",
        "expert_of_step": "EXPERT: self.experts.at(float(state.timestep)), ",
    }


_EXPERTS_IMPORT = """\
from port_kit.parallel.cfg_batching import EXPERT
from port_kit.pipeline.experts import NoiseExperts
"""


def _decode_call(found: Found) -> str:
    """Return the call of the decoder; without one, latents are the output."""
    output = found.port.output
    call = f'state.latents["{output}"].to(self.dtype)'
    decoders = [part for part in found.parts if part.kind == "vae"]
    decoders.sort(key=lambda part: ("audio" in part.name) != (output == "audio"))
    vocoders = [part for part in decoders if part.recognized and part.recognized.name == "vocoder"]
    first = next((part for part in decoders if part not in vocoders), None)
    if first is None and not vocoders:
        return f"{call}.clamp(-1, 1)"
    if first is not None:
        options = ", return_dict=False)[0].clamp(-1, 1)" if first.pretrained else ")"
        call = f"self.{first.name}{'.decode' if first.pretrained or first.recognized else ''}({call}{options}"
    if vocoders:
        call = f"self.{vocoders[0].name}({call})"
    return f"{call}.flatten()" if output == "audio" else call
