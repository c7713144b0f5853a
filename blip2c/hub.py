"""Folders, Hub ids and the package's own: where a checkpoint lies on this machine, after downloading what is needed.

Only json, txt and safetensors files are ever fetched: nothing that would have to be unpickled. With local_files_only,
or HF_HUB_OFFLINE set, no socket is opened.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

CONFIG_FILES = [
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    # InstructBLIP's second tokenizer
    "qformer_tokenizer/tokenizer.json", "qformer_tokenizer/tokenizer_config.json",
    "qformer_tokenizer/special_tokens_map.json", "qformer_tokenizer/added_tokens.json",
]  # fmt: skip
WEIGHT_FILES = [
    "model.safetensors",
    "model.blip2c.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
]
HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "token", "force_download", "subfolder")

# The small checkpoints inside the package: what they are called, and their folders.
SAMPLES = {"sample": "sample", "sample-retrieval": "sample_retrieval"}

_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")


def pop_hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options that say where files come from out of `options`."""
    if "use_auth_token" in options:  # the name before huggingface_hub 0.14
        token = options.pop("use_auth_token")
        options.setdefault("token", token)
    for name in (
        "proxies",
        "resume_download",
        "user_agent",
    ):  # accepted for old scripts; today's hub client has its own
        if options.pop(name, None):
            raise TypeError(f"{name} is not supported: set it up for huggingface_hub (environment variables)")
    return {name: options.pop(name) for name in HUB_OPTIONS if name in options}


def sample_path(name: str = "sample") -> Path:
    """The folder of a small checkpoint inside the package, in the Hub's format.

    name: "sample", which writes captions and answers, or "sample-retrieval", which compares pictures and texts.
    Raises ValueError for another name, FileNotFoundError where the installation carries none.
    """
    if name not in SAMPLES:
        raise ValueError(f"no small checkpoint is called {name!r}: there are {', '.join(SAMPLES)}")
    folder = Path(__file__).resolve().parent / SAMPLES[name]
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: this installation carries no sample checkpoint; name one: load(path_or_id)")
    return folder


def resolve(
    path_or_id: str | os.PathLike[str],
    *,
    weights: bool = True,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
    subfolder: str = "",
) -> Path:
    """The folder of a checkpoint: `path_or_id` itself if it is a folder, one of SAMPLES, else a Hub id's snapshot.

    weights: fetch the safetensors files too. Raises FileNotFoundError, PermissionError or OSError saying what was
    looked for and why it is not there.
    """
    name = os.fspath(path_or_id)
    path = Path(name).expanduser()
    if name and path.is_dir():  # an empty name would be the working directory
        return path / subfolder if subfolder else path
    if name in SAMPLES:
        return sample_path(name)
    if name and path.exists():
        raise NotADirectoryError(f"{name}: is a file; expected a checkpoint's folder or a Hub id")
    if not _REPO_ID.match(name) or name.startswith((".", "/", "~")) or ".." in name:
        raise FileNotFoundError(f"{name}: no such folder, and not a Hub id of the form owner/name")
    folder = _snapshot(
        name,
        [*CONFIG_FILES, *(WEIGHT_FILES if weights else [])],
        subfolder,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        force_download=force_download,
    )
    return folder / subfolder if subfolder else folder


def _snapshot(name: str, files: list[str], subfolder: str, **options: Any) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [f"{subfolder}/{file}" for file in files] if subfolder else files
    revision = options["revision"] or "main"
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, **options))
    except errors.LocalEntryNotFoundError as error:
        offline = options["local_files_only"] or huggingface_hub.constants.HF_HUB_OFFLINE
        why = "only local files were allowed" if offline else "the Hub could not be reached"
        raise FileNotFoundError(f"{name} (revision {revision}): not in the cache, and {why}") from error
    except errors.GatedRepoError as error:
        raise PermissionError(f"{name}: access is gated: log in on the Hub and pass token=") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such folder here and no such repository on the Hub (private? pass token=)"
        ) from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{name}: not a valid Hub id: {error}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise OSError(f"{name} (revision {revision}): can not be fetched: {error}") from error
