"""Which versions of a trainer an adapter is for: others are used all the same, after one warning."""

from __future__ import annotations

import functools
import importlib.metadata
import logging

from packaging.specifiers import SpecifierSet

logger = logging.getLogger("fastrl")


@functools.cache
def warn_outside(package: str, lowest: str, below: str, how: str = "tested with") -> None:
    """Warn once when the installed `package` is outside lowest <= version < below; pre-releases of `below` are outside.

    The warning goes to the logger `fastrl` and names the package, its version and the range. A package that was not
    installed as a distribution has no version to compare, and nothing is said.

    Args:
        package: the name of the distribution, e.g. "trl".
        lowest: the oldest version tested, e.g. "1.16".
        below: the first version not tested, e.g. "1.17".
        how: what the adapter has to do with these versions; "written for" where none of them could be run.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return
    if not SpecifierSet(f">={lowest},<{below}").contains(version, prereleases=True):
        logger.warning(
            "%s %s is outside the versions that this adapter was %s: %s >=%s,<%s; install one of them if something "
            "fails or differs",
            package,
            version,
            how,
            package,
            lowest,
            below,
        )
