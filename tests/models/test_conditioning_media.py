"""Images, audios, prompts and video files: the shared helpers of the family."""

from __future__ import annotations

import hashlib
import io
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from port_kit.models.wan.components.text_encoder import load_tokenizer
from port_kit.models.wan.pipeline.conditioning_media import crop_reference_audio, load_reference_audio
from port_kit.models.wan.pipeline.prompts import strip_tags, tokenize
from port_kit.pipeline.images import crop_image, fit_image, load_image
from port_kit.pipeline.media import (
    describe_file,
    measure_mp4,
    to_frames,
    to_omni_payload,
    write_mp4,
    write_result,
)
from tests.helpers import raises


def tone(rate: int, seconds: float = 3.0) -> np.ndarray:
    """A 440 Hz sine."""
    return np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def wav(samples: np.ndarray) -> bytes:
    """A WAV file of float32 samples (S,) at 16 kHz."""
    data = samples.astype("<f4").tobytes()
    head = struct.pack("<4sIHHIIHH4sI", b"fmt ", 16, 3, 1, 16_000, 64_000, 4, 32, b"data", len(data))
    return struct.pack("<4sI4s", b"RIFF", 4 + len(head) + len(data), b"WAVE") + head + data


@pytest.mark.parametrize(("name", "digest"), [("img0.png", "773c6c6d331b4c18"), ("img1.png", "04b6b38cb55bc2fe")])
def test_an_image_is_fitted_as_the_reference_fits_it(goldens: Path, name: str, digest: str) -> None:
    """The digests are those of the pixels that the reference code gave its VAE."""
    fitted = fit_image(load_image(goldens / "e2e_media" / name), 64, 96)
    assert hashlib.sha256(fitted.numpy().tobytes()).hexdigest().startswith(digest)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (64, 96), (3000, 2000)])
def test_any_ratio_fits_on_white(size: tuple[int, int]) -> None:
    pixels = fit_image(Image.new("RGB", size, (0, 0, 0)), 64, 96)
    assert pixels.shape == (3, 64, 96)
    assert pixels.min() == -1.0 and pixels.max() <= 1.0
    covered = (pixels < 0).any(0)
    assert covered.any(0).all() or covered.any(1).all()  # the image touches two opposite sides


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (65_535, 1), (1, 65_535)])
def test_any_ratio_is_cropped(size: tuple[int, int]) -> None:
    assert torch.equal(crop_image(Image.new("RGB", size, "white"), 64, 96), torch.ones(3, 64, 96))


def test_an_image_may_be_a_path_bytes_an_array_or_an_image_in_any_mode() -> None:
    array = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    for source in (array, Image.fromarray(array), buffer.getvalue()):
        assert np.array_equal(np.asarray(load_image(source)), array)
    assert load_image(Image.new("LA", (4, 4))).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (b"no image", "input_unreadable"),
        ("missing.png", "input_unreadable"),
        (3, "input_type"),
        (np.zeros((3, 3)), "input_type"),
        (np.zeros((0, 4, 3), np.uint8), "input_type"),
    ],
)
def test_a_source_that_is_not_an_image_is_refused_by_name(source: Any, code: str) -> None:
    with raises(code, "image 2"):
        load_image(source, name="image 2")


def test_a_truncated_image_is_refused(goldens: Path) -> None:
    data = (goldens / "e2e_media" / "img0.png").read_bytes()
    with raises("input_unreadable"):
        load_image(data[: len(data) // 2])


def test_a_reference_audio_keeps_its_second_second(goldens: Path) -> None:
    path = goldens / "e2e_media" / "aud0.wav"
    samples = load_reference_audio(path)
    assert np.array_equal(samples, load_reference_audio(path.read_bytes()))
    assert torch.equal(crop_reference_audio(samples), torch.from_numpy(samples[16_000:32_000]))


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
def test_a_reference_audio_is_resampled_and_mixed_down(rate: int) -> None:
    stereo = np.stack([tone(rate), tone(rate)])
    samples = load_reference_audio((stereo, rate))
    assert abs(len(samples) - 48_000) < 20
    middle = slice(16_000, 32_000)
    assert np.abs(samples[middle] - tone(16_000)[middle]).max() < 2e-3


def test_a_file_of_floats_is_read() -> None:
    assert np.array_equal(load_reference_audio(wav(tone(16_000) * 2)), tone(16_000) * 2)


def test_integer_samples_are_scaled_to_one() -> None:
    samples = load_reference_audio(((tone(16_000) * 32_767).astype(np.int16), 16_000))
    assert np.abs(samples - tone(16_000)).max() < 1e-4
    whole = torch.from_numpy((tone(16_000) * 32_767).astype(np.int16))
    assert np.array_equal(load_reference_audio((whole, np.int64(16_000))), samples)
    assert np.array_equal(load_reference_audio(np.asmatrix(tone(16_000))), tone(16_000))


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (b"no audio", "input_unreadable"),
        ("missing.wav", "input_unreadable"),
        (None, "input_type"),
        ("", "input_unreadable"),
        (np.zeros((2, 2, 2)), "input_type"),
        *[(np.zeros(48_000, kind), "input_type") for kind in (object, np.uint8, np.int64, bool, np.complex64, "U1")],
        *[(torch.zeros(9).to(kind), "input_type") for kind in (torch.cfloat, torch.int64, torch.float8_e4m3fn)],
        *[(torch.zeros(9, device="meta"), "input_type"), (torch.zeros(9).to_sparse(), "input_type")],
        *[(np.zeros(shape), "input_type") for shape in ((), (0,), (0, 5), (2, 0))],
        (np.zeros((10**6, 1)), "input_size"),
        (np.broadcast_to(np.float32(0), (8, 10**12)), "input_size"),
        *[((tone(16_000), rate), "input_value") for rate in (10**5000, 768_001, 999, float("inf"), 44_100.5)],
        *[((tone(16_000), rate), "input_type") for rate in (None, "16000", True, np.array(16_000), [16_000])],
        ((tone(16_000), 0), "input_value"),
        ((tone(16_000), float("nan")), "input_value"),
        ((tone(16_000) * np.nan, 16_000), "input_value"),
        ((tone(16_000) * 32_767, 16_000), "input_value"),
        ((tone(16_000).astype(np.float64) * 1e300, 16_000), "input_value"),
        *[(wav(np.full(48_000, size)), "input_value") for size in (np.nan, np.inf, 1e30, 100)],
    ],
)
def test_a_source_that_is_not_audio_is_refused_by_name(source: Any, code: str) -> None:
    with raises(code, "reference audio 1"):
        load_reference_audio(source, name="reference audio 1")


def test_a_short_audio_is_refused() -> None:
    with raises("input_too_short", "1.50 s"):
        crop_reference_audio(load_reference_audio(tone(16_000, 1.5)))


def test_a_video_without_audio_is_no_audio(tmp_path: Path) -> None:
    path = tmp_path / "mute.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=24)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with raises("input_unreadable"):
        load_reference_audio(path)
    facts = measure_mp4(path)
    assert (facts.frames, facts.audio_codec, facts.sample_rate) == (1, "", 0)


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("plain <img1> text [not a tag] [1]", "plain <img1> text [not a tag] [1]"),
        ("[SCENE] a room\n\n\n[END_SCENE] b", "a room\n b"),
        ("a [SPEAKER_TIMESTAMPS_START] 0-2 [X] <sub1> [SPEAKER_TIMESTAMPS_END] b", "a  b"),
        ("[AUDIO_DESCRIPTION] hum [PROMPT] a", "a"),
        ("a [AUDIO_DESCRIPTION_START] wind [AUDIO_DESCRIPTION_END]", "a"),
        ("a [SPEAKER_TIMESTAMPS] to the end", "a"),
    ],
)
def test_tags_leave_and_their_blocks_with_them(prompt: str, left: str) -> None:
    assert strip_tags(prompt) == left


def test_many_tags_without_an_end_take_no_time() -> None:
    """One read of the text for each of them would take minutes."""
    started = time.process_time()
    assert strip_tags("[AUDIO_DESCRIPTION_START]" * 20_000 + "rain") == "rain"
    mixed = (
        "[SPEAKER_TIMESTAMPS_START] a [AUDIO_DESCRIPTION_START] b [SPEAKER_TIMESTAMPS_END] c [AUDIO_DESCRIPTION_END] d"
    )
    assert strip_tags(mixed * 2_000) == (" c  d" * 2_000).strip()
    assert time.process_time() - started < 10


def test_a_text_beyond_the_limit_is_refused_not_cut(goldens: Path) -> None:
    tokenizer = load_tokenizer(goldens / "ckpts" / "Wan2.2-TI2V-5B" / "google" / "umt5-xxl")
    ids = tokenize(tokenizer, "hello  there")
    assert ids[-1] == 1 and tokenize(tokenizer, "hello there") == ids
    assert tokenize(tokenizer, "hello there", limit=len(ids)) == ids
    with raises("input_too_long", str(len(ids))):
        tokenize(tokenizer, "hello there", limit=len(ids) - 1)


def test_frames_are_rounded_not_cut() -> None:
    video = torch.tensor([-1.0, -0.999, 0.0, 0.999, 1.0, 1.5]).view(1, 1, 1, 1, 6).expand(1, 3, 2, 4, 6)
    frames = to_frames(video)
    assert frames.shape == (2, 4, 6, 3) and frames.dtype == torch.uint8
    assert frames[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


def test_the_formatter_reads_the_payload() -> None:
    from vllm_omni.diffusion.output_formatter import normalize_diffusion_postprocess_output

    output = {
        "video": torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        "audio": torch.zeros(8, dtype=torch.bfloat16).float(),
    }
    normal = normalize_diffusion_postprocess_output(to_omni_payload(output, fps=24, sample_rate=16_000))
    assert normal.primary_key == "video"
    assert normal.metadata == {"video": {"fps": 24}, "audio": {"sample_rate": 16_000}}
    assert normal.outputs["audio"].dtype == np.float32


def test_an_mp4_has_both_streams(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (25, 64, 96, 3), dtype=np.uint8)
    path = write_mp4(tmp_path / "new" / "clip.mp4", frames, tone(16_000, 25 / 24), fps=24, sample_rate=16_000)
    facts = measure_mp4(path)
    assert (facts.frames, facts.fps, facts.width, facts.height) == (25, 24.0, 96, 64)
    assert (facts.video_codec, facts.audio_codec, facts.sample_rate) == ("h264", "aac", 16_000)
    assert abs(facts.audio_seconds - facts.video_seconds) < 0.1
    assert 0.8 < facts.peak < 1.2
    with raises("media_write", "missing.mp4"):
        measure_mp4(tmp_path / "missing.mp4")


def test_a_result_without_audio_is_a_silent_video(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8)
    result = SimpleNamespace(images=[frames, frames], multimodal_output={"fps": 8})
    paths = write_result(tmp_path / "clip.mp4", result)
    assert [path.name for path in paths] == ["clip_1.mp4", "clip_2.mp4"]
    assert describe_file(paths[1]) == f"{paths[1]}: 9 frames 96x64 at 8 fps (h264, 1.12 s)"


def test_a_result_of_images_is_written_as_images(tmp_path: Path) -> None:
    output = {"image": torch.randint(0, 255, (64, 96, 3), dtype=torch.uint8)}
    payload = to_omni_payload(output, fps=0, sample_rate=0)
    assert payload["metadata"] == {}
    result = SimpleNamespace(images=payload["payload"]["image"], multimodal_output={})
    (path,) = write_result(tmp_path / "new" / "picture.png", result)
    assert describe_file(path) == f"{path}: 96x64"
    assert np.array_equal(np.asarray(Image.open(path)), output["image"].numpy())
