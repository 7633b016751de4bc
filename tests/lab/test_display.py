import pytest

from tethertune.lab.display import Display

LINE = {
    "epoch": 2,
    "loss": 0.51239,
    "accuracy": 0.75,
    "validation_accuracy": 0.5,
    "images_per_second": 99.6,
    "at_radius": 0.25,
}


def test_without_a_terminal_each_epoch_is_a_plain_line(capsys):
    with Display("mars-pgm seed 0", 6, done=3) as display:
        display.step(4, lambda: pytest.fail("figures are read for nobody"))
        display.epoch(LINE, 3)
        display.epoch(LINE | {"validation_accuracy": None, "at_radius": None}, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        (
            "mars-pgm seed 0: epoch 2/3, loss 0.5124, accuracy 75.0%, validation 50.0%, 100 images/s,"
            " 25% of rows at their radius"
        ),
        "mars-pgm seed 0: epoch 2/3, loss 0.5124, accuracy 75.0%, 100 images/s",
    ]


def test_quiet_says_nothing(capsys):
    with Display("none", 6, quiet=True) as display:
        display.epoch(LINE, 3)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_the_bar_shows_the_figures_twice_a_second_at_most(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    times = iter([0.0, 0.1, 0.6, 0.7, 1.2])
    monkeypatch.setattr("tethertune.lab.display.monotonic", lambda: next(times))
    read = []
    with Display("none", 6) as display:
        for step in range(1, 5):
            display.step(step, lambda step=step: read.append(step) or f"figures {step}")
    assert read == [2, 4]
    assert "figures 4" in capsys.readouterr().err
