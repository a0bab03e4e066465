"""Assemble DreamID-Omni's model directory: plan, fetch, verify, convert, lock, and model_index.json last.

python download_dreamid_omni.py --output-dir dreamid_omni [--dry-run]      # all options: --help
python download_dreamid_omni.py --output-dir tiny --tiny                   # a tiny model from a loopback Hub
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from port_kit.cli.download import main


def download_tiny() -> None:
    """Serve a tiny checkpoint in the original formats on the loopback interface, and download it as the real one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", required=True)
    parser.add_argument("--output-dir", default="dreamid_omni_tiny")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    from port_kit.download import download
    from port_kit.models.dreamid_omni.recipe import RECIPE
    from port_kit.testing.hub import Hub
    from port_kit.testing.tiny_fusion import tiny_fusion_model

    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        tiny = tiny_fusion_model(RECIPE, Path(folder))
        with Hub(tiny.repositories) as hub:
            report = download(
                RECIPE.with_(configs=tiny.configs),
                options.output_dir,
                dry_run=options.dry_run,
                endpoint=hub.endpoint,
                token=False,
                use_cache=False,
            )
    if options.dry_run and report.plan is not None:
        print(report.plan.describe())
    else:
        print(
            f"{report.directory} is complete: {len(report.fetched)} files, {report.network_bytes / 1e6:.1f} MB fetched"
        )


if __name__ == "__main__":
    download_tiny() if "--tiny" in sys.argv else main("dreamid_omni")
