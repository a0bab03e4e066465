"""Call commands of port-kit with odd arguments and damaged files: they must answer or refuse, in one message.

Each round calls one command in this process, with arguments and files that a seeded generator chose: valid ones, values
of other types, huge, empty, with control characters; JSON, YAML, TOML, safetensors headers and pickles cut, flipped and
replaced. A finding is: an exception, an exit code that docs/cli.md does not list, a traceback, a character that a
terminal would interpret, none or several messages, more than --patience seconds of processor time, or more than
--memory MiB. Findings are printed with the arguments that make them; then the exit code is 1. Nothing is started,
recorded, installed or sent: commands that load a model get no model, and there is no network.

    python benchmarks/fuzz_cli.py --rounds 2000 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
from click.testing import CliRunner, Result
from tqdm import tqdm

from port_kit.cli import main as port_kit
from port_kit.cli.generate import build_parser
from port_kit.cli.make_clips import Console
from port_kit.registry import find_port, list_ports

#: Exit codes of docs/cli.md.
CODES = (0, 1, 2, 130)
#: Commands that load torch or an engine when their arguments are valid: they get wrong ones only.
HEAVY = ("doctor", "plan infer", "plan prove", "run", "serve", "verify parallel", "verify parity")
#: Commands that wait or remove, whose folders are new names; and options that write into this repository.
CAREFUL, WRITING = ("hub", "remove", "uninstall"), ("--record",)
#: Longest text on stderr, in characters.
LONGEST_MESSAGE = 10_000

ODD = [
    "", " ", "\0", "a\0b", "\udcff", "\x1b[2J\x1b]0;x\7", "\u202egpj.exe", "\r\n\n", "x" * 300, "x" * 5000, "\u0661",
    "y" * 200_000, "-", "--", "-1", "0", "9" * 400, "1e309", "nan", "=", "a=", "=1", "hidden=" + "9" * 400, "[", "{}",
    "[" * 100_000, "owner/name", "owner/name@main:a/b", "http://127.0.0.1:9/", "ftp://user:secret@host/?token=secret",
    "module:ATTRIBUTE", "nowhere.at.all:x", "*", "(a+)+$", "{0}", "%s%n", "$(id)", "tp2", "tp2xtp2", "tp-1",
    "ring999999",     "ulysses2xring2", "~", "NUL", "\U0001f600", "e\u0301" * 100,
]  # fmt: skip
#: Paths that exist, and are none of the files that a command expects.
PLACES = ["/dev/null", "/dev/zero", "/proc/self/mem", ".", "..", "/", "/proc/1", "loop", "missing/file.json"]
OUTPUTS = [
    "out/result.toml",
    "out.json",
    "",
    "\0",
    "z" * 5000,
    ".",
    "rules.toml/x.toml",
    "missing/a/b.toml",
    "a\x1bb.toml",
]


def safetensors(header: Any, data: bytes = bytes(64)) -> bytes:
    """Return a safetensors file with a header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_TENSORS = {f"layers.{i}.{leaf}.weight": [[2, 2], "float32"] for i in range(2) for leaf in "qk"}
_RULE = {"source": r"layers\.(\d+)\.(\w)\.weight", "target": r"blocks.\1.\2.weight"}
#: Valid files of a workspace.
FILES: dict[str, bytes] = {
    "rules.json": json.dumps({"name": "r", "rule": [_RULE], "sizes": {"hidden": 4}}).encode(),
    "rules.toml": b"[[rule]]\nsource = 'layers\\.(\\d+)\\.(\\w)\\.weight'\ntarget = 'blocks.\\1.\\2.weight'\n",
    "source.json": json.dumps(_TENSORS).encode(),
    "target.json": json.dumps({name.replace("layers", "blocks"): shape for name, shape in _TENSORS.items()}).encode(),
    "one.safetensors": safetensors(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
            "b": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
        }
    ),
    "model.pkl": pickle.dumps({"a": [1, 2.0], "b": None}),
    "plan.toml": b'class_path = "a.b:C"\n[tensor]\n',
    "recipe.json": json.dumps({"name": "odd", "repositories": []}).encode(),
    "clip.png": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "clip.mp4": b"\0\0\0\x18ftypisom" + bytes(60),
    "folder/model_index.json": b'{"_class_name": "OddPipeline", "vae": ["diffusers", "AutoencoderKL"]}',
    "folder/README.md": b"---\nlicense: mit\ntags: [a, b]\n---\n# Model\n",
    "folder/vae/config.json": b'{"_class_name": "AutoencoderKL", "latent_channels": 4}',
    "folder/vae/model.safetensors": safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}),
    "folder/vae/model.safetensors.index.json": b'{"weight_map": {"a": "model.safetensors"}, "metadata": {}}',
    "goldens/SET.json": b'{"port": "ovi", "cases": []}',
    "folder/port.lock": b'{"schema": "x"}',
}  # fmt: skip
#: Fitting values by the name of a parameter.
FITTING: dict[str, list[str]] = {
    "source": ["source.json", "one.safetensors", "model.pkl", "folder", "folder/vae", "target.json"],
    "target": ["target.json", "one.safetensors", "folder/vae"],
    "rules": ["rules.json", "rules.toml", "source.json"],
    "checkpoint": ["one.safetensors", "source.json"],
    "mapping": ["rules.json", "source.json", "transformers:bert"],
    "config": ["folder/vae/config.json", "folder", "rules.json"],
    "plan": ["plan.toml", "rules.toml"],
    "sizes": ["hidden=4", "depth=2"],
    "layout": ["tp2", "ulysses2xring2", "hsdp4"],
    "wrapper": [".", "a", "a.b"],
    "component": ["transformer", "vae"],
    "sources": ["folder", "folder/vae"],
    "name": ["odd_port", "clip.png", "clip.mp4", "layers.0.q.weight"],
    "folder": ["missing"],
    "kind": ["custom", "diffusers"],
    "goldens": ["goldens", "folder"],
}


class TooSlow(BaseException):
    """A call took more processor time than it may."""


def leaves(group: click.Group) -> dict[str, click.Command]:
    """Return the commands that have no commands of their own, by their words."""
    context, found = click.Context(group), dict[str, click.Command]()
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            found.update({f"{name} {inner}": each for inner, each in leaves(command).items()})
        elif command is not None:
            found[name] = command
    return found


def mutated(data: bytes, source: random.Random) -> bytes:
    """Return a file cut, flipped, grown, or replaced by another kind."""
    changed = bytearray(data)
    place = source.randrange(len(changed) + 1)
    action = source.randrange(8)
    if action == 0:
        del changed[place:]
    elif action == 1:
        for _ in range(source.choice((1, 3, 20))):
            changed[source.randrange(len(changed))] = source.randrange(256)
    elif action == 2:
        changed[: min(8, len(changed))] = source.choice((b"\xff" * 8, bytes(8), struct.pack("<Q", 2**40)))
    elif action == 3:
        changed[place:place] = source.choice(
            (b"\0", b"\x1b[2J", b"\xff\xfe", "\u202e".encode(), b'"', b"}", b"\\ud800")
        )
    elif action == 4:
        changed[place:place] = source.choice((b"[", b'{"a":')) * 50_000
    elif action == 5:
        changed = bytearray(
            source.choice((b"", b"null", b"[]", b"{}", b"1", b"\xff\xfe\0", b"\xef\xbb\xbf{}", b"<html>"))
        )
    elif action == 6:
        changed[place:place] = b"9" * source.choice((30, 5000))
    else:
        changed[place:place] = changed[place : place + 40] * 3
    return bytes(changed)


def write_files(folder: Path, source: random.Random) -> None:
    """Write the files of a workspace anew, and damage a few."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    damaged = source.sample(sorted(FILES), source.choice((0, 1, 1, 2, 4)))
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mutated(data, source) if name in damaged else data)
    (folder / "loop").symlink_to("loop")


def value_of(parameter: click.Parameter, words: str, source: random.Random) -> str:
    """Return a value for a parameter, fitting or odd."""
    name = parameter.name or ""
    if name in ("output", "output_dir", "html", "svg", "storage") or (words, name) == ("convert", "target"):
        return source.choice(OUTPUTS)
    pool = list(ODD)
    if words not in HEAVY and words not in CAREFUL:
        pool += PLACES
        if name in FITTING and source.random() < 0.6:
            return source.choice(FITTING[name])
        pool += FITTING["source"]
    if isinstance(parameter.type, click.Choice) and name not in FITTING and source.random() < 0.7:
        return str(source.choice(list(parameter.type.choices)))
    return source.choice(pool)


def arguments_of(words: str, command: click.Command, source: random.Random) -> list[str]:
    """Return arguments of a command; those of heavy commands have an option that does not exist."""
    given: list[str] = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            if source.random() < 0.93:
                given.append(value_of(parameter, words, source))
        elif parameter.opts[0] not in WRITING and source.random() < (0.85 if parameter.required else 0.25):
            given.append(parameter.opts[-1])
            if not getattr(parameter, "is_flag", False):
                given.append(value_of(parameter, words, source))
    if words in HEAVY or source.random() < 0.05:
        given.insert(0, source.choice(("--no-such-option", "--\x1b[2J", "-\u202e")))
    return [*words.split(), *given]


class Captured(Console):
    """A console of ``generate`` whose lines :class:`~click.testing.CliRunner` keeps: it has no file descriptors."""

    def __init__(self) -> None:
        self._stdout, self._stderr = sys.stdout, sys.stderr
        self._bar = tqdm(disable=True)


def generate_arguments(source: random.Random) -> list[str]:
    """Return arguments of ``generate``, whose options are those of a port; the model does not exist."""
    port = source.choice(("ovi", "dreamid_omni", "mova") * 20 + tuple(ODD))
    given = ["generate", port, "--model", "missing"]
    if port not in list_ports():
        return given
    for action in build_parser(find_port(port))._actions:
        if action.option_strings and action.dest not in ("help", "model") and source.random() < 0.1:
            given.append(action.option_strings[-1])
            if action.nargs != 0:
                given.append(source.choice([*(action.choices or ()), "1", *FILES, *PLACES, *ODD]))
    return given if source.random() < 0.7 else [*given, source.choice(ODD)]


def problem_of(result: Result) -> str:
    """Return what is wrong with the end of a call; empty if nothing is."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "".join(traceback.format_exception(result.exception))
    if result.exit_code not in CODES:
        return f"exit code {result.exit_code}"
    if "Traceback (most recent call last)" in result.output:
        return f"a traceback: {result.output[-3000:]}"
    for stream in (result.stdout, result.stderr):
        if not stream.replace("\n", "").replace("\t", "").isprintable():
            return f"characters that a terminal interprets: {stream[:1000]!r}"
    if len(result.stderr) > LONGEST_MESSAGE:
        return f"a message of {len(result.stderr)} characters: {result.stderr[:1000]}"
    messages = sum(line.startswith(("error [", "Error: ")) or " error: " in line for line in result.stderr.splitlines())
    if result.exit_code == 1 and not messages and not result.stdout.strip():
        return "no message"
    if messages > 1 or (result.exit_code == 2 and messages != 1):
        return f"{messages} messages: {result.stderr[:2000]}"
    return ""


@contextlib.contextmanager
def bounded(patience: float, memory: int) -> Iterator[None]:
    """Bound processor time and memory, keep the network and new processes away, and wait for no signal."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = resource.getrlimit(resource.RLIMIT_AS)
    old = {sign: signal.signal(sign, stop) for sign in (signal.SIGPROF, signal.SIGALRM)}
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory * 2**20, before[1]))
    signal.setitimer(signal.ITIMER_PROF, patience)
    signal.setitimer(signal.ITIMER_REAL, 5 * patience)  # for a call that waits
    refuse = mock.Mock(side_effect=AssertionError("a process was started"))
    try:
        with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}), mock.patch("os.execve", refuse):
            with mock.patch("port_kit.cli.generate.Console", Captured):
                yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for sign, handler in old.items():
            signal.signal(sign, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    rounds: int, seed: int, *, patience: float, memory: int, only: Callable[[str], bool] = lambda _: True
) -> dict[str, Any]:
    """Return what the calls came to, and the findings.

    Args:
        rounds: number of calls.
        seed: of the generator.
        patience: seconds of processor time of a call.
        memory: MiB that a call may add to the address space.
        only: which commands are called.
    """
    source, commands = random.Random(seed), {words: each for words, each in leaves(port_kit).items() if only(words)}
    weak = {*HEAVY, *CAREFUL}  # these refuse most calls at once
    outcomes, slowest, findings, home = Counter[str](), (0.0, ""), list[dict[str, Any]](), Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            for _ in range(rounds):
                write_files(Path(place), source)
                words = source.choices(sorted(commands), [1 if each in weak else 4 for each in sorted(commands)])[0]
                given = generate_arguments(source) if words == "generate" else None
                arguments = given or arguments_of(words, commands[words], source)
                started = time.process_time()
                try:
                    with bounded(patience, memory):
                        result = CliRunner().invoke(port_kit, arguments, color=True)
                    problem = problem_of(result)
                    outcomes[f"exit {result.exit_code}"] += 1
                except TooSlow:
                    problem = f"more than {patience:g} s: {traceback.format_exc()[-3000:]}"
                slowest = max(slowest, (time.process_time() - started, words))
                if problem:
                    findings.append({"arguments": [each[:200] for each in arguments], "problem": problem})
        finally:
            os.chdir(home)
    return {
        "rounds": rounds,
        "commands": len(commands),
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_seconds": round(slowest[0], 2),
        "slowest": slowest[1],
        "findings": findings,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=20.0)
    parser.add_argument("--memory", type=int, default=2048)
    given = parser.parse_args(arguments)
    result = fuzz(given.rounds, given.seed, patience=given.patience, memory=given.memory)
    json.dump(result, sys.stdout, indent=1)
    print()
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
