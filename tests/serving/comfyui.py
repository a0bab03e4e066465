"""The requests that vLLM-Omni's nodes for ComfyUI send for the examples' workflows.

The nodes are those of ``apps/ComfyUI-vLLM-Omni`` in vLLM-Omni's repository. A workflow in ComfyUI's API format names
their inputs, and the form has what ``VLLMOmniGenerateVideo`` makes of them.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import av
import httpx
from PIL import Image

#: Inputs of the nodes that have to be given, as ComfyUI requires.
REQUIRED = {
    "VLLMOmniGenerateVideo": {"url", "model", "prompt", "negative_prompt", "width", "height", "fps", "duration"},
    "VLLMOmniDiffusionSampling": {
        *("n", "num_inference_steps", "guidance_scale", "true_cfg_scale", "vae_use_slicing", "vae_use_tiling", "seed")
    },
    "VLLMOmniVideoReferences": set(),
    "LoadImage": {"image"},
    "LoadAudio": {"audio"},
    "SaveVideo": {"video", "filename_prefix", "format", "codec"},
}
#: Further inputs of the nodes.
OPTIONAL = {
    "VLLMOmniGenerateVideo": {"frame", "references", "sampling_params", "lora", "model_params"},
    "VLLMOmniVideoReferences": {
        f"{kind}_{n}" for kind, most in (("image", 9), ("audio", 3)) for n in range(1, most + 1)
    },
}
Files = list[tuple[str, tuple[str, bytes, str]]]


class Workflow:
    """A workflow in ComfyUI's API format, whose media are files of a folder.

    Args:
        path: the JSON file.
        folder: ComfyUI's folder of inputs.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.nodes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.folder = folder
        for node in self.nodes.values():
            kind, given = node["class_type"], set(node["inputs"])
            assert REQUIRED[kind] <= given <= REQUIRED[kind] | OPTIONAL.get(kind, set()), (kind, given)

    def inputs(self, kind: str) -> dict[str, Any]:
        """Return the inputs of the only node of a kind."""
        (found,) = [node["inputs"] for node in self.nodes.values() if node["class_type"] == kind]
        return found

    def linked(self, link: list[Any]) -> Any:
        """Return the inputs of the node that a link names; of a node that loads a file, the file."""
        node = self.nodes[link[0]]
        if node["class_type"] == "LoadImage":
            return _png(self.folder / node["inputs"]["image"])
        if node["class_type"] == "LoadAudio":
            return _mp3(self.folder / node["inputs"]["audio"])
        return node["inputs"]

    def request(self, **changed: Any) -> tuple[dict[str, str], Files]:
        """Return the form, with other values of the nodes."""
        video = {**self.inputs("VLLMOmniGenerateVideo"), **changed}
        sampling = {**self.linked(video["sampling_params"])}
        sampling = {name: changed.get(name, value) for name, value in sampling.items()}
        if sampling["seed"] < 0:
            del sampling["seed"]
        fields = {name: video[name] for name in ("model", "prompt", "width", "height", "fps")}
        fields["num_frames"] = max(1, round(video["duration"] * video["fps"]))
        if video["negative_prompt"]:
            fields["negative_prompt"] = video["negative_prompt"]
        files: Files = []
        if "frame" in video:
            files.append(("input_reference", ("image.png", self.linked(video["frame"]), "image/png")))
        references = self.linked(video["references"]) if "references" in video else {}
        for kind, suffix, media_type in (("image", "png", "image/png"), ("audio", "mp3", "audio/mpeg")):
            for name in sorted(name for name in references if name.startswith(kind)):
                content = self.linked(references[name])
                files.append(("input_references", (f"{name}.{suffix}", content, media_type)))
        return {name: str(value) for name, value in (fields | sampling).items()}, files


def run(workflow: Path, folder: Path, http: httpx.Client, **changed: Any) -> bytes:
    """Send the request of a workflow as the nodes do, as a job, and return its video."""
    fields, files = Workflow(workflow, folder).request(model=http.get("/v1/models").json()["data"][0]["id"], **changed)
    answer = http.post("/v1/videos", data=fields, files=files)
    assert answer.status_code == 200, answer.text
    job = f"/v1/videos/{answer.json()['id']}"
    while (record := http.get(job).json())["status"] in ("queued", "in_progress"):
        time.sleep(0.2)
    assert record["status"] == "completed", record
    content = http.get(f"{job}/content").content
    assert http.delete(job).status_code == 200
    return content


def _png(path: Path) -> bytes:
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _mp3(path: Path) -> bytes:
    buffer = io.BytesIO()
    with av.open(str(path)) as source, av.open(buffer, "w", format="mp3") as target:
        stream = target.add_stream("libmp3lame", rate=source.streams.audio[0].rate)
        resampler = av.AudioResampler(stream.format, stream.layout, stream.rate)
        for frame in (*source.decode(audio=0), None):
            for resampled in resampler.resample(frame):
                target.mux(stream.encode(resampled))
        target.mux(stream.encode())
    return buffer.getvalue()
