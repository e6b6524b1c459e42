import json
import math
import random
import statistics
import sys

import pytest
from PIL import Image

from diffusers_dti.evaluation.summary import figure, markdown, summarize


def make(run, subject, values, **others):
    """Make a record for each value of "image"; "text" falls as it rises."""
    return [
        {"run": run, "subject": subject, "prompt": "a {}", "seed": i, "scores": {"image": v, "text": 1 - v / 2} | others}
        for i, v in enumerate(values)
    ]


@pytest.fixture
def records():
    rng = random.Random(0)
    made = []
    for run, shift in (("dti", 0.5), ("ti", 0.6)):
        for subject, count in (("dog", 12), ("cat", 7), ("teapot", 9), ("vase", 5)):
            made += make(run, subject, [shift + rng.uniform(-0.3, 0.3) for _ in range(count)])
    return made


def loop(values, times=20000):
    """Compute the interval by resampling again and again."""
    rng = random.Random(1)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(times))
    return means[int(0.025 * times)], means[int(0.975 * times)]


def test_means_and_intervals_of_subjects_and_runs(records):
    summary = summarize(records)
    assert list(summary) == ["dti", "ti"] and list(summary["ti"]["subjects"]) == ["dog", "cat", "teapot", "vase"]
    for run, entry in summary.items():
        assert entry["pictures"] == 33
        for score in ("image", "text"):
            means = []
            for subject, estimates in entry["subjects"].items():
                values = [r["scores"][score] for r in records if (r["run"], r["subject"]) == (run, subject)]
                means.append(statistics.fmean(values))
                assert estimates[score]["mean"] == pytest.approx(means[-1], abs=1e-12)
                assert (estimates[score]["low"], estimates[score]["high"]) == pytest.approx(loop(values), abs=0.02)
            assert entry["mean"][score]["mean"] == pytest.approx(statistics.fmean(means), abs=1e-12)
            assert (entry["mean"][score]["low"], entry["mean"][score]["high"]) == pytest.approx(loop(means), abs=0.02)


def test_intervals_of_many_images_agree_with_the_normal_distribution():
    rng = random.Random(2)
    values = [rng.gauss(0.4, 0.1) for _ in range(1000)]
    entry = summarize(make("dti", "dog", values))["dti"]
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    got = entry["subjects"]["dog"]["image"]
    assert got["mean"] - got["low"] == pytest.approx(half, rel=0.1)
    assert got["high"] - got["mean"] == pytest.approx(half, rel=0.1)
    assert entry["mean"] == entry["subjects"]["dog"]  # a single subject: over its images


def test_an_interval_does_not_depend_on_other_runs(records):
    alone = [r for r in records if r["run"] == "ti"]
    assert summarize(alone)["ti"] == summarize(records)["ti"]
    cat = [r for r in alone if r["subject"] == "cat"]
    assert summarize(cat)["ti"]["subjects"]["cat"] == summarize(records)["ti"]["subjects"]["cat"]
    assert json.loads(json.dumps(summarize(records))) == summarize(records)


def test_one_image_has_no_spread():
    estimate = summarize(make("dti", "dog", [0.3]))["dti"]["mean"]["image"]
    assert estimate == {"mean": 0.3, "low": 0.3, "high": 0.3}


def test_runs_must_have_the_same_scores():
    with pytest.raises(
        ValueError, match="Run 'ti' has the scores image, text, clip, run 'dti' has image, text: .*same metrics"
    ):
        summarize(make("dti", "dog", [0.1]) + make("ti", "dog", [0.1], clip=0.2))
    turned = make("ti", "dog", [0.1])
    turned[0]["scores"] = dict(reversed(turned[0]["scores"].items()))
    summary = summarize(make("dti", "dog", [0.1]) + turned)
    assert summary["ti"]["mean"] == summary["dti"]["mean"]
    with pytest.raises(ValueError, match="no scores"):
        summarize([])


def test_tables():
    records = make("dti", "dog", [0.5]) + make("dti", "cat", [0.3]) + make("ti", "dog", [-0.25, -0.25])
    assert markdown(summarize(records)).splitlines() == [
        "| run | image | text | pictures |",
        "|---|---|---|---|",
        "| dti | 0.400 [0.300, 0.500] | 0.800 [0.750, 0.850] | 2 |",
        "| ti | -0.250 [-0.250, -0.250] | 1.125 [1.125, 1.125] | 2 |",
        "",
        "| subject | run | image | text |",
        "|---|---|---|---|",
        "| dog | dti | 0.500 [0.500, 0.500] | 0.750 [0.750, 0.750] |",
        "| dog | ti | -0.250 [-0.250, -0.250] | 1.125 [1.125, 1.125] |",
        "| cat | dti | 0.300 [0.300, 0.300] | 0.850 [0.850, 0.850] |",
    ]


def test_figure(records, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    summary = summarize(records + make("constant", "dog", [0.1] * 33))  # its interval differs from the mean by rounding only
    figure(summary, "text", "image", tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 500
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    figure(summary, "text", "image", tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["dti", "ti", "constant"]
    for entry, bars in zip(summary.values(), axes.containers):
        line, _, (across, upright) = bars
        image, prompt = entry["mean"]["image"], entry["mean"]["text"]
        assert line.get_xydata().tolist() == [[prompt["mean"], image["mean"]]]
        assert across.get_segments()[0][:, 0].tolist() == pytest.approx([prompt["low"], prompt["high"]])
        assert upright.get_segments()[0][:, 1].tolist() == pytest.approx([image["low"], image["high"]])
    points = next(c for c in axes.collections if len(c.get_offsets()) == 4).get_offsets().tolist()
    assert points == [[s["text"]["mean"], s["image"]["mean"]] for s in summary["dti"]["subjects"].values()]
    assert "text" in axes.get_xlabel() and "image" in axes.get_ylabel()


def test_plots_that_cannot_be_made(records, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no score 'clip' to plot, only image, text"):
        figure(summarize(records), "clip", "image", tmp_path / "figure.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"diffusers-dti\[plot\]"):
        figure(summarize(records), "text", "image", tmp_path / "figure.png")
