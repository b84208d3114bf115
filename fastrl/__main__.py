"""`python -m fastrl`: versions, devices, and which backend each kind of input would take and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastrl._info import info


def text(found: dict[str, Any]) -> str:
    """`info()` as lines for a terminal."""
    lines = []
    for title, values in found.items():
        if not isinstance(values, dict):
            lines += [f"{title}: {values}"]
            continue
        absent = "not set" if title == "environment" else "not installed"
        width = max(map(len, values))
        lines += [f"{title}:"]
        lines += [f"  {name:{width}}  {absent if value is None else value}" for name, value in values.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastrl", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print fastrl.info() as JSON")
    found = info()
    print(json.dumps(found, indent=2) if parser.parse_args(arguments).json else text(found))


if __name__ == "__main__":
    main()
