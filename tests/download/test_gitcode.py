"""Git code over real remotes: the pinned commit or a named refusal; installed here alone, and taken out again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import FILES, MODEL_INDEX, VAE, bring, without_privileges

import port_kit
from port_kit.download import FileRule, GitCode, Recipe, Repository
from port_kit.download.gitcode import check_code, code_folder, environment, fetch_code, resolve_commit
from port_kit.errors import DownloadError
from port_kit.testing.gitserver import GitRemote, GitServer
from port_kit.testing.hub import Hub

PACKAGE = {"zz_model/__init__.py": "value = 1\n", "utils/__init__.py": "", "tests/__init__.py": ""}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of this test's own, and a HOME with a configuration that must have no effect."""
    monkeypatch.setenv("PORT_KIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    (tmp_path / "user").mkdir()
    return tmp_path / "home"


@pytest.fixture
def remote(tmp_path: Path) -> GitRemote:
    """A repository with two commits; the first is the one that recipes pin."""
    made = GitRemote(tmp_path / "remotes/code", PACKAGE)
    made.git("tag", "pinned")
    made.commit({"zz_model/__init__.py": "value = 2\n"})
    return made


def pinned(remote: GitRemote) -> str:
    """The first commit."""
    return remote.git("rev-parse", "pinned").strip()


def code(url: str, commit: str | None = None, **fields: object) -> GitCode:
    """Git code with one package."""
    return GitCode("zz_code", url, **{"packages": ("zz_model",), "commit": commit, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("over", ["file", "http"])
def test_a_pinned_old_commit_comes_alone(remote: GitRemote, tmp_path: Path, over: str) -> None:
    with GitServer(tmp_path / "remotes") as server:
        source = code(server.url("code") if over == "http" else remote.url, pinned(remote))
        assert resolve_commit(source) == pinned(remote)
        folder = fetch_code(source, pinned(remote))
    assert (folder / "path/zz_model/__init__.py").read_text() == "value = 1\n"
    assert (
        subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=folder / "repo", capture_output=True).stdout
        == b"1\n"
    )
    assert sorted(path.name for path in (folder / "path").iterdir()) == ["zz_model"]


def test_a_moved_branch_changes_nothing(remote: GitRemote) -> None:
    unpinned = code(remote.url)
    first = resolve_commit(unpinned)
    assert first == remote.head
    fetch_code(unpinned, first)
    remote.commit({"zz_model/__init__.py": "value = 3\n"})
    assert "value = 2" in (fetch_code(unpinned, first) / "path/zz_model/__init__.py").read_text()
    assert resolve_commit(unpinned) == remote.head != first


def test_killed_while_fetching_a_rerun_is_clean(remote: GitRemote, tmp_path: Path, home: Path) -> None:
    with GitServer(tmp_path / "remotes", stall=0.4) as server:
        source = code(server.url("code"), pinned(remote))
        script = f"from port_kit.download.gitcode import *\nfetch_code({source!r}, {pinned(remote)!r})"
        prelude = "from port_kit.download import GitCode\n"
        process = subprocess.Popen([sys.executable, "-c", prelude + script])
        while not server.requests:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not code_folder("zz_code", pinned(remote)).exists()
    fetch_code(code(remote.url, pinned(remote)), pinned(remote))
    assert [path.name for path in (home / "code/zz_code").iterdir()] == [pinned(remote)]


@pytest.mark.parametrize(("status", "stall"), [(401, 0), (404, 0), (500, 0), (0, 20)])
def test_refusing_and_silent_servers_end_within_ten_seconds(
    remote: GitRemote, tmp_path: Path, status: int, stall: float
) -> None:
    with GitServer(tmp_path / "remotes", status=status, stall=stall) as server:
        begun = time.monotonic()
        with pytest.raises(DownloadError) as caught:
            resolve_commit(code(server.url("code"), pinned(remote)))
        assert caught.value.code == "code_broken" and time.monotonic() - begun < 10


def test_unknown_commits_and_branches_are_named(remote: GitRemote, home: Path) -> None:
    with pytest.raises(DownloadError, match="0000000"):
        fetch_code(code(remote.url, "0" * 40), "0" * 40)
    with pytest.raises(DownloadError, match="no branch nowhere"):
        resolve_commit(code(remote.url, branch="nowhere"))
    with pytest.raises(DownloadError, match="no module other"):
        fetch_code(code(remote.url, packages=("other",)), pinned(remote))
    assert list((home / "code/zz_code").iterdir()) == []


def test_without_git_the_error_says_so(remote: GitRemote) -> None:
    script = f"""
from port_kit.download import GitCode
from port_kit.download.gitcode import resolve_commit
from port_kit.errors import DownloadError
try:
    resolve_commit(GitCode("c", {remote.url!r}, ("zz_model",)))
except DownloadError as error:
    print(error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True
    )
    assert done.stdout == "git is not installed\n", done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "ext::sh -c touch% marker",
        "-u./evil",
        "--upload-pack=touch marker",
        "ssh://-oProxyCommand=touch%20marker/x",
        "https://example.org/x\nevil",
        "https://example.org/x y",
        "http://example.org/x",
        "git://example.org/x",
        "/plain/path",
    ],
)
def test_dangerous_urls_are_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError) as caught:
        resolve_commit(code(url))
    assert caught.value.code == "code_url" and not (tmp_path / "marker").exists()


def test_the_users_configuration_has_no_effect(
    remote: GitRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "post-checkout").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (hooks / "post-checkout").chmod(0o755)
    (tmp_path / "user/.gitconfig").write_text(
        f'[core]\nhooksPath = {hooks}\n[url "file:///nowhere/"]\ninsteadOf = {remote.url}\n'
        f'[filter "lfs"]\nsmudge = touch {marker}\nprocess = touch {marker}\nrequired = true\n'
    )
    commit = remote.commit({".gitattributes": "*.bin filter=lfs\n", "zz_model/x.bin": "content"})
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_WORK_TREE", "/nowhere")
    fetch_code(code(remote.url, commit), commit)
    assert not marker.exists()
    assert os.environ["GIT_DIR"] == "/nowhere" and environment()["GIT_TERMINAL_PROMPT"] == "0"


def test_a_link_out_of_the_repository_is_refused(remote: GitRemote, home: Path) -> None:
    (remote.folder / "zz_model/secrets").symlink_to("/etc")
    commit = remote.commit({})
    with pytest.raises(DownloadError, match="zz_model/secrets links out"):
        fetch_code(code(remote.url, commit), commit)
    assert list((home / "code/zz_code").iterdir()) == []


@pytest.mark.parametrize(
    ("place", "packages"), [("zz_model/sub", ("zz_model",)), ("other", ("zz_model", "other")), ("outside", None)]
)
def test_a_package_that_is_or_holds_a_submodule_is_refused(
    remote: GitRemote, tmp_path: Path, place: str, packages: tuple[str, ...] | None
) -> None:
    other = GitRemote(tmp_path / "remotes/other", {"x.py": ""})
    remote.git("-c", "protocol.file.allow=always", "submodule", "add", "--quiet", other.url, place)
    source = code(remote.url, remote.commit({}), packages=packages or ("zz_model",))
    if packages is None:
        assert list((fetch_code(source, remote.head) / "repo" / place).iterdir()) == []
        return
    with pytest.raises(DownloadError) as caught:
        fetch_code(source, remote.head)
    assert caught.value.code == "code_broken" and place in caught.value.message


@pytest.mark.parametrize("path", ["zz_model/table.npz", "zz_model.py"])
def test_a_package_whose_files_lie_in_git_lfs_is_refused(remote: GitRemote, path: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"
    commit = remote.commit({path: pointer, "outside.bin": pointer})
    with pytest.raises(DownloadError) as caught:
        fetch_code(code(remote.url, commit), commit)
    assert caught.value.code == "code_broken" and f"{path} lies in Git LFS" in caught.value.message


def test_branches_and_tags_are_found_by_their_whole_name(remote: GitRemote) -> None:
    head = remote.head
    remote.git("tag", "--annotate", "v1", "--message", "x")
    remote.git("checkout", "--quiet", "-b", "feature/main")
    feature = remote.commit({"zz_model/__init__.py": "value = 9\n"})
    remote.git("checkout", "--quiet", "main")
    found = {name: resolve_commit(code(remote.url, branch=name)) for name in ("main", "feature/main", "v1", "HEAD")}
    assert found == {"main": head, "feature/main": feature, "v1": head, "HEAD": head}
    assert fetch_code(code(remote.url, branch="v1"), found["v1"]).is_dir()
    with pytest.raises(DownloadError) as caught:
        tag = remote.git("rev-parse", "v1").strip()
        fetch_code(code(remote.url, tag), tag)
    assert head in caught.value.hint


@pytest.mark.parametrize("status", [401, 404, 500, 0])
def test_the_error_has_gits_own_words(remote: GitRemote, tmp_path: Path, status: int) -> None:
    with GitServer(tmp_path / "remotes", status=status) as server:
        url = server.url("code") if status else (tmp_path / "nowhere").as_uri()
        with pytest.raises(DownloadError, match="failed: .*fatal: ") as caught:
            resolve_commit(code(url))
    said = {401: "Authentication failed", 404: "not found", 500: "500", 0: "does not"}
    assert said[status] in caught.value.message


def test_a_slow_server_is_waited_for(remote: GitRemote, tmp_path: Path) -> None:
    with GitServer(tmp_path / "remotes", stall=5.5) as server:
        assert resolve_commit(code(server.url("code"))) == remote.head


def test_two_processes_may_fetch_the_same_commit(remote: GitRemote, tmp_path: Path) -> None:
    with GitServer(tmp_path / "remotes", stall=0.3) as server, ThreadPoolExecutor() as pool:
        source = code(server.url("code"), pinned(remote))
        folders = list(pool.map(lambda _: fetch_code(source, pinned(remote)), range(3)))
    assert len(set(folders)) == 1 and len(list(folders[0].parent.iterdir())) == 1


def test_a_password_in_the_url_is_used_and_shown_nowhere(remote: GitRemote, tmp_path: Path, home: Path) -> None:
    secret = "ghp_S3cret"
    with GitServer(tmp_path / "remotes") as server, Hub({VAE: {"f": b"1"}}) as hub:
        source = code(server.url("code").replace("://", f"://oauth2:{secret}@"), pinned(remote))
        fetch_code(source, resolve_commit(source))
        recipe = Recipe("r", (Repository(VAE, (FileRule("f"),)),), MODEL_INDEX, code=(source,))
        plan = bring(recipe, tmp_path / "m", hub, dry_run=True, with_reference=True).plan
        assert plan is not None
        shown = plan.describe() + repr(plan.lock.to_json()) + repr(plan.to_json())
    assert secret not in shown
    assert not any(secret.encode() in path.read_bytes() for path in home.rglob("*") if path.is_file())
    for url in (f"https://u:{secret}@127.0.0.1:1/x", f"https://u:{secret}@[x", f"ftp://u:{secret}@h/x"):
        with pytest.raises(DownloadError) as caught:
            resolve_commit(code(url))
        assert secret not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize("package", ["sitecustomize", "usercustomize", "SiteCustomize", "json", "msvcrt", "org"])
def test_a_package_that_python_imports_by_itself_is_refused(remote: GitRemote, home: Path, package: str) -> None:
    commit = remote.commit({f"{package}.py": ""})
    source = code(remote.url, commit, packages=(package,))
    for action in (lambda: resolve_commit(source), lambda: fetch_code(source, commit)):
        with pytest.raises(DownloadError) as caught:
            action()
        assert caught.value.code == "code_clash"
    assert not home.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give files away")
def test_a_checkout_of_another_user_is_used_if_its_user_says_so(remote: GitRemote, tmp_path: Path) -> None:
    source = code(remote.url, pinned(remote))
    repository = fetch_code(source, pinned(remote)) / "repo"
    subprocess.run(["chown", "-R", "12345", str(repository)], check=True)
    with pytest.raises(DownloadError, match="safe.directory"):
        check_code(source, pinned(remote))
    subprocess.run(["git", "config", "--global", "--add", "safe.directory", str(repository)], check=True)
    check_code(source, pinned(remote))


def test_without_a_home_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "PORT_KIT_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(DownloadError) as caught:
        code_folder("c", "0" * 40)
    assert caught.value.code == "install_target"


@pytest.mark.parametrize("change", ["edited", "added", "moved"])
def test_a_changed_checkout_is_detected(remote: GitRemote, change: str) -> None:
    source = code(remote.url, pinned(remote))
    repository = fetch_code(source, pinned(remote)) / "repo"
    (repository / "zz_model/__pycache__").mkdir()
    (repository / "zz_model/__pycache__/x.pyc").write_bytes(b"")
    check_code(source, pinned(remote))
    if change == "moved":
        git = ["git", "-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet", "--allow-empty", "-m", "x"]
        subprocess.run(git, cwd=repository, check=True)
    else:
        (repository / ("zz_model/__init__.py" if change == "edited" else "zz_model/new.py")).write_text("x = 9\n")
    with pytest.raises(DownloadError) as caught:
        fetch_code(source, pinned(remote))
    assert caught.value.code == "code_broken" and "port-kit uninstall" in caught.value.hint


# --- installed into an environment -----------------------------------------------------------------------------------


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
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, preexec_fn=preexec_fn)


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


def test_a_missing_reference_names_the_command() -> None:
    from port_kit.download.install import import_reference
    from port_kit.errors import OptionalDependencyError

    with pytest.raises(OptionalDependencyError, match="port-kit download some_port --with-reference"):
        import_reference("zz_not_installed", "some_port")
    assert import_reference("json", "some_port").loads("1") == 1
