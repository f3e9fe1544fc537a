"""huggingface_hub: the commit of a data set."""

import httpx
import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)


def data_set_commit(repository: str) -> str:
    """The commit that a data set's main branch stands for.

    Raises:
        ValueError: there is no such data set.
        ConnectionError: the hub could not be reached, or is in trouble; worth another try.
    """
    try:
        return str(huggingface_hub.HfApi().dataset_info(repository).sha)
    except (RepositoryNotFoundError, HFValidationError) as error:
        text = f"{repository!r}: no such data set on the hub ({str(error).splitlines()[0]})"
        raise ValueError(text) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.TransportError) as error:
        raise ConnectionError(f"{repository!r}: the hub cannot be reached") from error
