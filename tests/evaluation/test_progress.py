import re

import pytest
from diffusers.utils import logging

from diffusers_dti.evaluation.progress import own_bar_hidden, pass_over, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Return a list with the time in seconds, which bars read."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_images_that_exist_say_nothing_about_the_time_left(clock, capsys):
    with progress_bar(100, "Generating") as bar:
        pass_over(bar, 40)
        for done in range(1, 31):
            clock[0] += 10
            bar.update()
            if done == 15:
                pass_over(bar, 25)
        # 40 + 25 were there; 5 of the other 35 are left, at 10 s each
        assert (bar.n, bar.format_dict["rate"]) == (95, pytest.approx(0.1))
    assert "95/100 [05:00<00:50" in capsys.readouterr().err


def test_the_bar_of_a_longer_work_is_used_and_stays_open(capsys):
    with progress_bar(4, "Generating") as outer:
        with progress_bar(2, "Part", outer) as bar:
            bar.update(2)
        outer.update(2)
    shown = capsys.readouterr().err
    assert "Part" not in shown and re.search(r"Generating: 100%\|█+\| 4/4", shown)


def test_bars_are_off_where_diffusers_bars_are(capsys):
    logging.disable_progress_bar()
    try:
        with progress_bar(4, "Generating") as bar:
            pass_over(bar, 2)
            bar.update(2)
    finally:
        logging.enable_progress_bar()
    assert not capsys.readouterr().err


def test_the_pipelines_own_bar_is_hidden_within_the_block(sdxl, capsys):
    sdxl.set_progress_bar_config(desc="steps")
    with pytest.raises(KeyError), own_bar_hidden(sdxl):
        list(sdxl.progress_bar([1, 2]))
        raise KeyError
    assert not capsys.readouterr().err and sdxl._progress_bar_config == {"desc": "steps"}
    list(sdxl.progress_bar([1, 2]))
    assert "steps: 100%" in capsys.readouterr().err
