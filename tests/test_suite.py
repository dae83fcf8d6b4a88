"""The settings of the suite itself: what CI may not overlook."""

import os
import subprocess
import sys

import pytest

WITHOUT_REFERENCE = "import sys, pytest; sys.modules['transformers'] = None; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.parametrize(("ci", "is_accepted"), [("", True), ("true", False)])
def test_a_comparison_that_is_skipped_fails_in_ci(ci, is_accepted, pytestconfig):
    """A module of which one test is skipped, and one that is skipped as a whole."""
    files = ["tests/vision/test_geometry.py", "tests/hf/test_parity.py"]
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_REFERENCE,
            *files,
            "-q",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
        ],
        cwd=pytestconfig.rootpath,
        env=os.environ | {"CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode == pytest.ExitCode.OK) == is_accepted
    assert finished.stdout.count("\nIn CI nothing may be skipped for a missing package") == (0 if is_accepted else 2)
