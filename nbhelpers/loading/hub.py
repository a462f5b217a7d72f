"""Models from the Hugging Face Hub, into the Hub's own cache: no pickles, no code, every file verified.

huggingface_hub ends a read that stalls, takes a broken transfer up where it broke and compares checksums. It
limits neither the time of the whole nor the pauses that a busy Hub asks for, so a download is a process here.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from huggingface_hub import constants, errors

from nbhelpers import registry
from nbhelpers.loading import folder as folders
from nbhelpers.records import Failure, LabError, ModelSpec

# Everything from_pretrained needs and nothing that runs code: no pickles, no .py files.
FILES = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
FILES += ["config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"]
FILES += ["tokenizer*", "chat_template.jinja", "vocab.*", "merges.txt", "*.model", "tekken.json"]
CONVERTER = "SFconvertbot"  # the Hub's own account that offers safetensors copies of pickled weights
ATTEMPTS = 6
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers that may be better next time
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOGIN = "log in with `hf auth login`"
WHY = {  # a model did not come: by the class of the Hub client's error, else by what it lacked
    "GatedRepoError": f"is gated: accept its licence on its Hub page, then {LOGIN} or set HF_TOKEN.",
    "RepositoryNotFoundError": f"is not on the Hub, or is private ({LOGIN}), and is no folder: {{nearest}}",
    "RevisionNotFoundError": "has no revision {revision!r} on the Hub.",
    "RemoteEntryNotFoundError": "has no config.json on the Hub: it is not a saved model.",
    "HfHubHTTPError": f"did not come, the Hub answered HTTP {{status}}: {LOGIN}, or try again later.",
    "disk": "did not come, the disk was full: free space for {cache} or set HF_HOME, and run again.",
    "offline": "is not wholly in the local cache and HF_HUB_OFFLINE is set: unset it and run again.",
    "network": "is not wholly in the local cache and did not come from {hub} ({reason}): run again.",
}


def download(spec: ModelSpec, download_s: float) -> Path:
    """The snapshot folder of a Hub model, named by its commit; what is already in the cache is not fetched.

    Without network a complete cached copy is used. Raises LabError for a Hub that cannot be reached, an
    unknown, private or gated repository, remote code, pickles, damaged files, and after download_s seconds.
    """
    folder = None
    with suppress(Exception):  # complete, verified and the Hub's latest: no process is needed
        cached = _files(spec.source, hf.resolve_revision(spec.source, revision=spec.revision), local=True)
        folder = cached if _note(cached).is_file() else None
    folder = folder or _by_child(spec, download_s)
    folders.check_folder(folder, spec.alias)
    return folder


def _files(repository: str, commit: str, local: bool = False) -> Path:
    keywords = {"allow_patterns": FILES, "local_files_only": local}
    return Path(hf.snapshot_download(repository, revision=commit, **keywords))


def _note(folder: Path) -> Path:
    """The file that says that a snapshot was verified."""
    return folder.parents[1] / "verified" / folder.name


def _by_child(spec: ModelSpec, download_s: float) -> Path:
    # A program of its own: multiprocessing would run a user's script again that has no main guard.
    with subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps([spec.source, spec.revision, download_s])],
        stdin=subprocess.PIPE,  # closed when this block or this process ends, and then the child ends
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # progress bars
    ) as child:
        try:
            child.wait(download_s)
        except subprocess.TimeoutExpired:
            why = f"was stopped after {download_s:.0f} s of downloading: run again, finished files are kept."
            raise folders.refusal(spec.source, why, Failure.TIMEOUT) from None
        died = {"error": f"The download of {spec.source!r} died: run again.", "kind": Failure.DOWNLOAD}
        answer = json.loads(child.communicate()[0] or json.dumps(died))
    if "error" in answer:
        raise LabError(answer["error"], Failure(answer["kind"]))
    return Path(answer["folder"])


def main() -> None:
    """The child: print {"folder"}, or {"error", "kind"}."""
    import tenacity

    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Write what arrives as it arrives: of the default 10 MB blocks a broken connection loses the last one.
    constants.DOWNLOAD_CHUNK_SIZE = None
    source, revision, download_s = json.loads(sys.argv[1])
    again = tenacity.Retrying(  # the library does not repeat all that may pass
        retry=tenacity.retry_if_exception(_passes),
        wait=tenacity.wait_exponential_jitter(1, 30) + tenacity.wait_exception(asked_pause),
        stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(download_s),
        reraise=True,
    )
    try:
        print(json.dumps({"folder": str(again(_fetch, source, revision))}))
    except Exception as error:
        refusal = error if isinstance(error, LabError) else _explained(error, source, revision)
        print(json.dumps({"error": str(refusal), "kind": refusal.kind}))


def _end_with_parent() -> None:
    """Wait until stdin is closed, then remove the files that nobody could go on with, and exit."""
    import psutil

    os.read(0, 1)
    with suppress(OSError, psutil.Error):
        for file in psutil.Process().open_files():
            if file.path.endswith(".incomplete"):
                Path(file.path).unlink()
    os._exit(1)


def _answer(error: BaseException | None) -> Any:
    """The HfHubHTTPError behind an error of the Hub client, or None where the Hub did not answer."""
    while error is not None and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__
    return error


def _passes(error: BaseException) -> bool:
    answer = _answer(error)  # None: a connection that was there and broke
    return answer.response.status_code in PASSING if answer else isinstance(error, errors.HTTPError)


def asked_pause(error: BaseException) -> float:
    """Seconds that the Hub asks to wait (Retry-After, RFC 9110, 10.2.3; it sends no dates)."""
    answer = _answer(error)
    asked = answer.response.headers.get("Retry-After", "") if answer else ""
    return float(asked) if asked.isdecimal() else 0.0


def _fetch(source: str, revision: str | None, mend: bool = True) -> Path:
    """The snapshot, each file held once against the hash that the Hub lists; damaged ones come once more.

    A repository with pickled weights only is read at the safetensors copy that the Hub's conversion account
    offers, if any. Raises LabError for remote code, pickles and damage, and the Hub client's errors.
    """
    folder = _snapshot(source, revision)
    if revision is None and not any(folder.glob("*.safetensors")):
        folder = _snapshot(source, _converted(source, folder))
    if _note(folder).is_file():
        return folder
    try:
        mismatches = hf.verify_repo_checksums(source, revision=folder.name).mismatches
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        if _answer(error) is not None:
            raise
        return folder  # a cache that another program filled, and nobody to ask
    for path in (damaged := [folder / file["path"] for file in mismatches]):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if damaged and mend:
        return _fetch(source, revision, mend=False)
    if damaged:
        why = f"came with a damaged {damaged[0].name} (not the hash that the Hub lists), deleted: run again."
        raise folders.refusal(source, why, Failure.DOWNLOAD)
    _note(folder).parent.mkdir(exist_ok=True)
    _note(folder).touch()
    return folder


def _snapshot(repository: str, revision: str | None) -> Path:
    """The files of a repository at a revision, or at its latest."""
    commit = hf.resolve_revision(repository, revision=revision)
    if not commit.resolved.isalnum():  # it names a folder
        why = "is named by something that is no commit: check HF_ENDPOINT."
        raise folders.refusal(repository, why, Failure.DOWNLOAD)
    config = Path(hf.hf_hub_download(repository, "config.json", revision=commit))  # before gigabytes arrive
    folders.check_no_remote_code(folders.read_json_file(config, repository), repository)
    return _files(repository, commit)


def _converted(source: str, folder: Path) -> str:
    """The revision with the safetensors copy. Raises LabError when the Hub has none."""
    query = {"discussion_type": "pull_request", "discussion_status": "open", "author": CONVERTER}
    try:
        offers = hf.get_repo_discussions(source, **query)
        numbers = [offer.num for offer in offers if offer.author == CONVERTER]
    except (errors.HTTPError, errors.OfflineModeIsEnabled):
        numbers = [int(path.name) for path in folder.parents[1].glob("refs/refs/pr/[0-9]*")]  # fetched before
        if not numbers:
            raise
    if not numbers:
        raise folders.no_weights(source, hf.list_repo_files(source))
    return f"refs/pr/{max(numbers)}"


def _explained(error: Exception, source: str, revision: str | None) -> LabError:
    """An error of the Hub client as a sentence that says what to do."""
    answer, full = _answer(error), isinstance(error, OSError) and error.errno in FULL
    lacked = "disk" if full else "offline" if constants.is_offline_mode() else "network"
    why = next((WHY[kind.__name__] for kind in type(answer).__mro__ if kind.__name__ in WHY), WHY[lacked])
    known = [model.source for model in registry.load_registry().values() if model.kind == "hub"]
    sentence = why.format(
        nearest=registry.nearest(source, known),
        revision=revision,
        status=answer and answer.response.status_code,
        cache=constants.HF_HUB_CACHE,
        hub=constants.ENDPOINT,
        reason=f"{type(error).__name__}: {error}".partition("\n")[0],
    )
    gated = isinstance(answer, errors.GatedRepoError)
    return folders.refusal(source, sentence, Failure.REFUSED if gated else Failure.DOWNLOAD)


if __name__ == "__main__":
    main()
