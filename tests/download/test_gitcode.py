"""Git code over real remotes: the pinned commit or a named refusal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from port_kit.download import FileRule, Recipe, Repository
from port_kit.download.gitcode import (
    check_code,
    code_folder,
    describe_clone,
    environment,
    fetch_code,
    resolve_commit,
)
from port_kit.errors import DownloadError
from port_kit.testing.gitserver import GitRemote, GitServer
from port_kit.testing.hub import Hub
from tests.download.helpers import MODEL_INDEX, VAE, bring, code, pinned
from tests.helpers import raises, wait_until

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize("over", ["file", "http"])
def test_a_pinned_old_commit_comes_alone(remote: GitRemote, tmp_path: Path, over: str) -> None:
    with GitServer(tmp_path / "remotes") as server:
        source = code(server.url("code") if over == "http" else remote.url, pinned(remote))
        assert resolve_commit(source) == pinned(remote)
        folder = fetch_code(source, pinned(remote))
    assert (folder / "path/zz_model/__init__.py").read_text() == "value = 1\n"
    assert (
        subprocess.run(
            ["git", "rev-list", "--count", "HEAD"], cwd=folder / "repo", capture_output=True, timeout=300
        ).stdout
        == b"1\n"
    )
    assert sorted(path.name for path in (folder / "path").iterdir()) == ["zz_model"]


def test_a_moved_branch_has_no_effect(remote: GitRemote) -> None:
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
        wait_until(lambda: server.requests)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert not code_folder("zz_code", pinned(remote)).exists()
    fetch_code(code(remote.url, pinned(remote)), pinned(remote))
    assert [path.name for path in (home / "code/zz_code").iterdir()] == [pinned(remote)]


@pytest.mark.parametrize(("status", "stall"), [(401, 0), (404, 0), (500, 0), (0, 20)])
def test_refusing_and_silent_servers_are_errors(remote: GitRemote, tmp_path: Path, status: int, stall: float) -> None:
    """A server that is silent for 20 s answers correctly after that, unless the client stops waiting."""
    with GitServer(tmp_path / "remotes", status=status, stall=stall) as server, raises("code_broken"):
        resolve_commit(code(server.url("code"), pinned(remote)))


def test_unknown_commits_and_branches_are_named(remote: GitRemote, home: Path) -> None:
    with raises("code_broken", "0000000"):
        fetch_code(code(remote.url, "0" * 40), "0" * 40)
    with raises("code_broken", "nowhere"):
        resolve_commit(code(remote.url, branch="nowhere"))
    with raises("code_broken", "other"):
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
    print(error.code, "git" in error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "code_broken True\n", done.stderr


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
    with raises("code_broken", "zz_model/secrets"):
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
    assert caught.value.code == "code_broken" and path in caught.value.message


def test_branches_and_tags_are_found_by_their_complete_name(remote: GitRemote) -> None:
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
def test_the_error_has_gits_last_message(remote: GitRemote, tmp_path: Path, status: int) -> None:
    with GitServer(tmp_path / "remotes", status=status) as server:
        url = server.url("code") if status else (tmp_path / "nowhere").as_uri()
        with raises("code_broken", "fatal: ", url):  # the prefix of git's own messages
            resolve_commit(code(url))


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


def test_a_checkout_of_another_user_is_used_if_it_is_declared_safe(
    remote: GitRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git itself has a switch that makes it treat every repository as another user's."""
    commit = pinned(remote)
    source = code(remote.url, commit)
    repository = fetch_code(source, commit) / "repo"
    check_code(source, commit)
    wrapper = tmp_path / "bin" / "git"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nGIT_TEST_ASSUME_DIFFERENT_OWNER=1 exec {shutil.which("git")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    with raises("code_broken"):
        check_code(source, commit)
    subprocess.run(["git", "config", "--global", "--add", "safe.directory", str(repository)], check=True, timeout=300)
    check_code(source, commit)


def test_without_a_home_the_error_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
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
        subprocess.run(git, cwd=repository, check=True, timeout=300)
    else:
        (repository / ("zz_model/__init__.py" if change == "edited" else "zz_model/new.py")).write_text("x = 9\n")
    with pytest.raises(DownloadError) as caught:
        fetch_code(source, pinned(remote))
    assert caught.value.code == "code_broken" and "port-kit uninstall" in caught.value.hint


def test_a_folder_of_code_is_described_by_its_commit(tmp_path: Path) -> None:
    remote = GitRemote(tmp_path / "clone", {"src/net.py": "x = 1\n", "other.py": ""})
    commit = f"commit {remote.head[:12]}"
    assert [describe_clone(remote.folder), describe_clone(remote.folder / "src")] == [commit, commit]
    (remote.folder / "other.py").write_text("x = 2\n")
    assert describe_clone(remote.folder) == f"{commit} with changes"
    assert describe_clone(remote.folder / "src") == commit
    (remote.folder / "untracked").mkdir()
    assert [describe_clone(folder) for folder in (remote.folder / "untracked", tmp_path)] == ["", ""]
