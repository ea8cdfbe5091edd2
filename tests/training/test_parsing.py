from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from mmixer_kernels.data import DATA, Data
from mmixer_kernels.errors import UserError
from mmixer_kernels.training import options, parsing, toml


@dataclass(frozen=True)
class TinyOptions:
    recipe: ClassVar[dict[str, object]] = {
        "epochs": 7,
        "optimizer.learning_rate": 0.5,
        "optimizer.schedule": "cosine",
        "model.layer_norm": False,
    }
    names: tuple[str, ...] = ("a", "b")
    """Names."""
    limit: float | None = None
    """Limit."""
    flip: bool = True
    """Flip."""

    def load(self, root: Path | None, seed: int) -> Data:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA, "tiny", TinyOptions)


def parse(*arguments: object) -> options.Options:
    return parsing.parse([str(argument) for argument in arguments], "train")


def test_general_defaults_are_the_papers() -> None:
    run = options.RunOptions()
    assert (run.optimizer.name, run.optimizer.learning_rate) == ("adam", 1e-4)
    assert run.loader.batch_size == 8
    assert run.model.hidden_size == 512


def test_recipes_name_existing_options() -> None:
    for name in DATA:
        assert parse("--data", name).run.data == name


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text(
        'data = "tiny"\nepochs = 8\nlimit = 2.5\nnames = ["c"]\nflip = false\n'
        "[model]\nlayer_norm = true\n[optimizer]\nlearning_rate = 0.25\n"
    )
    default = parse("--data", "tiny")
    assert default.run.epochs == 7
    assert default.run.model.layer_norm is False
    assert default.run.optimizer.clip_norm == 0
    configured = parse("--config", file)
    assert configured.run.epochs == 8
    assert configured.run.model.layer_norm is True
    assert configured.run.optimizer.learning_rate == 0.25
    assert configured.run.optimizer.schedule == "cosine"
    assert configured.data == TinyOptions(names=("c",), limit=2.5, flip=False)
    given = parse(
        "--epochs", 9, "--config", file, "--names", "d", "e", "--flip", "--model.no-layer-norm",
        "--limit", "None",
    )  # fmt: skip
    assert given.run.epochs == 9
    assert given.run.model.layer_norm is False
    assert given.run.optimizer.learning_rate == 0.25
    assert given.data == TinyOptions(names=("d", "e"))


def test_written_config_parses_to_the_same_options(tmp_path: Path) -> None:
    first = parse(
        "--data", "tiny", "--names", "x y", 'q"', "--limit", 1e-7, "--seed", 3, "--root",
        "some/place", "--model.content", "none", "--model.init", "orthogonal",
        "--loader.workers", 2, "--output", tmp_path / "out",
    )  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(toml.dumps(first.config()), encoding="utf-8")
    second = parse("--config", path)
    assert second.config() == first.config()
    assert second.data == first.data
    assert second.run.root == Path("some/place")
    assert second.output == Path("runs/tiny-3")
    assert parsing.parse_config(first.config(), "here").data == first.data
    older = first.config()
    del older["model"]["init"], older["model"]["content"]
    model = parsing.parse_config(older, "here").run.model
    assert (model.init, model.content) == ("uniform", "cross")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "epoch; perhaps epochs"),
        ("[model]\nhiden_size = 3", r"model\.hiden_size; perhaps model\.hidden_size"),
        ("[epochs]\nx = 3", r"epochs\.x"),
        ("model = 3", "model"),
        ("resume = true", "resume"),
        ('data = "nothing"', "must be one of .*tiny, but is 'nothing'"),
    ],
)
def test_unknown_keys_are_named_with_their_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"file\.toml.*{message}|{message}"):
        parse("--config", file)
    with pytest.raises(UserError, match=r"file\.toml"):
        parse("--config", file)


@pytest.mark.parametrize("text", ["[model]\nunit = 'mlp'", "epochs = true", "epochs = [1, 2]"])
def test_wrong_values_are_named_with_their_file(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse("--config", file)
    assert stopped.value.code == 2
    assert f"the value above is in the configuration {file}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.dropout", "1"], "--model.dropout must be at least 0 and below 1"),
        (["--optimizer.learning-rate", "nan"], "--optimizer.learning-rate must be positive"),
        (["--optimizer.clip-norm", "-1"], "--optimizer.clip-norm must be 0 or more"),
        (["--model.engine", "metal"], "--model.engine must be one of auto, cpu"),
        (["--loader.batch-size", "0"], "--loader.batch-size must be 1 or more"),
        (["--modle.unit", "gru"], "--modle.unit"),
    ],
)
def test_wrong_options_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error


def test_wrong_values_of_the_run_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--epochs must be 1 or more, but is 0"):
        parse("--epochs", 0)
    file = tmp_path / "file.toml"
    file.write_text("seed = -1")
    with pytest.raises(UserError, match=r"--seed must be 0 or more, but is -1, in .*file\.toml"):
        parse("--config", file)


def test_a_recipe_of_the_package_is_found_by_its_name_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parsing, "recipes", lambda: {"small": tmp_path / "recipe.toml"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text("epochs = 3")
    assert parse("--config", "small").run.epochs == 3
    (tmp_path / "small").write_text("epochs = 4")
    assert parse("--config", "small").run.epochs == 4
    with pytest.raises(UserError, match=r"--config large is neither a file nor .* \(small\)"):
        parse("--config", "large")


def test_unknown_data_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--data must be one of .*, but is 'imagenet'"):
        parse("--data", "imagenet")


def test_resume_reads_the_runs_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/tiny-0")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(toml.dumps(parse("--data", "tiny", "--limit", 4).config()))
    for arguments in (["--output", folder, "--resume"], ["--data", "tiny", "--resume"]):
        resumed = parse(*arguments)
        assert resumed.run.data == "tiny"
        assert resumed.data == TinyOptions(limit=4)
    assert parse("--output", folder).run.data == "synthetic"


def test_help_shows_the_options_of_the_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--data", "tiny", "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for expected in ("--names", "--limit", "--model.hidden-size", "--optimizer.schedule", "0.5"):
        assert expected in text
    assert "--frame-size" not in text


def test_differences_name_both_values() -> None:
    old = parse("--data", "tiny").config()
    new = parse("--data", "tiny", "--model.hidden-size", 3, "--names", "a").config()
    assert parsing.differences(old, old) == []
    assert parsing.differences(old, new) == [
        "--names was ['a', 'b'], is ['a']",
        "--model.hidden-size was 512, is 3",
    ]
