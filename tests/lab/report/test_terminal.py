from tethertune.lab.report.terminal import show


def test_of_one_task_all_is_said(demo, capsys):
    show([demo.root])
    told = capsys.readouterr().out
    assert "Test accuracy of lite0 on fashion" in told
    assert "mars-pgm reached" in told
    assert "Time a run" not in told
    assert "hard guarantee" in told


def test_of_several_tasks_the_answer_over_them_comes_first(folders, capsys):
    for data in ("fashion", "digits", "pets"):
        for seed in (1, 2, 3):
            folders.add(0.6 + seed / 100, data=data, seed=seed)
            folders.add(0.7 + seed / 100, data=data, seed=seed, method="mars-pgm")
    show([folders.root])
    told = capsys.readouterr().out
    assert told.index("Over 3 tasks, mars-pgm has the best mean rank 1 of 2") < told.index("lite0 on digits: mars-pgm")
    assert told.count("reached") == 3
