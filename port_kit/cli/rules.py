"""``port-kit rules``: check, explain, suggest, invert, import and export rule sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from port_kit.cli.inputs import config_option, read_rules, read_sizes, read_source, read_target
from port_kit.cli.output import emit, handles_errors, json_option, toml_path, write_text
from port_kit.escape import escape_control_chars
from port_kit.manifest import Manifest
from port_kit.port import resolve
from port_kit.registry import find_port
from port_kit.remap.rules import RuleSet

_OPTIONS = {
    "rules": click.option("--rules", help="A .toml or .json file of rules, or module:ATTRIBUTE."),
    "source": click.option("--source", help="A manifest, a checkpoint, or a Hub repository OWNER/NAME[@REV][:PATH]."),
    "target": click.option("--target", help="A manifest or checkpoint with the names to be filled."),
    "port": click.option("--port", help="Take target and rules of this port."),
    "component": click.option("--component", help="The port's component."),
    "config": config_option,
    "sizes": click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="A named size of the rules."),
}

_toml_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), callback=toml_path, help="Write the rules here, as TOML."
)


def _options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds options to a command."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(names):
            function = _OPTIONS[name](function)
        return function

    return add


_rule_options = _options(*_OPTIONS)


class Given:
    """Rules and manifests as the options name them."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.sizes = read_sizes(options.get("sizes", ()))
        if bool(options["port"]) != bool(options["component"]):
            raise click.UsageError("--port and --component go together")

    def rules(self) -> RuleSet:
        """The rule set of --rules or of the port's component."""
        if self.options["rules"]:
            return read_rules(self.options["rules"])
        if not self.options["port"]:
            raise click.UsageError("give --rules, or --port and --component")
        found: Any = resolve(find_port(self.options["port"]).component(self.options["component"]).rules)
        return found

    def source(self) -> Manifest:
        """The manifest of --source."""
        if not self.options["source"]:
            raise click.UsageError("give --source")
        return read_source(self.options["source"])

    def target(self) -> Manifest:
        """The manifest of --target or of the port's component."""
        if self.options["target"]:
            return read_source(self.options["target"])
        if not self.options["port"]:
            raise click.UsageError("give --target, or --port and --component")
        port, source = find_port(self.options["port"]), self.options["source"]
        return read_target(port, self.options["component"], source=source, config=self.options["config"]).manifest

    @property
    def has_both_sides(self) -> bool:
        """True if a source and a target are given."""
        return bool(self.options["source"]) and bool(self.options["target"] or self.options["port"])


@click.group("rules")
def command() -> None:
    """Work with rule sets: the data that maps a checkpoint onto a module."""


@command.command(
    "check",
    epilog="Examples:  port-kit rules check --rules rules.toml  |  "
    "port-kit rules check --rules rules.toml --source S.json --target T.json",
)
@_rule_options
@json_option
@handles_errors("rules check")
def check_command(as_json: bool, **options: Any) -> None:
    """Is the rule set valid? With a source and a target: is it complete, too?"""
    given = Given(options)
    rules = given.rules()
    data: dict[str, Any] = {"name": rules.name, "rules": len(rules), "sizes": dict(rules.sizes)}
    if not given.has_both_sides:
        emit("rules check", data, as_json=as_json, text=f"{rules.name}: {len(rules)} rules, all valid")
        return
    from port_kit.remap.coverage import coverage

    report = coverage(rules, given.source(), given.target(), given.sizes)
    data["coverage"] = report.to_json()
    emit("rules check", data, as_json=as_json, text=report.to_text(), ok=report.ok)


@command.command(
    "explain",
    epilog="Examples:  port-kit rules explain encoder.conv1.weight --port dreamid_omni --component vae  |  "
    "port-kit rules explain blocks.0.attn.qkv.weight --rules rules.toml --source S.json --target T.json",
)
@click.argument("name")
@_rule_options
@json_option
@handles_errors("rules explain")
def explain_command(name: str, as_json: bool, **options: Any) -> None:
    """Show the rules that match NAME (a source or a target) and their effect."""
    from port_kit.remap.coverage import explain

    given = Given(options)
    source = given.source() if options["source"] else None
    target = given.target() if options["target"] or options["port"] else None
    told = explain(name, given.rules(), source, target, given.sizes)
    emit("rules explain", told.to_json(), as_json=as_json, text=told.to_text(), ok=told.found)


@command.command(
    "plan",
    epilog="Examples:  port-kit rules plan --source S.json --target T.json --rules rules.toml --json  |  "
    "port-kit rules plan --source S.json --port dreamid_omni --component vae --json",
)
@_rule_options
@json_option
@handles_errors("rules plan")
def plan_command(as_json: bool, **options: Any) -> None:
    """Print the sources of every target element; exit code 1 if the plan is incomplete."""
    from port_kit.remap.plan import check
    from port_kit.reports.plan_json import plan_map

    given = Given(options)
    plan = check(given.rules(), given.source(), given.target(), given.sizes)
    entries = plan_map(plan)
    data = {
        "source": {name: list(spec.shape) for name, spec in plan.source.items()},
        "target": {name: list(spec.shape) for name, spec in plan.target.items()},
        "map": entries,
        "dropped": list(plan.dropped),
        "kept": dict(plan.kept),
        "converted": plan.converted,
        "problems": [problem.to_json() for problem in plan.explained()],
    }
    lines = [f"{target} <- {', '.join(entry['from'])} [{entry['op']}]" for target, entry in entries.items()]
    lines += [f"problem: {problem}" for problem in plan.explained()]
    emit("rules plan", data, as_json=as_json, text="\n".join(lines), ok=plan.ok)


@command.command(
    "suggest",
    epilog="Examples:  port-kit rules suggest --source S.json --target T.json -o rules.toml  |  "
    "port-kit rules suggest --source S.json --port my_port --component transformer --config full -o rules.toml",
)
@_options("source", "target", "port", "component", "config")
@_toml_option
@json_option
@handles_errors("rules suggest")
def suggest_command(output: Path | None, as_json: bool, **options: Any) -> None:
    """Propose a rule set from two manifests alone, each rule with its confidence."""
    from port_kit.remap.suggest import suggest

    given = Given(options)
    suggestion = suggest(given.source(), given.target())
    if output is not None:
        write_text(output, suggestion.to_toml())
    emit("rules suggest", suggestion.to_json(), as_json=as_json, text=suggestion.to_text())


@command.command(
    "invert",
    epilog="Examples:  port-kit rules invert --rules rules.toml --source S.json --target T.json -o back.toml  |  "
    "port-kit rules invert --port dreamid_omni --component transformer --source transformer/ -o back.toml",
)
@_rule_options
@_toml_option
@json_option
@handles_errors("rules invert")
def invert_command(output: Path | None, as_json: bool, **options: Any) -> None:
    """Work out the rules that lead back from the target's names to the source's."""
    from port_kit.remap.invert import invert

    given = Given(options)
    back = invert(given.rules().compile(given.source(), given.target(), given.sizes))
    _emit_text("rules invert", back.to_toml(), output, {"rules": back.to_dict()}, f"{len(back)} rules", as_json)


@command.command(
    "import",
    epilog="Examples:  port-kit rules import transformers:mixtral --source checkpoint/ -o rules.toml  |  "
    "port-kit rules import vllm.model_executor.models.llava:LlavaForConditionalGeneration.hf_to_vllm_mapper",
)
@click.argument("mapping")
@click.option("--source", help="The checkpoint to be mapped: a manifest, a checkpoint, or a Hub repository.")
@click.option("--name", default="imported", show_default=True, help="The name of the rule set.")
@_toml_option
@json_option
@handles_errors("rules import")
def import_command(mapping: str, source: str | None, name: str, output: Path | None, as_json: bool) -> None:
    """Translate a weight mapping of vLLM, transformers or SGLang into rules.

    MAPPING is module:attribute of a WeightsMapper, of a list of WeightRenaming and WeightConverter, or of a dictionary
    of name patterns; or transformers:MODEL_TYPE. Its rewrites depend on each other: with --source each name of the
    checkpoint is mapped; without it, only independent entries are accepted.
    """
    from port_kit.interop.imports import import_mapping, read_mapping

    rules = import_mapping(read_mapping(mapping), read_source(source) if source else None, name=name)
    _emit_text("rules import", rules.to_toml(), output, {"rules": rules.to_dict()}, f"{len(rules)} rules", as_json)


@command.command(
    "export",
    epilog="Examples:  port-kit rules export converted/ -o original.safetensors --rules rules.toml --source S.json  |  "
    "port-kit rules export original/ -o converted.safetensors --forward --rules rules.toml --target T.json  |  "
    "port-kit rules export --as vllm --rules rules.toml -o mapper.py",
)
@click.argument("checkpoint", required=False, type=click.Path(exists=True, path_type=Path))
@_rule_options
@click.option("--forward", is_flag=True, help="CHECKPOINT has the original names: write it with the target's.")
@click.option("--as", "form", type=click.Choice(["vllm", "transformers"]), help="Write the rules, as Python source.")
@click.option("--partial", is_flag=True, help="With --as: leave out the rules that do more than rename, and list them.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The safetensors file, or the Python source.")
@json_option
@handles_errors("rules export")
def export_command(
    checkpoint: Path | None,
    forward: bool,
    form: str | None,
    partial: bool,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a checkpoint with its original names, or rules in the form of another library.

    CHECKPOINT has the target's names; it is written with the original names, bit for bit. The manifest of the other
    side is --source (with --forward: --target, or a port's component).

    With --as and without CHECKPOINT, the rules are written as a WeightsMapper or as a list of
    GroupWeightRename.
    """
    given = Given(options)
    if form is not None:
        if checkpoint is not None or forward:
            raise click.UsageError("--as writes rules: leave out CHECKPOINT and --forward")
        _export_rules(given.rules(), form, partial, output, as_json)
    elif checkpoint is None or output is None or partial:
        raise click.UsageError("give CHECKPOINT and -o; or --as with --rules, where --partial may stand")
    else:
        _export_checkpoint(given, checkpoint, forward, output, as_json)


def _export_rules(rules: RuleSet, form: str, partial: bool, output: Path | None, as_json: bool) -> None:
    from port_kit.interop.exports import export_mapping

    text, left_out = export_mapping(rules, form, partial=partial)
    for label, why in left_out.items():
        click.echo(escape_control_chars(f"left out: {label}: {why}"), err=True)
    data = {"python": text, "left_out": dict(left_out)}
    _emit_text("rules export", text, output, data, f"{len(rules) - len(left_out)} rules", as_json)


def _export_checkpoint(given: Given, checkpoint: Path, forward: bool, output: Path, as_json: bool) -> None:
    from port_kit.remap.export import checkpoint_reader, convert_file, export_file, inexact

    manifest = Manifest.from_safetensors(checkpoint)
    if forward:
        plan = given.rules().compile(manifest, given.target(), given.sizes, allow_downcast=True)
        convert_file(plan, checkpoint_reader(checkpoint, manifest), output)
        lost: dict[str, str] = {}
    else:
        plan = given.rules().compile(given.source(), manifest, given.sizes, allow_downcast=True)
        lost = inexact(plan)
        export_file(plan, checkpoint_reader(checkpoint, manifest), output)
    written = Manifest.from_safetensors(output)
    data = {"output": str(output), "tensors": len(written), "bytes": written.nbytes, "inexact": lost}
    text = f"{output}: {len(written)} tensors, {written.nbytes:,} bytes"
    emit("rules export", data, as_json=as_json, text="\n".join([text, *(f"{n}: {why}" for n, why in lost.items())]))


def _emit_text(
    command_name: str, text: str, output: Path | None, data: dict[str, Any], summary: str, as_json: bool
) -> None:
    """Write a text to a file and report it, or print it."""
    if output is not None:
        write_text(output, text)
    shown = f"{output}: {summary}" if output else text.rstrip()
    emit(command_name, {**data, "output": str(output) if output else None}, as_json=as_json, text=shown)
