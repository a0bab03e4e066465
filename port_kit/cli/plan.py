"""``port-kit plan``: infer, show and prove parallel plans of unmodified modules."""

from __future__ import annotations

from pathlib import Path

import click

from port_kit.cli.output import emit, handles_errors, json_option, toml_path, write_text


@click.group("plan")
def command() -> None:
    """Parallel plans of unmodified modules."""


@command.command(
    "infer",
    epilog="Examples:  port-kit plan infer FluxTransformer2DModel -o flux.toml  |  "
    "port-kit plan infer my_package.subjects:make_transformer -o plan.toml",
)
@click.argument("subject")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), callback=toml_path, help="Write the plan to this file, as TOML."
)
@json_option
@handles_errors("plan infer")
def infer(subject: str, output: Path | None, as_json: bool) -> None:
    """Infer the plan of SUBJECT: a class of diffusers, or MODULE:FUNCTION of a function that returns a Subject.

    A tiny instance runs on the CPU. Without -o the plan is printed.
    """
    from port_kit.autoparallel.describe import describe
    from port_kit.autoparallel.infer import infer_plan
    from port_kit.autoparallel.shipped import fingerprint
    from port_kit.autoparallel.subject import load_subject

    plan = infer_plan(load_subject(subject))
    plan = plan.model_copy(update={"fingerprint": fingerprint(plan.module_class)})
    text = plan.to_toml()
    if output is not None:
        write_text(output, text)
        text = f"{describe(plan)}\nwrote {output}"
    data = {"plan": plan.model_dump(mode="json"), "output": str(output) if output else None}
    emit("plan infer", data, as_json=as_json, text=text, ok=not plan.refused)


@command.command("show", epilog="Examples:  port-kit plan show flux.toml  |  port-kit plan show flux.toml --json")
@click.argument("plan", type=click.Path(path_type=Path))
@json_option
@handles_errors("plan show")
def show(plan: Path, as_json: bool) -> None:
    """Describe the plan file PLAN."""
    from port_kit.autoparallel.describe import describe
    from port_kit.autoparallel.plan import Plan

    loaded = Plan.load(plan)
    emit("plan show", {"plan": loaded.model_dump(mode="json")}, as_json=as_json, text=describe(loaded))


@command.command(
    "prove",
    epilog="Examples:  port-kit plan prove flux.toml  |  port-kit plan prove flux.toml --layout tp2xulysses2 --write",
)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--layout", "layouts", multiple=True, help="Prove this layout; repeat for several. Default: thirteen layouts."
)
@click.option("--write", is_flag=True, help="Record the proofs in PLAN.")
@json_option
@handles_errors("plan prove")
def prove(plan: Path, layouts: tuple[str, ...], write: bool, as_json: bool) -> None:
    """Compare several ranks with one rank for the plan file PLAN, and measure how the work is divided.

    Tiny instances run on forked ranks on the CPU, at four configurations. Each exchange is left out once: the result
    must change. Layouts such as cache_dit and cache_ditxulysses2 prove Cache-DiT. The exit code is 0 if all layouts are
    proven.
    """
    from port_kit.autoparallel.plan import Plan
    from port_kit.autoparallel.prove import DEFAULT_LAYOUTS, prove_plan, with_proofs
    from port_kit.autoparallel.subject import load_subject

    loaded = Plan.load(plan)
    results = prove_plan(load_subject(loaded.subject), loaded, layouts or DEFAULT_LAYOUTS)
    if write:
        write_text(plan, with_proofs(loaded, results).to_toml())
    data = {"plan": str(plan), "results": [result.to_json() for result in results]}
    text = "\n".join(result.describe() for result in results)
    emit("plan prove", data, as_json=as_json, text=text, ok=all(result.proven for result in results))
