"""Git code installed into an environment of its own, and taken out again."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import port_kit
from port_kit.download import GitCode
from port_kit.download.gitcode import code_folder
from port_kit.testing.gitserver import GitRemote
from port_kit.testing.hub import Hub
from tests.download.helpers import FILES, MODEL_INDEX, VAE, code, pinned, without_privileges

pytestmark = pytest.mark.usefixtures("home")


class Environment:
    """A virtual environment of its own that sees this one's packages."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin/python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        here = [path for path in sys.path if path.endswith("site-packages")]
        lines = [f"import site; site.addsitedir({path!r})" for path in here]
        (self.site / "packages_of_the_tests.pth").write_text("\n".join(lines) + "\n")

    def run(
        self, script: str, preexec_fn: Callable[[], None] | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in it."""
        env = {**os.environ, **variables}
        command = [str(self.python), "-c", script]
        return subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, preexec_fn=preexec_fn, timeout=300
        )


INSTALL = """
from port_kit.download import GitCode
from port_kit.download.gitcode import fetch_code
from port_kit.download.install import install_code
from port_kit.errors import PortKitError
code = {code!r}
try:
    fetch_code(code, code.commit)
    install_code(code, code.commit)
except PortKitError as error:
    print(error.code)
"""
CATCH = """
from port_kit.download.install import uninstall_code
from port_kit.errors import DownloadError
def say(action):
    try:
        action()
    except DownloadError as error:
        print(error.code)
"""
UNINSTALL_OR_SAY = "say(lambda: uninstall_code('zz_code'))"
UNINSTALL = "from port_kit.download.install import uninstall_code; print(uninstall_code({name!r}))"


@pytest.fixture
def box(tmp_path: Path) -> Environment:
    """An environment to install into."""
    assert port_kit.__file__
    return Environment(tmp_path / "venv")


def test_installed_code_imports_in_a_fresh_interpreter_and_goes_away(
    remote: GitRemote, box: Environment, home: Path
) -> None:
    source = code(remote.url, pinned(remote))
    before = sorted(box.site.iterdir())
    assert box.run(INSTALL.format(code=source)).stdout == ""
    for variables in ({}, {"LC_ALL": "C"}):
        done = box.run("import zz_model; print(zz_model.value)", **variables)
        assert done.stdout == "1\n", done.stderr
    assert "No module named 'utils'" in box.run("import utils").stderr
    pth = box.site / "port_kit_zz_code.pth"
    content, stat = pth.read_bytes(), pth.stat()
    assert box.run(INSTALL.format(code=source)).stdout == ""
    assert pth.read_bytes() == content and pth.stat().st_mtime_ns == stat.st_mtime_ns
    assert "port_kit_zz_code.pth" in box.run(UNINSTALL.format(name="zz_code")).stdout
    assert sorted(box.site.iterdir()) == before and not (home / "code").exists()
    assert "No module named 'zz_model'" in box.run("import zz_model").stderr


def test_two_codes_live_side_by_side(remote: GitRemote, box: Environment, home: Path, tmp_path: Path) -> None:
    before = sorted(box.site.iterdir())
    other = GitRemote(tmp_path / "remotes/other", {"yy_model.py": "value = 5\n", "utils/__init__.py": ""})
    second = GitCode("yy_code", other.url, ("yy_model",), other.head)
    for source in (code(remote.url, pinned(remote)), second):
        assert box.run(INSTALL.format(code=source)).stdout == ""
    assert box.run("import zz_model, yy_model; print(zz_model.value + yy_model.value)").stdout == "6\n"
    box.run(UNINSTALL.format(name="zz_code"))
    assert box.run("import yy_model; print(yy_model.value)").stdout == "5\n"
    assert "No module named" in box.run("import zz_model").stderr
    box.run(UNINSTALL.format(name="yy_code"))
    assert sorted(box.site.iterdir()) == before and not (home / "code").exists()


def test_two_environments_share_a_checkout(remote: GitRemote, box: Environment, tmp_path: Path) -> None:
    second = Environment(tmp_path / "second")
    source = code(remote.url, pinned(remote))
    for place in (box, second):
        assert place.run(INSTALL.format(code=source)).stdout == ""
    box.run(UNINSTALL.format(name="zz_code"))
    assert second.run("import zz_model; print(zz_model.value)").stdout == "1\n"


@pytest.mark.parametrize("package", ["json", "click"])
def test_a_name_that_is_importable_already_is_refused(box: Environment, tmp_path: Path, package: str) -> None:
    clash = GitRemote(tmp_path / "remotes/clash", {f"{package}/__init__.py": ""})
    source = GitCode("clash", clash.url, (package,), clash.head)
    assert box.run(INSTALL.format(code=source)).stdout == "code_clash\n"
    assert not list(box.site.glob("port_kit_*"))


def test_a_name_that_a_pth_file_imports_at_every_start_is_refused(remote: GitRemote, box: Environment) -> None:
    (box.site / "tool.pth").write_text("import os; exec('try:\\n import zz_model\\nexcept ImportError: pass')\n")
    assert box.run(INSTALL.format(code=code(remote.url, pinned(remote)))).stdout == "code_clash\n"
    assert not list(box.site.glob("port_kit_*"))


def test_the_proof_of_an_installation_runs_no_customisation(
    remote: GitRemote, box: Environment, tmp_path: Path
) -> None:
    """Not even of an environment that has one already."""
    marker = tmp_path / "marker"
    (box.site / "sitecustomize.py").write_text(
        f"import sys\nif sys.flags.isolated: open({str(marker)!r}, 'w').close()\n"
    )
    assert box.run(INSTALL.format(code=code(remote.url, pinned(remote)))).stdout == ""
    assert not marker.exists() and box.run("import zz_model; print(zz_model.value)").stdout == "1\n"


def test_a_place_for_git_code_that_may_not_be_written_is_named(remote: GitRemote, box: Environment, home: Path) -> None:
    home.mkdir()
    home.chmod(0o555)
    try:
        done = box.run(INSTALL.format(code=code(remote.url, pinned(remote))), preexec_fn=without_privileges)
    finally:
        home.chmod(0o755)
    assert done.stdout == "install_target\n", done.stderr


@pytest.mark.parametrize("folder", ["hömé", "two\nlines"])
def test_paths_that_would_break_python_are_refused(
    remote: GitRemote, box: Environment, tmp_path: Path, folder: str
) -> None:
    source = code(remote.url, pinned(remote))
    done = box.run(INSTALL.format(code=source), PORT_KIT_HOME=str(tmp_path / folder))
    assert done.stdout == "install_target\n", done.stderr
    assert not list(box.site.glob("port_kit_*"))


DOWNLOAD = """
from port_kit.download import *
from port_kit.errors import DownloadError
recipe = Recipe("r", (Repository({repo!r}, (FileRule("f"),)),), {index!r}, code=({code!r},))
try:
    download(recipe, {place!r}, endpoint={endpoint!r}, token=False, with_reference=True)
except DownloadError as error:
    print(error.code)
"""


def test_an_unwritable_environment_is_named_before_the_download(
    remote: GitRemote, box: Environment, tmp_path: Path
) -> None:
    with Hub({VAE: {"f": b"1"}}) as hub:
        source, place = code(remote.url, pinned(remote)), str(tmp_path / "m")
        script = DOWNLOAD.format(repo=VAE, index=MODEL_INDEX, code=source, place=place, endpoint=hub.endpoint)
        box.site.chmod(0o555)
        try:
            done = box.run(script, preexec_fn=without_privileges)
        finally:
            box.site.chmod(0o755)
        assert done.stdout == "install_target\n", done.stderr
        assert hub.gets() == [] and not (tmp_path / "m/f").exists()
        assert box.run(script).stdout == "" and (tmp_path / "m/f").exists()
        box.site.chmod(0o555)
        try:
            done = box.run(f"{CATCH}{UNINSTALL_OR_SAY}", preexec_fn=without_privileges)
        finally:
            box.site.chmod(0o755)
        assert done.stdout == "output_dir\n", done.stderr
        assert box.run("import zz_model; print(zz_model.value)").stdout == "1\n"


@pytest.mark.parametrize("name", ["../..", "/{}", "..", ".", "", "a/b", "x\n"])
def test_uninstall_takes_names_and_no_paths(box: Environment, home: Path, tmp_path: Path, name: str) -> None:
    """A model directory, or anything else, that was named by mistake is left alone."""
    victim = tmp_path / "victim/transformer/weights"
    victim.parent.mkdir(parents=True)
    victim.write_text("precious")
    (home / "code").mkdir(parents=True)
    name = str(tmp_path / "victim") if name == "/{}" else name
    done = box.run(f"{CATCH}say(lambda: uninstall_code({name!r}))")
    assert done.stdout == "code_broken\n", done.stderr
    assert victim.read_text() == "precious" and (home / "code").is_dir()


def test_the_command_installs_reports_and_uninstalls(remote: GitRemote, box: Environment, tmp_path: Path) -> None:
    with Hub({VAE: {"vae.safetensors": FILES[VAE]["vae.safetensors"]}}) as hub:
        recipe = tmp_path / "r.toml"
        recipe.write_text(
            f'name = "zz"\nmodel_index = {{ _class_name = "T", _diffusers_version = "1" }}\n'
            f'[[repositories]]\nrepo_id = "{VAE}"\nfiles = [{{ pattern = "vae.safetensors", folder = "vae" }}]\n'
            f'[[code]]\nname = "zz_code"\nurl = "{remote.url}"\npackages = ["zz_model"]\n'
        )
        run = "import sys; sys.argv[1:] = {arguments!r}; from port_kit.cli import main; main()"
        arguments = ["download", str(recipe), "--output-dir", str(tmp_path / "m"), "--with-reference", "--no-cache"]
        done = box.run(run.format(arguments=arguments), **hub.environment)
        assert done.returncode == 0 and "installed zz_code" in done.stdout, done.stderr
        count = len(hub.requests)
        assert box.run(run.format(arguments=arguments), **hub.environment).returncode == 0
        assert len(hub.requests) == count
        assert box.run("import zz_model; print(zz_model.value)").stdout == "2\n"
        source = code_folder("zz_code", remote.head) / "repo/zz_model/__init__.py"
        source.write_text("value = 7\n")
        done = box.run(run.format(arguments=[*arguments, "--verify"]), **hub.environment)
        assert done.returncode == 1 and "code_broken" in done.stderr
        source.write_text("value = 2\n")
        done = box.run(run.format(arguments=["uninstall", "zz_code"]))
        assert done.returncode == 0 and "port_kit_zz_code.pth" in done.stdout
        assert box.run(run.format(arguments=["uninstall", "zz_code"])).returncode == 1
