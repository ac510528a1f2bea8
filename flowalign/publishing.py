"""What of a run may be seen by others, and how a folder gets onto the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

LEFT_OUT = "(left out)"
# a setting that is, or leads to, a secret: api_key, token, token_file
SECRET = re.compile(r"(?:^|_)(?:token|secret|password|passwd|credentials?|key)(?:_file|_path|_env)?$", re.IGNORECASE)
KEYS = re.compile(r"\b(?:hf_|sk-|gh[pousr]_)[A-Za-z0-9_-]{16,}")  # as hubs, services and trackers write theirs
HOST = re.compile(r"(\w+://)[^/\s\"'`]+")
PLACE = re.compile(r"(?<![\w/:.)\]])~?/(?:[\w.@+-]+/)+([\w.@+-]*)")  # a path in the midst of a sentence
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
NAMES = ("_name_or_path", "name_or_path", "base_model_name_or_path")  # where diffusers and others write what they read


def public(value: Any, key: str = "") -> Any:
    """Plain data without secrets, without the machine's folders (a path becomes its last part) and without servers."""
    if isinstance(value, Mapping):
        return {name: public(one, str(name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [public(one, key) for one in value]
    if not isinstance(value, str):
        return value
    return LEFT_OUT if value and SECRET.search(key) else public_text(value)


def public_text(text: str) -> str:
    """One string of a config, made so."""
    if WINDOWS.match(text):
        return PureWindowsPath(text).name
    if text.startswith(("/", "~", "file:")) or ".." in Path(text).parts:
        return Path(text).name
    return HOST.sub(r"\1HOST", KEYS.sub(LEFT_OUT, text))


def public_prose(text: str) -> str:
    """A sentence, made so: paths in the midst of it become their last parts too."""
    return PLACE.sub(r"\1", HOST.sub(r"\1HOST", KEYS.sub(LEFT_OUT, text)))


def scrub(folder: Path) -> None:
    """Take out of all JSON files of a folder from which path on this machine they were read."""
    for file in folder.rglob("*.json"):
        told = json.loads(file.read_bytes())
        if isinstance(told, dict) and any(told.get(name) for name in NAMES):
            kept = {name: value for name, value in told.items() if name not in NAMES}
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def check_id(name: str, option: str) -> None:
    """Raises: ValueError for what can be no repository's name on the hub."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"{option} {name}: {error}") from error


def check_push(repo: str) -> None:
    """Whether a folder could be pushed there, as far as can be told without the network.

    Raises: ValueError for what is no OWNER/NAME, without a login, and where the hub is switched off.
    """
    from huggingface_hub import constants, get_token

    check_id(repo, "--push")
    if repo.count("/") != 1:
        raise ValueError(f"--push takes OWNER/NAME, got {repo!r}")
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push needs the hub, and HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if not get_token():
        raise ValueError("--push needs a login: run hf auth login, or set HF_TOKEN to a token that may write")


def push(folder: Path, repo: str, private: bool) -> str:
    """Put a folder onto the hub in one commit; returns its address. The token is the environment's or the login's.

    Raises: ValueError in one line where that fails; the repository then has all of the folder, or nothing of it.
    """
    from huggingface_hub import HfApi, constants, get_token

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Exported by flowalign")
    except Exception as error:  # the library below the hub's own, and what it raises, change with its versions
        told = " ".join(str(error).split()).replace(get_token() or LEFT_OUT, LEFT_OUT)[:300] or type(error).__name__
        raise ValueError(
            f"{folder} is written, and could not be pushed to {repo}: {told}; try again with hf upload {repo} {folder}"
        ) from error
    return str(made)
