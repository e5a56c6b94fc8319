"""Columns that are written in the path of a run's folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from hpreliability.errors import EmptyInputError, SourceFormatError
from hpreliability.readers.files import is_pattern, matching

_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Layout:
    """How folder names spell the columns of a table.

    Args:
        template: the end of a run folder's path, with columns in braces, for example
            `"{hyperparameter}={value}/{env}/{seed}"`. A field never contains a slash. Fields other
            than hyperparameter, value and seed are contexts.
        hyperparameter: its name, where the path does not tell.

    Raises:
        ValueError: the template lacks `{value}` or `{seed}`, names a field twice, has no context,
            or the hyper-parameter is named nowhere or in both places.
    """

    def __init__(self, template: str, hyperparameter: str | None = None) -> None:
        fields = _FIELD.findall(template)
        twice = sorted({field for field in fields if fields.count(field) > 1})
        if twice:
            raise ValueError(f"the layout {template!r} names a field twice: {twice}")
        for needed in ("value", "seed"):
            if needed not in fields:
                raise ValueError(f"the layout {template!r} needs a field {{{needed}}}")
        if ("hyperparameter" in fields) == (hyperparameter is not None):
            raise ValueError(
                f"name the hyper-parameter once: as a field of the layout {template!r} "
                f"or as the argument hyperparameter (got {hyperparameter!r})"
            )
        reserved = ("hyperparameter", "value", "seed")
        self.contexts = tuple(field for field in fields if field not in reserved)
        if not self.contexts:
            raise ValueError(f"the layout {template!r} has no context field such as {{env}}")
        self.template = template
        self.hyperparameter = hyperparameter
        literals = _FIELD.split(template.strip("/"))
        pattern = "".join(
            f"(?P<{part}>[^/]+?)" if index % 2 else re.escape(part)
            for index, part in enumerate(literals)
        )
        self._pattern = re.compile(rf"(?:^|.*/){pattern}$")

    def columns(self, folder: Path) -> dict[str, str]:
        """The labels that a run folder's path spells.

        Raises:
            SourceFormatError: the path does not end as the template says.
        """
        match = self._pattern.match(folder.as_posix())
        if match is None:
            raise SourceFormatError(f"{folder} does not end like the layout {self.template!r}")
        labels = match.groupdict()
        if self.hyperparameter is not None:
            labels["hyperparameter"] = self.hyperparameter
        return labels


def run_folders(runs: str | PathLike[str], names: Sequence[str]) -> list[Path]:
    """Folders at or below `runs` that hold a file matching one of the `names`, sorted.

    Args:
        runs: a folder, or a pattern with wildcards that matches folders.
        names: patterns of file names, such as `"*.monitor.csv"`.

    Raises:
        FileNotFoundError: a folder without wildcards does not exist.
        EmptyInputError: no such file anywhere.
    """
    root = Path(runs)
    if root.exists():
        tops = [root]
    elif is_pattern(runs):
        tops = matching(runs)
    else:
        raise FileNotFoundError(f"no such folder: {runs}")
    folders = {
        file.parent for top in tops for name in names for file in top.rglob(name) if file.is_file()
    }
    if not folders:
        raise EmptyInputError(f"no {' or '.join(names)} in or below {runs}")
    return sorted(folders)
