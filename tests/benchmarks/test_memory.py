import json
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_snapshot_is_one_copy_and_a_file_is_none(benchmark, tmp_path, monkeypatch, capsys):
    memory = benchmark("memory")
    kept = {name: memory.SCHEMES[name] for name in ("snapshot (default)", "reference=FILE, mapped")}
    monkeypatch.setattr(memory, "SCHEMES", kept)
    file = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["memory.py", "--model", "vit_tiny_patch16_224", "--json", str(file)])
    memory.main()
    found = json.loads(file.read_text())["results"]["schemes"]
    snapshot, mapped = found["snapshot (default)"], found["reference=FILE, mapped"]
    assert snapshot["kept"] == pytest.approx(snapshot["constrained"], rel=0.3)
    assert mapped["kept"] < 0.3 * mapped["constrained"]
    assert mapped["mapped"] >= 0.9 * mapped["constrained"]
    assert "kept / weights" in capsys.readouterr().out
