"""The command, on trainings of a second or two."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmixer_kernels.errors import UserError
from mmixer_kernels.experiments import published
from mmixer_kernels.experiments.__main__ import main
from mmixer_kernels.experiments.catalogue import EXPERIMENTS
from mmixer_kernels.experiments.networks import M_MIXER, of_lengths, of_modalities
from mmixer_kernels.experiments.runs import FOLDS, Plan
from mmixer_kernels.training import parsing

TINY = [
    *("--frame-size", "8", "--frames", "4", "--samples", "64", "--evaluation-samples", "64"),
    *("--epochs", "2", "--model.hidden-size", "8", "--loader.batch-size", "16"),
]


TWICE = (
    *("table2", "table4", "tables5-7", "figure4", "figure5", "engines", "missing", "quantized"),
)
ONCE = ("table3",)
WITH_NETWORKS_OF_THEIR_OWN = ("modalities", "init", "length")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("experiments")
    assert main([*TWICE, *TINY, "--seeds", "1", "2", "--output", str(output)]) == 0
    assert main([*ONCE, *TINY, "--seeds", "1", "--output", str(output)]) == 0
    return output


def document(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def result(folder, network, seed):
    return json.loads((folder / "runs" / network / f"seed-{seed}" / "result.json").read_text())


def check_documents(folder, names, seeds):
    page = (folder / "README.md").read_text()
    for name in names:
        found = document(folder, name)
        assert found["seeds"] == seeds
        assert f"## {EXPERIMENTS[name].title}\n\n{found['markdown']}" in page
        assert f"]({name}.png)" in page
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert {training["seconds"] > 0 for training in found["trainings"]} == {True}
    assert "NTU" not in page  # the paper's figures are not beside other data


def test_every_experiment_leaves_numbers_a_table_and_a_picture(finished):
    check_documents(finished, TWICE, [1, 2])
    check_documents(finished, ONCE, [1])


@pytest.mark.slow
def test_so_do_those_with_networks_of_their_own(tmp_path):
    arguments = [*WITH_NETWORKS_OF_THEIR_OWN, *TINY, "--seeds", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    check_documents(tmp_path, WITH_NETWORKS_OF_THEIR_OWN, [1])


def test_a_table_has_the_trainings_means(finished):
    accuracies = [result(finished, "gru", seed)["accuracy"] for seed in (1, 2)]
    mean = sum(accuracies) / 2
    deviation = abs(accuracies[0] - accuracies[1]) / 2**0.5
    markdown = document(finished, "table2")["markdown"]
    assert "M-Mixer before GRU" in markdown
    assert "before MCU without context" not in markdown  # the paper does not have it
    row = f"| GRU | {100 * mean:.2f} ± {100 * deviation:.2f} |"
    assert row in markdown
    trainings = document(finished, "table2")["trainings"]
    assert [t["accuracy"] for t in trainings if t["network"] == "gru"] == accuracies


def test_streams_and_degraded_modalities_are_those_that_were_measured(finished):
    folder = finished / "runs" / "self" / "seed-2"
    streams = json.loads((folder / "streams.json").read_text())["streams"]
    found = document(finished, "table4")["numbers"]["accuracies"]
    assert found["depth, MCU-self"][1] == streams["depth"]["accuracy"]
    assert found["rgb+depth, MCU-self"][1] == result(finished, "self", 2)["accuracy"]
    absent = [
        json.loads((folder.with_name(f"seed-{seed}") / "missing.json").read_text())
        for seed in (1, 2)
    ]
    mean = sum(report["missing"]["rgb"]["absent"]["accuracy"] for report in absent) / 2
    found = document(finished, "missing")["numbers"]["accuracies"]
    assert found["rgb"]["MCU-self"]["absent"] == mean


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("own-content", {"content": "self", "layer_norm": False, "mix": "gated"}),
        ("concatenation", {"content": "cross", "layer_norm": False, "mix": "concat"}),
        ("no-norm", {"content": "cross", "layer_norm": False, "mix": "gated"}),
        ("m-mixer", {"content": "cross", "layer_norm": True, "summarizer": "avg", "unit": "mcu"}),
        ("lstm", {"unit": "lstm"}),
        ("no-context", {"unit": "mcu", "content": "none"}),
        ("engine-reference", {"engine": "reference"}),
    ],
)
def test_networks_are_what_their_rows_say(finished, network, options):
    """Section 4.3.3: Table 3's I has its own content, II concatenates, I to III have no norm."""
    model = result(finished, network, 1)["config"]["model"]
    assert {name: model[name] for name in options} == options


def test_engines_train_alike(finished):
    """Float32 engines do not part within two epochs; other seeds do."""
    rows = document(finished, "engines")["markdown"].splitlines()
    farthest = [float(row.split("|")[3]) for row in rows if row.startswith("| cpu")]
    assert farthest
    assert farthest[0] < 1e-3
    assert "Between seeds" in rows[-1]


def test_what_is_done_is_not_done_again(finished, capsys):
    path = finished / "runs" / "gru" / "seed-1" / "result.json"
    older = json.loads(path.read_text())
    del older["config"]["model"]["init"]  # a version's that did not have it
    path.write_text(json.dumps(older))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    table = (finished / "table2.json").read_text()
    assert main(["table2", *TINY, "--seeds", "1", "2", "--output", str(finished)]) == 0
    assert "to do" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")} == before
    assert json.loads(table)["markdown"] == document(finished, "table2")["markdown"]


def test_other_options_need_another_folder(finished, capsys):
    assert main(["table2", *TINY, "--epochs", "3", "--output", str(finished)]) == 2
    error = capsys.readouterr().err
    assert "holds a training with other options (--epochs was 2, is 3)" in error


def test_a_failed_training_is_named_and_the_others_go_on(tmp_path, capsys):
    arguments = ["table2", *TINY, "--seeds", "0", "--output", str(tmp_path)]
    (tmp_path / "runs" / "gru").mkdir(parents=True)
    (tmp_path / "runs" / "gru" / "seed-0").mkdir()
    (tmp_path / "runs" / "gru" / "seed-0" / "last.pt").write_bytes(b"no checkpoint")
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "failed: gru, seed 0: exit code 2: error: " in printed.out
    assert "table2: not reported, 1 trainings failed" in printed.err
    assert (tmp_path / "runs" / "lstm" / "seed-0" / "result.json").exists()
    assert not (tmp_path / "table2.json").exists()


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on(tmp_path):
    longer = [*TINY, "--epochs", "400", "--output", str(tmp_path), "--seeds", "0"]
    command = [sys.executable, "-m", "mmixer_kernels.experiments", "figure4", *longer]
    metrics = tmp_path / "runs" / "m-mixer" / "seed-0" / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 2):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, error
    epochs = len(metrics.read_bytes().splitlines())
    log = (metrics.parent / "log.txt").read_text()
    assert "stopped by SIGINT" in log
    assert (metrics.parent / "last.pt").exists()

    run = Plan((*TINY, "--epochs", "400"), tmp_path / "runs", (0,))
    ((name, arguments),) = run.runs(M_MIXER)[0].needs(())
    assert (name, arguments[-1]) == ("train", "--resume")
    assert 2 < epochs < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "NAME must be of table1"),
        (["--seeds", "0"], "NAME"),
        (["table1", "--seeds", "1", "1"], "--seeds must be one or more, each once"),
        (["table1", "--jobs", "0"], "--jobs must be 1 or more"),
        (["table1", "--seed", "3"], "--seed is not for experiments: use --seeds"),
        (["table1", "--model.unit", "gru"], "--model.unit must be left out"),
        (["table1", "--folds"], "--folds needs a data set with folds, watch"),
        (["modalities", "--data", "nw-ucla"], "modalities needs a data set with modalities"),
        (["modalities", "--data", "clips"], "or clips with three modalities or more"),
        (["length", "--data", "arrays"], "length needs a data set whose sequences"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as end:  # tyro's own
        code = end.code
    assert code == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data",
    ["synthetic", "watch", "ntu60", "ntu120", "clips --modalities rgb depth thermal"],
)
def test_forms_of_a_data_set_are_options_of_training(data):
    chosen = ["--data", *data.split()]
    base = parsing.parse(chosen, "test")
    networks = [*of_modalities(base), *of_lengths(base)]
    for network in networks:
        parsing.parse([*chosen, *network.options], "test")


def test_folds_test_everybody_once():
    tested = []
    for fold in FOLDS["watch"]:
        parsed = parsing.parse(["--data", "watch", *fold], "test")
        tested += parsed.data.test_subjects
        assert parsed.data.validation_subject is None
    assert sorted(tested) == list(range(1, 11))


def test_the_papers_figures_stand_beside_the_papers_data_only():
    papers = parsing.parse(["--data", "ntu60"], "test")
    assert published.of_ablation("table2", papers)["gru"] == 84.87
    assert published.behind("table2") == {"gru", "lstm"}
    assert published.behind("init") == set()
    other = parsing.parse(["--data", "ntu60", "--modalities", "rgb", "depth", "ir"], "test")
    assert published.of_ablation("table2", other) == {}


def test_unknown_data_are_named():
    with pytest.raises(UserError, match="--data must be one of"):
        _ = Plan(("--data", "nothing"), Path("runs"), (0,)).base
