"""Pipeline as vLLM-Omni's loader sees it: components that are built without weights, and then filled.

It is all that a port needs whose requests run in another pipeline, such as one of diffusers. The kit's own request loop
is in :class:`~port_kit.pipeline.base.PortPipeline`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.models.interface import SupportsComponentDiscovery

from port_kit.errors import InputError, RemapError
from port_kit.manifest import Manifest
from port_kit.pipeline.caching import configure_caches
from port_kit.pipeline.finite import check_weights
from port_kit.pipeline.inputs import to_client_error
from port_kit.pipeline.loading import build_components, load_component_weights, load_pretrained, weights_sources
from port_kit.pipeline.offload import PinnedOffload
from port_kit.port import KINDS, Component, Pretrained, resolve
from port_kit.runtime.lora import AdaptedPart, read_adapters
from port_kit.runtime.patches import size_lora_buffers_by_adapter
from port_kit.upstream.checks import require

require("pipeline_declarations")
require("lora_hook")


class ComponentPipeline(PinnedOffload, SupportsComponentDiscovery):
    """A pipeline as vLLM-Omni's registry builds it: without weights, which the standard loader then fills in.

    Attributes:
        components: weights that the port's rules map, in loading order.
        pretrained: further parts, which their own libraries fill.
        fps: of the output, in frames per second; 0 for images and for audio alone.
        audio_sample_rate: of the output, in Hz; 0 if the model makes no audio.
        support_audio_output: vLLM-Omni's name for a model that makes audio; derived from the sample rate.
        lora_names: pairs of (pattern of a checkpoint's module name, name in LoRA files) of further naming schemes.
        lora_folders: of a model whose LoRAs adapt several components: the first word of names in files, by component.
            Modules without such a word belong to each transformer.
    """

    components: ClassVar[tuple[Component, ...]] = ()
    pretrained: ClassVar[tuple[Pretrained, ...]] = ()
    fps: ClassVar[int] = 0
    audio_sample_rate: ClassVar[int] = 0
    support_audio_output: ClassVar[bool] = False
    lora_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    lora_folders: ClassVar[Mapping[str, str]] = {}

    _dit_modules: ClassVar[list[str]]
    _encoder_modules: ClassVar[list[str]]
    _vae_modules: ClassVar[list[str]]
    _resident_modules: ClassVar[list[str]]
    _lora_components: ClassVar[tuple[str, ...]]
    supports_request_cancellation: ClassVar[bool] = True
    color_format: ClassVar[str] = "RGB"

    def __init_subclass__(cls, **options: Any) -> None:
        """Derive what vLLM-Omni reads: lists of modules, and whether there is audio."""
        super().__init_subclass__(**options)
        cls.support_audio_output = bool(cls.audio_sample_rate)
        parts: tuple[Component | Pretrained, ...] = (*cls.components, *cls.pretrained)
        names = {kind: [part.name for part in parts if part.kind == kind] for kind in KINDS}
        cls._dit_modules, cls._encoder_modules, cls._vae_modules, cls._resident_modules = names.values()
        cls._lora_components = tuple(name for name in cls.lora_folders if name not in cls._dit_modules)

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        size_lora_buffers_by_adapter()
        self.od_config = od_config
        self.dtype = od_config.dtype
        self.device = get_local_device()
        model = od_config.model
        self.read_directory(model)
        for name, module in self.build_components(model).items():
            self.add_module(name, module)
        for part in self.pretrained:
            self.add_module(part.name, load_pretrained(part, model, self.dtype).to(self.device))
        self.cache_contexts = configure_caches([getattr(self, name) for name in self._dit_modules], od_config)
        self.weights_sources = weights_sources(model, self.components)
        self.eval().requires_grad_(False)

    def build_components(self, model: str) -> dict[str, nn.Module]:
        """Build every component, empty."""
        return build_components(model, self.components)

    def read_directory(self, model: str) -> None:
        """Read the small files of a model directory that requests are checked with; nothing by default."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill all components; see :func:`~port_kit.pipeline.loading.load_component_weights`."""
        loaded = load_component_weights(self, self.components, weights, self.od_config.model)
        check_weights(self, self.od_config.model)
        return loaded

    @classmethod
    def lora_components(cls) -> tuple[Component, ...]:
        """Return the components that LoRAs adapt: those of :attr:`lora_folders`, else the first transformer."""
        names = list(cls.lora_folders) or cls._dit_modules[:1]
        return tuple(component for component in cls.components if component.name in names)

    @classmethod
    def read_adapter(cls, path: str | Path, modules: Sequence[nn.Module], model: str | Path, **options: Any) -> Any:
        """Read a LoRA; see :func:`~port_kit.runtime.lora.read_adapters`.

        Args:
            path: of the adapter.
            modules: the components of :meth:`lora_components`; their weights are not read.
            model: the model directory.
            options: of the reader.

        Raises:
            InputError: ``lora_file``; the file is invalid or does not match the model.
            RemapError: no rule matches a module, or a rule's operations do not apply to an adapter.
        """
        parts = {}
        for part, module in zip(cls.lora_components(), modules, strict=True):
            names = Manifest.from_checkpoint(Path(model) / part.name)
            rules: Any = resolve(part.rules)
            adaptable = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
            parts[part.name] = AdaptedPart(module, rules, adaptable, cls.lora_names)
        folders = {folder: name for name, folder in cls.lora_folders.items()}
        unnamed = [name for name in parts if name in cls._dit_modules]
        return read_adapters(path, parts, folders=folders, unnamed=unnamed, **options)

    def _load_diffusion_lora_adapter(self, *, lora_request: Any, lora_path: str, dtype: torch.dtype) -> Any:
        """Read a LoRA with original names or :attr:`lora_names`, for vLLM-Omni's LoRA manager.

        Raises:
            OmniClientError: the file does not fit this model.
        """
        modules = [getattr(self, part.name) for part in self.lora_components()]
        model = self.od_config.model
        try:
            return self.read_adapter(lora_path, modules, model, adapter=lora_request.lora_int_id, dtype=dtype)
        except (InputError, RemapError) as error:
            raise to_client_error(error) from error
