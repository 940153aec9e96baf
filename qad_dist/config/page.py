"""A program: the page of all settings, ``python -m qad_dist.config.page > configs/README.md``."""

import re
import sys

from qad_dist.config.run import RunConfig
from qad_dist.config.section import Section, entry_of, section_of

README = """\
# Settings

One YAML file per run, one section per stage; `--set section.name=value` changes a setting for one start, and
`--print-config` shows all of them as resolved. Relative paths are relative to the folder that the command is started
in; `${QAD_NAME}` is replaced by that environment variable. Unknown names are refused.

| file | what it is |
|---|---|
| `toy.yaml` | the embedded run of `launch/demo.sh`: a small teacher and spoken digits in 29 languages |
| `an4.yaml` | human speech: AN4 in the folder that `QAD_SPEECH_DIR` names |
| `qwen3-asr-0.6b.yaml` | the real model on one node of 8 GPUs |
| `accelerate/*.yaml` | how many ranks on which machines: `accelerate launch --config_file` |
| `deepspeed/*.json` | what ZeRO shards: `train.deepspeed` |

Made by `python -m qad_dist.config.page > configs/README.md`; a test compares the two.

"""


def settings_readme() -> str:
    """The text of ``configs/README.md``."""
    return README + settings_table()


def settings_table() -> str:
    """All settings as Markdown: name, type, default, meaning; the body of ``configs/README.md``."""
    lines: list[str] = []
    for name, field in RunConfig.model_fields.items():
        if (section := section_of(field)) is not None:
            lines += _table(section, name)
    return "\n".join(["## The run", "", *_rows(RunConfig, ""), *lines, ""])


def _table(section: type[Section], name: str) -> list[str]:
    """A section, and behind it those inside it; the entries of a dict have whatever ``<name>`` the user gives them."""
    doc = _first_line(section.__doc__).replace("``", "`")
    lines = ["", f"## `{name}:`", "", doc, "", *_rows(section, f"{name}.")]
    for inner, field in section.model_fields.items():
        if "." not in name and (nested := section_of(field)) is not None:
            lines += _table(nested, f"{name}.{inner}")
        elif (entry := entry_of(field)) is not None:
            lines += _table(entry, f"{name}.{inner}.<name>")
    return lines


def _rows(section: type[Section], prefix: str) -> list[str]:
    return ["| setting | type | default | meaning |", "|---|---|---|---|", *_settings(section, prefix)]


def _settings(section: type[Section], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        if (nested := section_of(field)) is not None:
            if prefix.count(".") == 2:  # sections in a section of a section have no table of their own
                rows += [f"| **`{prefix}{name}`** | | | {field.description} |", *_settings(nested, f"{prefix}{name}.")]
            continue
        kind = field.annotation
        text = getattr(kind, "__name__", "") if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
        text = text.replace("typing.", "").replace("NoneType", "None").replace("|", "or")
        text = re.sub(r"Optional\[(.*)\]", r"\1 or None", text)
        text = re.sub(r"^Union\[(.*)\]$", r"\1", text)
        text = re.sub(r"Literal\[([^]]*)\]", lambda choices: choices.group(1).replace("'", "`"), text)
        if entry_of(field) is not None:
            text = "dict[str, section]"
        default = "required" if field.is_required() else f"`{field.default!r}`"
        limits = ", ".join(str(rule) for rule in field.metadata)
        limits = re.sub(r"(Ge|Gt|Le|Lt|MinLen|MaxLen)\(\w+=([^)]*)\)", _limit, limits)
        meaning = " ".join((field.description or "").split()).replace("``", "`") + (f" ({limits})" if limits else "")
        rows.append(f"| `{prefix}{name}` | {text} | {default} | {meaning} |")
    return rows


def _limit(match: re.Match[str]) -> str:
    sign = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<", "MinLen": "at least", "MaxLen": "at most"}[match.group(1)]
    return f"{sign} {match.group(2)}"


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.stdout.write(settings_readme())
