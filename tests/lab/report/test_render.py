import itertools
import json
import re
from html.parser import HTMLParser

from tethertune.lab import report

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> & `code` |"


class Page(HTMLParser):
    """Collects the elements of a page, with their attributes, and checks that they nest."""

    void = frozenset({"meta", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def written(folders, output_format="html", name="report"):
    return report.write([folders.root], folders.root.parent / name, output_format).read_text(encoding="utf-8")


def test_the_page_is_one_small_file_that_names_no_other(demo):
    text = written(demo)
    page = Page(text)

    assert len(text.encode()) < 2_000_000
    assert not [attributes for attributes in page.all("script") if "src" in attributes]
    assert page.all("link") == [{"rel": "icon", "href": "data:,"}]
    assert "@import" not in text.split("<script")[0]
    assert "default-src 'none'" in page.all("meta")[1]["content"]


def test_the_answer_comes_first(demo):
    page = Page(written(demo))
    told = "".join(page.texts)

    assert told.index("mars-pgm reached 75.6 ± 3.9 %") < told.index("Difference to none (95 % interval)")
    assert told.index("Difference to none (95 % interval)") < told.index("Learning curves")
    assert told.index("Layers at their radius") < told.index("tethertune finetune lite0")


def test_headings_tables_and_buttons_are_made_for_screen_readers(demo):
    page = Page(written(demo))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]

    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) == 5
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    assert all(attributes["aria-pressed"] == "false" for attributes in page.all("button"))
    assert {attributes["id"] for _, attributes in page.elements if "id" in attributes} >= {
        attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes
    }


def test_names_are_text_whatever_they_hold(folders):
    folder = folders.add(0.7, classes=(EVIL, "boot"), place=EVIL.replace("/", ""))
    info = json.loads((folder / "run.json").read_text())
    info["data"]["name"] = info["model"]["source"] = info["command"] = EVIL
    info["model"]["name"] = "</script><script>alert(3)</script>"
    (folder / "run.json").write_text(json.dumps(info))

    text = written(folders)
    page = Page(text)

    assert not page.all("img")
    assert len(page.all("script")) == len(page.all("figure")) + 1
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert EVIL in "".join(page.texts)


def test_markdown_says_the_same(demo):
    text = written(demo, "markdown")

    assert text.startswith("# Fine-tuning lite0 on fashion\n")
    assert "**mars-pgm reached 75.6 ± 3.9 % test accuracy, +4.6 points over none on the same 3 seeds" in text
    assert (
        "| mars-pgm | relative radius 0.02 | flatten | 0.0005 | 1, 2, 3 | **75.6 ± 3.9 %** "
        "| **+4.6 (+3.0 to +6.5)** | +0.6 (\N{MINUS SIGN}0.2 to +1.9) to l2-pgm | +4.4, +6.5, +3.0 | 22 s |" in text
    )
    assert "      tethertune finetune lite0 fashion --method mars-pgm" in text
    assert "\n\n\n\n" not in text


def test_markdown_takes_names_for_text(folders):
    folder = folders.add(0.7)
    info = json.loads((folder / "run.json").read_text())
    info["data"]["name"] = EVIL + "\n# heading"
    (folder / "run.json").write_text(json.dumps(info))

    text = written(folders, "markdown")

    assert not re.search(r"(?<!\\)<", text)
    assert "\n# heading" not in text


def test_noise_is_not_bold(folders):
    for method, accuracies in {"none": (0.7, 0.8), "mars-pgm": (0.69, 0.9)}.items():
        for seed, accuracy in enumerate(accuracies):
            folders.add(accuracy, method=method, seed=seed)

    assert not Page(written(folders)).all("strong")
    assert "**" not in written(folders, "markdown")


def test_several_comparisons_are_sections_with_a_list_of_them(folders):
    folders.add(0.7, data="fashion")
    folders.add(0.7, data="pets")

    page = Page(written(folders))

    assert [attributes["href"] for attributes in page.all("a")][1:4] == [
        "#overview",
        "#comparison-1",
        "#comparison-2",
    ]
    assert "# Fine-tuning: 2 comparisons" in written(folders, "markdown")


def test_unfinished_and_repeated_runs_are_listed(folders):
    folders.add(0.7)
    folders.add(0.7, place="copy")
    folders.add(0.7, seed=2, status="running")

    for output_format in ("html", "markdown"):
        text = written(folders, output_format)
        assert "Unfinished runs" in text
        assert "Repeated runs" in text


def test_a_page_of_unfinished_runs_only(folders):
    folders.add(0.7, status="running")

    assert "No run is complete" in written(folders)
    assert "No run is complete" in written(folders, "markdown")


def test_the_answer_over_all_tasks_comes_first(whole):
    page = Page(written(whole))
    told = "".join(page.texts)

    assert told.index("Over 2 tasks, mars-pgm has the best mean rank 1 of 2") < told.index("Table 2, ResNet-101")
    assert told.index("Table 2, ResNet-101") < told.index("mars-pgm reached")


def test_markdown_has_every_table(whole):
    text = written(whole, "markdown")
    captions = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]

    assert captions[:2] == [
        "Test accuracy by method and task, mean ± standard deviation over the seeds",
        "Table 2, ResNet-101: resnet101 beside the paper",
    ]
    assert captions[3:9] == [
        "Test accuracy of resnet101 on flowers",
        "Constrained body layers at the end of training",
        "Test accuracy and retention by interpolation, mean ± standard deviation",
        "Test accuracy in percent by multiplier of the chosen values, mean ± standard deviation",
        "Test accuracy in percent by learning rate, mean ± standard deviation",
        "The best trial of each search",
    ]
    assert "\n\n\n\n" not in text


def test_tables_of_markdown_have_as_many_cells_in_every_row(whole):
    tables = re.findall(r"(?:^\|.*\n)+", written(whole, "markdown"), re.MULTILINE)

    assert len(tables) > 10
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_page_of_trials_only(folders):
    folders.add(None, validation=0.6, part={"kind": "trial", "study": "s", "number": 0})

    assert "No run is complete" in written(folders)
    assert "The best trial of each search" in written(folders, "markdown")


def test_a_run_that_diverged_is_told(folders):
    folder = folders.add(None, status="diverged")
    (folder / "metrics.jsonl").write_text("")

    assert "No run has a finite test accuracy" in written(folders)
