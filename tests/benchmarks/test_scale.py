import json
import sys


def test_it_runs(benchmark, tmp_path, monkeypatch, capsys):
    scale = benchmark("scale")
    monkeypatch.setattr(scale, "ROWS", (9, 64))
    monkeypatch.setattr(scale, "TENSORS", (3, 10))
    file = tmp_path / "scale.json"
    monkeypatch.setattr(sys, "argv", ["scale.py", "--most", "2e6", "--rounds", "2", "--json", str(file)])
    scale.main()
    found = json.loads(file.read_text())["results"]
    assert [row["weights"] for row in found["weights"]] == [1 << 20]
    assert found["weights"][0]["ns"]["step"] > 0
    assert found["weights"][0]["ns"]["Adam"] > 0
    assert [row["columns"] for row in found["rows"]] == [9, 64]
    assert [row["tensors"] for row in found["tensors"]] == [3, 10]
    assert found["tensors"][1]["us"]["project"] > 0
    assert "weights a row" in capsys.readouterr().out
