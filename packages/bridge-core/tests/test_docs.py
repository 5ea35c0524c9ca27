"""The code in docs/ runs, and prints what the pages say it prints.

A page is run from top to bottom in a folder of its own, in one namespace:

* a `{code-block}` with a caption is a file: it is written under that name, and can be imported;
* a `pycon` block is a doctest, and its output is compared; a plain `python` block is executed;
* a comment `% needs: module, ...` above a block leaves it out where a module is not installed;
* the scripts in `ON_TWO_RANKS` are started by torchrun; `python` blocks that follow on their page go on where they end;
* of a `console` block, `bridge-core` commands are executed on the page in `COMMANDS_RUN`, output compared
  (`...` stands for anything), and on all other pages parsed.

A page's `pyproject.toml` is honoured as far as entry points go, and its `test_*.py` files are given to pytest.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.metadata
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import bridge_core
from bridge_core import families

REPOSITORY = Path(__file__).parents[3]
DOCS = REPOSITORY / "docs"
README = REPOSITORY / "packages" / "bridge-core" / "README.md"
COMMANDS_RUN = "ten-minutes.md"
ON_TWO_RANKS = {COMMANDS_RUN: "load.py", "how-to/live-ranks.md": "live.py"}

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="an installed package comes without its documentation")

_FENCE = re.compile(
    r"^(?:% needs: (?P<needs>[^\n]+)\n)?"
    r"```(?P<kind>python|pycon|console|\{code-block\} \w+)\n"
    r"(?::caption: (?P<caption>[^\n]+)\n\n)?"
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One code block of a page."""

    kind: str
    caption: str | None
    code: str
    line: int
    needs: tuple[str, ...]

    @property
    def runnable(self) -> bool:
        return all(find_spec(module) for module in self.needs)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["kind"],
            found["caption"],
            found["code"],
            text.count("\n", 0, found.start("code")) + 1,
            tuple((found["needs"] or "").replace(",", " ").split()),
        )
        for found in _FENCE.finditer(text)
    ]


PAGES = [page for page in [*sorted(DOCS.rglob("*.md")), README] if page.is_file() and blocks_of(page)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder from which modules can be imported, and no trace of it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    families._from_entry_points.cache_clear()
    before = set(sys.modules)
    yield tmp_path
    families._from_entry_points.cache_clear()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def script_of(page: Path) -> tuple[Block | None, list[Block]]:
    """The script of a page that is started on two ranks, and the blocks that go on where it ends."""
    blocks = blocks_of(page)
    name = ON_TWO_RANKS.get(str(page.relative_to(DOCS))) if page.is_relative_to(DOCS) else None
    at = next((number for number, block in enumerate(blocks) if name and block.caption == name), None)
    if at is None:
        return None, []
    return blocks[at], [block for block in blocks[at + 1 :] if block.kind == "python"]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES])
def test_the_code_of_a_page_runs(page, workplace):
    scope: dict = {"__name__": "page"}
    _, on_ranks = script_of(page)
    for block in blocks_of(page):
        if not block.runnable:
            assert page.name == COMMANDS_RUN, "only that page has something to stand in for a block that cannot run"
            save_tiny_qwen3(workplace / "tiny-qwen3")
        elif block.caption:
            write_file(workplace, block)
        elif block.kind == "pycon":
            run_doctest(block, scope, page)
        elif block.kind == "console":
            run_commands(block, page)
        elif page == README or block in on_ranks:  # it names models that are not here, or runs on two ranks
            compile(block.code, str(page), "exec")
        else:
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), scope)
    if tests := sorted(str(file) for file in workplace.glob("test_*.py")):
        run_pytest(tests, workplace)


def shows_rows_of_q_proj(printed: str, page: Path) -> None:
    """Each rank says the first element that it was given."""
    found = dict(re.findall(r"rank (\d): linear_qkv \(256, 256\), first element (\S+)", printed))
    q_proj = tiny_qwen3_weights()["model.layers.0.self_attn.q_proj.weight"].astype(np.float32)
    assert {rank: float(value) for rank, value in found.items()} == {"0": q_proj[0, 0], "1": q_proj[128, 0]}


def is_on_the_page(printed: str, page: Path) -> None:
    """What was printed is what the page shows below its command."""
    shown = [b.code.partition("\n")[2] for b in blocks_of(page) if b.code.startswith("$ torchrun --nproc-per-node 2 ")]
    assert shown == [printed]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), [*zip(ON_TWO_RANKS, (shows_rows_of_q_proj, is_on_the_page), strict=True)])
def test_the_script_of_a_page_runs_on_two_ranks(name, check, workplace):
    """As a reader would start it, with the page's later blocks before its last line, which ends the ranks' group."""
    pytest.importorskip("megatron.core")
    save_tiny_qwen3(workplace / "tiny-qwen3")
    bridge_core.AutoBridge.import_ckpt("tiny-qwen3", "tiny-megatron")
    script, rest = script_of(DOCS / name)
    *lines, end = script.code.splitlines(keepends=True)
    assert end == "dist.destroy_process_group()\n"
    write_file(workplace, script._replace(code="".join([*lines, *(block.code for block in rest), end])))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script.caption]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    check(done.stdout, DOCS / name)


def test_the_figure_is_what_its_script_draws():
    script = DOCS / "figures" / "qkv_pieces.py"
    drawn = runpy.run_path(str(script))["draw"]()
    assert script.with_suffix(".svg").read_text(encoding="utf-8") == drawn, f"run: python {script}"


def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"automodule:: (\S+)", text))
    homes = {name: getattr(bridge_core, name).__module__ for name in bridge_core.__all__}
    assert {name: home for name, home in homes.items() if home not in documented} == {}


def test_the_picture_of_the_architecture_is_what_the_imports_are_held_to():
    """Rooms of the picture, from the top down, are those of the contract, and none is missing."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1]
    drawn = re.findall(r"^ {3}(?:│ )? *([a-z]+) {2,}", picture, re.MULTILINE)
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    assert drawn == [room.strip() for layer in contract["layers"] for room in layer.split("|")]


@pytest.mark.parametrize("room", ["checkpoint", "runtime"])
def test_the_table_of_a_room_names_its_modules(room):
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = page.partition(f"## Inside `{room}`\n")[2].partition("\n## ")[0]
    inside = Path(bridge_core.__file__).parent / room
    modules = {file.stem for file in inside.rglob("*.py")} - {"__init__"}
    packages = {file.parent.name for file in inside.rglob("__init__.py")} - {room}
    assert set(re.findall(r"`(\w+)`", table)) == modules | packages


def test_every_decision_fits_a_screen_and_is_listed():
    listed = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    decisions = sorted((DOCS / "decisions").glob("0*.md"))
    assert decisions
    for page in decisions:
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 60, page.name
        assert page.stem in listed, page.name


def run_commands(block: Block, page: Path) -> None:
    """Execute or parse the `bridge-core` lines of a console block; other programs are not started."""
    from bridge_core.cli import main

    for chunk in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        line, _, expected = chunk.partition("\n")
        program, *arguments = shlex.split(line, comments=True)
        if program != "bridge-core":
            continue
        if page.name != COMMANDS_RUN:
            parse_command(arguments)
            continue
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(arguments)
        where = f"{page}, line {block.line}: {line}"
        assert code == 0, f"{where}\n{errors.getvalue()}"
        got = re.sub(r"[ ]+$", "", output.getvalue(), flags=re.MULTILINE)
        same = doctest.OutputChecker().check_output(expected, got, doctest.ELLIPSIS)
        assert same, f"{where}\nexpected:\n{expected}\ngot:\n{got}"


def parse_command(arguments: list[str]) -> None:
    """Raise unless the command line is understood; the error of a missing folder shows that it was."""
    from bridge_core.cli import main

    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            code = main(arguments)
        except SystemExit as exit_:
            code = exit_.code
    assert code == 1, f"{shlex.join(arguments)}: {errors.getvalue()}"
    assert "no such folder" in errors.getvalue(), errors.getvalue()


def write_file(workplace: Path, block: Block) -> None:
    (workplace / block.caption).write_text(block.code, encoding="utf-8")
    if block.caption == "pyproject.toml":
        install_entry_points(workplace, tomllib.loads(block.code)["project"])
    importlib.invalidate_caches()
    families._from_entry_points.cache_clear()


def install_entry_points(workplace: Path, project: dict) -> None:
    """What `pip install .` leaves behind for `importlib.metadata`, without running pip."""
    folder = workplace / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run_doctest(block: Block, scope: dict, page: Path) -> None:
    example = doctest.DocTestParser().get_doctest(block.code, scope, page.name, str(page), block.line - 1)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=report.append, clear_globs=False)
    scope.update(example.globs)
    assert not report, "".join(report)


def run_pytest(files: list[str], workplace: Path) -> None:
    if find_spec("safetensors") is None:
        pytest.skip("the page's tests write safetensors files")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(workplace), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(workplace), *files]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


TINY_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}


def tiny_qwen3_weights() -> dict[str, np.ndarray]:
    import ml_dtypes

    random = np.random.default_rng(0)
    shapes = bridge_core.AutoBridge.from_hf_config(TINY_QWEN3).plan().hf_tensors
    return {
        name: random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()
    }


def save_tiny_qwen3(folder: Path) -> None:
    """The model of the ten-minutes page without transformers: same files, names, shapes and types."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_QWEN3))
    (folder / "generation_config.json").write_text("{}")
    header, end = {"__metadata__": {"format": "pt"}}, 0
    weights = tiny_qwen3_weights()
    for name, array in weights.items():
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(array.tobytes() for array in weights.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
