"""The house: which file may import which, and how long the files that everybody reads may be."""

import ast
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT

# A file imports only files above it. `model` and `train` are those at the root, whose other
# files import any.
ORDER = """
    errors schedule files store copier nearest launchers commands flags deepspeed_keys cards
    config.values config.model_section config.sections config.nested
    mup sizes config.auto config.deepspeed config.hints config.build config.help
    hf.settings hf.families adapters config.load meeting dist run_folder out_dir checkpoint_names nodes failures
    supervise loss preference document_attention experts recompute rotary zero muon tensor_files
    data.order data.meta data.shards data.packing data.mixture data.text data.tokenizer_files data.tokenizer
    data.fast_encoding data.documents data.local_files data.sources data.docstrings data.chat_formats
    data.chat_templates data.conversations data.preferences data.output data.clean
    data.encode data.pipeline data.learn_tokenizer data.scripts data.verify data.foreign data.convert
    checkpoint_state checkpoint_folder checkpoint resume restore fetch model hf.weights
    hf.comparison hf.read lora four_bit trained init_from compiled
    engine watchdog bad_steps goodput metrics loggers profiler curves plot report hf.card hf.write
    hf.peft hf.gguf summary run
    evaluate_loss evaluate_pairs evaluate_roles reference sampling evaluate task_faults evaluate_tasks generate
    planner.units planner.gpus planner.batches planner.settings planner.activations planner.replay planner.stage3
    planner.memory planner.speed planner.search planner.plan planner.stage planner.fitting planner.report
    planner.picture planner.offers planner.measured
    benchmark scaling.shapes scaling.fits scaling.plan scaling.runs scaling.answer scaling.picture scaling.range_test
    train replay
""".split()
AT_THE_TOP = ["model", "train"]
ALONE = ["preflight"]  # runs before anything is installed, so it imports nothing
PRODUCT = sorted(
    [*ROOT.glob("*.py"), *ROOT.glob("minzero/**/*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("benchmarks/*.py")]
)
AT_THE_ROOT = {path.stem for path in ROOT.glob("*.py")}


def imported(path):
    """The modules of this repository that a file imports anywhere, as names in ORDER or of files at the root."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}
    ours = {name.removeprefix("minzero.") for name in found if name.startswith("minzero.")}
    at_the_root = {name.split(".")[0] for name in found} & AT_THE_ROOT
    return {name for name in ours if name in ORDER + ALONE} | at_the_root


def room(path):
    """The name of a file of minzero/ in ORDER."""
    return ".".join(path.relative_to(ROOT / "minzero").with_suffix("").parts)


def test_every_file_has_its_place():
    rooms = {room(path) for path in ROOT.glob("minzero/**/*.py") if path.name != "__init__.py"}
    assert rooms | {*AT_THE_TOP} == {*ORDER, *ALONE}
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", [name for name in ORDER if name not in AT_THE_TOP])
def test_a_file_imports_only_files_above_it(name):
    above = ORDER[: ORDER.index(name)]
    path = ROOT / "minzero" / f"{name.replace('.', '/')}.py"
    assert imported(path) <= {*above}


def test_the_model_knows_no_engine_and_no_files():
    known = {"config.sections", "sizes", "loss", "preference", "document_attention", "recompute", "rotary", "experts"}
    known |= {"mup"}
    assert imported(ROOT / "model.py") <= known


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_product_file_imports_tests(path):
    names = [line.split()[1] for line in path.read_text().splitlines() if line.strip().startswith(("import ", "from "))]
    assert not [name for name in names if name.split(".")[0] == "tests"]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_one_file_knows_deepspeeds_private_layout(path):
    if path == ROOT / "minzero" / "zero.py":
        return
    text = path.read_text()
    assert "deepspeed.runtime.zero" not in text and "single_partition_of_fp32_groups" not in text


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 500


def length(function):
    return function.end_lineno - function.lineno + 1


def test_the_loop_can_be_read_at_once():
    functions = {
        node.name: node for node in ast.parse((ROOT / "train.py").read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert length(functions["main"]) <= 110 and length(functions["train_step"]) <= 60
    loops = [length(node) for node in ast.walk(functions["main"]) if isinstance(node, ast.For | ast.While)]
    assert loops and max(loops) <= 60
    assert len((ROOT / "model.py").read_text().splitlines()) <= 350


def test_the_package_is_light():
    """`import minzero` loads nothing that takes a second."""
    code = "import sys, minzero; assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
