"""``port-kit download PORT``: create a model directory from a recipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.download import Recipe, Report, download
from port_kit.download.http import Policy
from port_kit.download.progress import choose_progress, human
from port_kit.errors import DownloadError
from port_kit.escape import quoted
from port_kit.port import resolve
from port_kit.registry import find_port
from port_kit.testing.tiny_port import download_tiny


@click.command(
    "download",
    epilog="Examples:  port-kit download dreamid_omni --dry-run  |  "
    "port-kit download dreamid_omni --output-dir /models/dreamid_omni",
)
@click.argument("port")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    help="The model directory.  [default: ./PORT]",
)
@click.option(
    "--variant", metavar="NAME", help="Another checkpoint of a port that has several; `port-kit show` names them."
)
@click.option("--tiny", is_flag=True, help="A tiny model with random weights, from a loopback Hub.")
@click.option("--trained", is_flag=True, help="With --tiny: trained weights, of ports that have some.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--revision", multiple=True, metavar="[REPO=]COMMIT", help="Another revision than the recipe's.")
@click.option("--update", is_flag=True, help="Resolve revisions that the recipe does not pin anew.")
@click.option("--offline", is_flag=True, envvar="HF_HUB_OFFLINE", help="Use no network; fail if a file is missing.")
@click.option("--verify", is_flag=True, help="Hash every file and fetch damaged files again.")
@click.option("--prune", is_flag=True, help="Delete files that are not part of the model; not in the first run.")
@click.option("--with-reference", is_flag=True, help="Also install the original code, for comparison.")
@click.option("--keep-original", is_flag=True, help="Keep pickle checkpoints after their conversion.")
@click.option("--no-cache", is_flag=True, help="Do not read the Hub cache.")
@click.option("--endpoint", help="A mirror of the Hub.  [default: HF_ENDPOINT]")
@click.option("--connections", default=8, show_default=True, type=click.IntRange(1, 64), help="Requests at a time.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@json_option
@handles_errors("download")
def command(
    port: str,
    output_dir: Path | None,
    variant: str | None,
    tiny: bool,
    trained: bool,
    dry_run: bool,
    revision: tuple[str, ...],
    update: bool,
    offline: bool,
    verify: bool,
    prune: bool,
    with_reference: bool,
    keep_original: bool,
    no_cache: bool,
    endpoint: str | None,
    connections: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fetch, convert and assemble the model directory of PORT (a port's name, or a recipe in TOML).

    Run the command again after an interruption to resume. HF_TOKEN, HF_ENDPOINT and HF_HOME are respected.
    """
    if trained and not tiny:
        raise click.UsageError("--trained needs --tiny")
    recipe = load_recipe(port, variant)
    if tiny:
        folder = output_dir or Path(f"{port}_tiny")
        report = download_tiny(find_port(port), folder, recipe=recipe, dry_run=dry_run, trained=trained)
        emit("download", report.to_json(), as_json=as_json, text=_describe(report, verified=False))
        return
    report = download(
        at_revisions(recipe, revision),
        output_dir or Path(recipe.name),
        dry_run=dry_run,
        offline=offline or None,
        verify=verify,
        update=update,
        prune=prune,
        with_reference=with_reference,
        keep_original=keep_original,
        use_cache=not no_cache,
        endpoint=endpoint,
        policy=Policy(connections=connections),
        progress=choose_progress(quiet=quiet or as_json),
    )
    emit(
        "download", report.to_json(), as_json=as_json, text=None if quiet and not dry_run else _describe(report, verify)
    )


def main(port: str) -> None:
    """Run the command for one port with options of the command line; called by ``download_<name>.py`` scripts."""
    command.main(args=[port, *sys.argv[1:]], prog_name=Path(sys.argv[0]).name)


def load_recipe(port: str, variant: str | None = None) -> Recipe:
    """Return the recipe of a port, of one of its variants, or the one in a TOML file."""
    variants: Mapping[str, str] = {}
    if not port.endswith(".toml"):
        found = find_port(port)
        variants = found.variants
        if variant is None:
            return cast(Recipe, resolve(found.recipe))
    elif variant is None:
        return Recipe.from_toml(port)
    if variant not in variants:
        raise DownloadError(
            f"{port} has no variant {quoted(variant)}",
            code="recipe_invalid",
            hint=f"use one of {', '.join(variants)}" if variants else "leave --variant out: it has one checkpoint",
        )
    return cast(Recipe, resolve(variants[variant]))


def at_revisions(recipe: Recipe, revisions: tuple[str, ...]) -> Recipe:
    """Apply ``--revision`` values: ``REPO=COMMIT``, or a bare commit if the recipe has one repository."""
    chosen: dict[str, str | None] = {}
    for value in revisions:
        repo_id, equals, commit = value.rpartition("=")
        if not equals and len(recipe.repositories) != 1:
            names = ", ".join(repository.repo_id for repository in recipe.repositories)
            raise DownloadError(
                f"--revision {value} does not say which repository it is for",
                code="recipe_invalid",
                hint=f"write REPO=COMMIT with one of {names}",
            )
        chosen[repo_id or recipe.repositories[0].repo_id] = commit
    return recipe.with_(revisions=chosen) if chosen else recipe


def _describe(report: Report, verified: bool) -> str:
    if report.plan is not None and not report.complete:
        return report.plan.describe()
    lines = [f"removed {target}" for target in report.removed]
    lines += [f"repaired {target} ({problem})" for target, problem in report.repaired.items()]
    lines += [f"installed {name} in {folder}" for name, folder in report.code.items()]
    if report.untracked_files:
        lines.append(f"not part of the model: {', '.join(report.untracked_files[:8])} (--prune deletes them)")
    moved = f"{len(report.fetched)} files, {human(report.network_bytes)} fetched" if report.fetched else "nothing to do"
    moved += ", every file has the hash that it should have" if verified else ""
    lines.append(f"{report.directory} is complete: {moved}, {report.seconds:.1f} s")
    return "\n".join(lines)
