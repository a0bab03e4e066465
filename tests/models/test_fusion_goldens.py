"""The fusion transformer against recorded branches of the original, in float32 and bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from port_kit.models.wan.parity import activation_hooks, transformer_cases
from port_kit.models.wan.parity.transformer_cases import TransformerGolden, recorded_forwards
from port_kit.models.wan.transformer.config import OVI_TRANSFORMER_CONFIG, TRANSFORMER_CONFIG, FusionConfig
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.models.wan.transformer.model import WanFusionTransformer
from port_kit.parity import run_case
from port_kit.runtime.single_process import single_rank
from tests.helpers import raises

CASES = (
    "dreamid_no_refs",
    "dreamid_one_ref_odd",
    "dreamid_padded",
    "dreamid_two_refs",
    "ovi_audio_only",
    "ovi_batch2_padded",
    "ovi_i2v_first_frame_clean",
    "ovi_slg",
    "ovi_t2v",
    "ovi_video_only",
)


@pytest.fixture(scope="session")
def cases(goldens: Path) -> dict[str, TransformerGolden]:
    return recorded_forwards(goldens)


def test_every_recorded_case_is_listed(cases: dict[str, TransformerGolden]) -> None:
    assert sorted(cases) == sorted(CASES)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_branch_equals_the_original(name: str, dtype: str, goldens: Path) -> None:
    (case,) = [case for case in transformer_cases.cases(goldens) if case.name == f"fusion/{name} {dtype}"]
    report = run_case(case)
    assert report.ok, (report.first_divergence, report.to_json())
    recorded = sum(key.startswith(("vid.", "audio.")) for key in cases_outputs(goldens, name))
    assert len(report.differences) >= recorded


def cases_outputs(goldens: Path, name: str) -> list[str]:
    return list(load_file(goldens / "fusion" / name / "outputs_fp32.safetensors"))


def test_every_intermediate_value_is_watched(cases: dict[str, TransformerGolden]) -> None:
    case = cases["dreamid_two_refs"]
    with single_rank(torch.float32):
        model = case.build()
        with activation_hooks.record_activations(model) as values:
            case.run(model, 0, torch.float32)
    assert list(values) == [hook.name for hook in activation_hooks.activation_hooks(model.config)]
    assert case.recorded("intermediates_fp32").keys() <= values.keys()


def test_a_divergence_is_named_at_its_first_module(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = TransformerGolden.build

    def damaged(golden: TransformerGolden) -> WanFusionTransformer:
        model = build(golden)
        model.blocks[1].video.ffn.down.weight.data[0, 0] += 1.0
        return model

    monkeypatch.setattr(TransformerGolden, "build", damaged)
    (case,) = [case for case in transformer_cases.cases(goldens) if case.name == "fusion/dreamid_two_refs fp32"]
    report = run_case(case)
    assert not report.ok
    assert report.first_divergence == "vid.block1.out"


def test_a_kept_text_is_projected_once_and_has_no_effect(cases: dict[str, TransformerGolden]) -> None:
    case = cases["ovi_t2v"]
    with single_rank(torch.float32), torch.inference_mode():
        model = case.build()
        video, audio = torch.randn(1, 48, 2, 4, 4), torch.randn(1, 5, 20)
        raw = torch.randn(2, 1, 6, model.config.video.text_dim)
        kept = TextContext(raw[0]), TextContext(raw[1])
        for step in (900, 500):
            time = torch.tensor(step)
            fresh = model(video, audio, time, raw[0], raw[1])
            with activation_hooks.record_activations(model) as values:
                again = model(video, audio, time, *kept)
            assert ("vid.context" in values) == (step == 900)
            assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))
    assert len(kept[0].keys_values) == model.config.num_layers


@pytest.mark.parametrize("unused", ["video", "audio"])
def test_an_unused_stream_has_no_effect_of_the_other(unused: str, cases: dict[str, TransformerGolden]) -> None:
    with single_rank(torch.float32), torch.inference_mode():
        model = cases["ovi_t2v"].build()
        inputs = (torch.randn(1, 48, 2, 4, 4), torch.randn(1, 5, 20), torch.tensor(700))
        texts = torch.randn(2, 1, 6, model.config.video.text_dim)
        both = model(*inputs, *texts)
        with activation_hooks.record_activations(model) as values:
            flows = model(*inputs, *texts, unused=unused)
    left_out = {"video": "vid", "audio": "audio"}[unused]
    assert not any(name.startswith((f"{left_out}.block2.ffn", f"{left_out}.head")) for name in values)
    for name, flow, expected in zip(("video", "audio"), flows, both, strict=True):
        assert torch.equal(flow, torch.zeros_like(expected) if name == unused else expected)


def test_samples_of_a_batch_do_not_mix(cases: dict[str, TransformerGolden]) -> None:
    with single_rank(torch.float32), torch.inference_mode():
        model = cases["dreamid_two_refs"].build()
        video, audio = torch.randn(2, 48, 3, 4, 4), torch.randn(2, 9, 20)
        text = torch.randn(2, 2, 6, model.config.video.text_dim)
        options = {"video_reference_frames": 1, "audio_reference_lengths": (3,), "first_frame_clean": True}
        both = model(video, audio, torch.tensor([999, 300]), *text, **options)
        for i, step in enumerate((999, 300)):
            inputs = (video[i : i + 1], audio[i : i + 1], torch.tensor([step]), text[0, i : i + 1], text[1, i : i + 1])
            for together, alone in zip(both, model(*inputs, **options), strict=True):
                torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


def test_full_size_config_is_the_published_model() -> None:
    with single_rank(torch.bfloat16), torch.device("meta"):
        model = WanFusionTransformer(FusionConfig.from_dict(TRANSFORMER_CONFIG))
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_660_753_108
    ovi = FusionConfig.from_dict(OVI_TRANSFORMER_CONFIG)
    assert (ovi.audio.rope.family, ovi.audio.rope.freqs_scaling) == ("ovi", 0.19676)
    assert ovi.audio.gated_conv_dim == 8192


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"rope": {"family": "other"}}, ("other", "freqs_scaling")),
        ({"rope": {"family": "dreamid_omni"}}, ("dreamid_omni", "freqs_scaling")),
        ({"audio": TRANSFORMER_CONFIG["audio"] | {"dim": 1536}}, ("head_dim", "128", "64")),
        ({"audio": TRANSFORMER_CONFIG["audio"] | {"num_layers": 20}}, ("num_layers", "30", "20")),
        ({"audio": TRANSFORMER_CONFIG["audio"] | {"eps": 1e-5}}, ("eps", "1e-06", "1e-05")),
        ({"video": TRANSFORMER_CONFIG["audio"]}, ("video", "(1,)")),
        ({"video": TRANSFORMER_CONFIG["video"] | {"out_dim": 16}}, ("video.out_dim", "16", "48")),
        ({"video": TRANSFORMER_CONFIG["video"] | {"qk_norm": False}}, ("video.qk_norm", "False")),
        ({"video": {}}, ("video", "'dim'")),
    ],
)
def test_a_wrong_config_is_refused(change: dict[str, object], names: tuple[str, ...]) -> None:
    with raises("config_invalid", *names):
        FusionConfig.from_dict(TRANSFORMER_CONFIG | change)


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [
        ({"video": torch.zeros(1, 48, 2, 3, 4)}, "latent_size", "(2, 3, 4)"),
        ({"video_text": torch.zeros(1, 25, 64)}, "text_length", "25"),
        ({"video_reference_frames": 3}, "reference_length", "3"),
        ({"audio_reference_lengths": (3, 3)}, "reference_length", "(3, 3)"),
        ({"skip_layers": (1, 3)}, "block_index", "skip_layers has 3"),
    ],
)
def test_a_wrong_input_is_refused(
    change: dict[str, object], code: str, name: str, cases: dict[str, TransformerGolden]
) -> None:
    inputs = {"video": torch.zeros(1, 48, 2, 4, 4), "audio": torch.zeros(1, 5, 20), "timestep": torch.tensor(1)}
    inputs |= {"video_text": torch.zeros(1, 1, 64), "audio_text": torch.zeros(1, 1, 64)}
    with single_rank(torch.float32), torch.inference_mode():
        model = cases["dreamid_two_refs"].build()
        with raises(code, name):
            model(**inputs | change)
