"""Fuzzing of untrusted files: a reader returns a report or raises an error of the kit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from port_kit.errors import CheckpointError
from port_kit.inspect import Inspection, inspect
from port_kit.inspect.checkpoint_files import read_index
from port_kit.inspect.gguf import read_gguf
from port_kit.inspect.model_card import read_model_card
from tests.inspect import fake_repositories

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["diffusers", "bagel", "F32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["_class_name", "_diffusers_version", "model_type", "architectures", "transformer", "vae", "weight_map", "a"]
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=4)
RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DEEP = b"[" * 100_000


class Bytes:
    """Bytes as a source."""

    def __init__(self, content: bytes) -> None:
        self.name, self.size, self._content = "some.gguf", len(content), content

    def read_at(self, offset: int, length: int) -> bytes:
        return self._content[offset : offset + length]


@RELAXED
@given(index=OBJECTS, config=OBJECTS, part=OBJECTS, header=st.dictionaries(st.text(max_size=4), VALUES, max_size=3))
def test_any_json_gives_a_report(
    tmp_path: Path, index: dict[str, Any], config: dict[str, Any], part: dict[str, Any], header: dict[str, Any]
) -> None:
    text = json.dumps(header).encode()
    files = {
        "model_index.json": fake_repositories.as_json(index),
        "config.json": fake_repositories.as_json(config),
        "transformer/config.json": fake_repositories.as_json(part),
        "transformer/model.safetensors.index.json": fake_repositories.as_json(part),
        "transformer/model.safetensors": len(text).to_bytes(8, "little") + text,
    }
    report = inspect(str(fake_repositories.write(files, tmp_path / "some_model")))
    assert isinstance(report, Inspection)
    json.dumps(report.to_dict())


@RELAXED
@given(place=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 250))
def test_damaged_gguf_is_an_error_of_ours(place: int, value: int, cut: int) -> None:
    content = bytearray(fake_repositories.gguf("flux", {"a.weight": ((8, 4), 0), "b": ((4,), 1)}))
    content[place % len(content)] = value
    try:
        read_gguf(Bytes(bytes(content[:cut])))
    except CheckpointError as error:
        assert error.code in ("checkpoint_format", "checkpoint_corrupt")


@pytest.mark.parametrize("name", ["model_index.json", "config.json", "model.safetensors.index.json"])
def test_brackets_without_end(name: str, tmp_path: Path) -> None:
    files = {"model.safetensors": fake_repositories.safetensors({"a": (2,)}), name: DEEP}
    report = inspect(str(fake_repositories.write(files, tmp_path / "some_model")))
    assert any(finding.file == name for finding in report.missing)


@given(st.text(max_size=60))
def test_any_card(text: str) -> None:
    read_model_card(text)
    read_model_card(f"---\n{text}\n---\n")


def test_cards_and_indexes_of_strangers() -> None:
    assert read_model_card(f"---\n{DEEP.decode()}\n---\n").problem
    assert read_model_card("---\ndate: 2024-13-45\n---\n").problem
    assert read_index("a/x.index.json", b'{"weight_map": {"t": 3}}').weight_map == {"t": "a/3"}
