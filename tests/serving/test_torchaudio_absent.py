"""The stand-in for torchaudio: who gets it, and what it says when it is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from port_kit.errors import OptionalDependencyError, RegistrationError
from port_kit.runtime import torchaudio_absent

SPEECH = """
import torchaudio
import torchaudio.transforms as transforms
from torchaudio.functional import melscale_fbanks
import json

def resample(sound):
    return torchaudio.functional.resample(sound, 1, 2)
"""


@pytest.fixture
def speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module that imports torchaudio, named as one of those that get the stand-in."""
    (tmp_path / "some_speech.py").write_text(SPEECH)
    (tmp_path / "other_speech.py").write_text("import torchaudio\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torchaudio_absent, "MODULES", ("some_speech",))
    monkeypatch.setattr(sys, "meta_path", [torchaudio_absent.AbsentFinder(), *sys.meta_path])
    yield importlib.import_module("some_speech")
    sys.modules.pop("some_speech")


def test_torchaudio_is_not_installed_here() -> None:
    assert find_spec("torchaudio") is None


def test_a_module_that_imports_torchaudio_is_imported(speech: ModuleType) -> None:
    assert speech.json.loads("1") == 1
    with pytest.raises(OptionalDependencyError, match="torchaudio.functional.resample was called") as caught:
        speech.resample([0.0])
    assert caught.value.code == "dependency_missing"
    with pytest.raises(OptionalDependencyError):
        speech.transforms.Spectrogram(n_fft=8)
    with pytest.raises(OptionalDependencyError):
        speech.melscale_fbanks(1)


def test_nobody_else_finds_torchaudio(speech: ModuleType) -> None:
    assert "torchaudio" not in sys.modules and find_spec("torchaudio") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("other_speech")
    assert not hasattr(speech.torchaudio, "__version__")


def test_an_installed_torchaudio_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchaudio.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert torchaudio_absent.AbsentFinder().find_spec(torchaudio_absent.MODULES[0]) is None


def test_other_imports_than_the_known_ones_are_refused(speech: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from port_kit.runtime.ledger import PATCHES

    patch = PATCHES["torchaudio_absent"]
    needs = (replace(patch.needs[0], expected=("torchaudio.compliance",)), *patch.needs[1:])
    monkeypatch.setitem(PATCHES, patch.name, replace(patch, needs=needs))
    with pytest.raises(RegistrationError, match="torchaudio.compliance"):
        importlib.reload(speech)
