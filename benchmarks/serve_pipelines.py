"""Serve tiny pipelines of diffusers with ``port-kit run DIR --serve``, send each a request, and print a line of JSON.

python benchmarks/serve_pipelines.py [PIPELINE ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

#: Options of the server by pipeline: one of each modality, on one rank or two.
SERVED = {
    "FluxPipeline": ("--ulysses-degree", "2"),
    "StableDiffusion3Img2ImgPipeline": (),
    "WanPipeline": ("--cfg-parallel-size", "2"),
    "WanImageToVideoPipeline": (),
    "LTXImageToVideoPipeline": (),
    "StableAudioPipeline": (),
}


def serve(name: str, options: tuple[str, ...]) -> dict[str, Any]:
    """Start a server, send a request, decode the answer, and stop the server."""
    from port_kit.autoparallel.host.index import PipelineIndex
    from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
    from port_kit.autoparallel.tiny_pipelines.server import ask, decode, run_server

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        model = write_pipeline(name, CASES[name], Path(folder) / "model")
        output = PipelineIndex.read(model).output_type
        with run_server(model, *options, folder=Path(folder)) as server:
            ready = time.monotonic()
            response = ask(server.url, CASES[name], output)
    return {
        "pipeline": name,
        "options": " ".join(options),
        "endpoint": response.url.path,
        "status": response.status_code,
        "file": decode(response, output) if response.status_code == 200 else response.text[:500],
        "start_seconds": round(ready - started, 1),
        "request_seconds": round(time.monotonic() - ready, 1),
    }


def main() -> int:
    """Run the command line; return 1 if an answer is no file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pipelines", nargs="*")
    rows = []
    for name in parser.parse_args().pipelines or SERVED:
        rows.append(serve(name, SERVED.get(name, ())))
        print(json.dumps(rows[-1]), flush=True)
    return 0 if all(row["status"] == 200 for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
