"""One certificate in the place of all: to read those that come with certifi takes each client a fiftieth of a second."""

import atexit
import re
import tempfile
from pathlib import Path

import certifi

_ONE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", re.DOTALL)


def one_certificate() -> Path:
    """A file with the first of certifi's; it goes with this process."""
    first = _ONE.search(Path(certifi.where()).read_text(encoding="utf-8"))
    assert first is not None
    folder = tempfile.TemporaryDirectory(prefix="minitron-certificate-")
    atexit.register(folder.cleanup)
    file = Path(folder.name) / "one.pem"
    file.write_text(first[0], encoding="utf-8")
    return file
