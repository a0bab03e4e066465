"""The command line: ``port-kit COMMAND``. One module per command, imported on demand."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

import click

from port_kit.cli.engine_logs import set_engine_logs
from port_kit.escape import quoted, reason_of
from port_kit.registry import add_port_folders

#: command -> (module with a click command of that name, one line for the overview)
COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("port_kit.cli.convert", "Convert a pickle checkpoint to safetensors without executing it."),
    "coverage": (
        "port_kit.cli.coverage",
        "Check a rule set against a source and a target, from headers alone.",
    ),
    "doctor": ("port_kit.cli.doctor", "Versions, plugin, token, disk, installed git code."),
    "download": ("port_kit.cli.download", "Fetch, convert and assemble a port's model directory."),
    "generate": ("port_kit.cli.generate", "Make clips of one or several requests on a model directory."),
    "hub": ("port_kit.cli.hub", "Serve a folder as a Hub on the loopback interface."),
    "inspect": ("port_kit.cli.inspect", "Classify a repository or folder and show the next step."),
    "layout": ("port_kit.cli.layout", "Draw the ranks of a parallel layout."),
    "list": ("port_kit.cli.list", "List the installed ports."),
    "manifest": ("port_kit.cli.manifest", "Names, shapes and dtypes of a checkpoint or of a port's modules."),
    "new": ("port_kit.cli.new", "Write a port: package, recipe, rules, tests, scripts, card."),
    "page": ("port_kit.cli.page", "Open a web page for a port, over a server of it."),
    "plan": ("port_kit.cli.plan", "Infer, show and prove parallel plans of unmodified modules."),
    "remove": ("port_kit.cli.remove", "Remove a downloaded model directory."),
    "run": ("port_kit.cli.run", "Run a pipeline of diffusers without a port, parallel by a plan."),
    "rules": ("port_kit.cli.rules", "Check, explain, suggest, plan, invert and export rule sets."),
    "serve": ("port_kit.cli.serve", "Serve a model directory to several clients, with limits."),
    "show": ("port_kit.cli.show", "One port: components, licences, card. Of a clip: its settings."),
    "uninstall": ("port_kit.cli.uninstall", "Remove a port's git code from this environment."),
    "verify": ("port_kit.cli.verify", "Compare a port with its original, or N ranks with one."),
}


@contextlib.contextmanager
def _printable() -> Iterator[None]:
    """Make click's messages, which repeat arguments as they are, printable and short."""
    try:
        yield
    except click.ClickException as error:
        error.message = reason_of(error)  # type: ignore[misc]
        raise


class LazyGroup(click.Group):
    """A group that imports a command's module when it is called, and suggests the nearest name for a typo."""

    def make_context(self, *arguments: Any, **keywords: Any) -> click.Context:
        with _printable():
            return super().make_context(*arguments, **keywords)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if any("\0" in argument for argument in args):  # no path has it, and the system's functions raise ValueError
            ctx.fail("an argument has a NUL character")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _printable():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(COMMANDS[cmd_name][0]).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"no such command {quoted(args[0])}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(COMMANDS.items())])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="port-kit")
@click.option("-v", "--verbose", count=True, help="More log lines on stderr; twice for debug.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
def main(verbose: int, quiet: bool) -> None:
    """Bring diffusion models with scattered checkpoints and custom code to vLLM-Omni, out of tree."""
    level = logging.ERROR if quiet else {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    set_engine_logs(verbose)
    add_port_folders()
