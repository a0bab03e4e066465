"""Requests that a server must survive: wrong names and values, huge bodies, foreign files, a full disk, a signal."""

from __future__ import annotations

import base64
import json
import os
import pickle
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.helpers import wait_until
from tests.models.test_admission import write_lora
from tests.serving.hostile import (
    ALICE,
    GOOD,
    LIMIT,
    MAX_QUEUE,
    Target,
    png,
    refused,
    small_png,
)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ({"shfit": 3}, ("'shfit'", "'shift'")),
        ({"Shift": 3}, ("'Shift'", "'shift'")),
        ({"solver": "euler"}, ("'solver'", "'solver_name'")),
        ({"sampler": "euler"}, ("'sampler'",)),
        ({"video_cfg_scale": 3}, ("'video_cfg_scale'", "'video_guidance_scale'")),
        ({"seed": 5}, ("'seed'", "field of the form")),
        ({"height": 640, "width": 640}, ("'height'", "field of the form")),
        ({"duration": 9}, ("duration is 9",)),
        ({"image": "/etc/passwd"}, ("'image'",)),
        ({"generate_sound": 0}, ("generate_sound is 0",)),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(
    target: Target, option: dict[str, Any], parts: tuple[str, ...]
) -> None:
    refused(target.sync({"extra_params": json.dumps(option)}), "[input_value]", *parts)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"aspect_ratio": "9:16"}, ("'aspect_ratio'",)),
        ({"guidance_scale_2": "5"}, ("'guidance_scale_2'", "'guidance_scale'")),
        ({"frame_interpolation_exp": "3"}, ("'frame_interpolation_exp'",)),
        ({"strength": "0.3"}, ("'strength'",)),
        ({"shift": "3"}, ("'shift'", "extra_params")),
        ({"num_frames": "1"}, ("num_frames is 1", "121")),
        ({"width": "640"}, ("only width",)),
        ({"size": "640x640", "width": "640"}, ("size",)),
        ({"size": "0x0"}, ("'0x0'",)),
        ({"negative_prompt": ""}, ("negative_prompt is empty",)),
        ({"prompt": "  "}, ("[input_missing] prompt",)),
        ({"seconds": "9"}, ("seconds is 9", "5.04 s")),
        ({"fps": "25"}, ("fps is 25", "24")),
        ({"num_outputs_per_prompt": "10"}, ("num_outputs_per_prompt is 10",)),
        ({"seed": "1e3"}, ("[input_type] seed is '1e3'",)),
        ({"seed": "9" * 40}, ("[input_type] seed",)),
        ({"guidance_scale": "inf"}, ("[input_type] guidance_scale",)),
        ({"extra_params": "[1]"}, ("[input_type] extra_params",)),
        ({"extra_params": "[" * 100_000}, ("[input_size] extra_params",)),
        ({"extra_params": "[" * 9_000}, ("extra_params is no valid JSON",)),
        ({"extra_params": '{"shift": 3, "shift": 4}'}, ("'shift' is repeated",)),
        ({"extra_params": '{"shift": 1e999}'}, ("extra_params", "out of range")),
        ({"extra_params": '{"shift": ' + "9" * 400 + "}"}, ("400 digits",)),
        ({"extra_params": '{"solver_name": "\\ud800"}'}, ("extra_params", "surrogates")),
        ({"extra_params": "[" + "[]," * 20_000 + "[]]"}, ("more than 10000 values",)),
        ({"image_reference": "[" + "[]," * 30_000 + "[]]"}, ("more than 10000 values",)),
        ({"image_reference": '{"image_url": "data:' + ";a" * 30_000 + '"}'}, ("[input_unreadable] a data URL",)),
        ({"image_reference": '{"image_url": "data:image/png;base64,!"}'}, ("[input_unreadable] a data URL",)),
        ({"num_inference_steps": "\u0661"}, ("[input_type] num_inference_steps",)),
        ({"num_inference_steps": "201"}, ("num_inference_steps", "200")),
        ({"num_inference_steps": "0"}, ("num_inference_steps",)),
        ({"guidance_scale": "20.5"}, ("guidance_scale", "20")),
        ({"num_inference_steps": "1_0"}, ("[input_type] num_inference_steps",)),
        ({"prompt": "rain " * 20_000}, ("[input_size] prompt has 100000 characters",)),
        ({"q" * 1_000: "1"}, ("[input_size] the name of a field",)),
    ],
)
def test_a_wrong_field_is_refused(target: Target, fields: dict[str, str], parts: tuple[str, ...]) -> None:
    refused(target.sync(fields), *parts)


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync"])
def test_a_query_is_not_ignored(target: Target, path: str) -> None:
    refused(target.alice.post(f"{path}?seed=3", data=GOOD), "[input_value]", "'seed=3'")


def test_the_length_of_the_model_may_be_given(target: Target, first: bytes) -> None:
    for fields in ({"seconds": "5"}, {"num_frames": "121", "fps": "24"}):
        response = target.sync(fields)
        assert (response.status_code, response.content == first) == (200, True), response.text[:300]


def test_an_image_is_the_same_by_any_way(target: Target, first: bytes) -> None:
    url = f"data:image/png;base64,{base64.b64encode(small_png()).decode()}"
    upload = ("picture", small_png(), "application/octet-stream")
    answers = [
        target.sync(files={"input_reference": upload}),
        target.sync(files={"input_references": upload}),
        target.sync({"image_reference": json.dumps({"image_url": url})}),
        target.sync({"image_reference": json.dumps([{"image_url": f"{target.web.url}/a.png"}])}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4, [answer.text[:200] for answer in answers]
    assert len({answer.content for answer in answers}) == 1 and answers[0].content != first


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ([png(13_300, 13_300)], ("[input_size]", "13300x13300")),
        ([b"GIF89a" + b"\0" * 40], ("reference ", " 1")),
        ([b"ffconcat version 1.0\nfile /etc/passwd\n"], ("reference ", " 1")),
        ([b"#EXTM3U\nhttp://127.0.0.1/\n"], ("reference ", " 1")),
        ([b"II*\0" + b"\0" * 40], ("is TIF", "PNG, JPEG, WEBP")),
        ([b"\0\0\0\x20ftypavif" + b"\0" * 40], ("is AVIF",)),
        ([b"RIFF\0\1\0\0WEBPVP8X\n\0\0\0\x02\0\0\0" + b"\xff" * 30], ("[input_size]", "16777216x16777216")),
        ([small_png(), small_png()], ("[input_count] 2 references", "at most 1")),
        ([small_png()[:40]], ("reference ", " 1")),
    ],
    ids=["huge", "gif", "ffconcat", "playlist", "tiff", "avif", "animated webp", "two", "cut"],
)
def test_a_reference_is_refused_for_its_content(target: Target, files: list[bytes], parts: tuple[str, ...]) -> None:
    before = target.server.memory()
    refused(target.sync(files=[("input_references", ("a.png", content)) for content in files]), *parts)
    assert target.server.memory() < before + 50e6


def reference(target: Target, *urls: str) -> httpx.Response:
    return target.sync({"image_reference": json.dumps([{"image_url": url} for url in urls])})


def test_references_come_from_allowed_hosts_only(target: Target) -> None:
    web, asked = target.web, len(target.web.asked)
    for url in ("http://10.0.0.1/a.png", "http://127.0.0.1:1/", "file:///etc/passwd", "http://\0", "gopher://x/"):
        refused(reference(target, url), "references may be fetched from")
    for url in (f"http://localhost:{web.port}/a.png", f"http://x@127.0.0.1:{web.port}/", "http://2130706433/"):
        refused(reference(target, url), "references may be fetched from")
    refused(reference(target, *[f"{web.url}/a.png"] * 200), "[input_count] 200 references")
    assert len(web.asked) == asked


def test_an_allowed_name_must_have_a_public_address(target: Target) -> None:
    message = refused(reference(target, "http://localhost/a.png"))
    assert message == "a reference could not be fetched from localhost"


def test_answers_of_other_servers_tell_nothing(target: Target) -> None:
    web = target.web
    paths = ["/none", "/gzip", "/huge", "/to//none", f"/to/{web.url}/to/{web.url}/none"]
    messages = {refused(reference(target, f"{web.url}{path}")) for path in paths}
    assert messages == {"a reference could not be fetched from 127.0.0.1"}
    refused(reference(target, f"{web.url}/to/http://10.0.0.1/"), "references may be fetched from")
    assert reference(target, f"{web.url}/to/{web.url}/a.png").status_code == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/none", "/proc/self/environ", "owner/name", "../model", "a\0b"])
def test_loras_outside_their_folder_do_not_exist(target: Target, path: str) -> None:
    message = refused(target.sync({"lora": json.dumps({"name": "x", "path": path})}))
    assert message == f"[source_missing] lora: this server has no LoRA {path!r}"
    both = [{"name": "x", "path": path}, {"name": "y", "path": path}]
    assert refused(target.sync({"lora": json.dumps(both)})) == message


def test_links_out_of_the_folder_of_loras_do_not_exist(target: Target) -> None:
    (target.loras / "link.safetensors").symlink_to(target.model / "model_index.json")
    (target.loras / "folder").symlink_to(target.model)
    for name in ("link", "link.safetensors", "folder", "folder/model_index.json", "folder/../link", "."):
        message = f"[source_missing] lora: this server has no LoRA {name!r}"
        assert refused(target.sync({"lora": json.dumps({"name": name})})) == message


@pytest.mark.parametrize("name", ["pickled.bin", "pickled.safetensors", "pickled.pt"])
def test_a_pickle_is_never_executed(target: Target, name: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(target.loras / "executed"),)

    (target.loras / name).write_bytes(pickle.dumps(Evil()))
    refused(target.sync({"lora": json.dumps({"name": name})}), "[lora_file]", "it is a pickle", "port-kit convert")
    assert not (target.loras / "executed").exists()


@pytest.mark.slow
def test_loras_with_one_number_give_their_own_results(target: Target, first: bytes) -> None:
    answers = []
    for seed, (name, rank) in enumerate({"a": 4, "b": 4, "wide": 48}.items()):
        write_lora(target.loras / f"{name}.safetensors", target.model, rank=rank, seed=seed)
        answers.append(target.sync({"lora": json.dumps({"name": name, "int_id": 77})}))
    assert [answer.status_code for answer in answers] == [200] * 3, [answer.text[:200] for answer in answers]
    assert len({first, *(answer.content for answer in answers)}) == 4
    assert target.sync().content == first, "a LoRA of larger rank left a trace"


@pytest.mark.slow
def test_several_loras_act_together(target: Target, first: bytes) -> None:
    for seed, name in enumerate(("one", "two")):
        write_lora(target.loras / f"{name}.safetensors", target.model, seed=seed)
    sent = [
        [{"name": "one", "scale": 0.5}],
        [{"name": "one", "scale": 0.5}, {"path": "two.safetensors"}],
        [{"name": "one"}, {"path": "two.safetensors"}],
    ]
    answers = [target.sync({"lora": json.dumps(lora)}) for lora in sent]
    assert [answer.status_code for answer in answers] == [200] * 3, [answer.text[:200] for answer in answers]
    assert len({first, *(answer.content for answer in answers)}) == 4


@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        ("[]", ("[input_count]", "0 LoRAs")),
        (json.dumps([{"name": "any"}] * 9), ("[input_count]", "9 LoRAs; 1 to 8")),
        ('["any"]', ("[input_type]", "lora is str")),
        ('[[{"name": "any"}]]', ("[input_type]", "lora is list")),
        ('[{"name": "any"}, {"name": "any", "weight": 1}]', ("[input_value]", "unknown key 'weight'", "scale")),
        ('[{"name": "any"}, {"scale": 1}]', ("[input_missing]", "neither name nor path")),
        ('[{"name": "any"}, {"name": "any", "scale": 11}]', ("[input_value]", "-10 to 10")),
    ],
)
def test_lists_of_loras_are_exact(target: Target, lora: str, parts: tuple[str, ...]) -> None:
    (target.loras / "any.safetensors").write_bytes(b"")
    refused(target.sync({"lora": lora}), *parts)


def test_a_file_that_is_no_lora_of_the_model_is_named(target: Target) -> None:
    shape = torch.ones(2, 4)
    files = {
        "cut": (b"", "it is empty"),
        "model": ({"blocks.0.q.weight": shape}, "it is a checkpoint, not a LoRA"),
        "text": ({"lora_te1_layers_0_q.lora_down.weight": shape}, "adapts a text encoder only"),
        "flux": ({"double_blocks.0.img_attn.qkv.lora_A.weight": shape}, "a LoRA of FLUX or HunyuanVideo"),
        "peft": ({"base_model.model.blocks.0.self_attn.q.lora_A.weight": shape}, "its scale is unknown"),
    }
    for name, (content, problem) in files.items():
        data = content if isinstance(content, bytes) else save(content)
        (target.loras / f"{name}.safetensors").write_bytes(data)
        for lora in ({"name": name}, [{"name": name}, {"name": name, "scale": 0.5}]):
            message = refused(target.sync({"lora": json.dumps(lora)}), f"{name}.safetensors", problem, "hint: ")
            assert message.startswith("[") and str(target.loras) not in message


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "1e308", "[1]", '"1"', "true", "9" * 400])
def test_the_scale_of_a_lora_is_bounded(target: Target, scale: str) -> None:
    (target.loras / "any.safetensors").write_bytes(b"")
    refused(target.sync({"lora": f'{{"name": "any", "scale": {scale}}}'}), "lora")


def test_keys_of_a_lora_are_exact(target: Target) -> None:
    refused(target.sync({"lora": '{"name": "any", "lora_path": "/etc/passwd"}'}), "'lora_path'")


def test_clients_see_their_own_jobs_only(target: Target, first: bytes) -> None:
    job = target.submit({"prompt": "a secret script", "seed": "7"})
    wait_until(lambda: target.alice.get(f"/v1/videos/{job}").json()["status"] == "completed", LIMIT, pause=0.2)
    assert [entry["id"] for entry in target.alice.get("/v1/videos?limit=5").json()["data"]] == [job]
    assert target.bob.get("/v1/videos").json()["data"] == []
    for method, path in (("GET", job), ("GET", f"{job}/content"), ("DELETE", job)):
        refused(target.bob.request(method, f"/v1/videos/{path}"), "not found", status=404)
    record = target.alice.get(f"/v1/videos/{job}").json()
    assert (record["seconds"], record["seed"], record["num_inference_steps"]) == ("5.04", 7, 1)
    assert target.alice.delete(f"/v1/videos/{job}").json()["deleted"]
    assert target.alice.get("/v1/videos").json()["data"] == []


def test_without_a_key_nothing_is_served(target: Target) -> None:
    for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos/sync"), ("GET", "/v1/models")):
        refused(httpx.request(method, target.server.url + path), "API key", status=401)
        for key in (
            "Bearer wrong",
            f"Bearer {ALICE[:-1]}",
            f"Basic {ALICE}",
            f"Bearer {ALICE}x",
            "Bearer \u00e4",
            ALICE,
        ):
            wrong = {"Authorization": key.encode("latin-1")}
            refused(httpx.request(method, target.server.url + path, headers=wrong), "API key", status=401)
    two = [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {ALICE}")]
    refused(httpx.get(f"{target.server.url}/v1/videos", headers=two), "API key", status=401)
    assert httpx.get(f"{target.server.url}/health").status_code == 200


@pytest.mark.parametrize("query", ["limit=" + "9" * 5000, "limit=%C2%B2", "limit=101", "limit=-1", "order=up"])
def test_a_list_is_bounded(target: Target, query: str) -> None:
    refused(target.alice.get(f"/v1/videos?{query}"), "0 to 100")
    refused(target.alice.get("/v1/videos?limits=1"), "'limits'")


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/responses", "/tokenize", "/invocations", "/scale_elastic_ep", "/v1/omni/sleep"]
)
def test_other_endpoints_do_not_exist(target: Target, path: str) -> None:
    refused(target.alice.post(path, json={"prompt": "x", "model": "x"}), "no endpoint", status=404)


def test_a_full_queue_is_answered_with_a_time(target: Target) -> None:
    jobs = [target.submit({"num_inference_steps": "200"}) for _ in range(MAX_QUEUE)]
    response = target.sync()
    refused(response, f"{MAX_QUEUE} requests", "--max-queue", status=429)
    assert 1 <= int(response.headers["retry-after"]) <= 600
    for job in jobs:
        assert target.alice.delete(f"/v1/videos/{job}").status_code == 200
    assert target.sync().status_code == 200


def test_a_video_survives_a_full_disk(target: Target, first: bytes) -> None:
    ballast = target.disk / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(b"\0" * 2**12)
    job = target.submit()
    wait_until(lambda: target.alice.get(f"/v1/videos/{job}").json()["status"] != "queued", LIMIT, pause=0.1)
    wait_until(lambda: target.alice.get(f"/v1/videos/{job}").json()["status"] != "in_progress", LIMIT, pause=0.1)
    assert target.alice.get(f"/v1/videos/{job}/content").content == first
    assert [path.name for path in target.disk.iterdir()] == ["ballast"]
    assert target.alice.delete(f"/v1/videos/{job}").json()["deleted"]
    assert target.alice.get(f"/v1/videos/{job}/content").status_code == 404
    ballast.unlink()
