"""Writes docs/losses.md and its plots from the presets' docstrings and fields: `python docs/generate.py [--check]`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import re
import textwrap
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import plots
from losses_text import CHOOSING, COMING_FROM, INTRODUCTION, PROBLEMS, TITLES

import fastrl
from fastrl.objectives import OBJECTIVES, OwnNumbers
from fastrl.presets import PRESETS
from fastrl.rollout_correction import RolloutCorrection
from fastrl.spec import LossSpec

DOCS = Path(__file__).resolve().parent
CURVES = "losses/curves.json"
LEADS = ("Gradient:", "Use it when", "Peers:")


def attribute_docstrings(body: list[ast.stmt]) -> dict[str, str | None]:
    """Every assigned name of a module's or class's body, and the string right under it."""
    found: dict[str, str | None] = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name):
            value = after.value if isinstance(after, ast.Expr) else None
            found[target.id] = str(value.value) if isinstance(value, ast.Constant) else None
    return found


def one_line(text: str) -> str:
    return " ".join(text.split())


def parse(module: str, class_name: str | None = None) -> dict[str, Any]:
    """The attribute docstrings of a module of fastrl, or of a class in it."""
    body = ast.parse((DOCS.parent / "fastrl" / f"{module}.py").read_text()).body
    if class_name is not None:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return attribute_docstrings(body)


def paragraphs(docstring: str) -> list[str]:
    """A preset's formula, gradient, use and peers, each on one line."""
    parts = [one_line(part) for part in docstring.strip().split("\n\n")]
    assert len(parts) == 4 and all(p.startswith(lead) for p, lead in zip(parts[1:], LEADS, strict=True)), docstring
    return parts


def linked(text: str) -> str:
    """Paper numbers become links."""
    return re.sub(r"(?:arXiv:)?\b(\d{4}\.\d{5})\b", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def referring(text: str, own: str) -> str:
    """Names of other presets become links to their sections; not the words PPO, REINFORCE, DRO and GPG."""
    others = sorted(PRESETS.keys() - {own, "ppo", "reinforce", "dro", "gpg"}, key=len, reverse=True)
    names = "|".join(name.upper() for name in others)
    pattern = rf"(?<=as in )PPO\b|(?<!Dr\. )(?<![\w`\"])(?:{names})(?![\w`\"])"
    return re.sub(pattern, lambda match: f"[{match[0]}](#{match[0].lower()})", text)


def shown(value: Any) -> str:
    return repr(str(value)).replace("'", '"') if isinstance(value, Enum | str) else repr(value)


def changed(spec: LossSpec) -> dict[str, Any]:
    """The fields that differ from the defaults; objective and aggregation always."""
    defaults = {field.name: field.default for field in dataclasses.fields(LossSpec)}
    values = {name: getattr(spec, name) for name in ("objective", "aggregation")}
    return values | {name: getattr(spec, name) for name in defaults if getattr(spec, name) != defaults[name]}


def code(spec: LossSpec, name: str) -> str:
    fields = [f"{field}={shown(value)}" for field, value in changed(spec).items()]
    line = f"{name} = LossSpec({', '.join(fields)})"
    if len(line) > 100:
        line = f"{name} = LossSpec(\n" + "".join(f"    {field},\n" for field in fields) + ")"
    return f"```python\n{line}\n```"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def at_a_glance() -> str:
    def bound(value: float | None) -> str:
        return "none" if value is None else f"{value:g}"

    rows = []
    for name, spec in PRESETS.items():
        clips = "epsilon_low" in OBJECTIVES[str(spec.objective)].reads
        bounds = f"{bound(spec.epsilon_low)} / {bound(spec.epsilon_high)}" if clips else "-"
        advantages = f"{spec.advantage_baseline} / {spec.advantage_scale}"
        link = f"[`{name.upper()}`](#{name})"
        rows.append((link, str(spec.objective), spec.ratio_level, bounds, spec.aggregation, advantages))
    head = ("preset", "objective", "ratio", "ε₋ / ε₊", "aggregation", "baseline / scale of advantages")
    return "## Presets at a glance\n\n" + table(head, [tuple(map(str, row)) for row in rows])


def image(objective: str) -> str:
    plot = plots.PLOTS[objective]
    at = f"The value depends on log π; here π_old = {plot.old_probability:g}."
    caption = " ".join(filter(None, (f"`{objective}`.", at if reads_probability(objective) else "", plot.note)))
    return f"![{objective}: loss and gradient against the ratio](losses/{objective}.svg)\n\n*{caption}*"


def reads_probability(objective: str) -> bool:
    """Whether the loss at one ratio changes with the old probability."""
    line, plot = plots.PLOTS[objective].lines[0], plots.PLOTS[objective]
    values = [plots.loss_at(line, 1, 1.1, share * plot.old_probability)[0] for share in (1.0, 0.9)]
    return not math.isclose(*values, rel_tol=1e-9)


def own_numbers(spec: LossSpec) -> list[str]:
    """A line with the values of the numbers that only this objective reads, if there are any."""
    read = [f"`{name}={getattr(spec, name)!r}`" for name in OBJECTIVES[str(spec.objective)].numbers]
    return [f"Its own numbers: {', '.join(read)}."] if read else []


def same_curves(spec: LossSpec, first: str) -> str:
    fields = ("ratio_level", "epsilon_low", "epsilon_high")
    alike = all(getattr(spec, field) == getattr(PRESETS[first], field) for field in fields)
    ending = "" if alike else ", with this ratio and these bounds"
    return f"The curves are those of [{first.upper()}](#{first}){ending}."


def sections() -> str:
    """One section per preset, and per objective without one."""
    docstrings, out = parse("presets"), ["## Presets"]
    drawn: dict[str, str] = {}
    for name, spec in PRESETS.items():
        formula, *rest = (referring(linked(part), name) for part in paragraphs(docstrings[name.upper()]))
        out += [f"### {name.upper()}", formula, code(spec, name.upper()), *own_numbers(spec)]
        out += [f"**{lead}**{part.removeprefix(lead)}" for lead, part in zip(LEADS, rest, strict=True)]
        first = drawn.setdefault(str(spec.objective), name)
        out.append(image(str(spec.objective)) if first == name else same_curves(spec, first))
    for objective in (name for name in OBJECTIVES if name not in drawn):
        text = one_line(OBJECTIVES[objective].loss.__doc__ or "")
        spec = LossSpec(objective=objective)
        out.append(f"### {objective}\n\n{linked(text)} An objective without a preset.")
        out.append(f"{code(spec, objective.upper())}\n\n{image(objective)}")
    return "\n\n".join(out)


def field_table(module: str, cls: type, skip: type | None = None) -> str:
    """Name, default and meaning; fields without a docstring share the next one's, or list their choices."""
    inherited = {field.name for field in dataclasses.fields(skip)} if skip else set()
    texts, rows, waiting = parse(module, cls.__name__), [], []
    for field in dataclasses.fields(cls):
        if field.name in inherited or field.name.startswith("_"):
            continue
        text = texts[field.name]
        if text is None and isinstance(field.default, Enum):
            text = f"One of [these](#{_anchor(type(field.default))})."
        waiting.append(f"`{field.name}` = {shown(field.default)}")
        if text is not None:
            rows.append((", ".join(waiting), linked(one_line(text))))
            waiting = []
    assert not waiting, f"{cls.__name__}: no docstring under {waiting}"
    return table(("field", "meaning"), rows)


def _anchor(enum: type) -> str:
    return TITLES[enum.__name__].lower().replace(" ", "-")


def options() -> str:
    choices = []
    for class_name, title in TITLES.items():
        rows = []
        for member, text in parse("options", class_name).items():
            assert text, f"{class_name}.{member}: no docstring"
            value = getattr(fastrl.options, class_name)[member]
            rows.append((f'`"{value}"`', linked(one_line(text))))
        choices.append(f"### {title}\n\n{table(('value', 'meaning'), rows)}")
    own = field_table("objectives", OwnNumbers)
    fields = field_table("spec", LossSpec, skip=OwnNumbers)
    correction = field_table("rollout_correction", RolloutCorrection)
    return "\n\n".join(
        (
            "## Options",
            f"### Fields of LossSpec\n\n{fields}",
            "### Numbers of single objectives\n\nFields of `LossSpec` too. Each belongs to the objective that it is "
            f"named after and must stay at its default with any other.\n\n{own}",
            *choices[:6],
            f"### Rollout correction\n\n{correction_text()}\n\n{correction}",
            *choices[6:],
        )
    )


def correction_text() -> str:
    """The class's docstring: its first paragraphs, and whose setting is which as a list."""
    doc = textwrap.dedent("    " + (RolloutCorrection.__doc__ or ""))
    about, weight, whose, _ = doc.split("\n\n")
    entries = re.split(r"(?<=\.)\n", textwrap.dedent(whose.split("\n", 1)[1]))
    listed = "\n".join(f"- {one_line(entry)}" for entry in entries)
    prose = "\n\n".join(one_line(part) for part in (about, weight))
    return linked(f"`LossSpec(rollout=RolloutCorrection(...))`. {prose}\n\n{listed}")


def page() -> str:
    problems = table(("problem", "presets and options"), PROBLEMS)
    coming = table(("coming from", "setting", "use"), COMING_FROM)
    parts = (INTRODUCTION, CHOOSING.format(problems=problems, coming=coming), at_a_glance(), sections(), options())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def curves() -> dict[str, Any]:
    """All curves, to six digits."""

    def rounded(tables: dict[str, plots.Table]) -> dict[str, plots.Table]:
        return {name: [[float(f"{v:.6g}") for v in column] for column in table] for name, table in tables.items()}

    return {name: rounded(plots.curves(plot)) for name, plot in plots.PLOTS.items()}


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """The objectives whose curves differ by more than rounding, or that only one side has."""

    def flat(tables: dict[str, plots.Table]) -> list[float]:
        return [v for name in sorted(tables) for column in tables[name] for v in column]

    def same(a: dict[str, plots.Table], b: dict[str, plots.Table]) -> bool:
        x, y = flat(a), flat(b)
        close = all(math.isclose(p, q, rel_tol=1e-5, abs_tol=1e-5) for p, q in zip(x, y, strict=False))
        return a.keys() == b.keys() and len(x) == len(y) and close

    return [name for name in sorted(now.keys() | then.keys()) if not same(now.get(name, {}), then.get(name, {}))]


def check(folder: Path = DOCS) -> list[str]:
    """The files in the folder that are not what would be written; images are only looked for."""
    text, stored = folder / "losses.md", folder / CURVES
    wrong = [] if text.is_file() and text.read_text() == page() else ["losses.md"]
    moved = differences(curves(), json.loads(stored.read_text()) if stored.is_file() else {})
    missing = (f"losses/{name}.svg" for name in plots.PLOTS if not (folder / f"losses/{name}.svg").is_file())
    return [*wrong, *(f"{CURVES}: {name}" for name in moved), *missing]


def write(folder: Path = DOCS) -> None:
    (folder / "losses").mkdir(exist_ok=True)
    (folder / "losses.md").write_text(page())
    tables = curves()
    (folder / CURVES).write_text(json.dumps(tables, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    for name, lines in tables.items():
        plots.draw(name, lines, folder / f"losses/{name}.svg")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the files differ")
    if not parser.parse_args().check:
        write()
        return 0
    wrong = check()
    for name in wrong:
        print(f"docs/{name} is not up to date: run `make docs`")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
