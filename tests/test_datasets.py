"""Data sets are told by their content, read whole, and refused with file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from gte_rag.datasets import BitextSet, RetrievalSet, SimilaritySet, find, load, names

CORPUS = [{"_id": "a", "title": "Port", "text": "is closed"}, {"_id": "b", "text": "Bread"}, {"_id": "c", "text": ""}]
QUERIES = [{"_id": "q1", "text": "port?"}, {"_id": "q2", "text": "bread?"}, {"_id": "q3", "text": "not judged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t0\nq2\tb\t1\nq9\ta\t1\n"


def write(file: Path, text: str, *, packed: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    (file.with_name(file.name + ".gz") if packed else file).write_bytes(gzip.compress(data) if packed else data)


def lines(records: list[dict[str, str]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def beir(folder: Path, *, packed: bool = False, qrels: str = "qrels.tsv") -> Path:
    write(folder / "corpus.jsonl", lines(CORPUS), packed=packed)
    write(folder / "queries.jsonl", lines(QUERIES), packed=packed)
    write(folder / qrels, QRELS, packed=packed)
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("qrels", ["qrels.tsv", "qrels/test.tsv"])
def test_a_beir_folder_is_read_with_titles_and_judged_queries_only(tmp_path: Path, packed: bool, qrels: str) -> None:
    dataset = load(beir(tmp_path / "cities", packed=packed, qrels=qrels))
    assert isinstance(dataset, RetrievalSet)
    assert dataset.name == "cities"
    assert dataset.corpus == {"a": "Port is closed", "b": "Bread", "c": ""}
    assert dataset.queries == {"q1": "port?", "q2": "bread?"}
    assert dataset.qrels == {"q1": {"a": 2, "b": 0}, "q2": {"b": 1}}


def test_two_columns_are_bitext_and_three_are_similarity(tmp_path: Path) -> None:
    write(tmp_path / "de-en.tsv", "Brot\tbread\nHafen\tport\n", packed=True)
    write(tmp_path / "sts.tsv", "score\tone\tother\n5.0\ta\tb\n0.5\tc\td\n")
    bitext, similarity = load(tmp_path / "de-en.tsv.gz"), load(tmp_path / "sts.tsv")
    assert isinstance(bitext, BitextSet)
    assert (bitext.name, bitext.sources, bitext.targets) == ("de-en", ["Brot", "Hafen"], ["bread", "port"])
    assert isinstance(similarity, SimilaritySet)
    assert (similarity.scores, similarity.firsts, similarity.seconds) == ([5.0, 0.5], ["a", "c"], ["b", "d"])


def test_all_sets_of_a_tree_are_found_in_order(tmp_path: Path) -> None:
    beir(tmp_path / "b" / "retrieval")
    write(tmp_path / "a" / "x.tsv", "a\tb\n", packed=True)
    write(tmp_path / "README.md", "no data")
    assert [path.name for path in find(tmp_path)] == ["x.tsv.gz", "retrieval"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", "{", r"corpus\.jsonl, line 1, is not JSON"),
        ("corpus.jsonl", "[" * 200_000, r"corpus\.jsonl, line 1, is not JSON"),
        ("corpus.jsonl", '{"_id": 1, "text": "x"}', r"line 1, must be an object like"),
        ("corpus.jsonl", '{"_id": "a"}', r"line 1,: text must be a string"),
        ("queries.jsonl", '{"_id": "q1", "text": "x"}\n{"_id": "q1", "text": "y"}', r"line 2, repeats the id 'q1'"),
        ("qrels.tsv", "q1\ta\n", r"qrels\.tsv, line 1, must be query id, passage id and a whole number"),
        ("qrels.tsv", "q1\ta\t1\nq1\tb\thalf\n", r"line 2, must be query id"),
        ("qrels.tsv", "q1\ta\t0\n", "judges no query"),
    ],
)
def test_a_damaged_beir_folder_is_refused_with_file_and_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    folder = beir(tmp_path / "cities")
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\na\tb\tc\n", "line 1, has 2 columns and the last line 3"),
        ("a\n", "has 1 columns"),
        ("1\ta\tb\nx\ta\tb\n", "line 2, starts with 'x'"),
        ("", "is empty"),
        ("1\ta\tb\n1\tc\td\n", "do not differ"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "x.tsv", content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x.tsv")


def test_what_is_no_data_set_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "text")
    write(tmp_path / "half" / "corpus.jsonl", lines(CORPUS))
    (tmp_path / "broken.tsv.gz").write_bytes(gzip.compress(b"a\tb\n" * 999)[:-20])
    (tmp_path / "latin.tsv").write_bytes("é\tè\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is no data set; give a folder with corpus"):
        load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"has no queries\.jsonl"):
        load(tmp_path / "half")
    with pytest.raises(ValueError, match="no intact gzip file"):
        load(tmp_path / "broken.tsv.gz")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load(tmp_path / "latin.tsv")
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        find(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data set"):
        find(tmp_path / "empty")


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_a_link_to_a_set_gives_it_the_links_name(tmp_path: Path) -> None:
    (tmp_path / "ar").symlink_to(beir(tmp_path / "versions" / "2"))
    assert load(tmp_path / "ar").name == "ar"
    assert names([tmp_path / "ar"]) == ["ar"]


def test_a_sample_depends_on_seed_and_ids_only() -> None:
    names = [f"q{number}" for number in range(50)]
    queries = dict.fromkeys(names, "text")
    whole = RetrievalSet("s", {"a": "x"}, queries, {name: {"a": 1} for name in names})
    backwards = RetrievalSet("s", {"a": "x"}, dict(reversed(queries.items())), whole.qrels)
    sample = whole.sample(10, seed=3)
    assert len(sample) == 10
    assert list(sample.queries) == sorted(sample.queries, key=names.index)
    assert set(sample.queries) == set(backwards.sample(10, seed=3).queries)
    assert set(sample.queries) != set(whole.sample(10, seed=4).queries)
    assert whole.sample(99).queries == queries
    with pytest.raises(ValueError, match="at least 1"):
        whole.sample(0)


def test_samples_of_pairs_keep_them_together() -> None:
    texts = [f"{number}" for number in range(20)]
    bitext = BitextSet("b", texts, texts).sample(5)
    similarity = SimilaritySet("s", [float(text) for text in texts], texts, texts).sample(5)
    assert len(bitext) == len(similarity) == 5
    assert bitext.sources == bitext.targets
    assert [f"{score:g}" for score in similarity.scores] == similarity.firsts == similarity.seconds


def test_a_name_is_told_from_others_by_the_folders_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("miracl/ar", "mldr/ar", "mldr/de"):
        beir(tmp_path / name)
    assert names(find(tmp_path)) == ["miracl/ar", "mldr/ar", "de"]
    monkeypatch.chdir(tmp_path / "mldr" / "de")
    assert names(find(".")) == ["de"]
    assert load(".").name == "de"
    assert load(".", name="mine").name == "mine"


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    beir(tmp_path / "data" / "one")
    for name in ("data/loop", "data/two", "empty/a", "empty/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "data" / "one" if name == "data/two" else (tmp_path / name).parent)
    assert find(tmp_path / "data") == [tmp_path / "data" / "one"]
    with pytest.raises(ValueError, match="holds no data set"):
        find(tmp_path / "empty")


@pytest.mark.parametrize("grade", [10_001, -10_001, 10**30])
def test_a_grade_that_no_judge_gives_is_refused(tmp_path: Path, grade: int) -> None:
    folder = beir(tmp_path / "cities")
    write(folder / "qrels.tsv", f"q1\ta\t1\nq1\tb\t{grade}\n")
    with pytest.raises(ValueError, match="the largest grade is 10000"):
        load(folder)


def test_relevant_passages_that_the_corpus_lacks_are_counted_in_a_warning(tmp_path: Path) -> None:
    folder = beir(tmp_path / "cities")
    write(folder / "qrels.tsv", "q1\ta\t1\nq1\tgone\t1\nq1\talso gone\t0\nq2\tgone\t2\n")
    with pytest.warns(
        UserWarning, match=r"1 of 2 relevant passages of .*qrels\.tsv, such as 'gone', are not in corpus"
    ):
        dataset = load(folder)
    assert isinstance(dataset, RetrievalSet)
    assert dataset.sample(1).qrels["q2"] == {"gone": 2}  # it can be measured, with nothing to find


def test_judgements_of_another_corpus_are_refused(tmp_path: Path) -> None:
    folder = beir(tmp_path / "cities")
    write(folder / "qrels.tsv", "q1\tdoc-1\t1\nq2\tdoc-2\t1\n")
    with pytest.raises(ValueError, match=r"none of the 2 relevant passages .* such as 'doc-1', .* ids are like 'a'"):
        load(folder)
