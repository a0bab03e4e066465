"""``port-kit verify``: compare a port with its original implementation, and N ranks with one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.parity import CaseReport, run_parity
from port_kit.parity.record import Settings, record
from port_kit.port import Port
from port_kit.registry import find_port
from port_kit.reports import parity_page, write_page

if TYPE_CHECKING:
    from port_kit.autoparallel.verify import Comparison
    from port_kit.parallel.verify import ParallelTestCase


@click.group("verify")
def command() -> None:
    """Check the results of a port."""


@command.command(
    "parity",
    epilog="Examples:  port-kit verify parity dreamid_omni --goldens DIR --only 'fusion/*' --html parity.html  |  "
    "port-kit verify parity dreamid_omni --reference --model MODEL --reference-python ORIGINAL/bin/python",
)
@click.argument("port")
@click.option("--goldens", type=click.Path(path_type=Path), help="Folder of recorded inputs and outputs (SET.json).")
@click.option("--reference", is_flag=True, help="Record the goldens now, by running the original code on MODEL.")
@click.option("--model", type=click.Path(path_type=Path), help="Model directory of --reference.  [default: ./PORT]")
@click.option(
    "--output-dir", type=click.Path(path_type=Path), help="Where --reference keeps goldens.  [default: ./PORT.goldens]"
)
@click.option(
    "--reference-python", type=click.Path(path_type=Path), help="Interpreter of the original's own environment."
)
@click.option(
    "--reference-code",
    type=click.Path(path_type=Path),
    help="Folder with the original code, such as a clone.  [default: the git code of MODEL]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["fp32", "bf16"]),
    help="What --reference records: fp32 without rounding (default), bf16 as the original runs, on CUDA.",
)
@click.option("--device", default="auto", show_default=True, help="Where --reference runs: cpu, cuda or auto.")
@click.option(
    "--timeout", default=14_400.0, show_default=True, help="Time limit of the original implementation in seconds."
)
@click.option("--only", default="*", show_default=True, help="Shell pattern over case names.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write the report to this file.")
@json_option
@handles_errors("verify parity")
def parity(
    port: str,
    goldens: Path | None,
    reference: bool,
    model: Path | None,
    output_dir: Path | None,
    reference_python: Path | None,
    reference_code: Path | None,
    precisions: tuple[str, ...],
    device: str,
    timeout: float,
    only: str,
    html: Path | None,
    as_json: bool,
) -> None:
    """Run every golden case in a folder and compare the results with the recorded outputs.

    With --reference the goldens are recorded first: the original implementation, which `port-kit download PORT
    --with-reference` installs or --reference-code names, runs on the model directory in a process of its own. The
    goldens are kept and reused.
    """
    if reference == (goldens is not None):
        raise click.UsageError("give --goldens DIR, or --reference")
    found = find_port(port)
    data: dict[str, Any] = {"port": port}
    if goldens is None:
        settings = Settings(reference_python, precisions or ("fp32",), device, timeout, code=reference_code)
        recording = record(
            found,
            model or Path(port),
            output_dir or Path(f"{port}.goldens"),
            settings,
            note=partial(click.echo, err=True),
        )
        goldens = recording.goldens
        data["reference"] = recording.to_json()
    reports = []
    for report in run_parity(found, goldens, only=only):
        reports.append(report)
        click.echo(_line(report), err=as_json)
    ok = all(report.ok for report in reports)
    data |= {
        "goldens": str(goldens),
        "ok": ok,
        "failed": [report.name for report in reports if not report.ok],
        "cases": [report.to_json() for report in reports],
    }
    text = f"{sum(report.ok for report in reports)} of {len(reports)} cases within their bounds"
    if html is not None:
        write_page(html, parity_page(data))
    emit("verify parity", data, as_json=as_json, text=text, ok=ok)


def _planned_layouts(port: Port, wanted: Iterable[str]) -> list[str]:
    """Return the layouts that the plan of a port proves; refuse another that is asked for."""
    from port_kit.autoparallel.verify import check_proven, proven_layouts

    check_proven(port, wanted)
    return proven_layouts(port)


def _compare(subject: ParallelTestCase, layouts: list[str]) -> Iterator[Comparison]:
    """Compare layouts of a port with a plan, whose modules the recorder of hand-written ports does not know."""
    from port_kit.autoparallel.verify import compare

    return compare(subject.model, subject.requests[0], layouts, subject.config)


def _line(report: CaseReport) -> str:
    data = report.to_json()
    verdict = "ok  " if report.ok else f"FAIL first at {report.first_divergence} "
    figures = f"max abs {data['max_abs']:.2e}  max rel {data['max_rel']:.2e}  {report.seconds:.1f} s"
    return f"{verdict}{report.name:<44} {figures}"


@command.command(
    "parallel",
    epilog="Examples:  port-kit verify parallel dreamid_omni  |  "
    "port-kit verify parallel my_port --model tiny_model --layout ulysses2 --layout tp2xcfg2 --json",
)
@click.argument("port")
@click.option(
    "--layout", "layouts", multiple=True, metavar="LAYOUT", help="tp2, ulysses2xring2, ...; default: a matrix."
)
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A small model directory to run.")
@click.option("--prompt", default="a cat", show_default=True, help="The prompt for --model.")
@click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda")),
    default="auto",
    show_default=True,
    help="Run ranks as CPU processes or on one GPU each; auto: the device that vLLM is built for.",
)
@json_option
@handles_errors("verify parallel")
def parallel(port: str, layouts: tuple[str, ...], model: Path | None, prompt: str, device: str, as_json: bool) -> None:
    """Run a port on several ranks of this machine, compare with one rank, and prove that the work was divided.

    A layout that the model or the machine does not support is an error. Such layouts of the default matrix are skipped
    and reported.
    """
    from port_kit.parallel.layout_selection import choose_layouts, find_device
    from port_kit.parallel.verify import DEFAULT_LAYOUTS, TOLERANCE, port_test_case, verify_parallel

    found = find_port(port)
    machine = find_device(device, TOLERANCE)
    reports: list[Any] = []
    with TemporaryDirectory(prefix="port-kit-") as scratch:
        subject = machine.prepare(port_test_case(found, Path(scratch), model, prompt))
        defaults = _planned_layouts(found, layouts) if found.plan else DEFAULT_LAYOUTS
        chosen, left_out = choose_layouts(layouts, defaults, subject.shape, machine)
        for layout, reason in left_out.items():
            click.echo(f"left out {layout}: {reason}", err=as_json)
        compared = _compare if found.plan else partial(verify_parallel, tolerance=machine.tolerance)
        for report in compared(subject, chosen):
            reports.append(report)
            click.echo(report.describe(), err=as_json)
    ok = all(report.ok for report in reports)
    failed = [report.layout for report in reports if not report.ok]
    data = {
        "port": port,
        "device": machine.kind,
        "ok": ok,
        "failed": failed,
        "left_out": left_out,
        "layouts": [report.to_json() for report in reports],
    }
    text = f"{len(reports) - len(failed)} of {len(reports)} layouts match one rank and divide the work"
    emit("verify parallel", data, as_json=as_json, text=text, ok=ok)
