"""Linters and tests with every torch that is supported: ``nox``, or ``nox -s "tests(torch='2.12')"``."""

from __future__ import annotations

import nox

TORCHES = {"2.11": "0.26", "2.12": "0.27", "2.13": "0.28", "2.14": "0.29"}
"""Each torch with the torchvision that was built for it."""

nox.options.default_venv_backend = "uv|virtualenv"


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-e", ".[test]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
@nox.parametrize("torch", list(TORCHES))
def tests(session: nox.Session, torch: str) -> None:
    session.install(f"torch=={torch}.*", f"torchvision=={TORCHES[torch]}.*")
    session.install("-e", ".[test,models]")
    session.run("pytest", "-n", "auto", *session.posargs, env={"OMP_NUM_THREADS": "1"})
