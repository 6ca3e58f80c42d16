"""The command line of fastflow.vae as tests call it: in this process, or as one of its own."""

from __future__ import annotations

import sys

import pytest

from fastflow.vae import cli

COMMAND = [sys.executable, "-W", "ignore", "-m", "fastflow.vae"]


def call(*words: object) -> int:
    """Runs a command line in this process and returns its exit code."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def complaint(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("fastflow.vae: ") and error.count("\n") == 1, error
    return error
