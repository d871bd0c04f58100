"""What build_engine chooses by: kernels and compilation. Real Apex needs a GPU; here are packages of its name."""

import sys
from importlib.machinery import PathFinder

import pytest
import torch
from torch.utils import cpp_extension

from minzero import engine
from minzero.config.build import build
from minzero.errors import UserError
from tests.helpers.processes import run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_real_apex(tmp_path, monkeypatch):
    """Only packages of tmp_path are found, also where NVIDIA Apex is installed."""
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put empty packages and modules on the path: install("apex/normalization", "amp_C")."""

    def put(*names):
        for name in names:
            (tmp_path / name).mkdir(parents=True)
            for folder in (name, name.partition("/")[0]):
                (tmp_path / folder / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)

    return put


def test_kernels_without_apex():
    assert engine.choose_kernels("auto", CUDA)[0] == engine.choose_kernels("torch", CUDA)[0] == "torch"
    with pytest.raises(UserError, match=r"train\.kernels: found apex, but NVIDIA Apex is not installed"):
        engine.choose_kernels("apex", CUDA)


def test_the_unrelated_package_is_named(install):
    install("apex/models")
    (kernels, reason) = engine.choose_kernels("auto", CUDA)
    assert kernels == "torch" and "unrelated one of that name; pip uninstall apex" in reason
    for device in (CPU, CUDA):
        with pytest.raises(UserError, match="not NVIDIA's but an unrelated one"):
            engine.choose_kernels("apex", device)
    assert "apex.models" not in sys.modules  # looked at, not imported


def test_apex_without_its_extensions(install):
    install("apex/normalization", "amp_C")
    assert engine.choose_kernels("auto", CUDA)[0] == "torch"
    with pytest.raises(UserError, match="without its CUDA extensions fused_layer_norm_cuda; build it with them"):
        engine.choose_kernels("apex", CUDA)


def test_apex_is_taken_on_gpus_only(install):
    install("apex/normalization", "amp_C", "fused_layer_norm_cuda")
    assert engine.choose_kernels("auto", CUDA) == engine.choose_kernels("apex", CUDA)
    assert engine.choose_kernels("auto", CUDA)[0] == "apex"
    assert engine.choose_kernels("torch", CUDA)[0] == engine.choose_kernels("auto", CPU)[0] == "torch"
    with pytest.raises(UserError, match=r"Apex needs a GPU, and this device is cpu; or set train\.kernels to auto"):
        engine.choose_kernels("apex", CPU)


def test_asking_for_apex_without_it_is_one_line(small_data, tmp_path):
    command = [sys.executable, "train.py", "configs/tiny.json", "--train.kernels", "apex", "--data.path", small_data]
    done = run([*command, "--train.out_dir", tmp_path / "run"])
    assert done.returncode == 2 and "train.kernels: found apex" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


class GroupCountingAdam(torch.optim.Optimizer):
    """Counts steps as Apex's FusedAdam does: once a group and call, and no group may be empty."""

    def __init__(self, groups):
        super().__init__(groups, {"step": 0})
        self.seen = []

    def step(self):
        for group in self.param_groups:
            assert group["params"][0].device.type == "cpu"
            group["step"] += 1
            self.seen.append(group["step"])
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)


def test_steps_are_counted_per_parameter_where_zero3_steps_piece_by_piece():
    pieces = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    optimizer = engine.step_piece_by_piece(GroupCountingAdam([{"params": pieces[:3]}, {"params": pieces[3:]}]))
    groups = optimizer.param_groups
    for group in groups:
        group["params"] = []
    for _ in range(4):
        for number, piece in enumerate(pieces):  # as stage3.py's _optimizer_step
            group = optimizer.param_groups[number // 3]
            group["params"] = [piece]
            optimizer.step()
            group["params"] = []
    assert optimizer.seen == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert [optimizer.state[piece]["step"] for piece in pieces] == [4] * 4
    assert all(ours is theirs for ours, theirs in zip(optimizer.param_groups, groups, strict=True))


@pytest.mark.slow
def test_what_cannot_be_compiled_runs_as_it_is(small_data, tmp_path):
    """No C++ compiler: one line says why, and the run goes on."""
    command = [sys.executable, "train.py", "configs/tiny.json", "--train.compile", "true", "--data.path", small_data]
    command += ["--train.max_tokens", "2048", "--train.out_dir", tmp_path / "run", "--model.vocab_size", "64"]
    done = run(command, CXX="/no/such/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if "compiled: no" in line)
    assert "InvalidCxxCompiler" in line or "compiler" in line.lower(), line
    assert "step 1/1" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_stage_0_in_16_bits_begins_with_the_weights_themselves(small_data, tmp_path):
    """DeepSpeed tries the optimizer there, with gradients of zero, which decays its float32 copy and counts a step."""
    script = f"""
import torch
from minzero import dist
from minzero.config.build import build
from minzero.config.deepspeed import deepspeed_config
from minzero.engine import build_engine
from minzero.zero import optimizer_steps, stage_0_masters
device, _, world_size = dist.start_process_group()
model = {{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64}}
settings = {{"micro_batch_size": 2, "global_batch_tokens": 64, "max_tokens": 64, "lr": 0.5, "weight_decay": 0.5}}
zero = {{"zero_optimization": {{"stage": 0}}}}
config = build({{"model": model, "data": {{"path": {str(small_data)!r}}}, "train": settings, "deepspeed": zero}}, "")
engine = build_engine(config, deepspeed_config(config, world_size, "bf16", False), device)
masters = stage_0_masters(engine)
assert optimizer_steps(engine) == 0
assert all(torch.equal(masters[id(p)].bfloat16(), p) for p in engine.module.parameters())
assert masters[id(next(engine.module.parameters()))].dtype == torch.float32
"""
    done = run([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("model", "settings", "zero", "expected"),
    [
        ({"n_layer": 10**5, "n_embd": 2**20, "n_head": 1}, {}, {}, "model: 1,319,"),
        ({"vocab_size": 2**32}, {}, {"stage": 3}, "model: 3,298,"),
        ({}, {"micro_batch_size": 2**30}, {}, "train.micro_batch_size: 1073741824 sequences of 1024 tokens need"),
        (
            {},
            {},
            {"stage": 2, "reduce_bucket_size": 1e12},
            "reduce_bucket_size: 1,000,000,000,000 elements need 3,725.3",
        ),
    ],
)
def test_what_no_machine_holds_is_one_line_in_place_of_the_allocators(model, settings, zero, expected):
    config = build({"model": model, "train": settings, "deepspeed": {"zero_optimization": zero}}, "")
    ds_config = config.deepspeed | {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    with pytest.raises(UserError, match=r" GiB of a rank's memory, which has [\d.,]+ GiB in all; plan\.py") as error:
        engine.check_memory(config, ds_config, engine.memory_per_rank(CPU), False, 8)
    assert expected in str(error.value) and "\n" not in str(error.value)
    small = build({"model": {"n_layer": 1, "n_embd": 48, "vocab_size": 64}}, "")
    zero = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    engine.check_memory(small, ds_config | zero, engine.memory_per_rank(CPU), False, 8)


def test_a_model_that_is_too_large_ends_a_run_in_one_line(small_data, tmp_path):
    command = [sys.executable, "train.py", "configs/tiny.json", "--data.path", small_data]
    command += [
        "--train.out_dir",
        tmp_path / "run",
        "--model.n_layer",
        "100000",
        "--model.n_embd",
        "1048576",
        "--model.n_head",
        "1",
    ]
    done = run([*command, "--train.eval_tokens", "64", "--train.compile", "false"])
    assert done.returncode == 2 and "error: model: 1,3" in done.stderr and "Traceback" not in done.stderr


def test_nvme_needs_the_cuda_toolkit_on_a_gpu_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(UserError, match=r"^key\.device: nvme needs the CUDA toolkit \(nvcc\).* set CUDA_HOME"):
        engine.prepare_nvme("key", str(tmp_path / "files"))
    assert not (tmp_path / "files").exists()
