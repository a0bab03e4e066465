"""The entry points: selection of the platform, registration of ports, errors."""

from __future__ import annotations

import io
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_omni.platforms import current_omni_platform  # resolved before a test installs another platform

from port_kit.errors import RegistrationError
from port_kit.registry import find_port
from port_kit.runtime import plugin


def _install_plugin(folder: Path, answer: str) -> None:
    """Lay out an installed package with a platform plugin that returns ``answer``."""
    info = folder / "other_platform-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-platform\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm_omni.platform_plugins]\nother = other_platform:offer\n")
    (folder / "other_platform.py").write_text(f"def offer():\n    {answer}\n")


def test_the_cpu_platform_is_offered_here() -> None:
    assert plugin.cpu_platform() == plugin.PLATFORM


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("return 'other_platform.Platform'", None),
        ("return None", plugin.PLATFORM),
        ("raise RuntimeError('no device')", plugin.PLATFORM),
        # A plugin that also asks others receives None from this one, and is therefore selected.
        ("from port_kit.runtime import plugin; return plugin.cpu_platform() or 'other_platform.Platform'", None),
    ],
)
def test_another_platform_goes_first(
    answer: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install_plugin(tmp_path, answer)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "other_platform", raising=False)
    assert plugin.cpu_platform() == expected


def test_an_accelerator_build_of_vllm_gets_no_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    monkeypatch.setattr(type(vllm.platforms.current_platform), "is_cpu", lambda self: False)
    assert plugin.cpu_platform() is None


def test_ports_are_registered_with_their_output_type() -> None:
    from vllm_omni.diffusion.io_support import get_diffusion_output_type
    from vllm_omni.diffusion.registry import DiffusionModelRegistry

    plugin.register_pipelines()
    plugin.register_pipelines()  # plugins may be loaded more than once
    for name in ("dreamid_omni", "toy_av"):
        port = find_port(name)
        assert port.class_name in DiffusionModelRegistry.get_supported_archs()
        assert get_diffusion_output_type(port.class_name) == "video"


def test_the_video_endpoints_are_reported_which_references_a_port_reads() -> None:
    from vllm_omni.diffusion.model_metadata import get_diffusion_model_metadata
    from vllm_omni.model_extras import should_preserve_reference_image_size

    plugin.register_metadata()
    told = {
        name: (
            get_diffusion_model_metadata(name).supports_mixed_reference_inputs,
            should_preserve_reference_image_size(name, model=None),
        )
        for name in ("DreamIDOmniPipeline", "OviPipeline", "ToyAVPipeline", "WanPipeline")
    }
    assert told == {
        "DreamIDOmniPipeline": (True, True),
        "OviPipeline": (False, True),
        "ToyAVPipeline": (False, False),
        "WanPipeline": (False, False),
    }


def test_a_pipeline_that_is_no_reference_is_refused() -> None:
    with pytest.raises(RegistrationError) as caught:
        plugin._register(replace(find_port("toy_av"), pipeline="toy_av.pipeline"))
    assert caught.value.code == "port_unregistrable"


def test_a_backend_without_a_cpu_kernel_is_refused() -> None:
    for backend in (None, "torch_sdpa"):
        assert current_omni_platform.get_diffusion_attn_backend_cls(backend, 64).endswith("CpuSDPABackend")
    with pytest.raises(RegistrationError) as caught:
        current_omni_platform.get_diffusion_attn_backend_cls("FLASH_ATTN", 64)
    assert caught.value.code == "attention_backend"


def test_the_platform_implements_queries_of_profiling() -> None:
    free, total = current_omni_platform.get_device_memory()
    assert 0 < free <= total
    assert current_omni_platform.mem_get_info()[1] == total
    assert current_omni_platform.max_memory_allocated() > 1 << 20
    assert current_omni_platform.get_torch_device(3).type == "cpu"


@pytest.mark.parametrize(("level", "shown"), [(logging.INFO, 1), (logging.ERROR, 0)])
def test_info_is_printed_where_the_engine_prints_its_own(
    monkeypatch: pytest.MonkeyPatch, level: int, shown: int
) -> None:
    kit, engine, stream = logging.getLogger("port_kit"), logging.getLogger("vllm"), io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(engine, "handlers", [logging.StreamHandler(stream)])
    monkeypatch.setattr(kit, "handlers", [])
    before = kit.level, engine.level
    try:
        engine.setLevel(level)
        plugin.show_info_with_the_engines()
        plugin.show_info_with_the_engines()
        logging.getLogger("port_kit.parallel").info("a graph")
    finally:
        kit.setLevel(before[0])
        engine.setLevel(before[1])
    assert stream.getvalue() == "a graph\n" * shown
