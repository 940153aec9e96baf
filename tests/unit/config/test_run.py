"""Settings: what is read, what is refused, and what the refusal says."""

from pathlib import Path

import pytest

from qad_dist.config import RunConfig, dump_run, load_run
from qad_dist.config.page import settings_table
from shards.errors import ConfigError

SMALL = """\
run: runs/small
model:
  path: some/model
pack:
  inputs: [a.jsonl]
"""


@pytest.fixture
def load(tmp_path: Path):
    def load_text(text: str | bytes, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_run(path, list(overrides))

    return load_text


def test_values_of_the_file_are_read_and_the_others_have_their_defaults(load):
    run = load(SMALL + "train:\n  steps: 7\n  warmup_steps: 2\n")

    assert (run.run, run.model.path, run.pack.inputs) == ("runs/small", "some/model", ["a.jsonl"])
    assert (run.train.steps, run.train.warmup_steps, run.train.temperature) == (7, 2, 1.0)
    assert run.stage_folder("label") == Path("runs/small/label")


def test_one_times_ten_to_the_minus_five_is_a_number_however_it_is_written(load):
    # PyYAML reads 1e-5 as text, 1.0e-5 as a number.
    assert load(SMALL + "train: {learning_rate: 1e-5}").train.learning_rate == 1e-5
    assert load(SMALL + "train: {learning_rate: 1.0e-5}").train.learning_rate == 1e-5
    assert load(SMALL, "train.learning_rate=3e-4").train.learning_rate == 3e-4


def test_dumped_config_reads_back_to_an_equal_config(load):
    run = load(SMALL + "seed: 3\nscore: {systems: {other: x/y}}\nexport: {dtype: null}\n", "train.steps=900")

    assert load(dump_run(run)) == run


def test_config_cannot_be_changed_after_loading(load):
    with pytest.raises(ValueError, match="frozen"):
        load(SMALL).train.steps = 3


def test_overrides_are_applied_in_order_and_reach_sections_that_the_file_does_not_have(load):
    run = load(SMALL, "train.steps=100", "train.steps=200", "label.splits=[heldout]", "seed=4", "model.path=m o=d")

    assert (run.train.steps, run.label.splits, run.seed, run.model.path) == (200, ["heldout"], 4, "m o=d")


def test_byte_order_mark_and_windows_line_ends_are_read(load):
    assert load(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode()).run == "runs/small"


def test_only_variables_of_this_project_are_expanded(load, monkeypatch):
    monkeypatch.setenv("QAD_SPEECH_DIR", "/some/speech")
    monkeypatch.setenv("SECRET", "hunter2")

    assert load(SMALL.replace("a.jsonl", "'${QAD_SPEECH_DIR}/a.jsonl'")).pack.inputs == ["/some/speech/a.jsonl"]
    with pytest.raises(ConfigError, match=r"^pack\.inputs\[0\] may only use .* got \$\{SECRET\}; write the value out$"):
        load(SMALL.replace("a.jsonl", "'${SECRET}'"))


def test_variable_that_is_not_set_is_named(load, monkeypatch):
    monkeypatch.delenv("QAD_NOWHERE", raising=False)

    with pytest.raises(ConfigError, match=r"^model\.path needs the environment variable QAD_NOWHERE, got none; export"):
        load(SMALL, "model.path=${QAD_NOWHERE}")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("train: {temprature: 2}", r"^train\.temprature must be a setting .*; did you mean 'temperature'\?$"),
        ("lable: {}", r"^lable must be a setting .*; did you mean 'label'\?$"),
        ("export: {xyzzy: 1}", r"^export\.xyzzy must be .*; known names are: format, dtype, verify_utterances$"),
        ("train: {steps: many}", r"^train\.steps must be a valid integer.*, got 'many'; see configs/README\.md$"),
        ("train: {steps: 0}", r"^train\.steps must be greater than or equal to 1, got 0;"),
        ("train: {steps: 1.5}", r"^train\.steps must be .*, got 1\.5;"),
        ("train: {steps: -3}", r"^train\.steps must be greater than or equal to 1, got -3;"),
        ("train: {learning_rate: .nan}", r"^train\.learning_rate must be .*finite.*, got nan;"),
        ("train: {learning_rate: .inf}", r"^train\.learning_rate must be .*finite.*, got inf;"),
        ("train: {train_norms: 3}", r"^train\.train_norms must be a valid boolean.*, got 3;"),
        ("train: 5", r"^train must be .*, got 5;"),
        ("train:", r"^train must be .*, got None;"),
        ("train: {steps: 10}", r"^train\.warmup_steps must be below train\.steps \(10\), got 50;"),
        ("train: {kl_weight: 0, ce_weight: 0}", r"^train\.kl_weight and train\.ce_weight must not both be 0"),
        ("label: {splits: [trian]}", r"^label\.splits\.0 must be 'train', 'heldout' or 'test', got 'trian';"),
        ("score: {systems: {qad: x}}", r"^score\.systems names must match .*, got 'qad'; rename it$"),
        ("run: twice", r"must be YAML, got: line 6: 'run' appears twice; remove one$"),
        ("train: {steps: 1, steps: 2}", r"must be YAML, got: line 6: 'steps' appears twice"),
        ("a: &a [x]\nb: [*a, *a]", r"must be YAML, got: aliases .* are not supported"),
        ("train: !!python/object/apply:os.system [ls]", r"must be YAML, got: could not determine a constructor"),
        ("1: x", r"must be YAML, got: line 6: names must be text, got 1; quote it$"),
        ("yes: x", r"must be YAML, got: line 6: names must be text, got True; quote it$"),
        ("train:\n\tsteps: 3", r"must be YAML, got: while scanning .*cannot start any token"),
        ("{", r"must be YAML, got: "),
    ],
)
def test_mistake_in_the_file_is_told_in_one_line(load, extra, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(SMALL + extra + "\n")

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must hold `name: value` lines, got NoneType"),
        ("- a\n- b\n", r"must hold `name: value` lines, got list"),
        ("just text", r"must hold `name: value` lines, got str"),
        (b"run: \xff\xfe", r"must be YAML, got: 'utf-8' codec"),
        (b"run: a\x00b", r"must be YAML, got: "),
        ("[" * 5000, r"must be YAML, got: "),
        ("x" * 1_000_001, r"must be smaller than 1000000 bytes, got 1000001"),
        ("run: r\npack: {inputs: [a]}\n", r"^model must be set in .*run\.yaml, got nothing"),
        ("run: r\nmodel: {path: m}\npack: {inputs: []}\n", r"^pack\.inputs must be .*at least 1 item.*, got \[\]"),
    ],
)
def test_file_that_is_no_config_is_refused(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_missing_file_and_folder_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"^--config must be a YAML file, got "):
        load_run(tmp_path / name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", r"^--set must look like section\.name=value, got 'train\.steps'"),
        ("train..steps=1", r"^--set must look like section\.name=value, got 'train\.\.steps=1'"),
        ("=1", r"^--set must look like section\.name=value, got '=1'"),
        ("train=5", r"^train must be .*, got 5;"),
        ("run.steps=5", r"^--set run\.steps must name a setting, got a path through the value 'run'"),
        ("train.stpes=5", r"^train\.stpes must be a setting .*; did you mean 'steps'\?$"),
        ("train.steps={", r"^--set train\.steps must have a YAML value, got '\{'; quote it$"),
        ("train.steps=", r"^train\.steps must be a valid integer, got None"),
        ("train.steps=²", r"^train\.steps must be a valid integer"),
    ],
)
def test_mistake_in_an_override_is_told(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load(SMALL, override)


def settings_of(section, prefix=""):
    for name, field in section.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None:
            yield f"{prefix}{name}", field
        else:
            yield from settings_of(field.annotation, f"{prefix}{name}.")


def test_every_setting_has_a_description_and_a_row_in_the_table():
    table = settings_table()
    found = dict(settings_of(RunConfig))

    for name, setting in found.items():
        assert setting.description, f"{name} has no description"
        assert f"| `{name}` |" in table
    assert "label.filters.loop.repeated_words" in found


def test_mistake_deep_in_a_section_is_told_with_its_whole_name(load):
    with pytest.raises(ConfigError, match=r"^label\.filters\.loop\.acton must be .*; did you mean 'action'\?$"):
        load(SMALL, "label.filters.loop.acton=drop")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["label.backend=vllm"], "label.backend vllm needs a server, got neither"),
        (
            ["label.backend=vllm", "label.vllm_url=http://127.0.0.1:8000", "label.hidden_states=true"],
            "label.hidden_states needs label.backend torch, got vllm",
        ),
    ],
)
def test_vllm_backend_that_cannot_work_is_refused(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(SMALL, *overrides)
