"""Classification into the four paths, as folders and as repositories, and further content of the reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from port_kit.inspect import Finding, Inspection, describe, inspect, parallel_plans
from port_kit.testing.hub import Hub
from tests.inspect import fake_repositories
from tests.inspect.types import Folder, Remote

MODELS = {
    "supported": fake_repositories.supported_model,
    "diffusers": fake_repositories.diffusers_model,
    "hybrid": fake_repositories.hybrid_model,
    "custom": fake_repositories.custom_model,
}


@pytest.mark.parametrize("path", MODELS)
def test_each_path_as_folder_and_as_repository(path: str, folder: Folder, remote: Remote) -> None:
    files = MODELS[path]()
    local, served = inspect(str(folder(files))), remote(files)
    assert (local.path, served.path) == (path, path)
    assert local.evidence == served.evidence and local.missing == served.missing
    assert local.components == served.components
    assert served.commit is not None and local.commit is None
    assert served.files == len(files) and served.size == sum(map(len, files.values()))
    json.dumps(local.to_dict())


def test_supported_names_the_registry_and_the_command(folder: Folder) -> None:
    report = inspect(str(folder(fake_repositories.supported_model())))
    assert report.class_name == "QwenImagePipeline"
    assert [finding.file for finding in report.evidence] == ["model_index.json"]
    assert "qwen_image.pipeline_qwen_image" in report.evidence[0].fact
    assert report.next.startswith("vllm serve ") and report.next.endswith(" --omni")
    assert not report.missing and not report.pitfalls


def test_diffusers_components_are_found_with_sizes_and_dtypes(remote: Remote) -> None:
    report = remote(fake_repositories.diffusers_model())
    transformer = report.component("transformer")
    assert transformer is not None and transformer.known and transformer.library == "diffusers"
    assert (transformer.tensors, transformer.parameters, transformer.dtypes) == (3, 136, ("bfloat16",))
    assert len(transformer.weights) == 2 and transformer.formats == ("safetensors",)
    assert transformer.manifest["proj.bias"].shape == (8,)
    assert [part.name for part in report.components] == ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"]
    assert report.card.licence == "apache-2.0" and report.card.task == "text-to-image"
    assert not report.missing and not report.pitfalls
    assert report.next == "port-kit new some_model --from org/some_model"


@pytest.mark.parametrize(
    ("transformer", "fact", "command"),
    [
        ("FluxTransformer2DModel", "has a shipped parallel plan", "port-kit new"),
        ("UNet2DConditionModel", "guidance parallelism only", "port-kit run"),
    ],
)
def test_a_report_says_where_a_plan_comes_from(transformer: str, fact: str, command: str, folder: Folder) -> None:
    report = inspect(str(folder(fake_repositories.diffusers_model(transformer=transformer))))
    facts = [finding.fact for finding in report.evidence]
    (found,) = [text for text in facts if text.startswith(f"transformer: {transformer} has ")]
    assert fact in found
    assert report.next.startswith(command)


def test_a_plan_that_is_not_shipped_is_inferred(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_plans, "PLANS", tmp_path)
    report = inspect(str(folder(fake_repositories.diffusers_model(transformer="SanaTransformer2DModel"))))
    (found,) = [one.fact for one in report.evidence if one.fact.startswith("transformer: SanaTransformer2DModel has ")]
    assert "no shipped parallel plan; port-kit new and port-kit run infer and prove one" in found
    assert report.next.startswith("port-kit new")


def test_memory_is_of_the_weights_with_the_largest_sharded(remote: Remote) -> None:
    memory = remote(fake_repositories.diffusers_model()).memory
    assert memory is not None and memory.sharded == ("transformer",)
    assert memory.bfloat16 == 2 * (136 + 16 + 64)
    assert memory.per_rank == {1: 432, 2: 296, 4: 228, 8: 194}


def test_hybrid_names_the_class_that_no_library_has(folder: Folder) -> None:
    report = inspect(str(folder(fake_repositories.hybrid_model())))
    facts = [finding.fact for finding in report.evidence]
    assert "transformer: MyFusionTransformer comes from 'my_package', the model's own code" in facts
    assert any(fact.startswith("vae: AutoencoderDC is in diffusers ") for fact in facts)
    assert (
        Finding("pipeline_my_own.py", "is code that comes with the weights; nothing of it was executed")
        in report.pitfalls
    )


def test_an_unknown_transformer_of_diffusers_is_hybrid_too(folder: Folder) -> None:
    report = inspect(str(folder(fake_repositories.diffusers_model(transformer="ImaginaryTransformer3DModel"))))
    assert report.path == "hybrid"
    part = report.component("transformer")
    assert part is not None and not part.known


def test_diffusers_components_without_an_index_are_hybrid(folder: Folder) -> None:
    files = fake_repositories.custom_model() | {
        "vae/config.json": fake_repositories.as_json({"_class_name": "AutoencoderKLWan"}),
        "vae/diffusion_pytorch_model.safetensors": fake_repositories.safetensors({"encoder.weight": (4, 4)}),
    }
    report = inspect(str(folder(files)))
    assert report.path == "hybrid"
    assert report.missing[0].file == "model_index.json"


def test_custom_lists_the_files_of_the_folder(remote: Remote) -> None:
    report = remote(fake_repositories.custom_model())
    formats = {part.name: part.formats for part in report.components}
    assert formats == {"best_netG": ("torch zip",), "fusion": ("torch zip",), "models_t5_enc": ("torch legacy",)}
    vocoder = report.component("best_netG")
    assert vocoder is not None and vocoder.weights[0].wrapper == "generator" and vocoder.tensors == 1
    assert report.card.licence == "my-research-licence" and report.card.base_models == ("org/base",)
    assert report.card.code == ("https://github.com/someone/original",)
    assert report.card.repositories == ("org/vae", "org/text")
    missing = {finding.file for finding in report.missing}
    assert {"model_index.json", "transformer/config.json", "tokenizer/", "fusion.pth", "best_netG.pt"} <= missing


def test_original_layout_with_an_unknown_root_class_is_custom(folder: Folder) -> None:
    files = fake_repositories.custom_model() | {
        "config.json": fake_repositories.as_json({"_class_name": "WanModel", "_diffusers_version": "0.33.0"}),
        "diffusion_pytorch_model.safetensors": fake_repositories.safetensors({"blocks.0.weight": (4, 4)}),
    }
    report = inspect(str(folder(files)))
    assert report.path == "custom"
    part = report.component("diffusion_pytorch_model")
    assert part is not None and (part.class_name, part.known) == ("WanModel", False)


def test_root_config_selects_a_pipeline_as_vllm_omni_does(folder: Folder) -> None:
    files = {
        "config.json": fake_repositories.as_json({"model_type": "nextstep"}),
        "model.safetensors": fake_repositories.safetensors({"layers.0.weight": (4, 4)}),
    }
    report = inspect(str(folder(files)))
    assert (report.path, report.class_name) == ("supported", "NextStep11Pipeline")


def test_multi_stage_pipeline_by_model_type(folder: Folder) -> None:
    files = {
        "config.json": fake_repositories.as_json({"model_type": "bagel"}),
        "ae.safetensors": fake_repositories.safetensors({"a": (2,)}),
    }
    report = inspect(str(folder(files)))
    assert report.path == "supported"
    assert any("model_type bagel is a multi-stage pipeline" in finding.fact for finding in report.evidence)


def test_multi_stage_pipeline_by_an_alias_of_its_class(folder: Folder) -> None:
    report = inspect(str(folder(fake_repositories.diffusers_model(pipeline="MingImageLayeredDiffusionPipeline"))))
    assert report.path == "supported"
    assert "is the multi-stage pipeline ming_image of" in report.evidence[0].fact


def test_a_port_serves_its_own_class(folder: Folder) -> None:
    files = fake_repositories.diffusers_model(pipeline="DreamIDOmniPipeline")
    report = inspect(str(folder(files)))
    assert report.path == "supported"
    assert report.evidence[0].fact == "DreamIDOmniPipeline is the pipeline of the port dreamid_omni"


def test_a_repository_that_a_port_takes_leads_to_its_download() -> None:
    files = {"dreamid_omni.safetensors": fake_repositories.safetensors({"video_model.blocks.0.weight": (4, 4)})}
    with Hub({"XuGuo699/DreamID-Omni": files}) as hub:
        report = inspect("XuGuo699/DreamID-Omni", endpoint=hub.endpoint, token=False)
    assert report.path == "custom"
    assert report.evidence[0] == Finding("dreamid_omni.safetensors", "becomes the transformer of the port dreamid_omni")
    assert report.next == "port-kit download dreamid_omni"


def test_text_report_says_all_of_it(remote: Remote) -> None:
    report: Inspection = remote(fake_repositories.custom_model())
    text = describe(report)
    for finding in (*report.evidence, *report.missing):
        assert finding.file in text and finding.fact in text
    assert text.startswith(f"org/some_model at {report.commit}: custom")
    assert text.endswith(f"next: {report.next}")
    assert "torch zip, under generator" in text and "my-research-licence (LICENSE)" in text
