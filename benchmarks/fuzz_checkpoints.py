"""Feed damaged and hostile checkpoints to the reader: it must answer or refuse, never crash, hang or execute.

Seeds are real checkpoints of both containers and hand-made pickles, kept in the
folder that --corpus names. Each round mutates one, in the container or in the pickle itself (whose
zip entry then gets a right CRC, so that the interpreter sees it). What can be read is also converted, and safetensors
must be able to read the result. Anything but that or an error of the kit is a finding: it is written to --findings and
ends the run with exit code 1. An audit hook notes what a pickle could have made Python do (exec, import, subprocess);
an input that ends the process itself is left in --findings as ``last``.

    python benchmarks/fuzz_checkpoints.py --seconds 60
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import mmap
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from safetensors import safe_open

from port_kit.checkpoint.convert import convert_file
from port_kit.checkpoint.pickle_reader import read_tables
from port_kit.errors import PortKitError

_WATCHED = ("exec", "compile", "subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "import")
_LONGEST = 1 << 20  # bytes of an input
_PATIENCE = 20  # seconds of processor time for one input


def plain_seeds() -> list[bytes]:
    """Pickles with many opcodes and protocols, good and evil."""
    values = [{"a": [1, 2.5, None, True, b"x" * 300, "y" * 300, (1, 2, 3, 4), {"n": ()}]}, 1 << 200, list(range(300))]
    good = [pickle.dumps(value, protocol) for value in values for protocol in range(6)]
    evil = [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02}r\xff\xff\xff\x7f.",
        b"\x80\x02})" + b"\x85" * 2000 + b"Ns.",  # a key so deep that to hash it overflows the stack
        b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",  # a key that takes for ever to hash
        b"\x80\x02}\x8b\x00\x20\x00\x00" + b"\x01" * 8192 + b"Ns.",  # a number too long to print
        b"\x80\x02](NNNNe0q\x00ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 9 + b".",
    ]
    return good + evil


def torch_seeds() -> tuple[list[bytes], list[bytes]]:
    """Real checkpoints, and the pickles inside the zip ones."""
    import torch

    parameter = torch.nn.Parameter(torch.ones(2))
    state = {"a": torch.ones(3, 2).t(), "b": torch.ones(4, dtype=torch.uint16), "c": parameter, "tied": parameter}
    state |= {"wide": torch.ones(1).expand(3, 5), "every other": torch.arange(9)[::2], "one": torch.tensor(1.0)}
    files, pickles = [], []
    for value in (state, {"generator": state, "epoch": 3}, torch.nn.Linear(2, 2).state_dict()):
        for options in ({}, {"_use_new_zipfile_serialization": False}):
            stream = io.BytesIO()
            torch.save(value, stream, **options)
            files.append(stream.getvalue())
        with zipfile.ZipFile(io.BytesIO(files[-2])) as archive:
            pickles.append(archive.read("archive/data.pkl"))
    return files, pickles


def mutate(data: bytes, source: random.Random) -> bytes:
    """A few small changes: bytes set, cut out, doubled, put in, lengths made huge."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 3, 8))):
        place = source.randrange(len(changed) + 1)
        action = source.randrange(6) if source.random() < 0.98 else 6
        if action == 0 and place < len(changed):
            changed[place] = source.randrange(256)
        elif action == 1:
            del changed[place : place + source.randint(1, 16)]
        elif action == 2:
            changed[place:place] = changed[place : place + source.randint(1, 32)]
        elif action == 3:
            changed[place:place] = source.randbytes(source.randint(1, 6))
        elif action == 4:
            changed[place : place + 4] = source.choice((b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", bytes(4)))
        elif action == 6:
            changed[place:place] = changed[place : place + source.choice((1, 2, 5, 9))] * source.choice(
                (50, 2000, 30000)
            )
        else:
            changed[place:place] = bytes([source.choice(b"}](0.120RbQhjqrtu\x81\x85\x86\x87\x88\x8c\x8d\x93\x94\x95")])
    return bytes(changed[:_LONGEST]) or b"\x80"


def in_archive(data: bytes) -> bytes:
    """A zip container around a pickle, with right checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/byteorder", b"little")
        archive.writestr("x/data/0", bytes(48))
    return stream.getvalue()


def load_corpus(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """Return the checkpoints and the pickles of a corpus, made anew where the folder is missing."""
    if not folder.is_dir():
        files, pickles = torch_seeds()
        folder.mkdir(parents=True)
        for kind, contents in (("pth", files), ("pkl", pickles + plain_seeds())):
            for content in contents:
                (folder / f"{hashlib.sha256(content).hexdigest()[:12]}.{kind}").write_bytes(content)
    return tuple([path.read_bytes() for path in sorted(folder.glob(f"*.{kind}"))] for kind in ("pth", "pkl"))  # type: ignore[return-value]


def attempt(data: bytes, folder: Path) -> str:
    """Read, and convert what can be read; return ``converted`` or the error's code."""
    wrapper = "generator" if b"generator" in data else ""
    try:
        others = read_tables(io.BytesIO(data), wrapper).others
        (folder / "x.pth").write_bytes(data)
        options = {"wrapper": wrapper, "drop": [*{"epoch"} & others.keys()], "remember": False}
        done = convert_file(folder / "x.pth", folder / "x.safetensors", **options)
    except PortKitError as error:
        return error.code
    with safe_open(folder / "x.safetensors", "numpy") as written:
        if len(written.keys()) != done.tensors:
            raise AssertionError(f"{done.tensors} tensors were written, {len(written.keys())} are there")
    return "converted"


def out_of_patience(*_: object) -> None:
    """An input takes too long."""
    raise TimeoutError(f"more than {_PATIENCE} s")


def fuzz(seconds: float, seed: int, findings: Path, corpus: Path) -> dict[str, object]:
    """Run for so many seconds of processor time."""
    files, pickles = load_corpus(corpus)
    source, rounds, slowest = random.Random(seed), 0, 0.0
    outcomes: dict[str, int] = {}
    watching, seen = False, []
    for codec in ("cp437", "raw_unicode_escape", "unicode_escape"):
        "".encode(codec)  # codecs of old zip names and text opcodes are imported when they are first needed
    sys.addaudithook(
        lambda event, arguments: seen.append(f"{event} {arguments[:1]}") if watching and event in _WATCHED else None
    )
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.signal(signal.SIGPROF, out_of_patience)
    with (findings / "last").open("w+b") as stream:
        stream.truncate(_LONGEST + 4096)
        last = mmap.mmap(stream.fileno(), 0)  # survives the process
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        for file in files:
            attempt(file, Path(place))  # imports what is imported late
        end = time.process_time() + seconds
        while time.process_time() < end:
            if source.random() < 0.4:
                data = mutate(source.choice(files), source)
            else:
                data = in_archive(mutate(source.choice(pickles), source))
            last[: len(data)] = data
            begun = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, _PATIENCE)
            watching = True
            try:
                outcome = attempt(data, Path(place))
            except BaseException as error:  # noqa: B036 - any other end is what is looked for
                outcome = f"FINDING {type(error).__name__}"
                (findings / f"{rounds}.pth").write_bytes(data)
            watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            slowest = max(slowest, time.process_time() - begun)
            rounds += 1
    (findings / "last").unlink()
    return {
        "rounds": rounds,
        "cpu_seconds": seconds,
        "corpus": {"files": len(files) + len(pickles), "bytes": sum(map(len, files + pickles))},
        "outcomes": dict(sorted(outcomes.items())),
        "audited_events": sorted(set(seen)),
        "slowest_seconds": round(slowest, 3),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Fuzz and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz_findings"))
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz_corpus"))
    arguments = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"
    arguments.findings.mkdir(exist_ok=True, parents=True)
    result = fuzz(arguments.seconds, arguments.seed, arguments.findings, arguments.corpus)
    print(json.dumps(result, indent=1))
    if any(outcome.startswith("FINDING") for outcome in result["outcomes"]):  # type: ignore[attr-defined]
        sys.exit(1)
    if not any(arguments.findings.iterdir()):
        arguments.findings.rmdir()


if __name__ == "__main__":
    main()
