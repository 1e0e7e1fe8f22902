"""What setup.sh and a run need of a GPU machine, and what they say where it is missing: with an
nvidia-smi and a compiler that are made up, since no test has either."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT

import lad
from harness import ranks, settings


@pytest.fixture
def machine(tmp_path):
    """machine(driver, tools) -> what setup.sh says and its exit code on a machine with a GPU under
    that driver, glibc as given, and only these tools."""
    here = tmp_path / "clone"
    here.mkdir()
    for name in ("setup.sh", "requirements.txt", "requirements-cpu.txt", "requirements-cuda.lock"):
        shutil.copy(ROOT / name, here)
    tools = tmp_path / "bin"
    tools.mkdir()

    def make(name, text):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)

    def run(driver="580.65.06", glibc="2.36", compiler=True, header=True):
        for name in ("bash", "dirname", "cat", "cksum", "cut", "head", "sort", "grep", "tail"):
            (tools / name).unlink(missing_ok=True)
            (tools / name).symlink_to(shutil.which(name))
        make("nvidia-smi", f'[ "$1" = -L ] && echo "GPU 0: H100" || echo {driver}')
        make("getconf", f"echo glibc {glibc}")
        if compiler:
            make("cc", "true")
        # a Python that knows where its header is, and cannot make an environment
        answer = tmp_path / ("Python.h" if header else "none/Python.h")
        (tmp_path / "Python.h").touch()
        make("python", f'[[ "$*" = *sysconfig* ]] && echo {answer}; [[ "$*" != *venv* ]]')
        env = dict(PATH=str(tools), PYTHON="python")
        done = subprocess.run(
            ["bash", "setup.sh"], cwd=here, env=env, capture_output=True, text=True, timeout=60
        )
        return done.stdout, done.returncode

    return run


@pytest.mark.parametrize(
    "missing, says",
    [
        (dict(driver="570.133.20"), "the NVIDIA driver is 570.133.20; .* need 580 or newer"),
        (dict(glibc="2.28"), "glibc is 2.28; the wheels need 2.31"),
        (dict(compiler=False), "no C compiler"),
        (dict(header=False), "none/Python.h, which triton needs"),
    ],
)
def test_what_a_gpu_machine_lacks_is_said_before_anything_is_installed(machine, missing, says):
    said, code = machine(**missing)
    assert code == 2 and re.search(says, said) and said.count("\n") == 1


def test_a_machine_that_has_everything_goes_on(machine):
    said, code = machine()
    assert "installing requirements.txt" in said and "no venv module" in said and code == 2
    said, _ = machine(driver="1000.1", glibc="2.100")
    assert "installing requirements.txt" in said


def test_the_lock_holds_what_requirements_ask_for():
    locked = set((ROOT / "requirements-cuda.lock").read_text().splitlines())
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert line.lower() in locked, line


def test_why_torch_finds_no_gpu_is_said(monkeypatch, capsys):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12080).")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", too_old)
    cfg = lad.Config()
    cfg.config = "default"
    with pytest.raises(SystemExit):
        ranks.join(cfg)
    said = capsys.readouterr().err
    assert "torch finds none here (The NVIDIA driver on your system is too old" in said


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_that_was_caught_has_its_traceback_on_request(monkeypatch, capsys, debug):
    """LAD_DEBUG=1, for errors of vLLM's start and the like, of which one line says too little."""
    monkeypatch.setenv("LAD_DEBUG", "1" if debug else "0")
    with pytest.raises(SystemExit):
        try:
            raise ValueError("deep inside")
        except ValueError as error:
            settings.die(f"vLLM did not start: {error}")
    said = capsys.readouterr().err
    assert said.endswith("error: vLLM did not start: deep inside\n")
    assert ("Traceback" in said and __file__ in said) == debug and (said.count("\n") == 1) != debug


@pytest.mark.parametrize("cores,ranks_here,threads", [(96, "8", 12), (2, "8", 1), (4, None, 4)])
def test_a_rank_takes_its_share_of_the_cores(monkeypatch, cores, ranks_here, threads):
    taken = []
    monkeypatch.setattr(ranks.torch, "set_num_threads", taken.append)
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks_here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    ranks.take_threads()
    assert taken == [threads]
