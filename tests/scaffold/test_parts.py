"""Files and components of sources, as a port's recipe names them; the git code that belongs to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from port_kit.download import FileRule
from port_kit.scaffold import NewPort
from port_kit.scaffold.found_sizes import channels_key, config_of, open_keys, tiny_sizes
from port_kit.scaffold.git_code import find_code, named_code
from port_kit.scaffold.parts import Part, find_parts, left_out
from port_kit.scaffold.source import Source, read_source
from port_kit.testing import GitRemote
from port_kit.testing.hub import Hub
from tests.helpers import raises
from tests.inspect import fake_repositories
from tests.scaffold.found_models import CODE, EXTRAS, NET, outline, served, zeros


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with served(tmp_path_factory.mktemp("found"), "no address") as (hub, _):
        yield hub


def read(hub: Hub, *repositories: str) -> list[Source]:
    return [read_source(name, "", endpoint=hub.endpoint) for name in repositories]


def of_files(files: fake_repositories.Files, folder: Path) -> list[Part]:
    source = str(fake_repositories.write(files, folder / "model"))
    return find_parts([read_source(source, "some-lab/some-net")])


def test_every_weight_file_of_both_repositories_is_named(hub: Hub) -> None:
    parts = {part.name: part for part in find_parts(read(hub, NET, EXTRAS))}
    assert list(parts) == ["transformer", "umt5", "vocoder", "audio_vae", "tokenizer"]
    single = {"name": "model.safetensors", "convert": True}
    assert {rule for part in parts.values() for rule in part.rules} == {
        FileRule("weights/net-*-of-00002.pt", folder="transformer", convert=True, wrapper="state_dict"),
        FileRule("discriminator/encoder.pt", folder="audio_vae", wrapper="ema", **single),
        FileRule("umt5.safetensors", folder="umt5", name="model.safetensors"),
        FileRule("wan_vae.pth", folder="vocoder", wrapper="generator", **single),
        FileRule("bpe/tokenizer.json", folder="tokenizer"),
        FileRule("bpe/tokenizer_config.json", folder="tokenizer"),
    }
    assert {
        name: part.source.repository for name, part in parts.items() if part.source.repository == EXTRAS
    }.keys() == {
        "audio_vae",
        "umt5",
        "vocoder",
    }


def test_known_components_are_not_the_ports_to_bring(hub: Hub) -> None:
    parts = {part.name: part for part in find_parts(read(hub, NET, EXTRAS))}
    assert {name for name, part in parts.items() if part.is_own} == {"transformer", "umt5"}
    vae = parts["audio_vae"].recognized
    assert vae is not None and (vae.prefix, vae.kind) == ("vae.", "vae")
    assert {name: part.kind for name, part in parts.items()} == {
        "transformer": "transformer",
        "audio_vae": "vae",
        "umt5": "encoder",
        "vocoder": "vae",
        "tokenizer": "",
    }


def test_known_components_alone_are_no_model(hub: Hub, tmp_path: Path) -> None:
    vocoder = fake_repositories.torch_file({"generator": zeros(outline("bigvgan_16k"))})
    with raises("scaffold_unsupported", "expected the weights of a transformer", "the vocoder of the port"):
        of_files({"net.pt": vocoder}, tmp_path)
    with raises("scaffold_unsupported", "some-lab/some-net", "found none"):
        of_files({"config.json": b'{"model_type": "unheard"}'}, tmp_path / "second")


def test_files_that_no_recipe_can_use_are_named(tmp_path: Path) -> None:
    files = {
        "net.safetensors": fake_repositories.safetensors({"a": (4, 4), "b": (4,)}),
        "detector.onnx": b"onnx",
        "notes.bin": fake_repositories.torch_file({"learning_rate": 1.0}),
    }
    source = read_source(str(fake_repositories.write(files, tmp_path / "model")), "some-lab/some-net")
    (part,) = find_parts([source])
    assert [rule.pattern for rule in part.rules] == ["net.safetensors"]
    facts = {finding.file: finding.fact for finding in left_out([source])}
    assert facts.keys() == {"detector.onnx", "notes.bin"} and facts["notes.bin"] == "has no tensors"
    with raises("scaffold_unsupported", "net.pt", "has no tensors"):
        of_files({"net.pt": fake_repositories.torch_file({"a": 1})}, tmp_path / "second")


def test_shards_beside_other_files_of_that_pattern_are_named_one_by_one(tmp_path: Path) -> None:
    files = {
        f"net-{part}-of-00002.safetensors": fake_repositories.safetensors({part: (4, 4)}) for part in ("00001", "00002")
    }
    files["net-old-of-00002.safetensors"] = fake_repositories.safetensors({"b": (2,)})
    rules = of_files(files, tmp_path)[0].rules
    assert [rule.pattern for rule in rules] == ["net-00001-of-00002.safetensors", "net-00002-of-00002.safetensors"]


def test_parts_of_libraries_keep_their_small_files(tmp_path: Path) -> None:
    parts = {part.name: part for part in of_files(fake_repositories.hybrid_model(), tmp_path)}
    assert list(parts) == ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"]
    assert parts["vae"].pretrained == "diffusers:AutoencoderDC" and parts["vae"].kind == "vae"
    assert [rule.pattern for rule in parts["vae"].rules] == [
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert parts["transformer"].config["_class_name"] == "MyFusionTransformer"
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    assert index in [rule.pattern for rule in parts["transformer"].rules]


def test_the_code_is_pinned_and_its_class_is_found(tmp_path: Path) -> None:
    with served(tmp_path) as (hub, commit):
        sources = read(hub, NET)
        port = NewPort("some_net", "external", tmp_path / "port", source=NET)
        found = find_code(port, named_code_of(port, sources, tmp_path), find_parts(sources))
    assert (found.code.commit, found.code.packages, found.code.path) == (commit, ("some_net_code",), "")
    assert found.classes == {"transformer": "some_net_code.net:Net"}


def named_code_of(port: NewPort, sources: list[Source], folder: Path) -> str:
    """A card names public hosts only; the remote of a test is on this machine."""
    assert named_code(NewPort("some_net", "custom", folder, source=NET), sources) == ""
    return (folder / "git" / "code").as_uri()


def test_packages_below_src_are_found(tmp_path: Path, hub: Hub) -> None:
    remote = GitRemote(tmp_path / "code", {f"src/{path}": text for path, text in CODE.items()})
    port = NewPort("some_net", "external", tmp_path / "port", source=NET)
    found = find_code(port, remote.url, find_parts(read(hub, NET)))
    assert found.code.path == "src" and found.classes["transformer"] == "some_net_code.net:Net"


def test_two_classes_that_fit_are_not_chosen_from(tmp_path: Path, hub: Hub) -> None:
    twice = {**CODE, "some_net_code/copy.py": CODE["some_net_code/net.py"]}
    remote = GitRemote(tmp_path / "code", twice)
    port = NewPort("some_net", "external", tmp_path / "port", source=NET)
    found = find_code(port, remote.url, find_parts(read(hub, NET)))
    assert found.classes == {} and found.code.packages == ("some_net_code",)


def test_code_that_cannot_be_had_is_an_error(tmp_path: Path, hub: Hub) -> None:
    port = NewPort("some_net", "external", tmp_path / "port", source=NET)
    parts = find_parts(read(hub, NET))
    with raises("code_broken", "nothing-here"):
        find_code(port, (tmp_path / "nothing-here").as_uri(), parts)
    with raises("scaffold_unsupported", "expected a Python package"):
        find_code(port, GitRemote(tmp_path / "code", {"README.md": "soon"}).url, parts)


def test_an_address_is_given_or_the_only_one_of_the_card(tmp_path: Path) -> None:
    def named(path: str, card: str, code: str = "") -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        files = {
            "README.md": fake_repositories.card("license: mit", card),
            "a.safetensors": fake_repositories.safetensors({"a": (2,)}),
        }
        source = read_source(str(fake_repositories.write(files, folder)), "some-lab/some-net")
        return named_code(NewPort("some_net", path, tmp_path, source="some-lab/some-net", code=code), [source])  # type: ignore[arg-type]

    one, two = "https://github.com/some-lab/net", "https://github.com/other/work"
    assert named("custom", f"code: {one}.git") == one
    assert named("custom", "") == ""
    assert named("external", f"{one} {two}", code=two) == two
    with raises("scaffold_unsupported", one, two):
        named("custom", f"{one} {two}")
    with raises("scaffold_unsupported", "found none"):
        named("external", "")


def test_layers_are_the_list_with_the_most_elements(tmp_path: Path) -> None:
    """A short model whose stem has more slots than the model has layers."""
    shapes = {f"layers.{n}.attention.wq.weight": (64, 64) for n in range(4)} | {"stem.5.weight": (8, 8)}
    shapes |= {"head.weight": (16, 64)}
    (part,) = of_files({"net.safetensors": fake_repositories.safetensors(shapes)}, tmp_path)
    assert config_of(part) == {"dim": 64, "layers": 4}
    assert open_keys(part) == ["channels", "heads", "hidden"] and channels_key(part) == "channels"
    signature = {"in_channels": 3, "dim": 512, "n_layers": 5, "n_heads": 16, "layers": 9, "stem": ..., "scale": None}
    known = replace(part, parameters=signature)
    assert config_of(known) == {"in_channels": 3, "dim": 64, "n_layers": 4, "n_heads": 16, "layers": 4, "scale": None}
    assert open_keys(known) == ["stem"] and channels_key(known) == "in_channels"
    short = replace(known, parameters={"channels": 4, "n_layers": 4})  # as many channels as layers
    assert tiny_sizes(short)["config"] == {"n_layers": 2}
    assert config_of(replace(known, config={"width": 1})) == {"width": 1}
