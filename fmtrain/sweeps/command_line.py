"""Command line of a trial: the placeholders of a template, each filled and quoted for the place where it stands."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

RUN = "run"
"""Folder of the run in the folder of its trial."""
COMMAND = "command"
FILLED = ("gpu", "number", "out", "python")
"""Placeholders of every template, apart from those of its parameters."""

PLACEHOLDER = re.compile(r"{{([\w.]+)}}|(?<!\$){([\w.]+)}")
"""``{name}``; ``{{name}}`` stands for the text ``{name}``, and ``${name}`` is a variable of the shell."""
WORD = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""")
SEGMENT = re.compile(r"""'[^']*'|"(?:[^"\\]|\\.)*"|[^'"]+|['"]""")
"""A quoted part of a shell script, or a part between two of them."""


def placeholders(template: str) -> set[str]:
    """Names in a template that are to be replaced.

    Example:
        >>> sorted(placeholders("ssh {host} 'cd ${HOME} && {command}' {{x}}"))
        ['command', 'host']
    """
    return {match[2] for match in PLACEHOLDER.finditer(template) if match[2]}


def check_placeholders(template: str, known: Iterable[str], *, what: str) -> None:
    """Refuse a template that cannot be divided into words, or with a placeholder that nothing replaces."""
    try:
        shlex.split(template)
    except ValueError as error:
        raise ValueError(f"{what} is no command line ({error}): {template}") from None
    if unknown := sorted(placeholders(template) - set(known)):
        raise ValueError(
            f"{what} holds {{{unknown[0]}}}, which nothing replaces; known are {', '.join(sorted(known))}. "
            f"Write {{{{{unknown[0]}}}}} for the text itself"
        )


def run_command(
    *,
    launcher: str,
    fit: Sequence[str],
    params: Mapping[str, object],
    folder: Path,
    number: int,
    resume: bool = False,
    seed: int | None = None,
    gpu: str = "",
) -> list[str]:
    """Command line of a trial of `fmtrain fit`.

    In the launcher, ``{command}`` is replaced by ``fmtrain fit …``, ``{out}`` by the folder of the run, ``{number}``
    by the number of the trial, ``{gpu}`` by its GPUs, ``{python}`` by this interpreter.

    Example:
        >>> parts = dict(fit=["--config", "demo"], params={"model.schedules.lr": 1e-3}, folder=Path("s/trials/0004"))
        >>> shlex.join(run_command(launcher="torchrun -m {command}", number=4, **parts))
        'torchrun -m fmtrain fit --config demo --model.schedules.lr 0.001 --out s/trials/0004/run'
        >>> remote = run_command(launcher="ssh gpu1 'cd /data && {command}'", number=4, **parts)
        >>> shlex.join(remote).count("'cd /data && fm")
        1
    """
    out = str(folder / RUN)
    seeded = {} if seed is None else {"seed_everything": seed}
    settings = [part for name, value in {**params, **seeded}.items() for part in (f"--{name}", cli_value(value))]
    command = ["fmtrain", "fit", *fit, *settings, "--out", out, *(["--resume"] if resume else [])]
    return fill(launcher, {"out": out, "number": str(number), "gpu": gpu}, command=command)


def fill_command(
    template: str, *, params: Mapping[str, object], folder: Path, number: int, seed: int | None = None, gpu: str = ""
) -> list[str]:
    """Command line of a trial of any script: each ``{name}`` is replaced by the value of that parameter.

    Example:
        >>> fill_command("python train.py --out {out} --lr {lr}", params={"lr": 0.1}, folder=Path("t"), number=0)
        ['python', 'train.py', '--out', 't/run', '--lr', '0.1']
    """
    values = {name: cli_value(value) for name, value in params.items()}
    values |= {"out": str(folder / RUN), "number": str(number), "seed": str(0 if seed is None else seed), "gpu": gpu}
    return fill(template, values)


def fill(template: str, values: Mapping[str, str], *, command: Sequence[str] = ()) -> list[str]:
    """Words of a command line whose placeholders are replaced.

    A word is passed on as it is. Words that are scripts of a shell are filled so that the shell reads each value as
    one word again: quoted words with a blank or ``{command}`` in them. ``ssh`` joins its words to such a script.

    Args:
        template: Command line with placeholders, quoted as in a shell.
        values: Values by name.
        command: Words that replace ``{command}``.

    Example:
        >>> fill("sh -c 'mkdir -p {out} && {command}' {out}", {"out": "a b"}, command=["train", "--x", "[1, 2]"])
        ['sh', '-c', "mkdir -p 'a b' && train --x '[1, 2]'", 'a b']
        >>> fill("ssh host {command}", {}, command=["train", "--x", "[1, 2]"])
        ['ssh', 'host', "train --x '[1, 2]'"]
    """
    values = {**values, "python": sys.executable, COMMAND: shlex.join(command)}
    parts: list[str] = []
    for word in WORD.findall(template):
        if word == f"{{{COMMAND}}}" and not any(Path(part).name == "ssh" for part in parts):
            parts += command
        else:
            parts.append(_fill_word(shlex.split(word)[0], values))
    return parts


def _fill_word(word: str, values: Mapping[str, str]) -> str:
    if not re.search(rf"\s|{{{COMMAND}}}", word):
        return _replaced(word, values)
    quoted = {name: text if name == COMMAND or not text else shlex.quote(text) for name, text in values.items()}
    filled = []
    for segment in SEGMENT.findall(word):
        mark, inner = segment[0], segment[1:-1]
        if len(segment) < 2 or mark not in "'\"":
            filled.append(_replaced(segment, quoted))
        elif mark == "'":
            filled.append("'" + _fill_word(inner, values).replace("'", "'\"'\"'") + "'")
        else:
            within = quoted if re.search(rf"\s|{{{COMMAND}}}", inner) else values
            escaped = {name: re.sub(r'([\\"$`])', r"\\\1", text) for name, text in within.items()}
            filled.append(f'"{_replaced(inner, escaped)}"')
    return "".join(filled)


def _replaced(text: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: f"{{{match[1]}}}" if match[1] else values.get(match[2], match[0]), text)


def cli_value(value: object) -> str:
    """A value as an argument of the command line.

    Example:
        >>> cli_value(0.001), cli_value("kde"), cli_value(True), cli_value(None)
        ('0.001', 'kde', 'true', 'null')
    """
    return value if isinstance(value, str) else json.dumps(value)
