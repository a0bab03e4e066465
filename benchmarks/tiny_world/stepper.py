"""Steps of an optimizer for a number of seconds: captured as CUDA graphs, logged, saved and continued."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Losses = dict[str, Tensor]
_WARM_UP = 4  # steps before a capture
_READ_EVERY = 10  # steps between readings of the clock and of the losses
_CONTINUED = 0.4  # part of the peak of the learning rate; the peak itself destroys what was learned


@dataclass(frozen=True)
class Options:
    """Options that all stages share.

    Attributes:
        folder: of the states, to continue a training.
        output: of the results and of the log.
        device: to train on.
        graphs: capture steps as CUDA graphs.
        save_every: steps between saved states; 0 to save at the end only.
        results: folder of results to start from; None to start anew or from the states.
        until: seconds since the epoch at which steps end, whatever a stage was given.
        batch: clips per step of the vocoder; 0 for the stage's own number, few on a CPU.
    """

    folder: Path
    output: Path
    device: torch.device
    graphs: bool = True
    save_every: int = 0
    results: Path | None = None
    until: float = math.inf
    batch: int = 0

    def result(self, name: str) -> Path | None:
        """Return the file of a result to start from, None if there is none."""
        path = self.results / f"{name}.safetensors" if self.results is not None else None
        return path if path is not None and path.is_file() else None

    @property
    def on_gpu(self) -> bool:
        """Return True on a GPU."""
        return self.device.type == "cuda"

    def autocast(self) -> torch.autocast:
        """Return a context of bfloat16 on a GPU; a CPU computes in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu, cache_enabled=False)

    def log(self, **facts: Any) -> None:
        """Write one JSON line to the log and to standard output."""
        line = json.dumps({"at": round(time.time(), 1), **facts})
        print(line, flush=True)
        self.output.mkdir(parents=True, exist_ok=True)
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Stepper:
    """Trains parameters with AdamW.

    Args:
        name: of the stage.
        parameters: to train, by name.
        losses: functions that return the losses by name; ``loss`` is minimized. Step i uses the i-th of them, in turn.
        options: of the training.
        rate: peak of the learning rate.
        after: called after each step, within the captured graph.
        average: decay of a moving average of the parameters; 0 for none.
        decay: of the weights.
    """

    def __init__(
        self,
        name: str,
        parameters: dict[str, Tensor],
        losses: Sequence[Callable[[], Losses]],
        options: Options,
        *,
        rate: float,
        after: Callable[[], None] | None = None,
        average: float = 0.0,
        decay: float = 0.0,
    ) -> None:
        self.name, self.losses, self.options, self.rate, self.after = name, losses, options, rate, after
        self.names, self.parameters = list(parameters), list(parameters.values())
        for value in self.parameters:
            value.requires_grad_(True)
        self.decay_of_average = average
        self.averages = [value.detach().clone() for value in self.parameters] if average else []
        self.step, self.seconds = 0, 0.0
        if self._state_path.is_file() or options.result(name) is not None:
            self.rate *= _CONTINUED
        gpu = options.on_gpu
        self.lr: Any = torch.tensor(0.0, device=options.device) if gpu else 0.0
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.lr, betas=(0.9, 0.98), weight_decay=decay, fused=gpu, capturable=gpu
        )
        if gpu:
            self.lr = self.optimizer.param_groups[0]["lr"]
        self.graphs: dict[Callable[[], Losses], tuple[torch.cuda.CUDAGraph, Losses]] = {}
        self._restore()

    # -- states --------------------------------------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return self.options.folder / f"{self.name}.state.pt"

    def _restore(self) -> None:
        if not self._state_path.is_file():
            return
        state = torch.load(self._state_path, map_location=self.options.device, weights_only=True)
        with torch.no_grad():
            for key, value in zip(self.names, self.parameters, strict=True):
                value.copy_(state["parameters"][key])
            for average, value in zip(self.averages, state["averages"], strict=False):
                average.copy_(value)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = rate
        self.step, self.seconds = state["step"], state["seconds"]

    def save_state(self) -> None:
        """Write what continues this training."""
        self.options.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "parameters": dict(zip(self.names, (value.detach() for value in self.parameters), strict=True)),
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self._state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._state_path)

    # -- steps ---------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Train for a number of seconds, the capture included; the rate warms up, then falls to 2 % of its peak.

        A training that goes on from a state or a result starts at a part of the peak.
        """
        seconds = max(1.0, min(seconds, self.options.until - time.time()))
        begin, before = time.perf_counter(), self.seconds
        first = self.step
        self._set_rate(0.0, first)
        if self.options.on_gpu and self.options.graphs:
            self._capture()
            self.options.log(stage=self.name, captured=len(self.graphs), seconds=round(time.perf_counter() - begin, 1))
        for losses in self._steps():
            if self.step % _READ_EVERY and self.options.on_gpu:
                continue
            values = {key: float(value) for key, value in losses.items()}  # waits for the device
            elapsed = time.perf_counter() - begin
            self.seconds = before + elapsed
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(f"{self.name}: the loss is {values['loss']} at step {self.step}")
            last = elapsed >= seconds
            if last or (self.step // _READ_EVERY) % 20 == 1 or not self.options.on_gpu:
                shown = {key: round(value, 5) for key, value in values.items()}
                self.options.log(stage=self.name, step=self.step, seconds=round(self.seconds, 1), **shown)
            if last:
                break
            self._set_rate(elapsed / seconds, first)
            if self.options.save_every and self.step % self.options.save_every == 0:
                self.save_state()
        self.graphs.clear()
        self.save_state()

    def _set_rate(self, share: float, first: int) -> None:
        warm = min(1.0, (self.step - first + 1) / 100, share / 0.02 + 0.02)
        rate = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))
        if isinstance(self.lr, Tensor):
            self.lr.fill_(rate)
        else:
            self.optimizer.param_groups[0]["lr"] = rate

    def _steps(self) -> Iterator[Losses]:
        while True:
            loss = self.losses[self.step % len(self.losses)]
            self.step += 1
            if self.graphs:
                graph, losses = self.graphs[loss]
                graph.replay()
            else:
                losses = self._one(loss)
            yield losses

    def _one(self, loss: Callable[[], Losses]) -> Losses:
        self.optimizer.zero_grad(set_to_none=True)
        losses = loss()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        idle = [name for name, value in zip(self.names, self.parameters, strict=True) if value.grad is None]
        if idle:
            raise RuntimeError(f"{self.name}: no gradient reaches {len(idle)} parameters, such as {idle[0]}")
        self.optimizer.step()
        if self.after is not None:
            self.after()
        if self.averages:
            torch._foreach_lerp_(self.averages, [v.detach() for v in self.parameters], 1 - self.decay_of_average)
        return {key: value.detach() for key, value in losses.items()}

    def _capture(self) -> None:
        """Capture one graph per loss, after steps that allocate and tune; graphs share memory, none reads another's."""
        pool = torch.cuda.graph_pool_handle()
        for loss in dict.fromkeys(self.losses):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._one(loss)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            with torch.cuda.graph(graph, pool=pool):
                losses = self._one(loss)
            self.graphs[loss] = graph, losses

    def use_averages(self) -> None:
        """Put the moving averages in place of the parameters, for good."""
        with torch.no_grad():
            for value, average in zip(self.parameters, self.averages, strict=bool(self.averages)):
                value.copy_(average)
