"""Parsing of command-line inputs: checkpoints, manifests, remote repositories, rule sets, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from port_kit.errors import RemapError
from port_kit.escape import escape_control_chars, quoted
from port_kit.manifest import Manifest
from port_kit.port import Port
from port_kit.remap.rules import RuleSet

if TYPE_CHECKING:
    from port_kit.runtime.target_cache import KnownTarget

wrapper_option = click.option(
    "--wrapper",
    default="",
    metavar="KEYS",
    help="Keys above the tensors of a torch checkpoint, dotted (generator, app.model); . for the top level.",
)

config_option = click.option(
    "--config",
    metavar="PATH",
    help="The component's config.json, its folder, or a model directory; full for the port's full size.  "
    "[default: the file beside the checkpoint, else full]",
)


def read_target(
    port: Port, name: str, *, source: str | None = None, config: str | None = None, build: bool = False
) -> KnownTarget:
    """Return the target of a port's component, in the sizes of a configuration.

    Args:
        port: the port.
        name: the component.
        source: the checkpoint; the configuration beside it applies, unless ``config`` names one.
        config: value of ``--config``.
        build: ignore recorded and cached manifests.

    Raises:
        RemapError: ``component_config`` or ``manifest_invalid`` for a configuration that cannot be used.
    """
    from port_kit.runtime.component_config import choose_config
    from port_kit.runtime.target_cache import component_target

    choice = choose_config(port, name, given=config, source=source)
    if choice.note:
        click.echo(escape_control_chars(f"note: {choice.note}"), err=True)
    return component_target(port, name, build=build, sizes=choice.config)


def read_source(text: str, *, wrapper: str = "") -> Manifest:
    """Read the checkpoint at a path, or remotely at ``owner/name[@revision][:path]``.

    Args:
        text: a manifest (``.json``), a checkpoint's file or folder, or a Hub repository with a folder or file in it.
        wrapper: of a torch checkpoint, the keys above its tensors.

    Raises:
        RemapError: ``manifest_invalid`` if no checkpoint is there, and what
            :meth:`~port_kit.manifest.Manifest.from_checkpoint` raises.
        CheckpointError: see there.
    """
    path = Path(text)
    if path.exists():
        return _noted(Manifest.from_checkpoint(path, wrapper))
    from port_kit.checkpoint.reader import looks_remote, read_remote

    if looks_remote(text):
        return _noted(read_remote(text, wrapper=wrapper))
    raise RemapError(
        f"{text} does not exist",
        code="manifest_invalid",
        hint="name a manifest, a checkpoint, or a Hub repository as owner/name[@revision][:path]",
    )


def _noted(manifest: Manifest) -> Manifest:
    """Print the parts of a checkpoint that were left out."""
    for note in manifest.notes:
        click.echo(escape_control_chars(f"note: {note}"), err=True)
    return manifest


def read_rules(text: str) -> RuleSet:
    """Read a rule set from a ``.toml`` or ``.json`` file, or from ``module:ATTRIBUTE``.

    Raises:
        RemapError: ``remap_rules`` if it is not a rule set.
    """
    path = Path(text)
    if path.suffix in (".toml", ".json") or path.exists():
        return RuleSet.from_file(path)
    from port_kit.remap.rules import import_rules

    return import_rules(text)


def read_sizes(items: tuple[str, ...]) -> dict[str, int]:
    """Read ``name=number`` options.

    Raises:
        RemapError: ``remap_size`` for anything else.
    """
    sizes: dict[str, int] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not name.strip() or not equals or not value.strip().isdecimal():
            raise RemapError(
                f"size {quoted(item)} is not name=number", code="remap_size", hint="such as --size hidden=3072"
            )
        sizes[name.strip()] = int(value)
    return sizes
