"""bench.device without a device: what it builds, what it runs, and that one bad row costs no other."""

import json
import sys
import time

import pytest
import torch
from internvl_kernels import backends

from bench import child, device, device_worker, plan, report, results

ROW = {
    **{"case": "c", "op": "prefix_attn", "direction": "forward", "backend": "cuda", "dtype": "bfloat16", "pairs": 1},
    **{"shape": [1, 64, 64, 1, 1, 64], "peers": {"flex": {"skipped": "no"}}, "ours": {"median_ms": 1.0, "spread": 0.1}},
}
# Answers like bench.device_worker, and fails in every way that a kernel can.
WORKER = f"""
import json, os, sys, time
for request in sys.stdin:
    request = request.strip()
    print("asked for", request, file=sys.stderr, flush=True)
    if "hangs" in request:
        time.sleep(60)
    if "dies" in request:
        os.abort()
    if "leaves" in request:
        sys.exit(3)
    answer = {{"row": {ROW!r}, "study": None, "process": os.getpid()}}
    if request == "ceilings":
        answer = {{"ceilings": {{"copy_gbytes": 1.0}}}}
    if "breaks" in request or "wrong" in request:
        answer = {{"error": f"RuntimeError: {{request}}", "broken": "breaks" in request}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with child.Worker([sys.executable, str(script)], tmp_path) as found:
        yield found


def test_a_command_ends_with_all_that_it_started(tmp_path):
    assert child.finish([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], 30, tmp_path) == (3, "hello\n")
    assert child.finish(["no-such-command"], 30, tmp_path)[0] == 127
    mark = tmp_path / "mark"
    grandchild = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; print(1, flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    assert child.finish([sys.executable, "-c", parent], 1, tmp_path) == (None, "1\n")
    time.sleep(2)
    assert not mark.exists()


def test_a_worker_is_started_again_after_it_broke(worker):
    assert not worker.running()
    first = worker.ask("a", 30)["process"]
    assert worker.ask("wrong", 30) == {"error": "RuntimeError: wrong"}
    assert worker.ask("b", 30)["process"] == first
    assert "no answer within" in worker.ask("hangs", 0.3)["error"] and not worker.running()
    second = worker.ask("c", 30)["process"]
    assert "SIGABRT" in worker.ask("dies", 30)["error"]
    left = worker.ask("leaves", 30)["error"]
    assert "code 3" in left and left.endswith("asked for leaves")
    third = worker.ask("d", 30)["process"]
    assert worker.ask("breaks", 30) == {"error": "RuntimeError: breaks"} and not worker.running()
    assert len({first, second, third, worker.ask("e", 30)["process"]}) == 4


def test_one_bad_row_costs_no_other(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "ROW_SECONDS", 0.5)
    monkeypatch.setattr(device, "START_SECONDS", 30)
    file = results.ResultFile(tmp_path / "r.json")
    names = ["a", "dies", "b", "hangs", "c", "breaks", "wrong", "d"]
    device.measure(file, names, worker, device.Clock(2))
    data = json.loads((tmp_path / "r.json").read_text())
    assert [row["entry"] for row in data["rows"]] == ["a", "b", "c", "d"]
    assert [row["entry"] for row in data["failed"]] == ["dies", "hangs", "breaks", "wrong"]
    assert data["ceilings"] and "left_out" not in data


def test_what_the_time_does_not_allow_is_named(worker, tmp_path):
    file = results.ResultFile(tmp_path / "r.json")
    began = time.monotonic()
    device.measure(file, ["a", "hangs", "b"], worker, device.Clock(3 / 60))
    assert time.monotonic() - began < 10
    assert [row["entry"] for row in file.rows] == ["a"]
    assert file.data["left_out"] == ["hangs", "b"] and "failed" not in file.data


def test_the_worker_reports_errors_and_goes_on():
    tiny = plan._attention("alibi-d64", 48, peers=("eager",), rounds=1)
    entries = {"tiny": tiny, "bad": plan.Entry("bad", lambda: [][1])}
    assert "IndexError" in device_worker.answer(entries, "bad", "cpu")["error"]
    assert "KeyError" in device_worker.answer(entries, "nothing", "cpu")["error"]
    found = json.loads(json.dumps(device_worker.answer(entries, "tiny", "cpu")))
    assert found["row"]["peers"]["eager"]["ratio"] > 0 and found["study"] is None


def test_every_gpu_entry_has_its_own_name():
    names = [entry.name for entry in plan.gpu_entries(("cuda", "triton"))]
    assert len(names) == len(set(names)) > 40


def test_hopper_is_built_with_its_own_kernels():
    assert device.architectures((9, 0), "best") == "90-real;90a-real"
    assert device.architectures((9, 0), "sm80") == "90-real"
    assert device.architectures((8, 6), "best") == "86-real"
    assert device.architectures((12, 0), "best") == "120-real"


def test_what_is_missing_is_named(monkeypatch, capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            device.main([])
        assert "sees no GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    found = device.obstacles(device.parser().parse_args([]))
    assert [text.split()[0] for text in found] == ["pybind11", "pytest", "cmake"]
    assert device.obstacles(device.parser().parse_args(["--skip-build", "--skip-tests"])) == []


@pytest.fixture
def gpu(monkeypatch, worker):
    """A machine that looks like one with a GPU; nothing is built, the worker is the script above."""
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    monkeypatch.setattr(results, "machine", lambda kind: {"gpu": "a device", "torch": "t"})
    monkeypatch.setattr(backends.Backend, "here", lambda self: [])
    monkeypatch.setattr(device, "obstacles", lambda args: [])
    monkeypatch.setattr(device, "build", lambda clock, kernels: [])
    monkeypatch.setattr(device, "Worker", lambda command, folder: worker)
    monkeypatch.setattr(
        plan, "gpu_entries", lambda names: [plan.Entry(f"{n} {i}", None) for i in range(2) for n in names]
    )


def test_the_whole_command(gpu, monkeypatch, tmp_path, capsys):
    commands = []

    def finish(command, seconds, folder):
        commands.append([str(part) for part in command])
        return 0, "3 passed, 1 skipped"

    monkeypatch.setattr(device, "finish", finish)
    out = tmp_path / "r.json"
    assert device.main(["--out", str(out), "--revision", "abc", "--minutes", "1"]) == 0
    data = results.load(out)
    assert [row["entry"] for row in data["rows"]] == ["cuda 0", "triton 0", "cuda 1", "triton 1"]
    assert data["revision"] == "abc" and data["cuda_kernels"] in ("sm80", "sm90")
    assert data["tests"]["cuda"] == {"verdict": "passed", "counts": {"passed": 3, "skipped": 1}}
    assert all("cuda" in command or "triton" in command for command in commands) and len(commands) == 2
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code,output,verdict", ((1, "1 failed", "failed"), (0, "9 skipped", "failed"), (None, "", "not finished"))
)
def test_failed_tests_do_not_stop_the_measurements(gpu, monkeypatch, tmp_path, code, output, verdict):
    monkeypatch.setattr(device, "finish", lambda *_: (code, output))
    out = tmp_path / "r.json"
    assert device.main(["--out", str(out), "--backends", "cuda", "--minutes", "1"]) == int(verdict == "failed")
    data = results.load(out)
    assert data["tests"]["cuda"]["verdict"] == verdict and len(data["rows"]) == 2


def test_a_failed_build_leaves_triton(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(device, "build", lambda clock, kernels: ["the build failed: no nvcc"])
    out = tmp_path / "r.json"
    assert device.main(["--out", str(out), "--skip-tests", "--minutes", "1"]) == 1
    data = results.load(out)
    assert [row["entry"] for row in data["rows"]] == ["triton 0", "triton 1"] and data["build"]
    assert "cuda does not run here: the build failed" in capsys.readouterr().out


def test_the_build_is_for_this_device_only(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(device, "finish", lambda command, *_: steps.append(list(map(str, command))) or (0, ""))
    assert device.build(device.Clock(1), "best") == []
    assert "-DINTERNVL_CUDA_ARCHS=90-real;90a-real" in steps[0] and steps[1][1] == "--build"
    monkeypatch.setattr(device, "finish", lambda *_: (None, "[12/99]"))
    assert "not through" in device.build(device.Clock(1), "best")[0]


def test_gpu_rows_can_be_reported(tmp_path):
    data = {"format": results.FORMAT, "date": "d", "revision": "r", "ceilings": {}}
    data["machine"] = {"gpu": "a device", "torch": "t"}
    data["tests"] = {"cuda": {"verdict": "passed", "counts": {"passed": 3}}}
    data["failed"] = [{"entry": "b", "error": "RuntimeError: no\nmore"}]
    data["rows"] = [{**ROW, "peers": {"cudnn-causal": {"ratio": 1.5}, "another": {"ratio": 2.0}}}]
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert report.main([str(tmp_path / "r.json")]) == 0
    page = (tmp_path / "r.md").read_text()
    assert "c, bf16, cuda" in page and "tests on cuda: passed" in page and "- b: RuntimeError: no\n" in page
