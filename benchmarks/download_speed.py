"""One large file from a loopback Hub: this kit against `hf download`, `curl`, and `curl` with a hash after it.

Every contender fetches the same bytes from the same server process into an empty directory, in turns; the smallest of
the rounds counts, and the median of the ratios within each round, which other work on the machine disturbs less. The
kit hashes everything and brings it to the disk (fsync); `hf download` and `curl` do neither. `openssl` is the fastest
hash that a command gives; some systems build `sha256sum` without the processor's own. With --limit the server holds
each connection to a rate. Times are wall times of whole commands, interpreter start included; `inner` leaves it out.
Processor seconds are those of the command, which says more than wall time where other work shares the machine.

    python benchmarks/download_speed.py --megabytes 2000 --rounds 3
    python benchmarks/download_speed.py --megabytes 500 --rounds 1 --limit 50
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from port_kit.testing.hub import Hub

REPOSITORY, NAME = "org/model", "model.safetensors"


def serve(path: Path, limit: int) -> None:
    """The server's process: serve until stdin ends; each line asks how many requests there were."""
    with Hub({REPOSITORY: {NAME: path}}, bytes_per_second=limit * 10**6 or None) as hub:
        print(json.dumps({"endpoint": hub.endpoint, "commit": hub.commit(REPOSITORY)}), flush=True)
        for _ in sys.stdin:
            print(len(hub.requests), flush=True)


def make_file(path: Path, megabytes: int) -> None:
    """Random bytes."""
    with path.open("wb") as stream:
        for _ in range(megabytes):
            stream.write(os.urandom(10**6))


def write_recipe(path: Path, commit: str) -> None:
    """A recipe of the one file."""
    path.write_text(
        f'name = "speed"\nmodel_index = {{ _class_name = "T", _diffusers_version = "1" }}\n[[repositories]]\n'
        f'repo_id = "{REPOSITORY}"\nrevision = "{commit}"\nfiles = [{{ pattern = "{NAME}" }}]\n'
    )


def timed(action: Callable[[], object]) -> float:
    """Seconds of wall time."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def children_cpu() -> float:
    """Processor seconds of all child processes that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def contenders(folder: Path, endpoint: str, commit: str) -> dict[str, Callable[[Path], float]]:
    """How each one fetches into a directory; returns seconds."""
    recipe = folder / "speed.toml"
    write_recipe(recipe, commit)
    url = f"{endpoint}/{REPOSITORY}/resolve/{commit}/{NAME}"
    bin_folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }

    def run(*command: object) -> None:
        subprocess.run([str(part) for part in command], env=environment, check=True, stdout=subprocess.DEVNULL)

    def kit(connections: int) -> Callable[[Path], float]:
        port_kit = bin_folder / "port-kit"
        options = ("--no-cache", "-q", "--connections", connections)
        return lambda target: timed(lambda: run(port_kit, "download", recipe, "--output-dir", target, *options))

    def inner(target: Path) -> float:
        script = (
            "import time; from port_kit.download import *; import port_kit.download.fetch, huggingface_hub.utils\n"
            f"recipe = Recipe.from_toml({str(recipe)!r}); begun = time.perf_counter()\n"
            f"download(recipe, {str(target)!r}, use_cache=False, policy=Policy(connections=1))\n"
            "print(time.perf_counter() - begun)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
        )
        return float(done.stdout)

    def curl(target: Path) -> float:
        return timed(lambda: run("curl", "-s", "--create-dirs", "-o", target / NAME, url))

    def curl_and_hash(target: Path) -> float:
        return curl(target) + timed(lambda: run("sha256sum", target / NAME))

    def curl_and_openssl(target: Path) -> float:
        return curl(target) + timed(lambda: run("openssl", "dgst", "-sha256", target / NAME))

    def hf(target: Path) -> float:
        hf_command = bin_folder / "hf"
        return timed(lambda: run(hf_command, "download", REPOSITORY, NAME, "--revision", commit, "--local-dir", target))

    return {
        "port-kit, 1 connection": kit(1),
        "curl": curl,
        "port-kit, 1 connection, inner": inner,
        "port-kit, 8 connections": kit(8),
        "curl and openssl": curl_and_openssl,
        "curl and sha256sum": curl_and_hash,
        "hf download": hf,
    }


def median_ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """The median over the rounds of one contender's time by another's."""
    return round(statistics.median(a / b for a, b in zip(times[ours], times[theirs], strict=True)), 2)


def measure(folder: Path, endpoint: str, commit: str, rounds: int, ask: Callable[[], int]) -> dict[str, object]:
    """All contenders in turns, and a second run with everything present."""
    times: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, fetch in contenders(folder, endpoint, commit).items():
            target = folder / "out"
            before = children_cpu()
            times.setdefault(name, []).append(round(fetch(target), 3))
            cpu.setdefault(name, []).append(round(children_cpu() - before, 3))
            if name == "port-kit, 8 connections":
                asked = ask()
                times.setdefault("port-kit, everything present", []).append(
                    round(contenders(folder, endpoint, commit)[name](target), 3)
                )
                requests = ask() - asked
            shutil.rmtree(target)
    best = {name: min(values) for name, values in times.items()}
    ours = best["port-kit, 1 connection"]
    return {
        "seconds": best,
        "processor_seconds": {name: min(values) for name, values in cpu.items()},
        "all_rounds": times,
        "requests_of_a_rerun": requests,
        "ratio_to_curl": round(ours / best["curl"], 2),
        "inner_ratio_to_curl": round(best["port-kit, 1 connection, inner"] / best["curl"], 2),
        "ratio_to_curl_median": median_ratio(times, "port-kit, 1 connection", "curl"),
        "ratio_to_curl_and_openssl": round(ours / best["curl and openssl"], 2),
        "ratio_to_curl_and_openssl_median": median_ratio(times, "port-kit, 1 connection", "curl and openssl"),
        "ratio_to_curl_and_sha256sum": round(ours / best["curl and sha256sum"], 2),
        "times_faster_than_hf_download_1_connection": round(best["hf download"] / ours, 2),
        "times_faster_than_hf_download": round(best["hf download"] / best["port-kit, 8 connections"], 2),
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=0, help="megabytes per second and connection; 0 for none")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.limit)
        return
    with tempfile.TemporaryDirectory(prefix="port-kit-") as name:
        folder = Path(name)
        make_file(folder / "source.bin", arguments.megabytes)
        command = [sys.executable, __file__, "--serve", str(folder / "source.bin"), "--limit", str(arguments.limit)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None and server.stdout is not None
            place = json.loads(server.stdout.readline())
            stdin, stdout = server.stdin, server.stdout

            def ask() -> int:
                stdin.write("\n")
                stdin.flush()
                return int(stdout.readline())

            result = measure(folder, place["endpoint"], place["commit"], arguments.rounds, ask)
            server.stdin.close()
    print(json.dumps({"megabytes": arguments.megabytes, "limit_mb_s": arguments.limit, **result}, indent=1))


if __name__ == "__main__":
    main()
