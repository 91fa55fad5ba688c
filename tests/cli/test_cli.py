"""The command line: instant help, messages without tracebacks, exit codes, and an interrupted sweep that resumes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hwsim.cli import _COMMANDS, cli, main
from hwsim.errors import InputError
from sweeps.store import ResultStore

HWSIM = [sys.executable, "-m", "hwsim"]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HWSIM, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture
def types(tmp_path: Path) -> Path:
    path = tmp_path / "types.npy"
    np.save(path, np.random.default_rng(0).choice([0, 1, 2], size=(20, 30)).astype(np.uint8))
    return path


def test_help_imports_neither_torch_nor_numba() -> None:
    code = (
        "import sys; from hwsim.cli import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numba', 'numpy', 'pandas', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("package", ["hwsim", "compress", "sweeps", "hwsim.simulator", "sweeps.runner"])
def test_importing_a_package_does_not_import_torch(package: str) -> None:
    code = f"import sys, {package}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", list(_COMMANDS))
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: hwsim {command}" in " ".join(result.output.split())


def test_passes_prints_one_object_per_row_tile_and_the_total(types: Path) -> None:
    result = CliRunner().invoke(cli, ["passes", "--types", str(types), "--json"])
    *tiles, last = [json.loads(line) for line in result.output.splitlines()]
    assert [tile["row_tile"] for tile in tiles] == [0, 1]
    assert [row for tile in tiles for row in tile["block_rows"]] == list(range(20))
    for name, total in last["total"].items():
        assert total == sum(tile[name] for tile in tiles)
    classes = ("busy", "imbalance", "accept", "fetch", "conflict", "starved")
    assert all(sum(tile[name] for name in classes) == 16 * tile["cycles"] for tile in tiles)


BAD_TYPES = {
    "three": (np.array([[0, 3]], np.uint8), "code 3 at [0, 1]"),
    "empty": (np.zeros((0, 4), np.uint8), "empty"),
    "floats": (np.zeros((2, 2)), "float64"),
    "cube": (np.zeros((2, 2, 2), np.uint8), "3 dimensions"),
}


@pytest.mark.parametrize("name", list(BAD_TYPES))
def test_bad_type_arrays_give_one_message_and_exit_code_2(name: str, tmp_path: Path) -> None:
    array, words = BAD_TYPES[name]
    np.save(tmp_path / "bad.npy", array)
    result = run("passes", "--types", str(tmp_path / "bad.npy"))
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    result = run("passes", "--types", str(tmp_path / "objects.npy"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate", "resnet81"], "resnet18"),
        (["simulate", "lenet5", "--machine", "msa-16x61"], "msa-16x16"),
        (["simulate", "lenet5", "--pruned", "0.7", "--unified", "0.5"], "must not exceed 1"),
        (["simulate", "lenet5", "--block", "4by4"], "4x4"),
        (["simulate", "lenet5", "--block", "6x4"], "does not divide"),
        (["storage", "lenet5", "--ratio", "half"], "0.5,0.25"),
        (["simulat", "lenet5"], "simulate"),
        (["sweep", "nowhere.toml"], "nowhere.toml"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_gives_a_message_and_exit_code_2(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_machine_with_two_mistakes_names_both(tmp_path: Path) -> None:
    from importlib import resources

    text = resources.files("hwsim").joinpath("presets", "msa-8x8.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("columns = 8", "colums = 8").replace("queue_depth = 4", "queue_depth = -4"))
    result = run("simulate", "lenet5", "--machine", str(path))
    assert result.returncode == 2
    for words in ("array.colums", 'did you mean "columns"', "front_end.queue_depth", "-4", str(path)):
        assert words in result.stderr


def test_simulate_writes_what_it_prints(tmp_path: Path) -> None:
    result = run("simulate", "lenet5", "--json", "--out", str(tmp_path / "tables"))
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "tables" / "report.json").read_text())
    assert printed["summary"]["latency_cycles"] == sum(row["latency_cycles"] for row in printed["layers"])
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {
        "layers.csv",
        "energy.csv",
        "storage.csv",
        "area.csv",
        "report.json",
    }


def test_storage_is_the_image_of_a_random_map() -> None:
    row = json.loads(run("storage", "lenet5", "--ratio", "0.5,0.25", "--json").stdout)
    simulated = json.loads(run("simulate", "lenet5", "--pruned", "0.5", "--unified", "0.25", "--json").stdout)
    assert row["image_bytes"] == simulated["summary"]["image_bytes"]


SPACE = """
name = "many"
networks = ["resnet18"]
blocks = ["4x4"]
ratios = [[0.5, 0.5], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]]
[machine]
base = "msa-16x16"
[machine.axes]
"front_end.queue_depth" = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
[random]
"""


def test_ctrl_c_in_the_middle_of_a_sweep_keeps_what_was_done(tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(
        SPACE.replace("[random]", '"front_end.skip_window" = [4, 8]\n[random]')
    )
    command = [*HWSIM, "sweep", "space.toml", "--out", "out"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell has its background jobs ignore the signal, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:  # a part is done, the rest is not: the sweep is in its middle
        if "%" in line and not line.startswith("  0%"):
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in rest
    done = len(ResultStore(tmp_path / "out").keys())
    assert 0 < done < 120
    result = run("sweep", "space.toml", "--out", "out", cwd=tmp_path)
    assert f"computed  {120 - done} of 120 points, {done} were there already" in result.stdout


def test_a_full_disk_gives_a_message_and_a_resumable_store(tmp_path: Path) -> None:
    import resource

    (tmp_path / "space.toml").write_text(SPACE)

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))

    limited = subprocess.run(
        [*HWSIM, "sweep", "space.toml", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=small_files,
        timeout=300,
    )
    assert limited.returncode == 2
    assert "Traceback" not in limited.stderr
    assert "out" in limited.stderr
    assert run("sweep", "space.toml", "--out", "out", cwd=tmp_path).returncode == 0
    assert len(ResultStore(tmp_path / "out").keys()) == 60


def test_main_turns_interrupts_into_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train lenet5 --data digts", "--data"),
        ("codesign lenet5 --budget latency_us=5 --data digts", "--data"),
        ("codesign lenet5 --budget latency_us=5 --space typo.toml", "training.dataset"),
        ("codesign-study --runs runs --space typo.toml", "training.dataset"),
        ("sweep typo-sweep.toml", "training.dataset"),
    ],
)
def test_a_misspelt_data_set_names_its_option(
    command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("typo.toml").write_text(
        'name = "typo"\nblocks = ["4x4"]\n[machine]\nbase = "msa-8x8"\n[training]\ndataset = "digts"\n'
    )
    Path("typo-sweep.toml").write_text(
        'networks = ["lenet5"]\nblocks = ["4x4"]\nratios = [[0.5, 0.5]]\n[training]\ndataset = "digts"\n'
    )
    result = CliRunner().invoke(cli, command.split(), standalone_mode=False)
    assert isinstance(result.exception, InputError)
    text = str(result.exception)
    assert all(part in text for part in (option, '"digts"', 'did you mean "digits"?')), text
    assert ("typo" in text) == ("typo" in command), "the file, where a file says it"
    assert list(tmp_path.glob("**/*.safetensors")) == []
