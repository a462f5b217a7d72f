"""Models from the Hugging Face Hub, into the Hub's own cache: no pickles, no code, every file verified.

huggingface_hub ends a read that stalls, resumes a broken transfer, waits where the Hub asks for it and
compares checksums. The time limit of a notebook's cell holds for the whole.
"""

import errno
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars, logging

from nbhelpers.loading import checkpoint
from nbhelpers.records import Failure, LabError, ModelSpec

# Everything that from_pretrained needs and nothing that runs code: no pickles, no .py files.
PATTERNS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "modules.json"]
PATTERNS += checkpoint.SMALL_FILES


def download(spec: ModelSpec) -> Path:
    """The snapshot folder of a Hub model, named by its commit; what is already in the cache is not fetched.

    Without network a complete cached copy is used. Raises LabError for a Hub that cannot be reached or stays
    busy, an unknown, private or gated repository, remote code, pickles and damaged files.
    """
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        folder = _fetch(spec.source, spec.revision)
    except LabError:
        raise
    except Exception as error:
        raise _explanation(error, spec.source, spec.revision) from None
    checkpoint.check_folder(folder, spec.alias)
    return folder


def _fetch(source: str, revision: str | None) -> Path:
    """The snapshot, each file compared once with the hash that the Hub lists.

    Raises LabError for remote code, pickles and damage, and the Hub client's errors.
    """
    commit = hf.resolve_revision(source, revision=revision)
    try:
        config = Path(hf.hf_hub_download(source, "config.json", revision=commit))  # before gigabytes
    except errors.RemoteEntryNotFoundError:
        raise checkpoint.no_weights(source, hf.list_repo_files(source, revision=commit)) from None
    checkpoint.check_config(checkpoint.read_json_file(config, source), source)
    folder = Path(hf.snapshot_download(source, revision=commit, allow_patterns=PATTERNS))
    if not any(folder.glob("*.safetensors")):
        raise checkpoint.no_weights(source, hf.list_repo_files(source, revision=folder.name))
    verified = folder.parents[1] / "verified" / folder.name
    if verified.is_file():
        return folder
    try:
        mismatches = hf.verify_repo_checksums(source, revision=folder.name).mismatches
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        if _http_error(error) is not None:
            raise
        return folder  # another program filled the cache, and the Hub cannot be asked
    for path in (damaged := [folder / file["path"] for file in mismatches]):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if damaged:
        why = f"has a damaged {damaged[0].name} in the local cache, which was deleted: run again."
        raise checkpoint.refusal(source, why, Failure.DOWNLOAD)
    verified.parent.mkdir(exist_ok=True)
    verified.touch()
    return folder


def _http_error(error: BaseException | None) -> Any:
    """The HfHubHTTPError behind an error of the Hub client, or None where the Hub did not answer."""
    while error is not None and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__
    return error


def _explanation(error: Exception, source: str, revision: str | None) -> LabError:
    """An error of the Hub client as a sentence that says what to do."""
    login = "log in with `hf auth login`"
    match cause := _http_error(error) or error:
        case errors.GatedRepoError():
            why = f"is gated: accept its licence on its Hub page, then {login} or set HF_TOKEN."
        case errors.RepositoryNotFoundError():
            why = f"is not on the Hub, or is private ({login}), and is no folder: check the name."
        case errors.RevisionNotFoundError():
            why = f"has no revision {revision!r} on the Hub."
        case errors.HfHubHTTPError(response=response):
            why = f"did not come, the Hub answered HTTP {response.status_code}: {login}, or try again later."
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            cache = constants.HF_HUB_CACHE
            why = f"did not come, the disk was full: free space for {cache} or set HF_HOME, and run again."
        case _:
            reason = f"{constants.ENDPOINT} ({type(error).__name__}: {error}".partition("\n")[0]
            why = f"is not wholly in the local cache and did not come from {reason}): check the network and "
            why += "HF_HUB_OFFLINE, and run again."
    gated = isinstance(cause, errors.GatedRepoError)
    return checkpoint.refusal(source, why, Failure.REFUSED if gated else Failure.DOWNLOAD)
