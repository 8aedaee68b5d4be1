"""benchmarks/doc_tables.py: what the pages of docs/ show is what the results say."""

from pathlib import Path

import doc_tables
import pytest
import quality_report

from dualcodebook_hf.files import read_json

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", doc_tables.PAGES)
def test_writing_the_tables_again_changes_nothing(page):
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text
    assert doc_tables.filled(text) == text


@pytest.mark.parametrize("folder", doc_tables.RESULTS)
def test_the_published_table_is_that_of_the_published_results(folder):
    lines = quality_report.read_lines(DOCS / folder / "results.jsonl")
    backbone = read_json(DOCS / folder / "conditions.json")["backbone"]
    assert quality_report.table(lines, backbone) == (DOCS / folder / "table.md").read_text()


def test_a_marked_table_is_made_new_and_the_text_around_it_stays():
    page = "before\n<!-- table: protocols -->\nold\n<!-- /table -->\nafter\n"
    text = doc_tables.filled(page)
    assert text.startswith("before\n<!-- table: protocols -->\n\n| protocol ")
    assert text.endswith("|\n\n<!-- /table -->\nafter\n") and "old" not in text
    assert "| `imagenet` | `ILSVRC/imagenet-1k`" in text
    assert doc_tables.filled(text) == text
    with pytest.raises(ValueError, match=r"`table` must be one of embedded, .*, got 'protocol'"):
        doc_tables.filled(page.replace("protocols", "protocol"))
