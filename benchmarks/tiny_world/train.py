"""Trains the tiny Ovi on the tiny world, part by part, each for a number of seconds.

    python -m benchmarks.tiny_world.train --folder STATES --output RESULTS \
        --stage text_encoder=0 --stage vae=240 --stage audio_vae=60 --stage vocoder=150 --stage transformer=240

Stages run in the order given. ``vae`` and ``audio_vae``, ``vocoder`` do not need each other and may run in two
processes at once; ``vocoder`` reads the audio VAE, ``transformer`` all others, ``lora`` the transformer.

``STATES`` holds what continues an interrupted training, optimizers included; a stage that finds its state there goes
on. ``RESULTS`` gets a file per part, in bfloat16, and ``log.jsonl``. ``--from-results FOLDER`` starts from the results
of an earlier training instead; results that a stage needs and that are not in ``RESULTS`` are copied from there.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.tiny_world.stepper import Options

_SEED = 7


def _stages() -> dict[str, Callable[[Options, float], None]]:
    from benchmarks.tiny_world import codecs, flows, lora

    return {
        "text_encoder": flows.write_text_encoder,
        "vae": codecs.train_vae,
        "audio_vae": codecs.train_audio_vae,
        "vocoder": codecs.train_vocoder,
        "transformer": flows.train_transformer,
        "lora": lora.train_lora,
    }


def _stage(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in ("text_encoder", "vae", "audio_vae", "vocoder", "transformer", "lora"):
        raise argparse.ArgumentTypeError(f"unknown stage {name!r}")
    return name, float(seconds)


def _options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--folder", type=Path, required=True, help="states")
    made.add_argument("--output", type=Path, required=True, help="results and log")
    made.add_argument("--stage", type=_stage, action="append", required=True, metavar="NAME=SECONDS")
    made.add_argument("--from-results", type=Path, help="folder of results to start from")
    made.add_argument("--until", type=float, default=math.inf, metavar="EPOCH", help="time at which all steps end")
    made.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="save states between")
    made.add_argument("--batch", type=int, default=0, help="clips per step of the vocoder, such as 8 on a CPU")
    made.add_argument("--no-graphs", action="store_true", help="do not capture CUDA graphs")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def main() -> None:
    """Run the stages."""
    given = _options().parse_args()
    from port_kit.runtime.single_process import single_rank

    options = Options(
        folder=given.folder,
        output=given.output,
        device=torch.device(given.device),
        graphs=not given.no_graphs,
        save_every=given.save_every,
        results=given.from_results,
        until=given.until,
        batch=given.batch,
    )
    if options.results is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        for path in options.results.glob("*.safetensors"):
            if not (options.output / path.name).exists():
                shutil.copyfile(path, options.output / path.name)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with single_rank(torch.float32, options.device, default_device=False):
        stages = _stages()
        for name, seconds in given.stage:
            torch.manual_seed(_SEED)
            options.log(stage=name, begin=seconds, device=str(options.device))
            stages[name](options, seconds)


if __name__ == "__main__":
    main()
