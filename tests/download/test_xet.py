"""A repository in Xet storage: real chunks in a real (local) store, announced by the Hub, fetched over plain HTTP.

The Hub's bridge answers a plain GET with the store's content. Here hf_xet itself writes and reads that store.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from port_kit.download import FileRule, Recipe, Repository
from port_kit.testing.hub import Hub
from tests.download.helpers import MODEL_INDEX, bring, noise
from tests.helpers import raises

REPOSITORY, NAME = "org/xet", "model.safetensors"
CONTENT = noise(3 << 20, 36)
UPLOAD = """
import json, sys
from hf_xet import XetSession
with XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:
    upload = commit.start_upload_file(sys.argv[2])
print(json.dumps(upload.result().xet_info.hash))
"""
REBUILD = """
import json, sys
from hf_xet import XetFileInfo, XetSession
with XetSession().new_file_download_group(endpoint=sys.argv[1]) as group:
    group.start_download_file(XetFileInfo(sys.argv[3], int(sys.argv[4])), sys.argv[2])
print(json.dumps("done"))
"""


class Store(NamedTuple):
    """A content-addressed store in a folder, the file's hash in it, and the served file."""

    folder: Path
    xet_hash: str
    served: Path

    def rebuild(self) -> None:
        """Rewrite the served file from the store's chunks."""
        self.served.unlink(missing_ok=True)
        run_hf_xet(REBUILD, self.folder, self.served, self.xet_hash, len(CONTENT))

    def flip(self) -> None:
        """Invert one bit of the stored chunks, far behind their header."""
        (xorb,) = (path for path in self.folder.rglob("xorbs/default.*") if path.suffix != ".tagset")
        damaged = bytearray(xorb.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        xorb.chmod(0o644)
        xorb.write_bytes(damaged)


def run_hf_xet(script: str, store: Path, file: Path, *rest: object) -> str:
    """Run a script in an interpreter of its own: hf_xet holds the store's lock, and a cache, as long as it lives."""
    caches = {"HF_HOME": str(store.parent / "hf"), "HF_XET_CACHE": str(store.parent / "hf-xet")}
    command = [sys.executable, "-c", script, f"local://{store}", str(file), *map(str, rest)]
    done = subprocess.run(command, env={**os.environ, **caches}, check=True, capture_output=True, text=True, timeout=60)
    return str(json.loads(done.stdout))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The file, uploaded by hf_xet and read back."""
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    found = Store(tmp_path / "cas", run_hf_xet(UPLOAD, tmp_path / "cas", source), tmp_path / "served")
    source.unlink()
    found.rebuild()
    return found


def xet_recipe(hub: Hub) -> Recipe:
    """A recipe of the one file."""
    return Recipe("xet", (Repository(REPOSITORY, (FileRule(NAME),), hub.commit(REPOSITORY)),), MODEL_INDEX)


def xet_hub(store: Store) -> Hub:
    """A Hub that announces the file as Xet storage and redirects requests to the bridge."""
    return Hub({REPOSITORY: {NAME: store.served}}, xet={NAME: store.xet_hash}, cdn=True)


def test_a_file_in_xet_storage_arrives_over_plain_http(store: Store, tmp_path: Path) -> None:
    with xet_hub(store) as hub:
        assert bring(xet_recipe(hub), tmp_path / "m", hub).complete
        assert (tmp_path / "m" / NAME).read_bytes() == CONTENT
        assert not [request for request in hub.requests if "xet-read-token" in request.path]
        assert {request.host for request in hub.gets(NAME)} == {"hub", "cdn"}


def test_a_byte_that_was_flipped_in_the_store_is_caught(store: Store, tmp_path: Path) -> None:
    with xet_hub(store) as hub:
        store.flip()
        store.rebuild()
        assert len(store.served.read_bytes()) == len(CONTENT), "hf_xet gives the damaged chunk out"
        with raises("hash_mismatch"):
            bring(xet_recipe(hub), tmp_path / "m", hub)
        assert not (tmp_path / "m" / NAME).exists()
        assert not (tmp_path / "m/model_index.json").exists()
