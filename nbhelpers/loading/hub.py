"""Models from the Hugging Face Hub, into the Hub's own cache: no pickles, no code, every file verified.

huggingface_hub ends a read that stalls, takes a broken transfer up where it broke and compares checksums. It
limits neither the time of the whole nor the pauses that a busy Hub asks for, so a download is a process here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nbhelpers import registry
from nbhelpers.loading import folder as folders
from nbhelpers.records import Failure, LabError, ModelSpec

# Everything from_pretrained needs and nothing that runs code: no pickles, no .py files.
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TEXTS = ("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER = ("tokenizer*", "chat_template.jinja", "vocab.*", "merges.txt", "*.model", "tekken.json")
CONVERTER = "SFconvertbot"  # the Hub's own account that offers safetensors copies of pickled weights
ATTEMPTS = 6
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers that may be better next time


def download(spec: ModelSpec, download_s: float) -> Path:
    """The snapshot folder of a Hub model, named by its commit; what is already in the cache is not fetched.

    Without network a complete cached copy is used. Raises LabError for a Hub that cannot be reached, an
    unknown, private or gated repository, remote code, pickles, damaged files, and after download_s seconds.
    """
    # A program of its own: multiprocessing would run a user's script again that has no main guard.
    with subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps([asdict(spec), download_s])],
        stdin=subprocess.PIPE,  # closed when this block or this process ends, and then the child ends
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # progress bars
    ) as child:
        try:
            child.wait(download_s)
        except subprocess.TimeoutExpired:
            why = f"The download of {spec.source!r} was stopped after {download_s:.0f} s"
            way_out = "check the network and run again, finished files are kept; or give it more time."
            raise LabError(f"{why}: {way_out}", Failure.TIMEOUT) from None
        answer = json.loads(child.communicate()[0] or "{}")
    if "folder" not in answer:
        died = f"The download of {spec.source!r} died (exit status {child.returncode}): run again."
        raise LabError(answer.get("error", died), Failure(answer.get("kind", Failure.DOWNLOAD)))
    folders.check_folder(folder := Path(answer["folder"]), spec.alias)
    return folder


def main() -> None:
    """The child of ``download``: print {"folder"}, or {"error", "kind"}."""
    import tenacity
    from huggingface_hub import constants

    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Write what arrives as it arrives: of the default 10 MB blocks a broken connection loses the last one.
    constants.DOWNLOAD_CHUNK_SIZE = None
    entry, download_s = json.loads(sys.argv[1])
    spec = ModelSpec(**entry)
    again = tenacity.Retrying(  # the library does not repeat all that may pass
        retry=tenacity.retry_if_exception(_passes),
        wait=pause,
        stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(download_s),
        reraise=True,
    )
    try:
        answer = {"folder": str(again(_fetch, spec))}
    except Exception as error:
        refusal = error if isinstance(error, LabError) else _explained(error, spec)
        answer = {"error": str(refusal), "kind": refusal.kind}
    print(json.dumps(answer))


def _end_with_parent() -> None:
    """Wait until stdin is closed, then remove the files that nobody could go on with, and exit."""
    import psutil

    os.read(0, 1)
    with suppress(OSError, psutil.Error):
        for file in psutil.Process().open_files():
            if file.path.endswith(".incomplete"):
                Path(file.path).unlink()
    os._exit(1)


def _passes(error: BaseException) -> bool:
    from huggingface_hub import errors

    if (answer := _answer(error)) is not None:
        return answer.response.status_code in PASSING
    return isinstance(error, errors.HTTPError)  # a connection that was there and broke


def pause(state: Any) -> float:
    """Seconds to wait: exponential with jitter, but at least what Retry-After says (RFC 9110, 10.2.3)."""
    import tenacity

    answer = _answer(state.outcome.exception())
    asked = answer.response.headers.get("Retry-After", "") if answer else ""  # the Hub sends no dates
    return max(float(asked) if asked.isdecimal() else 0.0, tenacity.wait_exponential_jitter(1, 30)(state))


def _answer(error: BaseException | None) -> Any:
    """The HfHubHTTPError behind an error of the Hub client, or None where the Hub did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _fetch(spec: ModelSpec) -> Path:
    """The snapshot, each file held once against the hash that the Hub lists; damaged ones are deleted.

    A repository with pickled weights only is read at the safetensors copy that the Hub's conversion account
    offers, if any. Raises LabError for remote code, pickles and damage, and the Hub client's errors.
    """
    import huggingface_hub as hf

    started = time.time()
    folder = _snapshot(spec.source, spec.revision)
    if spec.revision is None and not any(folder.glob("*.safetensors")):
        folder = _snapshot(spec.source, _converted(spec, folder))
    if (note := folder.parents[1] / "verified" / folder.name).is_file():
        return folder
    try:
        mismatches = hf.verify_repo_checksums(spec.source, revision=folder.name).mismatches
    except (hf.errors.HTTPError, hf.errors.OfflineModeIsEnabled) as error:
        if _answer(error) is not None:
            raise
        return folder  # a cache that another program filled, and nobody to ask
    damaged = [folder / file["path"] for file in mismatches]
    fresh = any(path.stat().st_mtime >= started for path in damaged)
    for path in damaged:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if damaged and not fresh:  # damaged in the cache, where nobody had looked
        return _fetch(spec)
    if damaged:
        why = "arrived damaged (its hash is not the one that the Hub lists) and was deleted: run again."
        raise LabError(f"The file {damaged[0].name} of {spec.source!r} {why}", Failure.DOWNLOAD)
    note.parent.mkdir(exist_ok=True)
    note.touch()
    return folder


def _snapshot(repository: str, revision: str | None) -> Path:
    """The files of a repository at a revision, or at its latest."""
    import huggingface_hub as hf

    commit = hf.resolve_revision(repository, revision=revision)
    if not re.fullmatch("[0-9a-f]{40}", commit.resolved):  # it names a folder
        why = "by something that is no commit: check HF_ENDPOINT."
        raise LabError(f"The Hub named {repository!r} {why}", Failure.DOWNLOAD)
    config = Path(hf.hf_hub_download(repository, "config.json", revision=commit))  # before gigabytes arrive
    folders.check_no_remote_code(folders.read_json_file(config, repository), repository)
    files = [*WEIGHTS, *TEXTS, *TOKENIZER]
    return Path(hf.snapshot_download(repository, revision=commit, allow_patterns=files))


def _converted(spec: ModelSpec, folder: Path) -> str:
    """The revision with the safetensors copy, if any. Raises LabError when the Hub has only pickles."""
    import huggingface_hub as hf

    query = {"discussion_type": "pull_request", "discussion_status": "open"}
    try:
        offers = list(hf.get_repo_discussions(spec.source, author=CONVERTER, **query))
        numbers = [offer.num for offer in offers if offer.author == CONVERTER]
    except (hf.errors.HTTPError, hf.errors.OfflineModeIsEnabled):
        numbers = [int(path.name) for path in folder.parents[1].glob("refs/refs/pr/[0-9]*")]  # fetched before
        if not numbers:
            raise
    if numbers:
        return f"refs/pr/{max(numbers)}"
    for name in hf.list_repo_files(spec.source):
        if any(Path(name).match(pattern) for pattern in folders.PICKLES):
            raise folders.pickled(spec.alias, name)
    return folder.name


def _explained(error: Exception, spec: ModelSpec) -> LabError:
    """An error of the Hub client as a sentence that says what to do."""
    from huggingface_hub import constants, errors

    unreachable = (errors.HTTPError, errors.RevisionResolutionError, errors.EntryNotFoundError)
    answer, kind, login = _answer(error), Failure.DOWNLOAD, "log in with `hf auth login`"
    status = answer.response.status_code if answer else None
    if isinstance(answer, errors.GatedRepoError):
        kind = Failure.REFUSED
        why = f"is gated: accept its licence on its Hub page, then {login} (or set HF_TOKEN)."
    elif isinstance(answer, errors.RepositoryNotFoundError):
        known = [model.source for model in registry.load_registry().values() if model.kind == "hub"]
        why = f"is not on the Hub, or is private ({login}), and is no folder: "
        why += registry.nearest(spec.source, known)
    elif isinstance(answer, errors.RevisionNotFoundError):
        why = f"has no revision {spec.revision!r} on the Hub."
    elif isinstance(answer, errors.RemoteEntryNotFoundError):
        why = "has no config.json on the Hub: it is not a saved model."
    elif status in (401, 403):
        why = f"is closed to you (HTTP {status}): {login}."
    elif status:
        why = f"did not come, the Hub answered HTTP {status}: try again later."
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        why = f"did not come, the disk was full: free space for {constants.HF_HUB_CACHE} or set HF_HOME to "
        why += "another disk and run again, finished files are kept."
    elif isinstance(error, (*unreachable, errors.OfflineModeIsEnabled, errors.XetDownloadError)):
        where, way_out = "HF_HUB_OFFLINE is set", "unset it to download"
        if not constants.is_offline_mode():
            where = f"the Hub ({constants.ENDPOINT}) cannot be reached ({type(error).__name__})"
            way_out = "check the network and run again, finished files are kept"
        why = f"is not wholly in the local cache and {where}: {way_out}; or use an embedded model."
    else:
        why = f"cannot be downloaded ({next(iter(str(error).splitlines()), type(error).__name__)})."
    return LabError(f"The model {spec.source!r} {why}", kind)


if __name__ == "__main__":
    main()
