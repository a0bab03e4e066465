"""run_fake_original.py FAKE_ORIGINAL GOLDENS: print {case: difference between the fake and the original's records}."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from port_kit.models.wan.parity.original_runner import be_exact, exact_attention

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    be_exact()
    from dreamid_omni.modules import fusion

    fusion.flash_attention = exact_attention
    folder = Path(sys.argv[2]) / "fusion"
    towers = json.loads((folder / "config.json").read_text())
    model = fusion.FusionModel(towers["video"], towers["audio"])
    model.set_rope_params()
    differences = {}
    for path in sorted(folder.glob("*/inputs.json")):
        meta, inputs = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        lone = meta.get("only") or meta["batch"] > 1 or (meta["family"] != "ovi" and not meta["ref_ip_lengths"])
        if lone:
            continue
        state = load_file(path.parent / meta["state"])
        model.load_state_dict({name: value.float() for name, value in state.items()})
        extra = {name: meta[name] for name in ("first_frame_is_clean", "slg_layer") if name in meta}
        if scaling := meta.get("freqs_scaling"):
            value = torch.tensor(scaling["num"] / scaling["den"], dtype=getattr(torch, scaling["dtype"]))
            extra = {"freqs_scaling": value, **{name: meta[name] for name in ("ref_ip_lengths", "ref_audio_lengths")}}
        lists = [[inputs[f"{name}.0"]] for name in ("vid", "audio", "vid_context", "audio_context")]
        lengths = inputs["vid.0"][0].numel() // 4, len(inputs["audio.0"])
        with torch.inference_mode():
            flows = model(*lists[:2], inputs["t"], *lists[2:], *lengths, **extra)
        expected = load_file(path.parent / "outputs_fp32.safetensors")
        gaps = [
            (flow[0] - expected[f"{name}.0"]).abs().max() for name, flow in zip(("vid", "audio"), flows, strict=True)
        ]
        differences[meta["case"]] = float(max(gaps))
    print(json.dumps(differences))
