"""The README names what is there: every module in its tree, every file in its commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree_files() -> set[str]:
    """Files of the README's tree, as paths; a line with several names lists several files."""
    (tree,) = re.findall(r"```\n(launch/ .*?)```", README, flags=re.DOTALL)
    found: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.match(r"\s*((?:[\w/.-]+ ?)+)", line)[1].split():  # type: ignore[index]  # a name stands first
            if name.endswith("/"):
                folders[depth:] = [name]
            elif "." in name:
                found.add("".join([*folders[:depth], name]))
    return found


def test_tree_names_every_module_and_program_and_nothing_else() -> None:
    programs = {*ROOT.glob("launch/*.py"), *ROOT.glob("launch/*.sh"), *ROOT.glob("launch/slurm/*")}
    modules = {
        path for top in ("qad_dist", "shards") for path in (ROOT / top).rglob("*.py") if path.name != "__init__.py"
    }

    assert tree_files() == {str(path.relative_to(ROOT)) for path in programs | modules}


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"\b(?:launch|configs|tests|qad_dist|shards)/[\w./-]*\w\.\w+", README)))
)
def test_every_file_in_a_command_or_link_is_there(name: str) -> None:
    if name in ("configs/X.yaml",):  # stands for any config
        return

    assert (ROOT / name).is_file()
