"""A script started with a Python that lacks the packages goes on in .venv, or says in one line what to do."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def project(tmp_path):
    """A copy of stagekit/__init__.py and a script that imports it, in a path with a blank."""
    root = tmp_path / "a project"
    (root / "stagekit").mkdir(parents=True)
    shutil.copy(ROOT / "stagekit" / "__init__.py", root / "stagekit")
    (root / "script.py").write_text("import stagekit\nprint('imported')\n")
    return root


def start(project, *arguments):
    """Start the script without site-packages, so that there is no torch."""
    command = [sys.executable, "-S", str(project / "script.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, input="question\n")


def test_it_goes_on_in_the_environment_the_wrappers_made(project):
    (project / ".venv" / "bin").mkdir(parents=True)
    python = project / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "in .venv:" "$@"\ncat\n')
    python.chmod(0o755)
    result = start(project, "--flag", "two words")
    assert result.stdout == f"in .venv: -S {project}/script.py --flag two words\nquestion\n"


def test_an_environment_without_torch_does_not_start_itself_for_ever(project):
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to(sys.executable)
    assert start(project).returncode == 2


def test_without_one_it_is_one_line_that_says_what_to_do(project):
    result = start(project)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "pip install -r requirements.txt" in result.stderr
