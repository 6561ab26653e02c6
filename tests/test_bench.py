"""The benchmarks' own arithmetic and commands: what counts as work, what stops a timing, what a result file says."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from internvl_kernels import semantics
from internvl_kernels.testing import Case

from bench import (
    baselines,
    cases,
    exchange,
    families,
    gate,
    measure,
    models,
    plan,
    report,
    results,
    run,
    targets,
    timing,
)


@pytest.mark.parametrize("mask", cases.MASKS)
@pytest.mark.parametrize("model", ["alibi-d64", "grouped-d128", "paligemma"])
def test_flops_count_visible_pairs_one_by_one(model, mask):
    bench = cases.make(model, 37, mask=mask, batch=2)
    c, terms = bench.case, bench.case.mask()
    total = 0
    for b in range(c.batch):
        segment = terms["segment_ids"][b].tolist() if terms["segment_ids"] is not None else [0] * c.seqlen_k
        start, end = c.key_range[b] if c.key_range else (0, c.seqlen_k)
        prefix = c.prefix_len[b] if c.prefix_len else 0
        for i in range(c.seqlen_q):
            p = c.seqlen_k - c.seqlen_q + i
            for j in range(c.seqlen_k):
                is_causal = bool(semantics.causal(torch.tensor(p), torch.tensor(j), 0))
                total += start <= j < end and segment[p] == segment[j] and (j < prefix or is_causal)
    assert bench.visible_pairs == total * c.heads_q
    assert bench.flops("forward") == 4 * c.head_dim * bench.visible_pairs
    assert bench.flops("backward") == 10 * c.head_dim * bench.visible_pairs


def test_prefix_as_keys_or_fraction():
    lengths = [cases.make("alibi-d64", 64, prefix=p).case.prefix_len[0] for p in ("1/4", "16", 16, "1/1", 0, "0", "1")]
    assert lengths == [16, 16, 16, 64, 0, 0, 1]
    for wrong in ("65", "-1", "9/8", "1/0", "half"):
        with pytest.raises(ValueError, match="prefix is"):
            cases.make("alibi-d64", 64, prefix=wrong)


def test_unknown_names_say_what_is_allowed():
    with pytest.raises(ValueError, match="mpt-7b"):
        cases.make("gpt-9", 64)
    with pytest.raises(ValueError, match="packed"):
        cases.make("mpt-7b", 64, mask="diagonal")
    with pytest.raises(ValueError, match="mpt-1b"):
        cases.make_norm("paligemma", 64)


@pytest.mark.parametrize("peer", ["sdpa", "eager", "sdpa-packed"])
@pytest.mark.parametrize("mask", ["prefix", "padded", "packed", "decode"])
def test_peers_compute_the_same(peer, mask):
    bench = cases.make("grouped-d128", 48, mask=mask, batch=2)
    own, clean = gate.inputs_for(bench)
    prepared = baselines.prepare(peer, clean, "forward")
    if prepared.skipped:
        assert (peer, mask == "decode") == ("sdpa-packed", False)
        return
    ours = gate.operator("cpu", own)(own.q, own.k, own.v)
    real = own.visible().any(-1)
    torch.testing.assert_close(prepared.call()[real], ours[real], atol=1e-5, rtol=1e-5)


def test_absent_peers_give_a_reason():
    _, clean = gate.inputs_for(cases.make("alibi-d64", 16))
    for name in ("sdpa-cudnn", "flash-causal", "flash-attn"):
        assert "needs a GPU" in baselines.prepare(name, clean, "forward").skipped
    assert "no backward" in baselines.prepare("flex", clean, "backward").skipped
    huge = dataclasses.replace(clean, k=torch.empty(1, 1 << 28, 1, 1).expand(1, 1 << 28, 16, 64))
    assert "GiB" in baselines.prepare("sdpa", huge, "forward").skipped


def test_a_wrong_result_is_never_timed(monkeypatch):
    bench = cases.make("alibi-d64", 96)
    right = gate.operator

    def wrong(backend, inputs):
        forward = right(backend, inputs)
        return lambda q, k, v: forward(q, k, v) * 1.001

    monkeypatch.setattr(gate, "operator", wrong)
    with pytest.raises(gate.WrongResult, match="sampled rows"):
        measure.attention(bench)


@pytest.mark.parametrize("wrong", ["y", "dx", "dweight"])
def test_a_wrong_norm_is_never_timed(monkeypatch, wrong):
    case = cases.make_norm("multi-query-2048", 100)
    for direction in ("forward", "backward"):
        measure.norm(case, direction=direction)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t * 1.001 if wrong == "y" else t.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    right = gate.clip_qk_layernorm

    def operator(qkv, q_width, k_width, clip, q_weight, *rest, **options):
        q_weight = Wrong.apply(q_weight) if wrong == "dweight" else q_weight
        q, k, v = right(Wrong.apply(qkv) if wrong == "dx" else qkv, q_width, k_width, clip, q_weight, *rest, **options)
        return (Wrong.apply(q) if wrong == "y" else q), k, v

    monkeypatch.setattr(gate, "clip_qk_layernorm", operator)
    with pytest.raises(gate.WrongResult, match=f"q: {wrong} is off"):
        measure.norm(case, direction="backward")


def test_shortened_cases_keep_the_form():
    bench = cases.make("mpt-30b", 4096, mask="padded", batch=3)
    small = gate.shortened(bench).case
    assert small.seqlen_q == small.seqlen_k == gate.GATE_LENGTH
    assert (small.head_dim, small.alibi, small.batch) == (112, "mpt", 2)
    assert all(0 <= a < b <= gate.GATE_LENGTH for a, b in small.key_range)


TINY = families.Sizes(heads=2, layers=2, mlp_ratio=1, vocabulary=64, image_side=3, seqlen=112)


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_models_agree_before_they_are_timed(family, monkeypatch):
    case = models.ModelCase(family, "prefill", sizes=TINY)
    measurement = models.model(case)
    assert measurement.ours().shape[-1] in (TINY.vocabulary, TINY.width)
    right = models.FAMILIES[family]

    def wrong(sizes, dtype):
        found = right.build(sizes, dtype)
        peer = list(found)[1]
        if isinstance(found[peer], exchange.Exchanged):  # the same weights, so another attention
            found[peer].make = lambda: exchange.nothing
        else:
            for parameter in found["ours"].parameters():
                parameter.data.mul_(1.1)
        return found

    monkeypatch.setitem(models.FAMILIES, family, dataclasses.replace(right, build=wrong))
    with pytest.raises(gate.WrongResult, match="disagree"):
        models.model(case)


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_every_mode_of_a_model_runs(family):
    for mode in models.FAMILIES[family].modes:
        measurement = models.model(models.ModelCase(family, mode, sizes=TINY), check=False)
        measurement.rounds(1)
        row = measurement.row()
        assert set(row["peers"]) and all(peer["ratio"] > 0 for peer in row["peers"].values())
        assert ("attention" in row["ours"]) == (mode != "decode")
        assert "model" in run.line(row)


def test_attention_is_left_out_and_put_back():
    case = models.ModelCase("qllama", "train", sizes=TINY)
    ours = models.FAMILIES["qllama"].build(TINY, torch.float32)["ours"]
    calls = []
    with exchange.attention_is(lambda q, k, v, **terms: calls.append(terms) or exchange.nothing(q, k, v)):
        models._call(ours, case)()
    assert len(calls) == 3  # two layers, one with cross attention
    assert all(p.grad is not None for p in ours.parameters())
    with exchange.attention_is(exchange.nothing):
        pass
    before = len(calls)
    models._call(ours, case)()
    assert len(calls) == before


def test_narrow_models_only_without_bf16_instructions(monkeypatch):
    for found, width in ((False, 256), (True, 1024)):
        monkeypatch.setattr(models, "bf16_instructions", lambda found=found: found)
        assert models.sizes_of("bfloat16").width == width
        assert models.sizes_of("float32").width == 1024


def test_what_attention_adds_to_a_step():
    part = measure._attention_part(100.0, 75.0, 25.0)
    assert part["added_ms"] == part["alone_ms"] and part["share"] == part["share_predicted"] == 0.25


def test_slow_calls_take_part_in_few_rounds():
    ticks = {"quick": 0.01, "slow": 2 * timing.PEER_SECONDS}
    rounds = timing.Rounds({name: name for name in ticks}, lambda name: ticks[name])
    for _ in range(5):
        rounds.round()
    summary = rounds.summary()
    assert (summary["quick"]["rounds"], summary["slow"]["rounds"]) == (4, 1)
    assert summary["quick"]["median_ms"] == pytest.approx(10)


def test_every_plan_entry_has_its_own_name():
    names = [entry.name for entry in plan.cpu_entries()]
    assert len(names) == len(set(names))
    assert sum(entry.core for entry in plan.cpu_entries()) < len(names)
    assert list(plan.gpu_entries(("cuda", "triton")))


def _row(**facts):
    base = {
        "case": "alibi-d64 prefix S2048 P512",
        "op": "prefix_attn",
        "direction": "forward",
        "backend": "cpu",
        "dtype": "float32",
    }
    base |= {"shape": [1, 2048, 2048, 16, 16, 64], "pairs": 100, "peers": {}, "ours": {"median_ms": 1.0, "spread": 0.1}}
    return {**base, **facts}


def test_targets_take_the_worst_row():
    def of(share, ratio):
        return _row(ours={"median_ms": 1.0, "spread": 0, "share_of_ceiling": share}, peers={"sdpa": {"ratio": ratio}})

    verdicts = {(v["what"], v["than"]): v for v in targets.judge([of(0.9, 1.7), of(0.86, 2.5)])}
    assert verdicts["forward fp32", "torch.mm"]["verdict"] == "met"
    assert verdicts["forward fp32", "SDPA with bias"]["verdict"] == "missed"
    assert verdicts["forward fp32", "SDPA with bias"]["value"] == 1.7
    assert verdicts["forward bf16", "SDPA with bias"]["verdict"] == "not measured"


def test_targets_of_whole_models():
    def of(case, direction, peer, **found):
        return _row(case=f"model {case}", op="model", direction=direction, peers={peer: {"ratio": 1.2, **found}})

    rows = [
        of("prefix-gpt2", "train", "sdpa", attention_ratio=1.4),
        of("prefix-gpt2", "prefill", "sdpa", attention_ratio=2.0),
        of("llama", "prefill", "sdpa", attention_ratio=0.5),
        of("llama", "decode", "sdpa"),
        of("mpt", "decode", "eager"),
    ]
    verdicts = {v["what"]: v for v in targets.judge(rows)}
    assert verdicts["attention of prefix LMs"]["value"] == 1.4
    assert verdicts["32 tokens of a model"] | {"value": 1.2, "verdict": "met"} == verdicts["32 tokens of a model"]
    assert "llama" in verdicts["32 tokens of a model"]["case"]


def test_targets_judge_rows_under_their_conditions_only():
    ours = {"median_ms": 1.0, "spread": 0, "share_of_ceiling": 0.1}
    others = ("alibi-d64 packed S2048", "llava-7b prefix S2048 P576", "alibi-d64 prefix S2048 P1024")
    judged = targets.judge([_row(case=case, ours=ours) for case in others])
    assert {v["verdict"] for v in judged} == {"not measured"}
    judged = targets.judge([_row(ours=ours)])
    assert next(v for v in judged if v["than"] == "torch.mm")["verdict"] == "missed"


def test_growth_target_compares_time_per_pair():
    def of(seqlen, ms):
        anchor = {"ratio": seqlen**2 / ms / 1024**2}
        return _row(shape=[1, seqlen, seqlen, 16, 16, 64], peers={"anchor": anchor}, study="growth")

    rows = [of(1024, 1.0), of(2048, 4.0), of(4096, 19.2)]
    verdict = next(v for v in targets.judge(rows) if v["what"] == "time per visible pair")
    assert verdict["verdict"] == "missed" and verdict["value"] == pytest.approx(1.2)


def test_run_writes_a_result_file_that_report_draws(tmp_path, capsys):
    out = tmp_path / "r.json"
    arguments = ["--case", "alibi-d64", "--seqlen", "128", "--rounds", "2", "--memory", "--out", str(out)]
    assert run.main(arguments) == 0
    assert "GFLOP/s" in capsys.readouterr().out
    data = results.load(out)
    assert data["rows"][0]["peers"]["sdpa"]["ratio"] > 0
    assert data["machine"]["torch"] == torch.__version__
    data["rows"] += [
        {**data["rows"][0], "study": "growth", "shape": [1, s, s, 16, 16, 64], "peers": {"anchor": {"ratio": 1.0}}}
        for s in (1024, 2048)
    ]
    out.write_text(json.dumps(data))
    assert report.main([str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("r-ceiling.png", "r-growth.png", "r-ratios.png", "r.json", "r.md")
    ]
    assert "| met |" in (tmp_path / "r.md").read_text() or "missed" in (tmp_path / "r.md").read_text()


def test_bad_arguments_are_named(tmp_path, capsys):
    for arguments, text in (
        ([], "name a --case"),
        (["--case", "nothing"], "mpt-7b"),
        (["--case", "mpt-7b", "--seqlen", "0"], "seqlen is 0"),
        (["--case", "mpt-7b", "--backend", "cuda"], "needs a GPU"),
    ):
        if torch.cuda.is_available() and "cuda" in arguments:
            continue
        with pytest.raises(SystemExit):
            run.main(arguments)
        assert text in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "x.json")])
    assert "no result file" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["run", "report", "compare", "device"])
def test_help(module):
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", "--help"], capture_output=True, text=True, check=True
    )
    assert f"bench.{module}" in done.stdout


def test_an_updated_result_file_keeps_the_other_rows(tmp_path):
    out = tmp_path / "r.json"
    file = results.ResultFile(out)
    file.data["revision"] = "old"
    for name in ("b", "a"):
        file.add({"case": name, "ours": 1}, name, study="growth" if name == "b" else None)
    again = results.ResultFile(out, update=True)
    again.data["revision"] = "new"
    again.add({"case": "a", "ours": 2}, "a")
    again.sort(["a", "b"])
    again.write()
    data = results.load(out)
    assert [(row["entry"], row["ours"], row["revision"], row.get("study")) for row in data["rows"]] == [
        ("a", 2, "new", None),
        ("b", 1, "old", "growth"),
    ]
    assert results.describe(data).endswith("revision new, old")
    data["machine"]["processor"] = "another"
    out.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="another"):
        results.ResultFile(out, update=True)


def test_committed_results_are_readable():
    for path in results.FOLDER.glob("*.json"):
        data = results.load(path)
        assert data["rows"] and data["revision"], path
        assert Case and report.page(data, [])
