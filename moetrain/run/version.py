"""Version of moetrain that made a result. It is shown to the user and never causes a stage to run again."""

import functools
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_SOURCES = (".py", ".cpp", ".h")
_SHOWN = 12  # characters of a digest


@functools.cache
def made_by() -> str:
    """Return the package's version and a digest of its sources, Python and C++: `0.1.0 (source 1a2b3c4d5e6f)`."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in _SOURCES):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        number = version("moetrain")
    except PackageNotFoundError:  # the package runs from its folder without being installed
        number = "unknown"
    return f"{number} (source {digest.hexdigest()[:_SHOWN]})"
