"""Which names of a whole trainer's config concern the policy loss, by the words in them."""

from __future__ import annotations

import re
from collections.abc import Iterable

LOSS_WORDS = (
    "loss", "clip", "kl", "entropy", "pg", "ppo", "cispo", "dapo", "dppo", "gmpo", "gspo", "luspo", "opsm", "sapo",
    "tis", "topr", "vespo", "surrogate", "centering", "unbiased",
)  # fmt: skip
"""Words of a name, between underscores, by which a field that is not listed is taken for one of the policy loss."""


def named_with(words: Iterable[str], *, but: Iterable[str] = ()) -> re.Pattern[str]:
    """Matches names that have one of `words` in them as a whole word, unless they begin with one of `but`."""
    others = "".join(f"(?!{prefix})" for prefix in but)
    return re.compile(f"{others}(.*_)?({'|'.join(words)})(_|$)")
