"""Places that a job can use. Its working directory is a copy that goes with it, and holds no data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from raylux.config import Config
from raylux.errors import UserError
from raylux.sources import PACKAGE, is_url

# Ray gives it to what it runs as a job.
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Left out of what is sent, beside what .rayignore and .gitignore name: weights, arrays, corpora, and what git keeps.
EXCLUDES = (
    ".git", ".venv", "runs/", "**/__pycache__/", "*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth", "*.ckpt",
    "*.zarr/", "*.parquet", "*.arrow", "*.npy", "*.npz", "*.tar", "*.zip", "*.gz", "*.zst", "*.xz", "*.bz2",
    "auth_token",
)  # fmt: skip


def check_folder(config: Config) -> None:
    """Raises UserError where a job would write its results into the copy that it runs in, and lose them."""
    folder = config.run.folder
    if _relative(folder):
        here = Path(folder).expanduser().resolve()
        raise UserError(
            f"run.folder = {folder}: a job needs an absolute path that every node reaches, or a URL: what it writes "
            f"elsewhere goes with it; on this machine, run.folder={here}"
        )


def check_in_job(config: Config) -> None:
    """As ``check_folder``, where this process is a job's; elsewhere nothing."""
    if os.environ.get(_JOB):
        check_folder(config)


def check_places_in_job(places: Mapping[str, str]) -> None:
    """Raises UserError where this process is a job's and a place (what it is called -> path) is relative."""
    for name, place in places.items():
        if os.environ.get(_JOB) and _relative(place):
            raise UserError(
                f"{name} = {place}: a job needs an absolute path that every node reaches, or a URL: its working "
                "directory is a copy"
            )


def check_inbox(place: str) -> None:
    """Raises UserError where a batch's query files would be looked for in the job's own folder."""
    if _relative(place):
        raise UserError(
            f"--queries {place}: a job needs an absolute path that every node reaches, or a URL; on this machine, "
            f"--queries {Path(place).expanduser().resolve()}"
        )


def check(config: Config, working_dir: Path) -> None:
    """Whether a job finds what a config names.

    Args:
        config: of the run.
        working_dir: absolute; what is sent with the job.

    Raises:
        UserError: the run folder, the model or the corpus is a relative path of this machine; the query file is not
            in the working directory.
    """
    check_folder(config)
    model = config.model
    places = {"model.path": model.path, "model.adapter": model.adapter, "corpus.path": config.corpus.path}
    for key, place in places.items():
        # A name of a hub looks like a relative path: it is one if something is there.
        if place is not None and _relative(place) and (working_dir / place).exists():
            raise UserError(
                f"{key} = {place}: a job carries no data; give an absolute path that every node reaches, or a URL; "
                f"on this machine, {key}={(working_dir / place).resolve()}"
            )
    queries = config.queries.path
    if _relative(queries) and not (working_dir / queries).is_file():
        raise UserError(f"queries.path = {queries}: not in {working_dir}, which is sent with the job")


def carried(config_path: str, working_dir: Path) -> str:
    """A config's path as the job sees it.

    Raises:
        UserError: it is not in the working directory.
    """
    path = Path(config_path).expanduser().resolve()
    if not path.is_relative_to(working_dir):
        raise UserError(
            f"{config_path}: not in {working_dir}, which is sent with the job; run the command in the config's folder, "
            "or name a --working-dir above it"
        )
    return path.relative_to(working_dir).as_posix()


def _relative(place: str) -> bool:
    return not (is_url(place) or place.startswith(PACKAGE) or Path(place).is_absolute())
