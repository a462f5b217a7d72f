"""Models from the Hugging Face Hub: safetensors, configuration and tokenizer, into the Hub's own cache."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbhelpers import registry
from nbhelpers.loading.folder import PICKLES, check_no_remote_code, pickle_message, read_json_file
from nbhelpers.records import LabError, ModelSpec

# Everything from_pretrained needs and nothing that runs code: no pickles, no .py files.
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",
    "tekken.json",
)
_COMMIT = re.compile("[0-9a-f]{40}")
CONVERTER = "SFconvertbot"  # the Hub's own account that offers safetensors copies of pickled weights


def find(spec: ModelSpec) -> Path:
    """The snapshot folder of a Hub model, fetched where the cache lacks it.

    A repository with pickled weights only is read at the safetensors copy that the Hub's conversion account
    offers, if any. Raises LabError for remote code and pickles, and the Hub client's errors.
    """
    folder = snapshot(spec.source, spec.revision)
    if not any(folder.glob("*.safetensors")) and spec.revision is None:
        folder = snapshot(spec.source, _converted(spec))
    return folder


def snapshot(repository: str, revision: str | None, local: bool = False) -> Path:
    """The files of a repository at a revision, or at its latest; local: without fetching any."""
    import huggingface_hub as hf

    commit = hf.resolve_revision(repository, revision=revision)
    if not _COMMIT.fullmatch(commit.resolved):  # it names a folder
        raise LabError(f"The Hub named {repository!r} by something that is no commit: check HF_ENDPOINT.")
    if not local:
        config = Path(hf.hf_hub_download(repository, "config.json", revision=commit))
        check_no_remote_code(read_json_file(config, repository), repository)  # before gigabytes arrive
    return Path(
        hf.snapshot_download(repository, revision=commit, allow_patterns=list(FILES), local_files_only=local)
    )


def _converted(spec: ModelSpec) -> str:
    """The pull request with the safetensors copy. Raises LabError when the Hub has only pickles."""
    import huggingface_hub as hf

    offers = hf.get_repo_discussions(
        spec.source, author=CONVERTER, discussion_type="pull_request", discussion_status="open"
    )
    try:
        numbers = [offer.num for offer in offers if offer.author == CONVERTER]
    except (hf.errors.HTTPError, hf.errors.OfflineModeIsEnabled):
        numbers = _cached_offers(spec.source)
        if not numbers:
            raise
    if numbers:
        return f"refs/pr/{max(numbers)}"
    names = hf.list_repo_files(spec.source)
    pickles = [name for name in names if any(Path(name).match(pattern) for pattern in PICKLES)]
    if pickles:
        raise LabError(pickle_message(spec.alias, pickles[0]))
    raise LabError(f"The Hub repository {spec.source!r} has no safetensors weights: choose another model.")


def _cached_offers(repository: str) -> list[int]:
    """Pull requests fetched before, for work without network (cache layout: refs/<revision>)."""
    import huggingface_hub as hf

    name = f"models--{repository.replace('/', '--')}"
    refs = Path(hf.constants.HF_HUB_CACHE) / name / "refs" / "refs" / "pr"
    return [int(path.name) for path in refs.glob("[0-9]*")]


@contextmanager
def one_sentence(spec: ModelSpec) -> Iterator[None]:
    """Turn the Hub client's errors into a LabError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HFValidationError, ValueError) as error:
        raise LabError(f"{spec.source!r} is not a valid Hub repository ({_first_line(error)}).") from None
    except (
        errors.HTTPError,
        errors.RevisionResolutionError,
        errors.EntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.XetDownloadError,
    ) as error:
        raise LabError(_explain(answer_of(error) or error, spec)) from None
    except OSError as error:
        raise LabError(_disk(error, spec)) from None


def answer_of(error: BaseException | None) -> BaseException | None:
    """The HTTP answer behind an error of the Hub client, or None where the Hub did not answer."""
    from huggingface_hub import errors

    while error is not None and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _disk(error: OSError, spec: ModelSpec) -> str:
    from huggingface_hub import constants

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"The disk was full while {spec.source!r} was downloaded to {constants.HF_HUB_CACHE}: free "
            "space or set HF_HOME to another disk and run again, finished files are kept."
        )
    return f"The download of {spec.source!r} failed ({error.strerror or _first_line(error)})."


def _explain(error: BaseException, spec: ModelSpec) -> str:
    from huggingface_hub import errors

    name = spec.source
    if isinstance(error, errors.GatedRepoError):
        return (
            f"The model {name!r} is gated: accept its licence on its Hub page, then log in with "
            "`hf auth login` (or set HF_TOKEN)."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        known = [model.source for model in registry.load_registry().values() if model.kind == "hub"]
        return (
            f"The Hub has no model {name!r} that you may read (if it is private, log in with "
            f"`hf auth login`), and there is no such folder: {registry.nearest(name, known)}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The model {name!r} has no revision {spec.revision!r} on the Hub."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"The Hub repository {name!r} has no config.json: it is not a saved model."
    if not isinstance(error, errors.HfHubHTTPError):
        return _unreachable(name, error)
    status = error.response.status_code
    if status in (401, 403):
        return f"The Hub refused access to {name!r} (HTTP {status}): log in with `hf auth login`."
    return f"The Hub answered HTTP {status} for {name!r}: try again later."


def _unreachable(name: str, error: BaseException) -> str:
    import huggingface_hub as hf

    if hf.constants.is_offline_mode():
        return (
            f"The model {name!r} is not wholly in the local cache and HF_HUB_OFFLINE is set: "
            "unset it to download, or use an embedded model."
        )
    return (
        f"The Hub ({hf.constants.ENDPOINT}) cannot be reached and {name!r} is not complete in the local "
        f"cache ({type(error).__name__}): check the network and run again, finished files are kept; "
        "or use an embedded model."
    )
