"""Config files: strict YAML, `extends`, overrides, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from isoray.config import load as loading
from isoray.config.document import parse
from isoray.config.load import load, stock_configs
from isoray.errors import UserError

TOY = Path(__file__).parent / "toy"


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(TOY))
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str, *, kind: str = "kind: toy_recipe:Toy\n") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(kind + text)
    return name


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("-.5", -0.5),
        (".inf", float("inf")),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("010", 10),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("", None),
        ("~", None),
        ("'1'", "1"),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
        ("{no: 1, 2: x, null: y}", {"no": 1, "2": "x", "null": "y"}),
        ("- &x {a: 1}\n- *x", [{"a": 1}, {"a": 1}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse(text, source="s").value
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "s:2: the key 'c' stands here for the second time"),
        ("a: [1\nb: 2", "s:2: "),
        ("a: 1\n---\nb: 2", "s:2: "),
        ("a: !!python/object/apply:os.getcwd []", "s:1: the tag"),
        ("a: !!timestamp 2024-01-01", "s:1: the tag"),
        ("x: &x {a: 1}\ny:\n  <<: *x", "s:3: merge keys"),
        ("a: &x [*x]", "s:1: an alias inside its own anchor"),
        ("? [1, 2]\n: 3", "s:1: expected a plain word"),
        ("a: !!int x", "s:1: 'x' is no int"),
        ("a: \x07", "s: "),
    ],
)
def test_broken_yaml_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, source="s")
    assert str(caught.value).startswith(message)


def test_defaults_stay_when_a_nested_mapping_gives_a_part() -> None:
    config = load(write("c.yaml", "training: {learning_rate: 1e-5}\nengine: {wheels: 3}\nshape: {}\n")).config
    assert config.model_dump()["training"] == {"steps": 20, "learning_rate": 1e-5, "schedule": "constant"}
    assert config.model_dump()["engine"] == {"kind": "fast", "speed": 2.0, "wheels": 3}
    assert config.model_dump()["shape"] == {"kind": "circle", "radius": 3.0}


def test_another_kind_starts_from_its_own_defaults() -> None:
    config = load(write("c.yaml", "engine: slow\nshape: {kind: square}\n")).config
    assert config.model_dump()["engine"] == {"kind": "slow", "patience": 3}
    assert config.model_dump()["shape"] == {"kind": "square", "side": 1.0}


def test_extends_merges_mappings_and_replaces_the_rest() -> None:
    write("base.yaml", "seed: 1\ncorpora: [x, y, z]\ntraining: {steps: 5, learning_rate: 0.5}\nengine: fast\n")
    write("mid/mid.yaml", "extends: ../base.yaml\ncorpora: [x]\nengine: {speed: 4}\n", kind="")
    write("mid/top.yaml", "extends: mid.yaml\ntraining: {steps: 6}\n", kind="")
    dumped = load("mid/top.yaml").config.model_dump()
    assert (dumped["seed"], dumped["corpora"]) == (1, ["x"])
    assert dumped["training"] == {"steps": 6, "learning_rate": 0.5, "schedule": "constant"}
    assert dumped["engine"] == {"kind": "fast", "speed": 4.0, "wheels": 4}


def test_a_mapping_of_another_kind_replaces_the_one_it_extends() -> None:
    write("base.yaml", "engine: {kind: fast, speed: 4}\n")
    loaded = load(write("top.yaml", "extends: base.yaml\nengine: {kind: slow}\n", kind=""))
    assert loaded.config.model_dump()["engine"] == {"kind": "slow", "patience": 3}


def test_extends_in_a_circle_is_refused() -> None:
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: a.yaml\n")
    assert "extends itself" in refusal("a.yaml")


def test_extends_names_a_missing_file_with_its_line() -> None:
    write("base.yaml", "")
    message = refusal(write("top.yaml", "extends: bsae.yaml\n"))
    assert message.startswith("top.yaml:2: extends: no such config file: 'bsae.yaml'")
    assert "did you mean 'base.yaml'?" in message


def test_overrides_reach_mappings_lists_slots_and_defaults_in_any_order() -> None:
    path = write("c.yaml", "parts: [{steps: 1}, {steps: 2}]\nengine: {kind: fast, speed: 3}\n")
    overrides = ["engine.patience=9", "engine.kind=slow", "parts.1.steps=7", "training.learning_rate=1e-2", "seed=4"]
    for order in (overrides, overrides[::-1]):
        dumped = load(path, order).config.model_dump()
        assert dumped["engine"] == {"kind": "slow", "patience": 9}
        assert [part["steps"] for part in dumped["parts"]] == [1, 7]
        assert dumped["training"] == {"steps": 20, "learning_rate": 0.01, "schedule": "constant"}
        assert dumped["seed"] == 4
    assert load(path, ["corpora=[p, q]"]).config.model_dump()["corpora"] == ["p", "q"]
    assert load(path, ["fail="]).config.model_dump()["fail"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "command line: 'seed' is no override; expected a.b=value"),
        ("a..b=1", "command line: 'a..b=1' is no override"),
        ("seed=[1", "command line: 'seed=[1': "),
        ("training.stepz=1", "command line: training.stepz: unknown key; did you mean 'steps'?"),
        ("engine.sped=1", "command line: engine.sped: unknown key; did you mean 'speed'?"),
        ("parts.3.steps=1", "parts.3: the list has 1 items"),
        ("parts.0.stepz=1", "command line: parts.0.stepz: unknown key; did you mean 'steps'?"),
    ],
)
def test_wrong_overrides_are_told(override: str, message: str) -> None:
    assert refusal(write("c.yaml", "parts: [{steps: 1}]\n"), override).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainin: {}", "c.yaml:2: trainin: unknown key; did you mean 'training'?"),
        ("training:\n  stepz: 1", "c.yaml:3: training.stepz: unknown key; did you mean 'steps'?"),
        ("training: {foo: 1}", "c.yaml:2: training.foo: unknown key; one of: learning_rate, schedule, steps"),
        ("named: {x: {stepz: 1}}", "c.yaml:2: named.x.stepz: unknown key; did you mean 'steps'?"),
        ("shape: {kind: square, sid: 1}", "c.yaml:2: shape.sid: unknown key; did you mean 'side'?"),
        ("shape: {kind: sqare}", "c.yaml:2: shape: 'sqare' is no kind of this; did you mean 'square'?"),
        ("engine: {kind: slow, patients: 1}", "c.yaml:2: engine.patients: unknown key; did you mean 'patience'?"),
        ("engine: fsat", "c.yaml:2: engine: 'fsat' is no kind of toy_parts: did you mean 'fast'?"),
        ("engine: {kind: fast, speed: 11}", "c.yaml:2: engine.speed: expected less than or equal to 10, got 11"),
        ("training: {steps: ten}", "c.yaml:2: training.steps: expected a valid integer"),
        ("training: {steps: 0}", "c.yaml:2: training.steps: expected greater than 0, got 0"),
        ("training: 3", "c.yaml:2: training: expected a valid dictionary"),
        ("parts: [{steps: 1}, {steps: x}]", "c.yaml:2: parts.1.steps: expected a valid integer"),
        (
            "training: {schedule: liner}",
            "c.yaml:2: training.schedule: expected 'constant' or 'linear', got 'liner'; did",
        ),
        ("training: {steps: 2000, schedule: linear}", "c.yaml:2: training: linear schedules have at most 1000 steps"),
        ("parts: {x: {}, y: {stepz: 1}}", "c.yaml:2: parts.y.stepz: unknown key; did you mean 'steps'?"),
        ("root: corpra", "c.yaml:2: root: 'corpra' does not exist: "),
    ],
)
def test_mistakes_are_told_in_one_line_each(text: str, message: str) -> None:
    Path("corpora").mkdir()
    found = refusal(write("c.yaml", text + "\n"))
    assert found.startswith(message)
    assert "\n" not in found


def test_missing_paths_name_the_nearest() -> None:
    Path("data/corpora").mkdir(parents=True)
    assert "did you mean 'corpora'?" in refusal(write("c.yaml", "root: data/corpra/wiki\n"))
    assert load("c.yaml", ["root=data/corpora"]).config.model_dump()["root"] == "data/corpora"
    assert load("c.yaml", ["root=s3://bucket/x"]).config.model_dump()["root"] == "s3://bucket/x"


def test_all_problems_are_told_each_where_it_was_written() -> None:
    write("base.yaml", "seed: -1\n")
    message = refusal(write("top.yaml", "extends: base.yaml\ntraining: {stepz: 3}\n", kind=""), "corpora=3")
    assert message.splitlines()[0] == "3 problems in top.yaml"
    assert "  base.yaml:2: seed: expected greater than or equal to 0, got -1" in message.splitlines()
    assert any(line.startswith("  top.yaml:2: training.stepz: ") for line in message.splitlines())
    assert any(line.startswith("  command line: corpora: expected a valid list") for line in message.splitlines())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("", "kind: is required and missing"),
        ("kind: 3\n", "kind: expected the name of a recipe, got 3"),
        ("kind: no_such_recipe\n", "kind: 'no_such_recipe' is no kind of isoray.recipes: "),
        ("kind: toy_recipe:Toi\n", "kind: 'toy_recipe:Toi' cannot be loaded"),
        ("kind: :Toy\n", "kind: ':Toy' is not of the form package.module:Class"),
        ("kind: isoray.recipes.base:Recipe\n", "kind: 'isoray.recipes.base:Recipe' is an abstract class"),
        ("kind: toy_recipe:Circle\n", "kind: 'toy_recipe:Circle' is not a Component class"),
    ],
)
def test_the_recipe_must_be_one(kind: str, message: str) -> None:
    assert message in refusal(write("c.yaml", "seed: 1\n", kind=kind))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"- 1\n", "holds a list"), (b"kind: \xff", "is not UTF-8 text (byte 6)")],
)
def test_files_that_are_no_config(content: bytes, message: str) -> None:
    Path("c.yaml").write_bytes(content)
    assert message in refusal("c.yaml")


def test_a_byte_order_mark_is_not_part_of_the_first_key() -> None:
    Path("c.yaml").write_bytes(b"\xef\xbb\xbfkind: toy_recipe:Toy\n")
    assert load("c.yaml").name == "c"


def test_a_missing_file_names_its_neighbours_and_stock_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("stock/untrac/quickstart.yaml", "seed: 7\n")
    write("conf.yaml", "")
    monkeypatch.setattr(loading, "stock_folder", lambda: tmp_path / "stock")
    assert "did you mean 'conf.yaml'?" in refusal("cnf.yaml")
    assert "or the stock config 'untrac/quickstart'" in refusal("untrac/quickstrt")
    assert refusal("stock").startswith("stock: is a folder")
    for name in ("untrac/quickstart", "configs/untrac/quickstart.yaml", "untrac/quickstart.yaml"):
        assert load(name).config.model_dump()["seed"] == 7
    write("untrac/quickstart.yaml", "seed: 8\n")
    assert load("untrac/quickstart.yaml").config.model_dump()["seed"] == 8  # the file on disk comes first
    assert load(write("top.yaml", "extends: untrac/quickstart\n")).config.model_dump()["seed"] == 7


def test_the_digest_is_of_the_resolved_config() -> None:
    plain = load(write("a.yaml", "")).config.digest()
    assert load(write("b.yaml", "training: {steps: 20}\nseed: 0\n")).config.digest() == plain
    assert load("a.yaml", ["seed=1"]).config.digest() != plain


@pytest.mark.parametrize("name", sorted(stock_configs()))
def test_every_stock_config_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    loaded = load(f"configs/{name}.yaml")
    assert loaded.config.digest()


def test_no_file_beside_the_stock_configs_goes_unparsed() -> None:
    folder = Path(__file__).parents[2] / "configs"
    assert {path for path in folder.rglob("*") if path.is_file()} == set(stock_configs().values())
