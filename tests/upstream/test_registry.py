"""The registry of patches and uses: complete, with checked preconditions, and each patch as documented."""

from __future__ import annotations

import ast
import importlib.util
import queue
import re
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from port_kit import upstream
from port_kit.runtime import patches
from port_kit.upstream import checks, series
from port_kit.upstream.registry import PATCHES, REGISTRY
from port_kit.upstream.used_names import source_files
from tests.helpers import raises

FOLDER = Path(upstream.__file__).parent
PARTS = ("Why", "How", "Upstream", "Guard", "Goes when")


@pytest.fixture(autouse=True)
def unpatched_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the installed worker, which earlier tests of this process may have patched, and forget checks."""
    from vllm_omni.diffusion.worker import diffusion_worker

    spec = importlib.util.spec_from_file_location(diffusion_worker.__name__, diffusion_worker.__file__)
    assert spec is not None and spec.loader is not None
    pristine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pristine)
    monkeypatch.setattr(checks, "_held", {})
    monkeypatch.setattr(diffusion_worker.WorkerProc, "_async_output_loop", pristine.WorkerProc._async_output_loop)


def _sections() -> dict[str, str]:
    text = (FOLDER / "patches.md").read_text(encoding="utf-8")
    pieces = re.split(r"^## (\S+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def test_registry_and_document_have_the_same_entries() -> None:
    assert list(_sections()) == list(PATCHES)


@pytest.mark.parametrize("name", PATCHES)
def test_every_section_is_complete(name: str) -> None:
    section = _sections()[name]
    assert [part for part in PARTS if f"- **{part}**:" not in section] == []


def test_every_entry_is_checked_where_it_is_used() -> None:
    guarded = set()
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                guarded |= _guards(node)
    assert guarded == set(REGISTRY)


def _guards(call: ast.Call) -> set[str]:
    """Names in ``require("name")``, and in ``RegistrationError(..., patch="name")`` if the guard is written inline."""
    arguments = call.args if getattr(call.func, "id", "") == "require" else []
    arguments = [*arguments, *(keyword.value for keyword in call.keywords if keyword.arg == "patch")]
    return {node.value for node in arguments if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("name", REGISTRY)
def test_every_guard_accepts_the_installed_version(name: str) -> None:
    checks.require(name)


@pytest.mark.parametrize(
    ("name", "index"), [(name, index) for name, entry in REGISTRY.items() for index in range(len(entry.preconditions))]
)
def test_every_guard_fires_if_upstream_differs(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = REGISTRY[name]
    needs = [*entry.preconditions]
    needs[index] = replace(needs[index], expected="value of an older release")
    monkeypatch.setitem(REGISTRY, name, replace(entry, preconditions=tuple(needs)))
    if not checks.is_needed(name):
        checks.require(name)
        return
    with raises("upstream_changed", "value of an older release") as caught:
        checks.require(name)
    assert caught.value.details == {"entry": name, "target": needs[index].target}


def test_a_changed_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.diffusion.worker.diffusion_worker import WorkerProc

    monkeypatch.setattr(patches, "_installed", set())
    monkeypatch.setattr(WorkerProc, "_async_output_loop", lambda self: None)
    with raises("upstream_changed", "async_output_loop"):
        patches.install_worker_fixes()


def test_a_patch_of_one_series_is_neither_checked_nor_applied_in_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.diffusion import output_formatter

    monkeypatch.setattr(patches, "_installed", set())
    plain = output_formatter._format_audio_multimodal_output
    monkeypatch.setattr(output_formatter, "_format_audio_multimodal_output", plain)
    entry = REGISTRY["audio_sample_rate"]
    wrong = replace(entry.preconditions[0], expected="value of another release")
    others = tuple(known for known in series.SERIES if known != series.installed_series())
    monkeypatch.setitem(REGISTRY, "audio_sample_rate", replace(entry, preconditions=(wrong,), series=others))
    patches.label_audio_results()
    assert output_formatter._format_audio_multimodal_output is plain
    assert list(checks.differences(REGISTRY["audio_sample_rate"])) == []


def test_an_attribute_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.diffusion import model_metadata

    monkeypatch.delattr(model_metadata, "_DIFFUSION_MODEL_METADATA")
    with raises("upstream_changed"):
        patches.declare_output_type("SomePipeline", "video")


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("0.30.0", True), ("0.30.2", True), ("0.32.0rc1", True), ("0.3", False), ("0.31.0", False), ("0.33.0", False)],
)
def test_only_supported_series_are_accepted(version: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "version", lambda name: version)
    if accepted:
        assert version.startswith(series.check_version())
        return
    with raises("vllm_omni_version", version):
        series.check_version()


def test_declaring_an_output_type_keeps_known_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.diffusion import model_metadata

    known = {"Known": model_metadata.DiffusionModelMetadata(supports_multimodal_inputs=True)}
    monkeypatch.setattr(model_metadata, "_DIFFUSION_MODEL_METADATA", known)
    for name in ("Known", "New"):
        patches.declare_output_type(name, "video")
    assert known["Known"].supports_multimodal_inputs
    assert {entry.final_output_type for entry in known.values()} == {"video"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ring_kernel_gives_output_and_log_sum_exp(dtype: torch.dtype) -> None:
    from port_kit.runtime.worker import efficient_attention_cpu

    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator).to(dtype) for length in (5, 7, 7))
    output, log_sum_exp, *_ = efficient_attention_cpu(query, key, value, None, True, scale=0.5)
    scores = query.double() @ key.double().transpose(-1, -2) * 0.5
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ value.double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(log_sum_exp.double(), scores.logsumexp(-1), atol=tolerance, rtol=tolerance)
    assert log_sum_exp.dtype == torch.float32


def test_the_output_loop_reports_why_an_output_was_not_packed() -> None:
    from vllm_omni.diffusion.data import DiffusionOutput

    from port_kit.runtime.worker import async_output_loop

    sent: list[object] = []
    worker = SimpleNamespace(
        _async_output_queue=queue.Queue(),
        _async_output_done=threading.Condition(),
        _async_output_pending=2,
        _enqueue_result=sent.append,
    )
    large = torch.empty(1 << 20, device="meta")  # has no data to copy
    for output in (DiffusionOutput(output=large), DiffusionOutput(output=torch.ones(1 << 19))):
        worker._async_output_queue.put((output, f"id-{len(sent)}", None))
    worker._async_output_queue.put(None)
    async_output_loop(worker)
    assert worker._async_output_pending == 0
    assert [bool(message.error) for message in sent] == [True, False]
    assert "shared memory failed" in sent[0].error
    _release(sent[1].output)


def _release(output: object) -> None:
    """Take the packed tensor back, which also frees its shared memory."""
    from vllm_omni.diffusion.ipc import unpack_diffusion_output_shm

    unpack_diffusion_output_shm(output)
    assert output.output.sum() == 1 << 19
