"""Reports of runs that are complete, damaged, hostile or odd, drawn from real run folders."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import Config, SFTConfig
from tir_alp.records.folder import RunFolder
from tir_alp.records.meanings import meaning
from tir_alp.report import write_comparison, write_run_report
from tir_alp.report.__main__ import main
from tir_alp.report.catalogue import PICTURES
from tir_alp.report.compare import row, summary_of
from tir_alp.report.methods import STYLES, by_method
from tir_alp.report.read import Series, read_run
from tir_alp.report.series import median_of, scale_for, shares
from tir_alp.run.describe import changed_settings

METRICS = {
    **{"rollout/reward": 0.5, "ratio/p2": 0.5, "ratio/p50": 1.0, "ratio/p98": 2.0},
    **{"ratio_clean/p2": 0.5, "ratio_clean/p98": 2.0, "kl_clean/rollout": 0.01},
    **{"loss_clean/clip_fraction": 0.1},
    **{"kl/rollout": 0.01, "loss/clip_fraction": 0.1, "loss/clip_fraction_low": 0.1},
    **{"entropy/mean": 0.3, "alp/sigma_mean": 0.01, "alp/sigma_0": 0.01, "alp/sigma_1": 0.01},
    **{"alp/effective": 1.0, "alp/relative_rms": 0.1, "grad_norm/policy": 0.2},
    **{"time/rollout": 1.0, "time/train": 2.0, "time/generate": 0.5, "time/tool": 0.1},
    **{"outcome/ok": 7, "outcome/tool_error": 1, "rollout/tool_calls": 1.0},
    **{"tokens/generated": 100, "tokens/loss": 90, "staleness/mean": 0.0},
}
ALL = {
    "clean",
    *("reward", "ratio", "kl", "clip", "entropy", "sigma", "perturbation", "gradients", "time"),
    *("outcomes", "rollouts", "tokens", "staleness"),
}


def make_run(path, metrics=None, **config):
    """Write a run folder with the program's own writer; `metrics` are pairs (step, metrics)."""
    if metrics is None:
        metrics = [(0, {"eval/accuracy": 0.1}), *((step, METRICS) for step in (1, 2, 3))]
        metrics += [(3, {"eval/accuracy": 0.6})]
    folder = RunFolder(path)
    folder.create(Config(**config))
    for step, values in metrics:
        folder.log(step, values)
    folder.close()
    return path


class Page(HTMLParser):
    """The tags and links that a browser would find."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.anchors = [], [], []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.anchors += [value for name, value in attrs if name == "id"]


def drawn(folder):
    return {file.stem for file in (folder / "figures").iterdir()}


def test_a_run_has_every_picture_that_it_has_metrics_for(tmp_path):
    path = make_run(tmp_path / "run")
    page = write_run_report(path)
    assert page == path / "report.html"
    assert drawn(path) == ALL
    assert Page(page).tags.count("img") == len(ALL)
    assert "10.0% before, 60.0% after training" in page.read_text()
    assert (path / "objective.txt").read_text().splitlines()[0] in page.read_text()


def test_a_page_fetches_nothing_and_runs_its_own_scripts_alone(tmp_path):
    written = write_run_report(make_run(tmp_path / "run"))
    page = Page(written)
    own = ("data:image/png;base64,", "data:,", "#")
    assert page.sources and all(source.startswith(own) for source in page.sources)
    assert not {"iframe", "object", "form"} & set(page.tags) and page.tags.count("link") == 1
    assert {each[1:] for each in page.sources if each[0] == "#"} <= set(page.anchors)
    text = written.read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    scripts = re.findall(r'<script(?: type="module")?>(.*?)</script>', text, re.DOTALL)
    assert len(scripts) == 2 and "unsafe" not in policy and "connect-src" not in policy
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"sha256-{digest}" in policy


def test_pictures_of_an_older_report_go(tmp_path):
    path = make_run(tmp_path / "run")
    write_run_report(path)
    (path / "metrics.jsonl").write_text('{"step": 1, "rollout/reward": 1.0}\n')
    write_run_report(path)
    assert drawn(path) == {"reward"}


def test_names_and_configs_are_text_and_never_markup_or_formulas(tmp_path):
    bad = "<script>alert(1)</script>$\\frac$"
    paths = []
    for number, system in enumerate((bad, bad + "2")):
        path = make_run(tmp_path / f"<b>{number}$x$", model={"system": system})
        (path / "objective.txt").write_text(bad)
        event = {"step": 2, "kind": bad, "reason": bad}
        (path / "events.jsonl").write_text(json.dumps(event) + "\n")
        environment = {"step": 0, "tools": {"python": {"backend": bad}}, "warnings": [bad]}
        (path / "environment.jsonl").write_text(json.dumps(environment) + "\n")
        paths.append(path)
    for page in (write_run_report(paths[0]), write_comparison(paths, tmp_path / "both")):
        assert Page(page).tags.count("script") == 3
        assert "<script>alert" not in page.read_text()
        assert "&lt;script&gt;" in page.read_text()


def test_events_and_the_sandbox_are_shown(tmp_path):
    path = make_run(tmp_path / "run")
    RunFolder(path).log_event(2, "roll_back", "KL too large")
    tools = {
        "python": {"sandbox": "landlock", "refused": {"namespaces": "not permitted"}},
        "checker": {"sandbox": "namespaces", "refused": {}},
    }
    report = {"step": 0, "tools": tools, "warnings": ["Beware."]}
    (path / "environment.jsonl").write_text(json.dumps(report) + "\n")
    page = write_run_report(path).read_text()
    assert "roll_back: KL too large" in page
    assert "python: sandbox landlock, refused (namespaces not permitted); checker: sandbox" in page
    assert "checker: sandbox namespaces<" in page
    assert "Beware." in page


@pytest.mark.parametrize("num_records", [0, 1])
def test_a_run_that_has_just_begun_can_be_drawn(tmp_path, num_records):
    path = make_run(tmp_path / "run", [(1, METRICS)] * num_records)
    page = write_run_report(path)
    assert drawn(path) == (ALL if num_records else set())
    assert ("no metrics to draw yet" in page.read_text()) is not bool(num_records)


def test_an_incomplete_last_line_is_ignored_and_a_broken_one_reported(tmp_path):
    path = make_run(tmp_path / "run")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/rew')
    assert read_run(path).num_unreadable == 0
    with (path / "metrics.jsonl").open("a") as file:
        file.write('\nnull\n{"step": 5, "rollout/reward": "?", "kl/rollout": null}\n')
    run = read_run(path)
    assert run.num_unreadable == 2
    assert run.last_step == 3
    assert "2 lines of metrics.jsonl could not be read" in write_run_report(path).read_text()


def test_values_that_are_not_finite_are_shown_and_counted(tmp_path):
    odd = {
        name: value
        for name, value in zip(METRICS, [math.nan, math.inf, -math.inf] * 9, strict=False)
    }
    path = make_run(tmp_path / "run", [(1, METRICS), (2, odd), (4, METRICS)])
    only_nan = make_run(tmp_path / "nan", [(1, dict.fromkeys(METRICS, math.nan))], seed=1)
    assert drawn(write_run_report(path).parent) == ALL
    assert drawn(write_run_report(only_nan).parent) >= ALL - {"outcomes"}
    write_comparison([path, only_nan], tmp_path / "both")
    (method,) = by_method([read_run(path), read_run(only_nan)])
    assert row(method)[-2] == "2"


def test_unknown_metrics_are_listed_and_draw_nothing(tmp_path):
    path = make_run(tmp_path / "run", [(1, {"mine/own": 3.0})])
    page = write_run_report(path)
    assert drawn(path) == set()
    assert "mine/own" in page.read_text() and "1 more metric" in page.read_text()


@pytest.mark.parametrize(
    ("metric", "explained"),
    [
        ("mismatch/p50", "percentile of the sequence ratios, trainer over engine"),
        ("mismatch/token_p2", "percentile of the token ratios, trainer over engine"),
        ("mismatch/probe_kl", "KL of trainer and engine on a sample, k1"),
        ("mismatch/probe_mean", "mean |logprob of trainer - engine| of a sample"),
        ("mismatch/probe_max", "largest |logprob of trainer - engine| of a sample"),
        ("mismatch/proximal_perplexity", "perplexity by the trainer before the updates"),
        ("alp/sigma_mean", "sigma of the noise, mean over layers"),
        ("alp/sigma_2", "sigma of the noise at one layer"),
        ("mismatch/ess", "effective sample size"),
        ("mine/own", ""),
    ],
)
def test_a_metric_is_explained_by_its_own_entry(metric, explained):
    assert meaning(metric)[0] == explained


def test_every_metric_of_a_picture_is_explained():
    lines = [line for picture in PICTURES for panel in picture.panels for line in panel.lines]
    names = {line.metric.replace("*", "0") for line in lines if line.label}
    names |= {f"{line.metric}2" for line in lines if not line.label}  # prefixes of percentiles
    assert [name for name in sorted(names) if not meaning(name)[0]] == []


def test_many_layers_and_levels_of_ratios_are_drawn(tmp_path):
    metrics = {f"alp/sigma_{layer}": 0.01 * (layer + 1) for layer in range(28)}
    for prefix in ("ratio/p", "ratio/turn_p", "ratio/token_p"):
        metrics |= {f"{prefix}{n}": 0.1 + n / 50 for n in (2, 5, 25, 50, 75, 95, 98)}
    path = make_run(tmp_path / "run", [(1, metrics), (2, metrics)])
    write_run_report(path)
    assert drawn(path) == {"sigma", "ratio"}


def test_settings_that_differ_from_the_preset_are_named(tmp_path):
    grpo = ALGORITHMS["grpo"].model_copy(update={"clip_high": 0.5})
    run = read_run(make_run(tmp_path / "run", seed=3, algorithm=grpo))
    assert changed_settings(run.settings, run.algorithm) == {
        "seed": (3, 0),
        "algorithm.clip_high": (0.5, 0.28),
    }


def test_seeds_are_one_method_and_other_settings_are_another(tmp_path):
    paths = [make_run(tmp_path / f"alp{seed}", seed=seed) for seed in (0, 1)]
    paths += [make_run(tmp_path / "grpo", algorithm=ALGORITHMS["grpo"])]
    paths += [make_run(tmp_path / "stale", rollout={"max_staleness": 2})]
    alp, grpo, stale = by_method([read_run(path) for path in paths])
    assert (alp.label, alp.seeds) == ("alp_sequence (max_staleness=0)", "0, 1")
    assert (grpo.label, stale.label) == ("grpo", "alp_sequence (max_staleness=2)")
    assert alp.colour == stale.colour != grpo.colour
    assert alp.marker != stale.marker
    page = write_comparison(paths, tmp_path / "out")
    assert drawn(tmp_path / "out") == ALL
    assert Page(page).tags.count("img") == len(ALL)


def test_every_preset_has_its_own_look_in_any_comparison(tmp_path):
    assert set(STYLES) == set(ALGORITHMS)
    assert len(set(map(str, STYLES.values()))) == len(STYLES)
    one, other = (
        read_run(make_run(tmp_path / name, algorithm=ALGORITHMS[name])) for name in ("gspo", "dapo")
    )
    looks = [
        {method.algorithm: (method.colour, method.dash) for method in by_method(runs)}
        for runs in ([one, other], [other, one], [one])
    ]
    assert looks[0] == looks[1]
    assert looks[2].items() <= looks[0].items()


def test_the_table_has_the_worst_of_tails_and_means_of_the_rest(tmp_path):
    noisy = {"ratio/p2": 0.01, "kl/rollout": -9.0, "loss/clip_fraction": 1.0}
    clean = {"ratio_clean/p2": 0.1, "kl_clean/rollout": -0.2, "loss_clean/clip_fraction": 0.3}
    wide = METRICS | noisy | clean
    run = read_run(make_run(tmp_path / "run", [(1, METRICS), (2, wide)]))
    summary = summary_of(run)
    assert (summary.widest, summary.max_kl) == (20.0, 0.2)
    assert summary.clip_fraction == pytest.approx(0.2)
    assert math.isnan(summary.after)


def test_the_median_is_over_the_runs_that_are_there():
    runs = [Series((1, 2, 3), (1.0, 2.0, 3.0)), Series((1,), (3.0,)), Series((1, 2), (8.0, 4.0))]
    assert median_of(runs) == Series((1, 2), (3.0, 3.0))


def test_shares_add_up_to_one_and_leave_out_constant_zeros():
    found = shares({"a": Series((1, 2), (3, 1)), "b": Series((1,), (1,)), "c": Series((1,), (0,))})
    assert found == {"a": Series((1, 2), (0.75, 1.0)), "b": Series((1, 2), (0.25, 0.0))}


@pytest.mark.parametrize(
    ("values", "wanted", "scale"),
    [
        ([1.0, 2.0], "auto", "linear"),
        ([1e-6, 1.0], "auto", "log"),
        ([-1e-3, 1e-3, 1e-3, 5.0], "auto", "symlog"),
        ([0.0, 0.0], "log", "linear"),
        ([], "log", "linear"),
        ([1.0, 2.0], "log", "log"),
    ],
)
def test_an_axis_is_logarithmic_where_values_differ_by_orders(values, wanted, scale):
    assert scale_for(values, wanted) == scale


def test_the_command_prints_the_page_and_refuses_other_folders(tmp_path, capsys):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", seed=1)
    assert main([str(one)]) == 0
    assert capsys.readouterr().out.strip() == str(one / "report.html")
    assert main([str(one), str(other), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").exists()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for wrong in ([tmp_path / "nowhere"], [tmp_path], [tmp_path / "list"], [one, one]):
        assert main([str(each) for each in wrong]) == 2
        assert "tir_alp.report: " in capsys.readouterr().err
    assert main([str(one), str(other), "--out", str(other)]) == 2
    assert not (other / "report.html").exists()


def test_several_runs_go_beside_the_first(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    assert main(runs) == 0
    (folder,) = tmp_path.glob("report-*")
    table, _, last_line = capsys.readouterr().out.strip().rpartition("\n")
    assert last_line == str(folder / "report.html")
    assert table.strip() == (folder / "table.md").read_text().strip()
    titles, *rows = ([*line.split(" | ")] for line in table.strip().splitlines())
    assert {len(row) for row in rows} == {len(titles)}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "a", seed=0)
    assert main([str(run), "--out", str(run / "config.json" / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json" in line and line.endswith("Not a directory; --out FOLDER writes elsewhere")


def test_the_module_is_a_command(tmp_path):
    command = [sys.executable, "-m", "tir_alp.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr


def made_by(command, path, config, metrics):
    folder = RunFolder(path)
    folder.create(config, objective="", command=command)
    for step, values in metrics:
        folder.log(step, values)
    folder.close()
    return path


def test_fine_tuning_and_evaluations_have_sound_pages(tmp_path):
    losses = [(step, {"loss/value": 2.0 / step, "tokens/loss": 10}) for step in range(1, 9)]
    sft = SFTConfig.model_validate({"data": {"path": "a.jsonl"}, "steps": 20})
    path = made_by("sft", tmp_path / "sft", sft, losses)
    page = write_run_report(path).read_text()
    assert "The training loss fell from" in page and "The run has made 8 of 20 steps" in page
    assert 'data-picture="entropy"' in page.split("<nav")[0]
    assert 'id="examples"' not in page and "Stability" not in page
    accuracy = {"eval/accuracy": 0.25, "eval/tasks": 40}
    path = made_by("evaluate", tmp_path / "evaluation", Config(), [(0, accuracy)])
    page = write_run_report(path).read_text()
    assert "was measured once, in step 0: 25.0% [14.2%, 40.2%] (40 tasks)" in page
    assert "steps." not in page.split("<nav")[0]
