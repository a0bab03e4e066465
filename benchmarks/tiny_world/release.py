"""Packs the results of a training into the release file of :mod:`port_kit.testing.tiny_trained`, or unpacks it.

python -m benchmarks.tiny_world.release RESULTS [--output FILE]
python -m benchmarks.tiny_world.release RESULTS --unpack    # for `train --from-results RESULTS`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from port_kit.testing.tiny_trained import METADATA, RELEASE, read_release

LIMIT = 10_000_000  # bytes


def pack(results: Path, output: Path) -> int:
    """Write the release file; return its size.

    Raises:
        ValueError: it is larger than a package should have.
    """
    from safetensors.torch import save_file

    from benchmarks.tiny_world import parts
    from benchmarks.tiny_world.grammar import words
    from port_kit.runtime.single_process import single_rank

    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, Any] = {}
    with single_rank(torch.float32):
        for name in parts.PARTS:
            module, config = parts.load(results, name, torch.device("cpu"))
            if config:
                configs[name] = config
            tensors |= {f"{name}/{key}": value for key, value in parts.original(name, module).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output, metadata={METADATA: json.dumps({"configs": configs, "words": words()})})
    size = output.stat().st_size
    if size > LIMIT:
        raise ValueError(f"{output} has {size} bytes; at most {LIMIT} belong into the package")
    return size


def unpack(release: Path, results: Path) -> None:
    """Write the parts of a release as results of a training."""
    from benchmarks.tiny_world import parts
    from port_kit.runtime.single_process import single_rank

    values, facts = read_release(release)
    with single_rank(torch.float32):
        for name in parts.PARTS:
            config = facts["configs"].get(name, {})
            module = parts.build(name, torch.device("cpu"), config)
            parts.fill_with(module, name, values[name])
            parts.save(results, name, module, config, {"from": release.name})


def main() -> None:
    """Pack the results, or unpack a release."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("results", type=Path)
    made.add_argument("--output", type=Path, default=RELEASE, help="the release file")
    made.add_argument("--unpack", action="store_true", help="write results from the release file")
    given = made.parse_args()
    if given.unpack:
        unpack(given.output, given.results)
        return
    print(f"{given.output}: {pack(given.results, given.output)} bytes")


if __name__ == "__main__":
    main()
