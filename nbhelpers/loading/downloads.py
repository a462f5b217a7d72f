"""A Hub download in a process of its own, patient with the Hub, strict with what arrives.

A blocked read cannot be timed out from within its process, so the download runs in a child that is killed
at the limit. Retries wait exponentially longer with jitter (tenacity), or as long as the Hub asks.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nbhelpers.loading import hub
from nbhelpers.loading.folder import check_folder
from nbhelpers.records import LabError, ModelSpec
from nbhelpers.runner.processes import end_with_parent

if TYPE_CHECKING:
    from tenacity import RetryCallState

ATTEMPTS = 6
PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))  # HTTP answers that may be better next time


def download(spec: ModelSpec, limit_s: float) -> Path:
    """The snapshot folder of a Hub model, named by its commit; what is already in the cache is not fetched.

    A connection that breaks is taken up where it broke, and after a stop the files that were complete are
    kept (huggingface_hub does both). Every file is held against the hash that the Hub lists for it. Without
    network a complete cached copy is used. Raises LabError for a Hub that cannot be reached, an unknown,
    private or gated repository, remote code, pickles, damaged files and a download above limit_s seconds.
    """
    folder = _cached(spec) or _fetched(spec, limit_s)
    check_folder(folder, spec.alias)
    return folder


def _cached(spec: ModelSpec) -> Path | None:
    """The snapshot that needs no download, or None; what is wrong with it the download will say."""
    from huggingface_hub import errors

    try:
        folder = hub.snapshot(spec.source, spec.revision, local=True)
        verify(spec.source, folder)
    except (errors.HTTPError, errors.RevisionResolutionError, OSError, ValueError, LabError):
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def _fetched(spec: ModelSpec, limit_s: float) -> Path:
    order = json.dumps({"spec": asdict(spec), "limit_s": limit_s})
    child = subprocess.Popen(
        [sys.executable, "-m", "nbhelpers.loading.downloads", order],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # progress bars
        text=True,
    )
    try:
        said, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise LabError(
            f"The download of {spec.source!r} was stopped after {limit_s:.0f} s: check the network and run "
            "again, finished files are kept; or give it more time."
        ) from None
    finally:
        _stop(child)
    if child.returncode != 0:
        raise LabError(f"The download of {spec.source!r} died (exit status {child.returncode}): run again.")
    answer = json.loads(said)
    if "error" in answer:
        raise LabError(answer["error"])
    return Path(answer["folder"])


def _stop(child: subprocess.Popen[str]) -> None:
    """Kill a download that still runs and remove the file it was at: nobody could go on with it."""
    import psutil

    if child.poll() is None:
        opened = [Path(file.path) for file in psutil.Process(child.pid).open_files()]
        child.kill()
        child.wait()
        for path in opened:
            if path.suffix == ".incomplete":
                path.unlink(missing_ok=True)


def verify(repository: str, folder: Path) -> None:
    """Hold each file of a snapshot against the Hub's list: sha256 of large files, git's sha1 of small ones.

    Once for each list of files: a note in the cache remembers it. A damaged file is deleted. Without the
    list (a cache that another program filled) there is nothing to compare. Raises LabError.
    """
    import huggingface_hub as hf

    try:
        tree = hf.get_cached_repo_tree(repository, revision=folder.name)
    except hf.errors.CachedRepoTreeNotFoundError:
        return
    files = {folder / entry.path: entry for entry in tree if (folder / entry.path).is_file()}
    note = folder.parent.parent / "verified" / folder.name
    names = "\n".join(sorted(entry.path for entry in files.values()))
    if note.is_file() and note.read_text(encoding="utf-8") == names:
        return
    for path, entry in files.items():
        if _digest(path, git=entry.lfs is None) != (entry.lfs.sha256 if entry.lfs else entry.blob_id):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise LabError(
                f"The file {path.name} of {repository!r} arrived damaged (its hash is not the one that the "
                "Hub lists) and was deleted: run again."
            )
    note.parent.mkdir(exist_ok=True)
    note.write_text(names, encoding="utf-8")


def _digest(path: Path, git: bool) -> str:
    with path.open("rb") as file:
        start = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if git else hashlib.sha256()
        return hashlib.file_digest(file, lambda: start).hexdigest()


def _patiently(spec: ModelSpec, limit_s: float) -> Path:
    """hub.find, again after errors that pass; a Hub that cannot even be asked is given up at once."""
    import tenacity

    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_passes),
        wait=_pause,
        stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(limit_s),
        reraise=True,
    )
    return again(hub.find, spec)


def _passes(error: BaseException) -> bool:
    from huggingface_hub import errors

    answer = hub.answer_of(error)
    if isinstance(answer, errors.HfHubHTTPError):
        return answer.response.status_code in PASSING
    return isinstance(error, errors.HTTPError)  # a connection that was there and broke


def _pause(state: RetryCallState) -> float:
    """Seconds to wait: exponential with jitter, but at least what Retry-After says (RFC 9110, 10.2.3)."""
    import tenacity

    error = state.outcome.exception() if state.outcome else None
    headers = getattr(getattr(hub.answer_of(error), "response", None), "headers", {})
    return max(seconds_of(headers.get("Retry-After")), tenacity.wait_exponential_jitter(1, 30)(state))


def seconds_of(retry_after: str | None) -> float:
    """Retry-After in seconds, from a number or a date; 0 for anything else."""
    try:
        if not retry_after or retry_after.isdecimal():
            return float(retry_after or 0)
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def main() -> None:
    """``python -m nbhelpers.loading.downloads ORDER`` prints {"folder": path} or {"error": sentence}."""
    from huggingface_hub import constants

    end_with_parent()
    # Write what arrives as it arrives: of the default 10 MB blocks a broken connection loses the last one.
    constants.DOWNLOAD_CHUNK_SIZE = None
    order = json.loads(sys.argv[1])
    spec = ModelSpec(**order["spec"])
    try:
        with hub.one_sentence(spec):
            folder = _patiently(spec, order["limit_s"])
            verify(spec.source, folder)
        print(json.dumps({"folder": str(folder)}))
    except LabError as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main()
