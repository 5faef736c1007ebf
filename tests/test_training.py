"""The parts of the training recipe that can be checked without its data and its teacher."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gte_rag import GTEEncoder
from gte_rag.checkpoint import load_checkpoint
from gte_rag.config import GTEConfig

TRAINING = Path(__file__).parent.parent / "training"
if not TRAINING.is_dir():
    pytest.skip("training/ is part of the repository, not of the sdist", allow_module_level=True)
sys.path.insert(0, str(TRAINING))

import distil  # noqa: E402
from alignment import common  # noqa: E402
from batch import Batch  # noqa: E402
from counting import place_counting, saturated_counts  # noqa: E402
from distil import Run  # noqa: E402
from finish import Finish  # noqa: E402
from grid import EMBEDDING_STEPS, STEPS, coarse, rounded, rounded_words  # noqa: E402
from heal import (  # noqa: E402
    SLOTS,
    Lesson,
    fit_cosines,
    heal,
    heal_words,
    place_pooling,
    place_positions,
    tell_apart,
)
from mixture import Texts  # noqa: E402
from packed import Drawn, Mixture, first_ones, lengths, likes_together, pack, tokenized  # noqa: E402
from prepare import statistics  # noqa: E402
from student import (  # noqa: E402
    CARRYING,
    CONSTANT,
    FIRST,
    GAIN,
    OWN,
    RARE,
    RARE_SCALE,
    STANDING,
    Layer,
    Student,
    carrying_neurons,
    rotate,
    transplant,
    turns,
)
from teacher import Teacher  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from vocabulary import SPECIALS, build  # noqa: E402


class Tokens:
    """What `common` reads of an encoding: offsets between two special tokens."""

    def __init__(self, *offsets: tuple[int, int]) -> None:
        self.offsets = [(0, 0), *offsets, (0, 0)]
        self.ids = list(range(len(self.offsets)))


def test_attention_stays_within_a_text_whatever_the_lengths() -> None:
    batch = Batch.of([[5, 6, 7], [8], [9, 10]])
    q, k, v = torch.randn(3, 6, 2, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    mixed = batch.attend(q, k, v)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 6)):
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) / 2
        alone = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[rows]).flatten(1)
        torch.testing.assert_close(mixed[rows], alone)  # float32 rounding
    torch.testing.assert_close(batch.mean(v.flatten(1))[2], v[4:].flatten(1).mean(0))


def test_the_student_computes_what_the_encoder_computes(encoder: GTEEncoder) -> None:
    checkpoint = load_checkpoint("gte-mini")
    student = Student(checkpoint.config)
    left = student.load_state_dict({name: tensor.float() for name, tensor in checkpoint.weights.items()}, strict=False)
    assert set(left.missing_keys) == {"classifier.weight", "classifier.bias"}
    assert not left.unexpected_keys
    texts = ["Peking ist die Hauptstadt Chinas.", "bread"]
    with torch.inference_mode():
        batch = Batch.of([encoder.tokenizer.encode(text).ids for text in texts])
        states = student(batch)[-1]
    dense = torch.nn.functional.normalize(states[batch.first], dim=1).numpy()
    expected = encoder.encode_documents(texts).dense
    assert expected is not None
    assert (dense * expected).sum(1) == pytest.approx(
        [1, 1], abs=1e-4
    )  # training takes the up branch for 1; float16 holds it to 5e-4


def test_spans_hold_the_same_characters_on_both_sides() -> None:
    mine = Tokens((0, 3), (3, 5), (5, 9), (9, 12))
    its = Tokens((0, 5), (5, 7), (7, 9), (9, 12))
    spans = common([mine], [its], [6])
    assert spans.student.tolist() == [-1, 0, 0, 1, 2, -1]
    assert spans.teacher.tolist() == [-1, 0, 1, 1, 2, -1]
    means = spans.mean(torch.arange(6.0)[:, None], spans.student)
    assert means.squeeze(1).tolist() == [1.5, 3, 4]


def test_spans_end_where_the_student_stops_reading() -> None:
    spans = common([Tokens((0, 2), (2, 4), (4, 6))], [Tokens((0, 2), (2, 6))], [4])
    assert spans.student.tolist() == [-1, 0, -1, -1]  # the teacher's second token reaches beyond
    assert spans.teacher.tolist() == [-1, 0, -1, -1]


WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "far", "away", "und", "die", "katze", "lief"]


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    """A student's tokenizer, lower-cased, and a teacher's that knows longer pieces."""
    letters = [chr(code) for code in range(97, 123)]
    small = [*SPECIALS, "▁", *letters, *(f"▁{word[:2]}" for word in WORDS)]
    large = [
        *SPECIALS, "▁", *letters, *map(str.upper, letters), *(f"▁{form}" for word in WORDS for form in (word, word.title()))
    ]  # fmt: skip
    small, large = (list(dict.fromkeys(pieces)) for pieces in (small, large))
    scores = [[0.0] * 4 + [-10.0 + len(piece) for piece in pieces[4:]] for pieces in (small, large)]
    return build(small, scores[0], lowercase=True), build(large, scores[1])


def test_packed_texts_start_tokens_of_both_at_the_same_characters(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    texts = ["The cat sat", "ran", "", "   ", "Die Katze lief far away", "xyz cat", " ".join(["Dog"] * 400)]
    mine, its = tokenized(texts, *tokenizers)
    for text, (start, stop), (its_start, its_stop) in zip(
        texts, mine.first.unfold(0, 2, 1).tolist(), its.first.unfold(0, 2, 1).tolist(), strict=True
    ):
        read = []
        for tokenizer, tokens in zip(
            tokenizers, (mine.tokens[start:stop], its.tokens[its_start:its_stop]), strict=True
        ):
            flags = (tokens >= 1 << 20).long().cumsum(0).tolist()
            pieces: dict[int, str] = {}
            for flag, token in zip(flags, (tokens & ((1 << 20) - 1)).tolist(), strict=True):
                pieces[flag] = pieces.get(flag, "") + (tokenizer.id_to_token(token) or "")
            read.append([piece.lower() for piece in pieces.values()])
        assert read[0] == read[1]  # the same characters between two starts
        assert "".join(read[0]).replace("▁", " ").strip() == " ".join(text.lower().split())[: len("".join(read[0])) - 1]
    assert lengths(mine)[2:4].tolist() == [0, 0]
    assert lengths(mine)[-1] == 320  # of two pieces a word
    assert lengths(its)[-1] == 160


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizers: tuple[Tokenizer, Tokenizer]) -> dict[str, Any]:
    """A training folder of two languages, packed."""
    zstandard = pytest.importorskip("zstandard")
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=words))

    files = {
        "mono/en.txt.zst": sorted({text(6) for _ in range(300)}),
        "mono/de.txt.zst": sorted({text(9) for _ in range(40)}),
        "qa_pairs/some.en.tsv.zst": [f"{text(4)} here\t{text(30)}" for _ in range(150)],
        "parallel/ntrex128.tsv.zst": [f"en\tde\t{text(8)}\t{text(8)}" for _ in range(120)],
    }
    for name, rows in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(zstandard.compress("\n".join(rows).encode()))
    packed: dict[str, Any] = pack(folder, *tokenizers, most=200)
    return packed


def read(drawn: Drawn, tokenizers: tuple[Tokenizer, Tokenizer]) -> list[list[str]]:
    """Return drawn texts as the student and as the teacher reads them."""
    sides = []
    for tokenizer, batch in zip(tokenizers, (drawn.mine, drawn.its), strict=True):
        rows = batch.ids.split(batch.lengths.tolist())
        assert all(row[0] == 0 and row[-1] == 2 for row in rows)
        sides.append([tokenizer.decode(row.tolist()).lower() for row in rows])
    return sides


def test_a_mixture_draws_texts_that_both_read_alike(
    corpus: dict[str, Any], tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    mixture = Mixture(corpus, torch.device("cpu"), seed=0)
    seen = []
    for _ in range(20):
        drawn = mixture.texts(400)
        mine, its = read(drawn, tokenizers)
        assert mine == its
        assert len(drawn.mine.ids) <= 400
        seen += drawn.language.tolist()
        spans = drawn.spans
        assert spans.student.max() == spans.teacher.max() == spans.count - 1
        ends = [batch.ids < len(SPECIALS) for batch in (drawn.mine, drawn.its)]
        assert (spans.student[ends[0]] == -1).all()
        assert (spans.teacher[ends[1]] == -1).all()
        # A span lies in one text, the same on both sides.
        of = [torch.full((spans.count,), -1) for _ in range(2)]
        of[0][spans.student[~ends[0]]] = drawn.mine.text[~ends[0]]
        of[1][spans.teacher[~ends[1]]] = drawn.its.text[~ends[1]]
        assert torch.equal(*of)
        assert (of[0] >= 0).all()
    assert set(seen) == {0, 1}


def test_a_mixture_draws_pairs_of_one_source_without_repeats(
    corpus: dict[str, Any], tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    mixture = Mixture(corpus, torch.device("cpu"), seed=1)
    kinds = set()
    for _ in range(20):
        first, second = mixture.pairs(2000)
        assert len(first.mine.lengths) == len(second.mine.lengths) > 1
        for side in (first, second):
            mine, its = read(side, tokenizers)
            assert mine == its
            assert len(set(mine)) == len(mine)
        assert len(first.mine.ids) + len(second.mine.ids) <= 2000
        kinds.add((first.language.unique().tolist() == second.language.unique().tolist(), len(first.language.unique())))
    assert kinds == {(True, 1), (False, 1)}  # questions and passages, or translations


def test_long_documents_are_several_texts_to_the_teacher(
    corpus: dict[str, Any], tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    mixture = Mixture(corpus, torch.device("cpu"), seed=2)
    for _ in range(5):
        drawn = mixture.long(6000)
        mine, its = read(drawn, tokenizers)
        assert drawn.its.lengths.max() <= 512
        assert 500 < drawn.mine.lengths.min() <= drawn.mine.lengths.max() <= 4096
        for text, whole in enumerate(mine):
            parts = [part for part, of in zip(its, drawn.part_of.tolist(), strict=True) if of == text]
            assert " ".join(parts) == whole


def test_values_are_kept_where_they_come_first() -> None:
    assert first_ones(torch.tensor([7, 3, 7, 9, 3])).tolist() == [0, 1, 3]


def test_passages_that_share_words_stand_together(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    texts = [
        f"{topic} {topic} {'away' if i % 3 else 'far'}" for i in range(20) for topic in ("cat", "katze", "mat", "dog")
    ]
    mine, _ = tokenized(texts, *tokenizers)
    order = likes_together(mine, torch.arange(len(texts)))
    assert sorted(order.tolist()) == list(range(len(texts)))
    topics = [texts[i].split()[0] for i in order.tolist()]
    assert sum(a != b for a, b in itertools.pairwise(topics)) <= 15  # of 79; 59 by chance


@pytest.mark.parametrize("kind", ["text", "pair", "long"])
def test_every_kind_of_step_has_gradients(
    kind: str, corpus: dict[str, Any], tokenizers: tuple[Tokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    teacher = small_teacher(pieces=tokenizers[1].get_vocab_size())
    teacher.weights["emb.pos"] = 0.05 * torch.randn(512, 384)
    monkeypatch.setattr(distil, "Teacher", lambda: teacher)
    pieces = tokenizers[0].get_vocab_size()
    shape = {
        "vocab_size": pieces, "hidden_size": 384, "num_layers": 5, "num_heads": 12, "intermediate_size": 512,
        "type_vocab_size": 0, "rope_theta": 1e10, "rope_scaling": {"kind": "none", "factor": 1.0},
    }  # fmt: skip
    student = Student(distil.config_from(shape))
    words = coarse(torch.randn(pieces, 384), EMBEDDING_STEPS, per_row=True)
    start = {
        "shape": shape,
        "weights": student.state_dict() | {"word_embeddings.weight": words},
        "layers": [0, 1, 2],
        "mean": torch.zeros(384),
        "projection": torch.eye(384),
        "rarities": {language: torch.rand(pieces) for language in ("de", "en")},
    }
    run = Run(start, corpus, torch.device("cpu"), seed=0)
    run.start_classifier(tokens=500)
    with (
        rounded(run.student.layers[FIRST:], True, eight_bits=True),
        rounded_words(run.student.word_embeddings, words, True),
    ):
        value, figures = run.long_loss(2000) if kind == "long" else getattr(run, f"{kind}_loss")(1500, 1.0)
        value.backward()
    assert value.isfinite()
    assert figures.isfinite().all()
    for name, parameter in run.student.named_parameters():
        trained = not name.startswith("layers.0.") and not (kind == "long" and name.startswith("classifier"))
        assert (parameter.grad is not None) == trained, name
    assert run.student.word_embeddings.weight.grad is not None
    assert not run.student.word_embeddings.weight.grad[:, OWN].any()


def test_a_sum_of_cosines_of_the_distance_is_found_again() -> None:
    frequencies = torch.tensor([1.0, 0.237, 0.0562, 0.0133])
    distances = torch.arange(-64, 65).float()
    kernel = 3 * torch.exp(-((distances - 1) ** 2) / 50) - 1  # looks mostly at the next few tokens
    amplitudes = fit_cosines(kernel, frequencies)
    angles = distances[:, None] * frequencies
    fitted = (angles.cos() * amplitudes.real + angles.sin() * amplitudes.imag).sum(1)
    near = distances.abs() <= 12
    assert torch.corrcoef(torch.stack([fitted[near], kernel[near]]))[0, 1] > 0.95


def test_biases_alone_make_attention_depend_on_distance(encoder: GTEEncoder) -> None:
    config = encoder.config
    layer = Layer(config, carrying=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.attention["qkv_proj"].weight, std=0.05)
    size = config.hidden_size // config.num_heads
    frequencies = 1e10 ** (-torch.arange(0, size, 2) / size)
    distances = torch.arange(-64, 65).float()
    kernel = 4 * torch.exp(-(distances**2) / 20)
    hidden = torch.randn(400, config.hidden_size)
    with torch.no_grad():
        place_positions(layer, kernel.expand(config.num_heads, -1), hidden, frequencies)
        bias = layer.attention["qkv_proj"].bias[: 2 * config.hidden_size].view(2, 1, config.num_heads, size)
        angles = torch.arange(40.0)[:, None, None] * frequencies
        q, k = (rotate(part.expand(40, -1, -1), angles.cos(), angles.sin())[:, 0].clone() for part in bias)
    for pair in range(SLOTS, size // 2):  # the content's biases are not what this is about
        q[:, [pair, pair + size // 2]] = 0
    row = (q[20] @ k.T) * size**-0.5
    amplitudes = fit_cosines(kernel, frequencies[:SLOTS])
    turned = (torch.arange(40.0)[:, None] - 20) * frequencies[:SLOTS]
    wanted = (turned.cos() * amplitudes.real + turned.sin() * amplitudes.imag).sum(1)
    torch.testing.assert_close(row, wanted, atol=1e-4, rtol=0)


def small_teacher(layers: int = 3, pieces: int = 60, width: int = 384) -> Teacher:
    """Return a teacher with random weights; its width is the real one's, because channels have numbers."""
    teacher = Teacher.__new__(Teacher)
    teacher.hidden_size, teacher.intermediate_size, teacher.num_layers, teacher.num_heads = width, 256, layers, 12
    teacher.max_positions, teacher.eps = 64, 1e-12
    torch.manual_seed(0)
    w = {
        "emb.word": torch.randn(pieces, width),
        "emb.pos": 0.05 * torch.randn(64, width),
        "emb.type": torch.zeros(width),
    }
    w["emb.word"][[0, 2], 15] = 200.0  # as the real one's special tokens are: one channel, and little else
    norms = ["emb.ln"]
    for layer in range(layers):
        for name, rows, columns in (
            *((part, width, width) for part in ("q", "k", "v", "ao")),
            ("fi", 256, width),
            ("fo", width, 256),
        ):
            w[f"l{layer}.{name}.w"] = 0.05 * torch.randn(rows, columns)
            w[f"l{layer}.{name}.b"] = 0.05 * torch.randn(rows)
        norms += [f"l{layer}.aln", f"l{layer}.oln"]
    for name in norms:
        w[name + ".w"], w[name + ".b"] = 0.5 + 0.05 * torch.randn(width), 0.05 * torch.randn(width)
    teacher.weights = w
    teacher.prepare()
    return teacher


RARITIES = torch.linspace(-0.5, 0.5, 60).index_fill(0, torch.arange(4), 0.0)


def small_student(teacher: Teacher, config: GTEConfig, token_ids: list[list[int]]) -> Student:
    """Return the teacher transplanted, one layer before its three and one after them."""
    seen = statistics(teacher, token_ids, ["en"] * len(token_ids))
    return transplant(
        teacher,
        teacher.weights["emb.word"],
        [0, 1, 2],
        dataclasses.replace(config, vocab_size=60, num_layers=5, intermediate_size=256, rope_theta=1e10),
        seen["constants"],
        torch.zeros(384),
        torch.eye(384),
        [torch.arange(256 - CARRYING)] * 3,
        RARITIES,
        seen["norms"],
    )


def test_the_first_layer_counts_and_leaves_everything_else_alone(encoder: GTEEncoder) -> None:
    teacher = small_teacher()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 60, (60,), generator=generator).tolist()
    token_ids = [[0, *torch.randint(4, 60, (length,), generator=generator).tolist(), 2] for length in lengths]
    student = small_student(teacher, encoder.config, token_ids)
    batch = Batch.of(token_ids)
    ordinary = batch.ids > 3
    with torch.inference_mode():
        before = student.embeddings_ln(student.word_embeddings(batch.ids))[ordinary]
        told = place_counting(student, [Batch.of(token_ids)], RARE_SCALE * 0.6)
        words = student.embeddings_ln(student.word_embeddings(batch.ids))
        after = student.layers[0](words, *turns(batch, student.frequencies), batch)[ordinary]
    assert told > 0.8  # of the variance of the factors; without the code by which tokens know their like: below 0.3
    factors = saturated_counts(batch)[ordinary]
    weights = (RARITIES[batch.ids[ordinary]] + 0.6) * factors
    assert torch.corrcoef(torch.stack([after[:, RARE], weights]))[0, 1] > 0.97
    assert after[:, GAIN].std() < 0.01  # where the factor was
    assert after[:, STANDING].abs().max() < 0.05  # the code is gone: it was 0.4
    others = [channel for channel in range(384) if channel not in OWN]
    torch.testing.assert_close(after[:, others], before[:, others], atol=0.05, rtol=0.05)


def test_a_saturated_count_is_that_of_bm25() -> None:
    batch = Batch.of([[0, 7, 7, 8, 2], [0, 7, 2]])
    c, n = torch.tensor([2.0, 2.0, 1.0, 1.0]), torch.tensor([5.0, 5.0, 5.0, 3.0])
    torch.testing.assert_close(saturated_counts(batch)[batch.ids > 3], c / (c + 0.3 + 0.7 * n / 150))


def test_a_healed_student_carries_rarity_and_has_special_tokens_of_their_own_channels(encoder: GTEEncoder) -> None:
    teacher = small_teacher()
    generator = torch.Generator().manual_seed(1)
    token_ids = [[0, *torch.randint(4, 60, (7,), generator=generator).tolist(), 2] for _ in range(80)]
    batch = Batch.of(token_ids)
    student = small_student(teacher, encoder.config, token_ids)
    place_counting(student, [batch], RARE_SCALE * 0.6)
    for linear in (student.layers[n].attention["o_proj"] for n in range(FIRST, FIRST + 3)):
        assert not linear.weight[OWN].any()  # attention never writes there
    # Every token is a span of its own: both read the same pieces.
    encodings = [Tokens(*((i, i + 1) for i in range(len(ids) - 2))) for ids in token_ids]
    lessons = []
    for start in range(0, 80, 10):
        few = slice(start, start + 10)
        spans = common(encodings[few], encodings[few], [9] * 10)
        lessons.append(Lesson(Batch.of(token_ids[few]), Batch.of(token_ids[few]), spans, {}))
    missed = heal(student, teacher, [0, 1, 2], lessons)
    assert missed[-1] < 0.5
    with torch.inference_mode():
        states = student(batch)
    first, *_, last = (hidden[:, RARE] for hidden in states[:-1])
    assert torch.corrcoef(torch.stack([first, last]))[0, 1] > 0.95  # untouched channels: about 0
    special = batch.ids < 4
    for hidden in states[:-1]:
        held = hidden[special][:, STANDING]
        assert held.square().sum(1).div(hidden[special].square().sum(1)).min() > 0.7  # of an ordinary token: about 0.02
        assert hidden[~special][:, STANDING].abs().max() < 0.1 * held.abs().min()
    place_pooling(student, lessons)
    pooling = student.layers[-1]
    with torch.inference_mode():
        mixed = pooling.mixed(states[-2], *turns(batch, student.frequencies), batch)
        values = pooling.attention["qkv_proj"](states[-2])[:, 2 * 384 :]
    # The first token looks at all tokens alike, all others at the closing one.
    torch.testing.assert_close(mixed[batch.first], batch.mean(values), atol=0.15, rtol=0)  # values have deviation 0.5
    torch.testing.assert_close(mixed[~special], values[batch.ids == 2][batch.text[~special]], atol=0.05, rtol=0)


def test_some_states_are_read_as_others_and_the_rest_almost_as_before() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.linspace(2, 0.05, 64)
    others = torch.randn(4000, 64, generator=generator) * spectrum
    marks, instead = torch.randn(2, 2, 64, generator=generator).unbind(0)
    linear = torch.nn.Linear(64, 32)
    before = linear(torch.cat([instead, others])).detach()
    with torch.no_grad():
        change = linear(instead) - linear(marks)
        plain = others @ torch.linalg.pinv(marks) @ change  # blind to what others are like
        tell_apart(linear, marks, change, others)
        after = linear(torch.cat([marks, others]))
    torch.testing.assert_close(after[:2], before[:2], atol=1e-4, rtol=0)
    assert (after[2:] - before[2:]).square().mean() < plain.square().mean() / 5


def test_word_embeddings_make_good_for_pieces_the_student_lacks() -> None:
    generator = torch.Generator().manual_seed(0)
    its_words = torch.randn(6, 8, generator=generator)
    # Piece 5 of the teacher is what the student writes as pieces 3 and 4; piece 2 is one of both.
    mine, its = Tokens((0, 1), (1, 2), (2, 3)), Tokens((0, 1), (1, 3))
    mine.ids, its.ids = [0, 2, 3, 4, 1], [0, 2, 5, 1]
    words = heal_words(its_words[:5], its_words, [mine] * 1000, [its] * 1000)
    torch.testing.assert_close(
        words[3:5].mean(0), its_words[5], atol=0.02, rtol=0
    )  # 3 occurrences of what was, beside 1000
    torch.testing.assert_close(words[2], its_words[2])
    assert torch.equal(words[:2], its_words[:2])  # special tokens are in no span


def test_what_layer_norms_did_to_a_channel_is_undone_in_the_mlp() -> None:
    up, gate, down = carrying_neurons(constant=0.5, width=384)
    hidden = torch.randn(6, 384, generator=torch.Generator().manual_seed(0))
    scaled = torch.tensor([0.6, 0.8, 0.9, 1.1, 1.2, 1.4])
    rarity = torch.tensor([1.0, -0.7, 0.3, -0.2, 0.8, -1.1])
    hidden[:, CONSTANT], hidden[:, GAIN], hidden[:, RARE] = 0.5, scaled, rarity * scaled
    added = (torch.nn.functional.gelu(hidden @ gate.T) * (hidden @ up.T)) @ down.T
    left = 1 - (1 - scaled) ** 2
    torch.testing.assert_close((hidden + added)[:, RARE], rarity * left)
    torch.testing.assert_close((hidden + added)[:, GAIN], left)
    others = [channel for channel in range(384) if channel not in (RARE, GAIN)]
    assert not added[:, others].any()


def test_the_last_layer_on_kept_states_is_the_whole_student(encoder: GTEEncoder) -> None:
    torch.manual_seed(0)
    run = Run.__new__(Run)
    run.student = Student(dataclasses.replace(encoder.config, vocab_size=60, num_layers=3, intermediate_size=64))
    run.device, run.dtype = torch.device("cpu"), torch.float32
    token_ids = [[0, 7, 8, 2], [0, 9, 2]]
    finish = Finish(run)
    run.tokens = 0
    kept = finish.example(Batch.of(token_ids), torch.zeros(2, 384), torch.tensor([0, 1]))
    with torch.inference_mode():
        torch.testing.assert_close(
            finish.apply(kept), run.student(Batch.of(token_ids))[-1], atol=5e-3, rtol=0
        )  # float16
    finish.apply(kept)[kept.batch.first].sum().backward()
    assert finish.layers[-1].attention["o_proj"].weight.grad is not None
    assert run.student.word_embeddings.weight.grad is None


def test_rounding_is_there_within_and_gone_after() -> None:
    layer = torch.nn.Linear(384, 384)
    precise = layer.weight.detach().clone()
    with rounded(layer, active=True):
        assert torch.equal(layer.weight, coarse(precise, STEPS))
        assert not torch.equal(layer.weight, precise)
        layer(torch.ones(1, 384)).sum().backward()
    assert torch.equal(layer.weight, precise)
    assert layer.weight.grad is not None


def test_the_usual_rarity_of_a_token_is_that_where_it_occurs() -> None:
    texts = Texts.__new__(Texts)
    texts.pools, texts._languages = {language: {"mono": ["a text"] * 6000} for language in ("de", "en")}, [1.0, 1.0]
    # "die" is everywhere in German and nowhere in English; a name is rare in both; the last token never occurs.
    rare = {"de": np.array([0.05, 0.8, 1.0], np.float32), "en": np.array([1.0, 0.8, 1.0], np.float32)}
    assert texts.usual_rarity(rare) == pytest.approx([0.05, 0.8, 1.0], abs=1e-3)
