"""Broken, gated, missing and dangerous files: each is reported."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.errors import DownloadError, InspectError
from port_kit.inspect import Inspection, describe, inspect
from port_kit.testing.hub import Fault, Hub
from tests.helpers import raises
from tests.inspect import fake_repositories
from tests.inspect.types import Folder, Remote


def facts(report: Inspection, kind: str) -> dict[str, list[str]]:
    """Findings of a kind by their file."""
    found: dict[str, list[str]] = {}
    for finding in getattr(report, kind):
        found.setdefault(finding.file, []).append(finding.fact)
    return found


def test_gated_diffusers_repository_is_not_decided(remote: Remote) -> None:
    report = remote(fake_repositories.diffusers_model(), gated=("org/some_model",))
    assert report.path == "unknown"
    assert "is gated: no token was sent" in report.gate and "accept its terms at" in report.gate
    assert report.evidence[-1].file == "model_index.json" and "gated" in report.evidence[-1].fact
    assert report.next == "accept the terms, then: hf auth login && port-kit inspect org/some_model"
    assert report.memory is None and report.size > 0
    assert {part.name for part in report.components} >= {"transformer", "vae", "text_encoder"}


def test_gated_custom_repository_is_decided_by_its_listing(remote: Remote) -> None:
    report = remote({"fusion.pth": fake_repositories.torch_file({})}, gated=("org/some_model",))
    assert report.path == "custom" and report.gate
    assert [part.formats for part in report.components] == [("torch",)]
    assert report.components[0].weights[0].problem == "not read: the repository is gated"


def test_gated_repository_opens_with_a_granted_token(remote: Remote) -> None:
    files = fake_repositories.diffusers_model() | {
        "README.md": fake_repositories.card("license: other\nextra_gated_prompt: Accept this.")
    }
    report = remote(files, gated=("org/some_model",), token="hf_x", asked={"token": "hf_x"})
    assert report.path == "diffusers" and not report.gate and report.card.asks_terms
    assert "gate     open to you; README.md asks for terms to be accepted" in describe(report)


def test_missing_and_private_repositories_are_distinguished_by_the_token(remote: Remote) -> None:
    with pytest.raises(DownloadError) as private:
        remote(fake_repositories.custom_model(), private=("org/some_model",))
    assert private.value.code in ("hub_token_missing", "hub_repo_missing")
    with Hub({}) as hub, pytest.raises(DownloadError) as missing:
        inspect("org/nothing", endpoint=hub.endpoint, token="hf_x")
    assert missing.value.code == "hub_repo_missing"
    assert "recipe" not in missing.value.hint


def test_missing_revision(remote: Remote) -> None:
    with pytest.raises(DownloadError) as caught:
        remote(fake_repositories.custom_model(), asked={"revision": "v9"})
    assert caught.value.code == "hub_revision_missing" and "--revision" in caught.value.hint


def test_a_server_that_is_gone_is_a_network_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("port_kit.inspect.file_listing.POLICY", _impatient())
    with Hub({"org/some_model": fake_repositories.custom_model()}) as hub:
        hub.inject(Fault("revision", times=-1, status=503))
        with pytest.raises(DownloadError) as caught:
            inspect("org/some_model", endpoint=hub.endpoint, token=False)
    assert caught.value.code == "network"


def _impatient() -> object:
    from port_kit.download.http import Policy

    return Policy(attempts=2, base=0.01)


@pytest.mark.parametrize("files", [{}, {"README.md": b"# soon\n", "assets/a.png": b"png"}])
def test_nothing_to_inspect(files: fake_repositories.Files, remote: Remote, folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "some_model").mkdir()
    for ask in (lambda: remote(files), lambda: inspect(str(folder(files)))):
        with pytest.raises(InspectError) as caught:
            ask()
        assert caught.value.code == "inspect_empty"


@pytest.mark.parametrize("target", ["", "./nowhere", "gpt2", "a/b/c", "https://huggingface.co/org/model"])
def test_neither_folder_nor_repository(target: str) -> None:
    with pytest.raises(InspectError) as caught:
        inspect(target)
    assert caught.value.code == "inspect_target" and target in caught.value.message


def test_a_file_and_a_folder_with_a_revision(folder: Folder) -> None:
    place = folder(fake_repositories.custom_model())
    with raises("inspect_target", "README.md"):
        inspect(str(place / "README.md"))
    with raises("inspect_target", "main"):
        inspect(str(place), revision="main")


def test_broken_index_shards_and_configs(folder: Folder) -> None:
    files = fake_repositories.diffusers_model()
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(files[index])["weight_map"] | {"proj.weight": "gone.safetensors"}
    weight_map["blocks.0.weight"] = weight_map["blocks.1.weight"]
    files[index] = fake_repositories.index(weight_map)
    files["vae/config.json"] = b"{"
    files["text_encoder/model.safetensors.index.json"] = b"[]"
    missing = facts(inspect(str(folder(files))), "missing")
    assert any("1 are missing: transformer/gone.safetensors" in fact for fact in missing[index])
    assert any("places 1 tensors in files that lack them: blocks.0.weight" in fact for fact in missing[index])
    assert missing["vae/config.json"][0].startswith("is no JSON")
    assert missing["text_encoder/model.safetensors.index.json"][0].startswith("is no index")


def test_missing_shards_without_an_index(folder: Folder) -> None:
    files = {
        f"model-0000{part}-of-00003.safetensors": fake_repositories.safetensors({f"layer.{part}": (2,)})
        for part in (1, 3)
    }
    report = inspect(str(folder(files)))
    assert [part.name for part in report.components] == ["model"]
    assert facts(report, "missing")["model-00001-of-00003.safetensors"] == ["2 of 3 shards are there"]


def test_index_without_its_parts(folder: Folder) -> None:
    files = {
        path: content for path, content in fake_repositories.diffusers_model().items() if not path.startswith("vae/")
    }
    del files["text_encoder/model.safetensors"]
    index = json.loads(files["model_index.json"])
    del index["_diffusers_version"]
    files["model_index.json"] = fake_repositories.as_json(index)
    missing = facts(inspect(str(folder(files))), "missing")["model_index.json"]
    assert missing == [
        "lacks _diffusers_version, by which vLLM-Omni knows a diffusion model",
        "names vae, and there is no such folder",
        "text_encoder: Gemma2Model has no weights beside it",
    ]


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("/nonexistent/port-kit-was-here",))


def test_unsafe_cut_and_foreign_pickles_are_named_and_not_run(folder: Folder) -> None:
    whole = fake_repositories.torch_file(fake_repositories.torch_tensors("a"))
    files = {
        "evil.pth": fake_repositories.torch_file({"a": _Evil()}),
        "plain.bin": pickle.dumps({"a": 1}),
        "cut.pt": whole[: len(whole) // 2],
        "page.ckpt": b"<!DOCTYPE html><html>404</html>",
        "good.pth": whole,
    }
    report = inspect(str(folder(files)))
    missing = facts(report, "missing")
    assert "[pickle_unsafe]" in missing["evil.pth"][0]
    assert "[pickle_corrupt]" in missing["plain.bin"][0]
    assert "[pickle_corrupt]" in missing["cut.pt"][0]
    assert "HTML page" in missing["page.ckpt"][0]
    assert "port-kit convert" in missing["good.pth"][0]
    assert not any(str(folder({})) in fact for found in missing.values() for fact in found)


def test_sets_of_tensors_in_a_pickle_are_named(folder: Folder) -> None:
    weights, small = fake_repositories.torch_tensors("a", "b", "c"), fake_repositories.torch_tensors("step")
    beside = {"opt": {"state": {0: weights}}, "args": argparse.Namespace(lr=1), **small}
    report = inspect(
        str(folder({"net.pt": fake_repositories.torch_file({**beside, "model": weights, "ema": weights})}))
    )
    (part,) = report.components
    assert (part.weights[0].wrapper, part.weights[0].alternatives, part.tensors) == ("model", ("ema",), 3)
    (fact,) = facts(report, "pitfalls")["net.pt"]
    assert "model is taken" in fact and "port-kit new --wrapper ema" in fact
    assert report.next.startswith("port-kit new some_model --from")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evil.pth", fake_repositories.torch_file({"a": _Evil()})),
        ("net-q4.gguf", fake_repositories.gguf("flux", {"a.weight": ((8, 4), 12)})),
    ],
)
def test_the_next_step_is_not_a_command_that_fails(file: str, content: bytes, folder: Folder) -> None:
    report = inspect(str(folder({file: content})))
    assert report.next.startswith(f"replace {file} (")


def test_cut_and_foreign_safetensors(folder: Folder) -> None:
    whole = fake_repositories.safetensors({"a": (4, 4)})
    files = {"cut.safetensors": whole[:-1], "not.safetensors": b"x" * 64, "new.safetensors": whole}
    missing = facts(inspect(str(folder(files))), "missing")
    assert "its header needs" in missing["cut.safetensors"][0]
    assert "[checkpoint_format]" in missing["not.safetensors"][0]
    assert "new.safetensors" not in missing


def test_dtypes_that_are_newer_than_this_kit_are_shown_as_they_are(folder: Folder) -> None:
    report = inspect(str(folder({"model.safetensors": fake_repositories.safetensors({"a": (4, 4)}, "float6")})))
    assert report.components[0].dtypes == ("f6_e2m3",) and not report.components[0].manifest


def test_gguf_header(remote: Remote) -> None:
    content = fake_repositories.gguf(
        "flux", {"img_in.weight": ((8, 4), 12), "img_in.bias": ((8,), 0), "new": ((1,), 99)}
    )
    report = remote({"flux-q4.gguf": content, "cut.gguf": content[:40], "old.gguf": b"GGUF\1\0\0\0" + bytes(16)})
    part = report.component("flux-q4")
    assert part is not None
    file = part.weights[0]
    assert file.entries == {
        "img_in.weight": ((8, 4), "q4_k"),
        "img_in.bias": ((8,), "float32"),
        "new": ((1,), "ggml_99"),
    }
    assert file.details == {"general.architecture": "flux", "general.alignment": "32"}
    missing = facts(report, "missing")
    assert "does not read: needs a conversion" in missing["flux-q4.gguf"][0]
    assert "within its header" in missing["cut.gguf"][0] and "GGUF version 1" in missing["old.gguf"][0]


def test_formats_that_are_only_named(folder: Folder) -> None:
    report = inspect(str(folder({"model.onnx": b"\x08\x07onnx", "optimizer.pt": b"state"})))
    assert [(part.name, part.formats) for part in report.components] == [("model", ("onnx",))]
    assert facts(report, "missing")["model.onnx"] == ["tensors of onnx files are not read"]


def test_lfs_pointers_and_dangling_links(folder: Folder) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"
    place = folder({"fusion.safetensors": pointer, "vae.pth": pointer})
    (place / "blob.safetensors").symlink_to("../blobs/gone")
    report = inspect(str(place))
    missing = facts(report, "missing")
    assert all("Git LFS pointer" in missing[name][0] for name in ("fusion.safetensors", "vae.pth"))
    assert missing["blob.safetensors"] == ["is no file, or a link that leads nowhere"]
    assert " lfs pull " in report.next


@pytest.mark.parametrize("name", ["pipe.safetensors", "config.json", "pipe.pth"])
def test_a_pipe_is_named_and_not_waited_for(name: str, folder: Folder) -> None:
    place = folder({"model.safetensors": fake_repositories.safetensors({"a": (2,)})})
    os.mkfifo(place / name)
    report = inspect(str(place))
    assert facts(report, "missing")[name] == ["is no file, or a link that leads nowhere"]
    assert report.files == 1


def test_a_header_with_wrong_offsets(folder: Folder) -> None:
    def file(**entries: tuple[list[int], list[int]]) -> bytes:
        header = {name: {"dtype": "F32", "shape": shape, "data_offsets": at} for name, (shape, at) in entries.items()}
        text, end = fake_repositories.as_json(header), max(at[1] for _, at in entries.values())
        return len(text).to_bytes(8, "little") + text + bytes(end)

    files = {
        "size.safetensors": file(a=([1000], [0, 16])),
        "twice.safetensors": file(a=([4], [0, 16]), b=([4], [0, 16])),
        "hole.safetensors": file(a=([4], [0, 16]), b=([4], [20, 36])),
        "good.safetensors": file(b=([4], [16, 32]), a=([4], [0, 16]), none=([0, 5], [32, 32])),
    }
    missing = facts(inspect(str(folder(files))), "missing")
    assert missing["size.safetensors"] == ["'a' is float32 [1000] and has 16 bytes [checkpoint_corrupt]"]
    assert "'b' begins at byte 0 of the data" in missing["twice.safetensors"][0]
    assert "'b' begins at byte 20 of the data, the tensor before it ends at 16" in missing["hole.safetensors"][0]
    assert "good.safetensors" not in missing


def test_names_cannot_write_on_the_terminal(folder: Folder) -> None:
    files = {
        "a\u202eb.safetensors": fake_repositories.safetensors({"a": (2,)}),
        "transformer/config.json": b'{"_class_name": "Foo\\u001b[2J\\nnext: rm \\ud800"}',
        "README.md": fake_repositories.card('license: "mine\\e[31m"'),
    }
    place = folder(files)
    Path(os.fsdecode(os.fsencode(place) + b"/\xff.safetensors")).write_bytes(fake_repositories.safetensors({"b": (2,)}))
    text = describe(inspect(str(place)))
    assert text.replace("\n", "").isprintable() and text.encode()
    assert "a\\u202eb.safetensors" in text and "Foo\\x1b[2J\\nnext: rm \\ud800" in text
    assert "mine\\x1b[31m" in text and "\\udcff.safetensors" in text
    done = CliRunner().invoke(main, ["inspect", str(place)])
    assert (done.exit_code, done.stdout) == (0, text + "\n")


def test_a_folder_name_that_selects_a_built_in_pipeline(tmp_path: Path) -> None:
    place = fake_repositories.write(fake_repositories.diffusers_model(), tmp_path / "My-Cosy_Voice3-remix")
    assert facts(inspect(str(place)), "pitfalls")["name My-Cosy_Voice3-remix"][0].startswith("contains 'cosyvoice3'")


def test_a_root_model_type_that_goes_before_the_index(folder: Folder) -> None:
    files = fake_repositories.diffusers_model() | {"config.json": fake_repositories.as_json({"model_type": "bagel"})}
    assert "whatever the index says" in facts(inspect(str(folder(files))), "pitfalls")["config.json"][0]


def test_a_repository_of_several_models(folder: Folder) -> None:
    files = {f"small/{path}": content for path, content in fake_repositories.diffusers_model().items()}
    traps = facts(inspect(str(folder(files))), "pitfalls")
    assert "a model directory of its own" in traps["small/model_index.json"][0]


def test_variants_that_would_be_loaded_twice(folder: Folder) -> None:
    files = fake_repositories.diffusers_model()
    files["vae/diffusion_pytorch_model.fp16.safetensors"] = fake_repositories.safetensors(
        {"encoder.weight": (4, 4)}, "float16"
    )
    files["vae/config.json"] = fake_repositories.as_json({"_class_name": "AutoencoderKL"})
    report = inspect(str(folder(files)))
    vae = report.component("vae")
    assert vae is not None and vae.dtypes == ("float32",)
    assert [file.path for file in vae.spare] == ["vae/diffusion_pytorch_model.fp16.safetensors"]
    traps = facts(report, "pitfalls")
    assert any("1 of its tensors are also in" in fact for found in traps.values() for fact in found)
    assert traps["vae/config.json"] == ["says AutoencoderKL, model_index.json says AutoencoderDC"]


def test_a_card_that_is_no_yaml(folder: Folder) -> None:
    files = fake_repositories.custom_model() | {
        "README.md": fake_repositories.card("license: [open", "see gitlab.com/a/b.")
    }
    card = inspect(str(folder(files))).card
    assert card.problem.startswith("its metadata is no YAML") and card.code == ("https://gitlab.com/a/b",)
