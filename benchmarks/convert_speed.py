"""A large .pth to safetensors: this kit against `cp`, and against `torch.load` with `save_file`.

All run in turns on the same file with a warm cache; the smallest of the rounds counts. Times are of the work alone
(imports left out; ours includes fsync and the CRC check), memory is the peak of the whole process (VmHWM), and the
result is compared tensor by tensor.

    python benchmarks/convert_speed.py --megabytes 2000 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_PEAK = "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) / 1024"
SCRIPTS = {
    "port-kit": "from port_kit.checkpoint.convert import convert_file as work\n",
    "torch.load and save_file": (
        "import torch, safetensors.torch\n"
        "def work(source, target): safetensors.torch.save_file(torch.load(source), target)\n"
    ),
    "torch.load(mmap) and save_file": (
        "import torch, safetensors.torch\n"
        "def work(source, target): safetensors.torch.save_file(torch.load(source, mmap=True), target)\n"
    ),
}


def make_checkpoint(path: Path, megabytes: int) -> None:
    """Tensors of three dtypes, the largest of 200 MB, as a training run would save them."""
    script = (
        "import sys, torch\n"
        f"rest, n, state = {megabytes * 10**6}, 0, {{}}\n"
        "while rest > 0:\n"
        "    dtype = (torch.bfloat16, torch.float32, torch.float16)[n % 3]\n"
        "    size = min(rest, 200_000_000 if n == 5 else 5_000_000) // 4\n"
        "    state[f'blocks.{n}.weight'] = torch.randn(size).to(dtype)\n"
        "    rest -= state[f'blocks.{n}.weight'].nbytes\n"
        "    n += 1\n"
        "torch.save(state, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)


def run(prelude: str, source: Path, target: Path) -> tuple[float, float]:
    """Return seconds and peak resident MiB of one conversion in a fresh process."""
    script = (
        f"import time\n{prelude}begun = time.perf_counter()\nwork({str(source)!r}, {str(target)!r})\n"
        f"print(time.perf_counter() - begun, {_PEAK})"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    seconds, peak = done.stdout.split()
    return round(float(seconds), 3), round(float(peak), 1)


def copy(source: Path, target: Path, *, durable: bool) -> tuple[float, float]:
    """The limit: `cp`, alone and with the fsync that the conversion also does."""
    begun = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    if durable:
        descriptor = os.open(target, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    return round(time.perf_counter() - begun, 3), 0.0


def same(first: Path, second: Path) -> bool:
    """Whether two safetensors files hold the same tensors."""
    from safetensors import safe_open

    with safe_open(first, "pt") as left, safe_open(second, "pt") as right:
        names = set(left.keys())
        equal = all(left.get_tensor(name).equal(right.get_tensor(name)) for name in names)
        return names == set(right.keys()) and equal


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=int, default=2, help="rounds of the slow peers")
    arguments = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {}
    equal = True
    with tempfile.TemporaryDirectory(prefix="port-kit-") as name:
        source, target = Path(name) / "source.pth", Path(name) / "target.safetensors"
        reference = Path(name) / "reference.safetensors"
        make_checkpoint(source, arguments.megabytes)
        run(SCRIPTS["torch.load(mmap) and save_file"], source, reference)
        for number in range(arguments.rounds):
            for peer, durable in (("cp", False), ("cp and fsync", True)):
                results.setdefault(peer, []).append(copy(source, target, durable=durable))
                target.unlink()
            for peer, script in SCRIPTS.items():
                if peer == "port-kit" or number < arguments.peers:
                    results.setdefault(peer, []).append(run(script, source, target))
                if peer == "port-kit":
                    equal = equal and same(target, reference)
                target.unlink(missing_ok=True)
    best = {peer: {"seconds": min(v)[0], "peak_mib": max(p for _, p in v)} for peer, v in results.items()}
    ours = best["port-kit"]["seconds"]
    ratios = {f"ratio_to_{peer}": round(ours / best[peer]["seconds"], 2) for peer in ("cp", "cp and fsync")}
    print(json.dumps({"megabytes": arguments.megabytes, "equal": equal, **ratios, "best": best}, indent=1))
    print(json.dumps({peer: [seconds for seconds, _ in v] for peer, v in results.items()}), file=sys.stderr)


if __name__ == "__main__":
    main()
