"""Puts a run's weights and model card on the Hugging Face Hub.

Everything that can be refused is refused before anything is sent: the folder, the name, offline mode, the token.
The files go up in one commit, so that a repository never holds half of a run.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client the library uses
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from diffalign.model_card import CARD, CURVES, Run, read_run, render_card, shown_pictures, write_card
from diffalign.public_text import public_bytes

ABOUT = (CARD, CURVES, "config.yaml", "run.json", "metrics.jsonl", "evaluation/comparison.json")
"""Files of a run that explain its weights. Caches, checkpoints and training pictures stay here."""


class PublishingError(ValueError):
    """Nothing could be published; the message is for the user."""


def push_to_hub(
    run_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads trained weights, model card, curves, configuration, metrics and scores of a run.

    Local folders in these texts are left out, see `diffalign.public_text`; the files here stay as they are.

    Args:
        run_dir: The run's output folder.
        repo_id: Where to, "owner/name"; made if it does not exist.
        private: Whether a new repository is private.
        license: See `write_card`, which is called with it unless the card there was edited by hand.
        token: Of the Hub; None takes the one of `hf auth login` or HF_TOKEN.
        endpoint: Address of another Hub; None takes the library's.

    Returns:
        Address of the commit.

    Raises:
        PublishingError: If the name cannot be a repository's, the Hub is out of reach, there is no token or it is not
            accepted: nothing was sent then. Or if the upload fails.
        ValueError: If the folder is no finished run.
    """
    run = read_run(run_dir)
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise PublishingError(f"{repo_id!r} cannot be the name of a repository: {error}") from error
    if repo_id.count("/") != 1:
        raise PublishingError(f"{repo_id!r} cannot be the name of a repository; expected owner/name")
    if is_offline_mode():
        raise PublishingError("offline mode is on (HF_HUB_OFFLINE), nothing was uploaded; unset it to publish")
    token = token or get_token()
    if token is None:
        raise PublishingError("no token for the Hub, nothing was uploaded; run `hf auth login` or set HF_TOKEN")
    api = HfApi(endpoint=endpoint, token=token, library_name="diffalign")
    try:
        api.whoami()
    except (HTTPError, OSError) as error:
        raise PublishingError(
            f"the Hub is out of reach or does not accept the token ({_line(error)}), nothing was uploaded; "
            "check the connection and `hf auth whoami`"
        ) from error
    if not _edited_card(run, license, repo_id):
        write_card(run.folder, license=license, repo_id=repo_id)
    names = files_to_publish(run.folder, run.weights)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=public_bytes(run.folder / name) or run.folder / name)
        for name in names
    ]
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=f"Weights trained with {run.method}")
    except (HTTPError, OSError, ValueError) as error:
        raise PublishingError(f"could not upload to {repo_id}, which has no new commit: {_line(error)}") from error
    return str(commit.commit_url)


def files_to_publish(folder: Path, weights: tuple[str, ...]) -> list[str]:
    """What is uploaded, relative to the run's folder and sorted.

    Args:
        folder: The run's folder.
        weights: Names of the files and folders with trained weights; see `Run.weights`.
    """
    about = [folder / name for name in ABOUT] + [folder / path for path in shown_pictures(folder)]
    trained = [path for name in weights for path in (folder / name, *(folder / name).rglob("*"))]
    exported = folder.glob("*.safetensors")  # the same adapter in other layouts, if it was exported here
    return sorted({path.relative_to(folder).as_posix() for path in (*about, *trained, *exported) if path.is_file()})


def _edited_card(run: Run, license: str | None, repo_id: str) -> bool:
    """Whether there is a card with other words than the ones written here."""
    card = run.folder / CARD
    if not card.is_file():
        return False
    ours = {render_card(run, terms, place) for terms in (None, license) for place in (None, repo_id)}
    return card.read_text(encoding="utf-8") not in ours


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no details"
    return f"{type(error).__name__}: {text[:300]}"


# --- the command -----------------------------------------------------------------------------------------------------


def push(run_dir: str, repo_id: str, private: bool = False, license: str | None = None) -> str:
    """Body of `diffalign push`."""
    return f"published: {push_to_hub(run_dir, repo_id, private=private, license=license)}"
