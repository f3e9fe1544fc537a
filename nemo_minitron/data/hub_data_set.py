"""huggingface_hub: the commit of a data set."""

import httpx
import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def data_set_commit(repository: str, revision: str | None = None) -> str:
    """The commit that a revision of a data set stands for.

    Args:
        repository: hub id.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        ValueError: there is no such data set or revision.
        ConnectionError: the hub could not be reached, or is in trouble; worth another try.
    """
    try:
        return str(huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha)
    except (RepositoryNotFoundError, HFValidationError) as error:
        text = f"{repository!r}: no such data set on the hub ({str(error).splitlines()[0]})"
        raise ValueError(text) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{repository!r}: the data set on the hub has no revision {revision!r}"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.TransportError) as error:
        raise ConnectionError(f"{repository!r}: the hub cannot be reached") from error
