"""Commit subjects are imperative sentences of at most 72 characters, since the commit that added this file."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 72
# A first word of this form is no imperative: an article, a participle, or a verb in the third person.
OTHER_MOOD = re.compile(r"(An?|The|This|[A-Z]\w*(ed|ing)|[A-Z]\w*[^su]s)\b")
IMPERATIVES = ("Bring", "Embed", "Feed", "Need", "Seed", "Speed")  # which only look otherwise


def problem(subject):
    """Say what is wrong with a commit's subject, or return None."""
    word = subject.split(" ", 1)[0]
    if len(subject) > LONGEST:
        return f"{len(subject)} characters, at most {LONGEST}"
    if not word[:1].isupper() or (OTHER_MOOD.fullmatch(word) and word not in IMPERATIVES):
        return "begin with a verb in the imperative, capitalised: 'Add', 'Fix', 'Move'"
    if subject.endswith("."):
        return "no full stop at the end"
    return None


@pytest.mark.parametrize(
    "subject", ["Add a test", "Pass seeds on", "Focus on errors", "Speed up the GEMV", "Bring back the cache", "A" * 72]
)
def test_good_subjects_pass(subject):
    assert problem(subject) is None


@pytest.mark.parametrize(
    "subject",
    [
        "Added a test",
        "Adds a test",
        "Adding a test",
        "The cache, faster",
        "add a test",
        "Add a test.",
        "Add " + "a" * 69,
    ],
)
def test_bad_subjects_are_found(subject):
    assert problem(subject)


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")
def test_commits_have_good_subjects():
    def log(*arguments):
        command = ["git", "-C", ROOT, "log", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    added = log("--diff-filter=A", "--format=%H", "--", __file__)
    subjects = log("--no-merges", "--format=%s", f"{added[-1]}..HEAD") if added else []
    wrong = {subject: problem(subject) for subject in subjects if problem(subject)}
    assert not wrong, "reword them: git rebase -i"
