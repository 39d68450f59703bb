"""The configuration: what is accepted, what is refused and in which words, what follows the data set."""

import ast
import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import lemonade_hpc
from lemonade_hpc import config
from lemonade_hpc.config import ConfigError
from lemonade_hpc.view.template import template

DIGITS = "data: {name: digits}\n"
SECTIONS = {
    name: field.annotation
    for name, field in config.Config.model_fields.items()
    if hasattr(field.annotation, "model_fields")
}
KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


def parse(text):
    return config.parse(DIGITS + text, "some.yaml")


def value(settings, key):
    for part in key.split("."):
        settings = settings[int(part)] if part.isdigit() else getattr(settings, part)
    return settings


def refusal(text):
    """What the user is told; `text` is the whole file."""
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "some.yaml")
    assert all(line.startswith("some.yaml") for line in str(caught.value).splitlines())
    return str(caught.value)


# ---------------------------------------------------------------- what is accepted


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("training: {lr: 1e-3}", "training.lr", 0.001),  # text to YAML 1.1: no dot
        ("training: {lr: 1.0e-3}", "training.lr", 0.001),
        ("training: {lr: '0.001'}", "training.lr", 0.001),
        ("training: {lr: 1}", "training.lr", 1.0),
        ("training: {lr: .5}", "training.lr", 0.5),
        ("training: {lr: }", "training.lr", None),
        ("objectives: [{name: val_error}, {name: params, max: 2.0e6}]", "objectives.1.max", 2e6),  # no sign: text
        ("objectives: [{name: val_error}, {name: params, max: 2e6, min: 300}]", "objectives.1.min", 300.0),
        ("training: {epochs: 5.0}", "training.epochs", 5),
        ("training: {epochs: '5'}", "training.epochs", 5),
        ("search: {children: 1e4}", "search.children", 10_000),
        ("search: {children: 10_000}", "search.children", 10_000),
        ("search: {children: 0}", "search.children", 0),
        ("seed: '123456789012345678901234567890'", "seed", 123456789012345678901234567890),
        ("training: {flip: yes}", "training.flip", True),
        ("training: {flip: off}", "training.flip", False),
        ("search: {operators: [widen, prune]}", "search.operators", ("widen", "prune")),
        ("training:", "training", config.Training()),  # every line below it is commented out
        ("seed:", "seed", 0),
    ],
)
def test_numbers_and_words_as_people_write_them(text, key, expected):
    found = value(parse(text), key)
    assert found == expected
    assert type(found) is type(expected)


def test_a_file_may_have_windows_line_ends_a_byte_order_mark_or_two_byte_characters(tmp_path):
    text = f"# café\n{DIGITS}seed: 3\n".replace("\n", "\r\n")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.yaml"
        path.write_bytes(text.encode(encoding))
        assert config.load(str(path)).seed == 3


def test_stored_settings_are_read_back_as_they_were():
    given = parse("training: {lr: 1e-3}\nsearch: {operators: [skip], mode: generational}\nseed: 7")
    stored = json.loads(json.dumps(config.to_dict(given)))
    before = json.dumps(stored)
    assert config.from_dict(stored, "run.json") == given
    assert json.dumps(stored) == before


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        parse("").seed = 1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_an_unknown_key_is_answered_with_the_valid_ones(section):
    text = f"{DIGITS}quux: 1" if not section else "data: {name: digits, quux: 1}"
    if section not in ("", "data"):
        text = f"{DIGITS}{section}: {{quux: 1}}"
    told = refusal(text)
    model = SECTIONS.get(section, config.Config)
    assert f"unknown key '{section + '.' if section else ''}quux'. Valid keys here: " in told
    assert told.split("here: ")[1].split(", ") == sorted(model.model_fields)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("trainig: {}", "Did you mean 'training'?"),
        ("training: {epoch: 5}", "Did you mean 'epochs'?"),
        ("cluster: {worker: 5}", "Did you mean 'workers'?"),
        ("epochs: 5", "Did you mean 'training.epochs'?"),  # right key, wrong place
        ("training: {workers: 5}", "Did you mean 'cluster.workers'?"),
        ("objectives: [{name: val_error}, {name: params, mx: 5}]", "Did you mean 'max'?"),
        ("trainig:", "Did you mean 'training'?"),
        ("search: {mode: steady}", "Did you mean 'steady_state'?"),
        ("objectives: [{name: val_error}, {name: parms}]", "Did you mean 'params'?"),
        ("search: {operators: [wide]}", "Did you mean 'widen'?"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_match(text, hint):
    assert hint in refusal(DIGITS + text)


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_the_wrong_type_is_refused_for_every_key(key):
    section, name = key.split(".")
    given = {"data": {"name": "digits"}, section: {"name": "digits"} if section == "data" else {}}
    wrong = given[section][name] = {"a": 1} if not key.endswith("extra") else ["a"]
    assert f"some.yaml: {key}: got {wrong}; it must be " in refusal(yaml.safe_dump(given))


@pytest.mark.parametrize("key", [key for key in KEYS if value(parse(""), key) is not None])
def test_a_key_without_a_value_and_without_a_default_that_follows_is_refused(key):
    section, name = key.split(".")
    given = {"data": {"name": "digits"}, section: {"name": "digits"} if section == "data" else {}}
    given[section][name] = None
    assert f"{key}: got no value; it must be " in refusal(yaml.safe_dump(given))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {epochs: 5.5}", "training.epochs: got 5.5; it must be a whole number"),
        ("training: {epochs: yes}", "training.epochs: got True; it must be a whole number"),
        ("training: {epochs: five}", "training.epochs: got 'five'; it must be a whole number"),
        ("training: {epochs: -5}", "training.epochs: got -5; it must be at least 1"),
        ("training: {epochs: 0}", "training.epochs: got 0; it must be at least 1"),
        ("training: {lr: yes}", "training.lr: got True; it must be a number"),
        ("training: {lr: 0}", "training.lr: got 0; it must be above 0"),
        ("training: {lr: .nan}", "training.lr: got nan; it must be a finite number"),
        ("training: {lr: 1e400}", "training.lr: got inf; it must be a finite number"),
        ("training: {momentum: 1}", "training.momentum: got 1; it must be below 1"),
        ("training: {mixup: -0.1}", "training.mixup: got -0.1; it must be at least 0"),
        ("training: {mixup: .inf}", "training.mixup: got inf; it must be a finite number"),
        ("training: {cutout: -1}", "training.cutout: got -1; it must be at least 0"),
        ("training: {pad: -1}", "training.pad: got -1; it must be at least 0"),
        ("training: {flip: 1}", "training.flip: got 1; it must be true or false"),
        ("training: {flip: y}", "training.flip: got 'y'; it must be true or false"),
        ("training: [epochs]", "training: got ['epochs']; it must hold keys, as in {epochs: ...}"),
        ("training: 5", "training: got 5; it must hold keys, as in {epochs: ...}"),
        ("seed: -1", "seed: got -1; it must be at least 0"),
        ("seed: 1e400", "seed: got inf; it must be a whole number"),
        ("search: {mode: on}", "search.mode: got True; it must be 'steady_state' or 'generational'"),
        ("search: {operators: []}", "operators is empty; allowed are insert, widen, skip, remove, prune, separable"),
        ("search: {operators: widen}", "search.operators: got 'widen'; it must be a list"),
        ("search: {operators: [widen, widen]}", "operators: one occurs twice in widen, widen"),
        ("search: {proposals: 10}", "search: proposals (10) must be at least accepted (50)"),
        ("objectives: params", "objectives: got 'params'; it must be a list"),
        ("objectives: [params]", "objectives.0: got 'params'; it must hold keys, as in {name: ...}"),
        ("objectives: []", "objectives: got []; val_error must be among them"),
        ("objectives: [{name: params}]", "got ['params']; val_error must be among them"),
        ("objectives: [{name: val_error}]", "got ['val_error']; params or macs must be among them"),
        ("objectives: [{name: val_error}, {name: macs}, {name: macs}]", "objectives: a name occurs twice"),
        ("objectives: [{name: val_error, max: 1}, {name: macs}]", "objectives.0: val_error takes no max and no min"),
        ("objectives: [{name: val_error}, {name: macs, min: 3, max: 2}]", "objectives.1: min (3) is above max (2)"),
        ("objectives: [{name: val_error}, {name: macs, max: 0}]", "objectives.1.max: got 0; it must be above 0"),
        ("objectives: [{max: 3}]", "the key 'objectives.0.name' is required"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(text, expected):
    assert expected in refusal(DIGITS + text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected keys, at least 'data: {name: digits}'; it is empty"),
        ("# only a comment", "it is empty"),
        ("[a, b]", "got ['a', 'b']"),
        ("just words", "got 'just words'"),
        ("seed: 1", "the key 'data' is required"),
        ("data:", "the key 'data' is required"),
        ("data: {}", "the key 'data.name' is required"),
        ("data: digits", "data: got 'digits'; it must hold keys, as in {name: ...}"),
        ("data: {name: 5}", "data.name: got 5; it must be text; write it in quotes"),
        ("data: {name: cifar10, root: 2024-01-01}", "data.root: got datetime.date(2024, 1, 1); it must be text"),
        ("data: {name: digits, validation: 0}", "data.validation: got 0; it must be at least 1"),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice, in lines 1 and 2"),
        (f"{DIGITS}training:\n  lr: 1\n  pad: 1\n  lr: 2", "the key 'lr' is given twice, in lines 3 and 5"),
        (f"{DIGITS}objectives: [{{name: macs, name: params}}]", "the key 'name' is given twice"),
        ("data: [", "some.yaml, line 1: not valid YAML"),
        ("data:\n\tname: digits", "some.yaml, line 2: not valid YAML: found character '\\t'"),
        ("--- 1\n--- 2", "some.yaml, line 2: not valid YAML"),
        ("seed: 2024-13-01", "not valid YAML: month must be in 1..12"),
        ("seed: !!bool maybe", "not valid YAML"),
        ("data: &a [*a]", "not valid YAML: maximum recursion depth exceeded"),
        ("[" * 3000, "not valid YAML: maximum recursion depth exceeded"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text, expected):
    assert expected in refusal(text)


def test_all_mistakes_are_told_at_once():
    assert len(refusal(f"{DIGITS}quux: 1\nseed: -1\ntraining: {{epochs: 0, lr: x}}").splitlines()) == 4


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_a_tag_never_runs_code(tag, tmp_path):
    proof = tmp_path / "proof"
    assert "could not determine a constructor" in refusal(f"data: !!{tag} ['touch {proof}']")
    assert not proof.exists()


@pytest.mark.parametrize(
    "line",
    [
        "seed: 010", "search: {children: 0100}", "training: {lr: 010}", "cluster: {extra: {nice: 0x1F}}",
        "objectives: [{name: val_error}, {name: params, max: 0200000}]", "training: {batch_size: 0b101}",
    ],
)  # fmt: skip
def test_numbers_that_yaml_reads_otherwise_are_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=r"in line 2, which YAML 1.1 takes for octal, hexadecimal or binary"):
        config.parse(f"data: {{name: digits}}\n{line}\n", "mine.yaml")


def test_plain_numbers_are_read_as_written() -> None:
    read = config.parse("data: {name: digits}\nseed: 0\nsearch: {children: 1_000}\ntraining: {lr: 0.05}\n", "mine.yaml")
    assert (read.seed, read.search.children, read.training.lr) == (0, 1000, 0.05)


def test_yaml_is_read_by_safe_loaders_and_pickles_by_none_but_the_cifar_reader():
    calls = {"yaml": set(), "pickle": set()}
    for path in Path(lemonade_hpc.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in calls:
                calls[node.value.id].add((path.name, node.attr))
    loaders = {(name, attr) for name, attr in calls["yaml"] if attr.endswith(("load", "load_all", "Loader"))}
    assert loaders == {("config.py", "safe_load"), ("config.py", "SafeLoader")}
    assert calls["pickle"] == {("data.py", "Unpickler"), ("data.py", "UnpicklingError")}


# ---------------------------------------------------------------- which file


def test_every_shipped_name_is_a_configuration():
    assert "digits" in config.shipped_names()
    for name in config.shipped_names():
        assert isinstance(config.load(name), config.Config)


def test_a_run_folder_of_a_shipped_name_does_not_hide_it_but_a_file_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = config.load("digits")
    Path("digits").mkdir()  # what `search digits` makes
    assert config.load("digits") == shipped
    Path("digits").rmdir()
    Path("digits").write_text(f"{DIGITS}seed: 9")
    assert config.load("digits").seed == 9


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digit", "digit: no such file. Did you mean 'digits'? Shipped are: "),
        ("mine.yam", "mine.yam: no such file. Did you mean 'mine.yaml'? Shipped are: "),
        ("../configs/digits", "no such file"),
        ("folder", "folder: a folder; give the YAML file of the search, and the folder by --run"),
        ("mine.yaml/x", "mine.yaml/x: cannot be read: Not a directory"),
        ("picture.png", "picture.png: not valid YAML"),
        ("zeros", "zeros: not valid YAML"),
        ("empty", "empty: expected keys"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(DIGITS)
    Path("folder").mkdir()
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    Path("zeros").write_bytes(b"\x00" * 100)
    Path("empty").touch()
    with pytest.raises(ConfigError) as caught:
        config.load(name)
    assert expected in str(caught.value)


# ---------------------------------------------------------------- the file that `init` writes


def test_the_template_equals_the_defaults():
    assert config.parse(template(), "template") == config.Config(data=config.Data(name="digits"))


def test_the_template_shows_every_key_and_every_choice_in_120_columns():
    text = template()
    assert max(map(len, text.splitlines())) <= 120
    for key in KEYS:
        assert f"  {key.split('.')[1]}:" in text or f"  # {key.split('.')[1]}:" in text
    assert "# steady_state | generational" in text


def test_the_lines_of_the_template_that_are_commented_out_are_the_defaults_of_larger_images():
    text = "\n".join(
        line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in template().splitlines()
    )
    assert text != template()
    shown, default = (config.resolve(config.parse(one, "template"), (3, 32, 32)) for one in (text, template()))
    assert shown == default
    small = config.resolve(config.parse(template(), "template"), (1, 8, 8)).training
    for key in config.BY_SIZE:
        (line,) = [line for line in template().splitlines() if line.startswith(f"  # {key}: ")]
        assert line.endswith(f"small images: {str(getattr(small, key)).lower()}")


# ---------------------------------------------------------------- defaults that follow the data set

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 16, 16), (3, 32, 32), (3, 64, 64), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_resolve_fills_in_every_default_and_twice_is_once(shape):
    resolved = config.resolve(parse(""), shape)
    assert None not in config.to_dict(resolved)["training"].values()
    assert config.resolve(resolved, shape) == resolved
    assert config.from_dict(config.to_dict(resolved), "run.json") == resolved


@pytest.mark.parametrize("shape", SHAPES)
def test_resolve_keeps_what_was_given(shape):
    text = "{epochs: 7, initial_epochs: 3, distill_epochs: 0, lr: 0.3, initial_lr: 0.2, pad: 0, flip: true, cutout: 1, "
    given = parse(f"training: {text} mixup: 0.5, weight_decay: 0.01, deterministic: true}}\ncluster: {{poll_s: 0.5}}")
    assert config.resolve(given, shape) == given


def test_logs_are_looked_at_seldom_on_shared_storage():
    for backend, seconds in (("local", 0.02), ("slurm", 1.0)):
        assert config.resolve(parse(f"cluster: {{backend: {backend}}}"), (1, 8, 8)).cluster.poll_s == seconds


def test_resolve_knows_small_images_and_grey_ones_and_the_mode():
    small, grey, large = (config.resolve(parse(""), shape).training for shape in ((3, 8, 8), (1, 32, 32), (3, 32, 32)))
    assert small.epochs < large.epochs
    assert (small.cutout, small.mixup) == (0, 0.0)
    assert (small.flip, grey.flip, large.flip) == (False, False, True)
    assert config.resolve(parse("search: {mode: generational}"), (1, 8, 8)).training.deterministic is True
    assert small.deterministic is False


@pytest.mark.parametrize("key", ["pad", "cutout"])
def test_what_is_larger_than_the_image_is_refused_once_its_size_is_known(key):
    settings = parse(f"training: {{{key}: 9}}")
    assert getattr(config.resolve(settings, (3, 9, 12)).training, key) == 9
    with pytest.raises(ConfigError, match=f"training.{key}: got 9; the images have 12 x 8 pixels.*at most 8"):
        config.resolve(settings, (3, 12, 8))


def test_a_time_with_colons_is_no_number_of_minutes() -> None:
    """YAML 1.1 reads it as a number to the base of 60: ten days."""
    with pytest.raises(config.ConfigError, match="test: got 4:00:00 in line 2; give a number, without colons"):
        config.parse("data: {name: digits}\ncluster: {time_min: 4:00:00}", "test")
