"""The command `bridge-core`: what it prints, its exit codes, and how quickly it starts."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hf_folders import change_json, write_hf

import bridge_core
from bridge_core.checkpoint import convert
from bridge_core.cli import VERBS, main
from bridge_core.cli.convert import size_in_bytes
from bridge_core.cli.options import UsageError, parse
from bridge_core.cli.progress import bar
from bridge_core.cli.tables import in_bytes, in_count, table

QWEN3_235B = Path(__file__).parent / "published" / "qwen3-235b-a22b.json"
LAYOUT_235B = [
    *("--tp", "4", "--pp", "4", "--ep", "8"),
    *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
]


@pytest.fixture
def run(capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        done = capsys.readouterr()
        return code, done.out, done.err

    return command


# --- plan -----------------------------------------------------------------------------------------


def test_plan_folds_ranks_that_hold_the_same(run):
    code, out, err = run("plan", QWEN3_235B, *LAYOUT_235B)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "235.1 B parameters" in out
    assert "36945 tensors" in out
    rows = [line for line in lines if line.startswith(("0-31 ", "32-63 ", "64-95 ", "96-127 "))]
    assert len(rows) == 4
    assert "pp=0" in rows[0]
    assert "0-22 " in rows[0]
    assert "embedding 311.2 MB" in rows[0]
    assert "output 311.2 MB" in rows[3]


def test_plan_shows_every_rank_if_asked(run):
    _, out, _ = run("plan", QWEN3_235B, *LAYOUT_235B, "--all-ranks")
    rows = out.split("\n\n")[1].splitlines()[2:]
    assert [row.split()[0] for row in rows] == [str(rank) for rank in range(128)]
    assert "tp=3 dp=7 pp=3 etp=3 ep=7" in rows[127]


def test_plan_as_json_and_the_manifest_of_one_rank(run, tmp_path):
    folder = write_hf(tmp_path / "hf", "qwen3_moe")
    whole = json.loads(run("plan", folder, "--tp", 2, "--ep", 4, "--json")[1])
    assert len(whole["ranks"]) == whole["layout"]["tp"] * whole["layout"]["dp"]
    manifest = json.loads(run("plan", folder / "config.json", "--tp", 2, "--ep", 4, "--json", "--rank", 3)[1])
    assert manifest["rank"] == 3
    assert manifest["shards"][0]["pieces"][0]["source"]["tensor"] == "model.embed_tokens.weight"
    code, out, _ = run("plan", folder, "--tp", 2, "--ep", 4, "--etp", 1, "--rank", 3)
    assert code == 0
    assert "mlp.experts.linear_fc1.weight{0-1}" in out
    assert "model.layers.{0-3}.mlp.experts.{6-7}.up_proj.weight" in out


def test_plan_lists_hf_metadata(run, tmp_path):
    folder = write_hf(tmp_path / "hf")
    tensors = json.loads(run("plan", folder, "--tensors", "--json")[1])
    assert tensors[0] == {
        "name": "model.embed_tokens.weight",
        "dtype": "BF16",
        "shape": [37, 12],
        "nbytes": 2 * 37 * 12,
        "group": "embedding.word_embeddings.weight",
    }
    text = run("plan", folder, "--tensors")[1]
    assert len(text.splitlines()) == 2 + len(tensors)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tp", "3"], ["attention heads", "tp=3"]),
        (["--pp", "3"], ["4 decoder layers", "pp=3"]),
        (["--rank", "1"], ["rank 1 does not exist"]),
        (["--pp", "4", "--pipeline-model-parallel-layout", "Et|t|tL"], ["pipeline"]),
    ],
)
def test_plan_says_why_a_layout_does_not_fit(run, tmp_path, options, words):
    code, out, err = run("plan", write_hf(tmp_path / "hf"), *options)
    assert (code, out) == (1, "")
    assert err.startswith("bridge-core: ")
    assert "expected:" in err
    for word in words:
        assert word in err


def test_plan_takes_every_option_of_a_layout():
    from dataclasses import fields

    from bridge_core.topology import ParallelLayout

    options = {field.name for field in fields(ParallelLayout) if field.init} | set(ParallelLayout().to_dict())
    assert options <= {field.name for field in fields(VERBS["plan"])}


# --- import, export, verify, inspect --------------------------------------------------------------


def test_a_round_trip_by_commands(run, tmp_path):
    hf, megatron, back = write_hf(tmp_path / "hf", "qwen3_moe", files=2), tmp_path / "megatron", tmp_path / "back"
    code, out, err = run("import", hf, megatron)
    assert (code, err) == (0, "")
    assert "qwen3_moe, 135 tensors" in out
    assert "carried   tokenizer.json" in out
    code, out, err = run("export", megatron, back, "--source", hf, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["tensors"] == 135
    assert report["carried"] == ["tokenizer.json"]
    for file in hf.glob("*.safetensors"):
        assert (back / file.name).stat().st_size > 0
    code, out, _ = run("verify", hf, back)
    assert code == 0
    assert "equal" in out
    assert json.loads(run("verify", megatron, back, "--json")[1])["ok"] is True
    described = json.loads(run("inspect", megatron, "--json")[1])
    assert described["kind"] == "megatron"
    text = run("inspect", back)[1]
    assert "model.layers.{0-3}.mlp.experts.{0-7}.gate_proj.weight" in text


def test_options_of_the_conversions_arrive(run, tmp_path):
    hf = write_hf(tmp_path / "hf")
    change_json(hf / "config.json", logit_softcap=30.0, new_option=1)
    code, _, err = run("import", hf, tmp_path / "megatron")
    assert code == 1
    assert "--ignore-option" in err
    ignored = ["--ignore-option", "logit_softcap", "new_option"]
    assert run("import", hf, tmp_path / "megatron", "--dtype", "fp16", "--threads", 1, *ignored)[0] == 0
    assert json.loads(run("inspect", tmp_path / "megatron", "--json")[1])["dtypes"].keys() == {"F16"}
    assert run("export", tmp_path / "megatron", tmp_path / "back", "--max-shard-size", "4kB")[0] == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    code, _, err = run("export", tmp_path / "megatron", tmp_path / "back")
    assert code == 1
    assert "--overwrite" in err
    assert run("export", tmp_path / "megatron", tmp_path / "back", "--overwrite")[0] == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 1


def test_verify_with_differences_fails_and_names_them(run, tmp_path):
    a, b = write_hf(tmp_path / "a"), write_hf(tmp_path / "b", num_hidden_layers=3)
    code, out, _ = run("verify", a, b, "--limit", 1)
    assert code == 1
    assert "9 x only in a" in out
    assert "... (8 more)" in out
    code, out, _ = run("verify", a, b, "--json")
    assert code == 1
    assert json.loads(out)["counts"]["only in a"] == 9
    assert run("verify", a, a, "--names", "model.layers.0.*", "lm_head.*")[0] == 0


# --- Exit codes and messages ----------------------------------------------------------------------


def test_an_error_is_told_without_a_traceback(run, tmp_path):
    code, out, err = run("import", tmp_path / "absent", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "bridge-core: no such folder"
    assert [line.split(":")[0].strip() for line in err.splitlines()[1:]] == ["where", "expected", "got", "fix"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["plan"],
        ["plan", "config.json", "--tp", "four"],
        ["import", "a"],
        ["import", "a", "b", "--dtype", "fp4"],
        ["import", "a", "b", "--over"],
        ["export", "a", "b", "--max-shard-size", "5 apples"],
    ],
)
def test_wrong_usage_ends_with_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err


def test_help_and_version(run):
    assert run("--version") == (0, f"bridge-core {bridge_core.__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    for verb in VERBS:
        assert f"\n    {verb} " in out
        code, text, _ = run(verb, "--help") if verb != "demo" else (0, "", "")
        assert code == 0
        assert "annotated" not in text.lower()


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/locked"), 1, "where:    /locked"),
        (bridge_core.BridgeError("no luck", fix="try again"), 1, "bridge-core: no luck\n  fix:      try again"),
    ],
)
def test_what_a_command_ends_with(run, monkeypatch, tmp_path, raised, code, words):
    def fails(*arguments, **options):
        raise raised

    monkeypatch.setattr(convert, "import_ckpt", fails)
    found, _, err = run("import", tmp_path, tmp_path / "out")
    assert found == code
    assert words in err


def test_demo_is_handed_over(run, monkeypatch):
    seen = []
    demo = types.ModuleType("bridge_core.cli.demo")
    demo.main = seen.append
    monkeypatch.setitem(sys.modules, "bridge_core.cli.demo", demo)
    assert run("demo", "--quick", "plan")[0] == 0
    assert seen == [["--quick", "plan"]]


def test_a_reader_that_leaves_early_is_no_traceback():
    command = f"{sys.executable} -m bridge_core.cli plan {QWEN3_235B} --tensors | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("name")
    assert done.stderr == ""


# --- Start-up -------------------------------------------------------------------------------------


def test_planning_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from bridge_core.cli import main\n"
        f"main(['plan', {str(QWEN3_235B)!r}])\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'rich', 'safetensors', 'yaml'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- The parts ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(monkeypatch):
    for stream, quiet, shown in ((Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with bar("import", quiet=quiet) as progress:
            progress.on_total(100)
            if progress.progress:
                progress.progress(50)
        assert bool(stream.getvalue()) == shown
        assert ("import" in stream.getvalue()) == shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("700", 700), ("2kB", 2000), ("1 tb", 10**12)],
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5XB", "5 GB please"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="like 5GB"):
        size_in_bytes(text)


def test_numbers_with_units():
    assert [in_bytes(n) for n in (0, 999, 1000, 3_400_000_000, 5e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "3.4 GB",
        "5000.0 TB",
    ]
    assert [in_count(n) for n in (12, 1234, 235_093_634_560)] == ["12", "1.2 K", "235.1 B"]


def test_tables_align():
    assert table(["name", "n"], [["a", 1], ["long", 100]], right=["n"]).splitlines() == [
        "name    n",
        "----  ---",
        "a       1",
        "long  100",
    ]


@dataclass(frozen=True, kw_only=True)
class Verb:
    """Do something.

    More about it.
    """

    first: Annotated[Path, "A path."]
    how_many: Annotated[int | None, "A number."] = None
    kind: Annotated[Literal["a", "b"] | None, "A choice."] = None
    words: Annotated[tuple[str, ...], "Words."] = ()
    deep: Annotated[bool, "A switch: 100%."] = False

    def run(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("text", "verb"),
    [
        ("do x", Verb(first=Path("x"))),
        ("do x --how-many 3 --kind b --deep", Verb(first=Path("x"), how_many=3, kind="b", deep=True)),
        ("do x --words a b --words c", Verb(first=Path("x"), words=("a", "b", "c"))),
    ],
)
def test_options_are_fields(text, verb):
    assert parse(text.split(), {"do": Verb}, program="p", description="", version="1") == verb
