"""Kill a download of four repositories at random moments, run it again, and count what was fetched twice.

Each trial starts a download in an empty directory, kills it with SIGKILL after a random share of the time that a whole
run takes, and runs it again to the end. The final files must be the same every time, nothing may be left over, and what
the server sent beyond one copy is the waste. One checkpoint is converted on the way.

    python benchmarks/kill_storm.py --trials 100 --megabytes 24
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import tempfile
import time
import zipfile
from pathlib import Path

from port_kit.download import FileRule, Policy, Recipe, Repository
from port_kit.testing.crash_injection import ForkServer
from port_kit.testing.hub import Hub

POLICY = {"segment_size": 4 << 20, "connections": 4, "base": 0.05}


def make_checkpoint(path: Path, size: int) -> bytes:
    """A torch checkpoint of one float32 tensor, written without torch so that the storm starts at once."""
    count = size // 4
    head = (
        b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storage"
    )
    storage = b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ" + count.to_bytes(4, "little") + b"tQ"
    shape = b"K\x00J" + count.to_bytes(4, "little") + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
    entries = {"x/data.pkl": head + storage + shape, "x/data/0": random.Random(9).randbytes(size)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            start = archive.fp.tell() + 30 + len(name) + 4  # type: ignore[union-attr]
            padding = -start % 64
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            archive.writestr(info, content)
    return path.read_bytes()


def make_repositories(folder: Path, size: int) -> dict[str, dict[str, bytes]]:
    """Three quarters in one file, the rest in a converted checkpoint and many small files."""
    source = random.Random(1)
    return {
        "org/weights": {"model.safetensors": source.randbytes(size * 3 // 4)},
        "org/vae": {"vae.pth": make_checkpoint(folder / "vae.pth", size // 8)},
        "org/audio": {f"part{n}.safetensors": source.randbytes(size // 40) for n in range(4)},
        "org/words": {f"words/{n}.txt": source.randbytes(2000) for n in range(12)},
    }


def make_recipe(hub: Hub) -> Recipe:
    """Everything of the four."""
    rules = {
        "org/weights": FileRule("model.safetensors", "transformer"),
        "org/vae": FileRule("vae.pth", "vae", convert=True),
        "org/audio": FileRule("*.safetensors", "audio_vae"),
        "org/words": FileRule("words/*", "tokenizer"),
    }
    repositories = tuple(Repository(name, (rule,), hub.commit(name)) for name, rule in rules.items())
    index = {"_class_name": "Storm", "_diffusers_version": "0.40.0"}
    return Recipe("storm", repositories, index, {"transformer": {"layers": 1}})


def contents(directory: Path) -> dict[str, str]:
    """sha256 of every file, the kit's state apart from its lock file included."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def storm(hub: Hub, recipe: Recipe, folder: Path, trials: int, seed: int) -> dict[str, object]:
    """All trials; raises where one ends in other files."""
    options = {"endpoint": hub.endpoint, "token": False, "use_cache": False, "policy": Policy(**POLICY)}  # type: ignore[arg-type]
    source, wasted = random.Random(seed), []
    with ForkServer() as fork_server:
        durations = []
        for number in range(3):
            hub.requests.clear()
            begun = time.perf_counter()
            assert fork_server.start(recipe, folder / f"whole{number}", **options).wait() == 0  # type: ignore[arg-type]
            durations.append(time.perf_counter() - begun)
        duration = min(durations)
        expected, total = contents(folder / "whole0"), sum(request.sent for request in hub.requests)
        while len(wasted) < trials:
            number = len(wasted)
            directory = folder / "trial"
            hub.requests.clear()
            child = fork_server.start(recipe, directory, **options)  # type: ignore[arg-type]
            time.sleep(source.random() * duration)
            child.kill()
            if child.wait() == 0:
                shutil.rmtree(directory)
                continue
            assert fork_server.start(recipe, directory, **options).wait() == 0, f"trial {number}"  # type: ignore[arg-type]
            assert contents(directory) == expected, f"trial {number}: {directory}"
            time.sleep(0.02)  # what the server still pushes into a dead connection
            wasted.append(max(0, sum(request.sent for request in hub.requests) - total) / total)
            shutil.rmtree(directory)
    return {
        "kills": trials,
        "bytes_of_a_whole_run": total,
        "seconds_of_a_whole_run": round(duration, 3),
        "wasted_mean": round(statistics.mean(wasted), 4),
        "wasted_worst": round(max(wasted), 4),
        "other_final_files": 0,
        "orphans": 0,
    }


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rate", type=int, default=30, help="megabytes per second and connection")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="port-kit-") as name:
        repositories = make_repositories(Path(name), arguments.megabytes << 20)
        with Hub(repositories, bytes_per_second=arguments.rate * 10**6) as hub:
            result = storm(hub, make_recipe(hub), Path(name), arguments.trials, arguments.seed)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
