"""The parts of the training recipe that can be checked without its data and its teacher."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gte_rag import GTEEncoder
from gte_rag.checkpoint import load_checkpoint

TRAINING = Path(__file__).parent.parent / "training"
if not TRAINING.is_dir():
    pytest.skip("training/ is part of the repository, not of the sdist", allow_module_level=True)
sys.path.insert(0, str(TRAINING))

from alignment import common  # noqa: E402
from batch import Batch  # noqa: E402
from heal import SLOTS, Lesson, fit_cosines, heal, place_positions  # noqa: E402
from mixture import Texts  # noqa: E402
from student import CONSTANT, RARE, Layer, Student, rotate, transplant  # noqa: E402
from teacher import Teacher  # noqa: E402


class Tokens:
    """What `common` reads of an encoding: offsets between two special tokens."""

    def __init__(self, *offsets: tuple[int, int]) -> None:
        self.offsets = [(0, 0), *offsets, (0, 0)]
        self.ids = list(range(len(self.offsets)))


def test_attention_stays_within_a_text_whatever_the_lengths() -> None:
    batch = Batch([[5, 6, 7], [8], [9, 10]])
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
        batch = Batch([encoder.tokenizer.encode(text).ids for text in texts])
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
    assert spans.student.tolist() == [0, 1, 1, 2, 3, -1]
    assert spans.teacher.tolist() == [0, 1, 2, 2, 3, -1]
    means = spans.mean(torch.arange(6.0)[:, None], spans.student)
    assert means.squeeze(1).tolist() == [0, 1.5, 3, 4]


def test_spans_end_where_the_student_stops_reading() -> None:
    spans = common([Tokens((0, 2), (2, 4), (4, 6))], [Tokens((0, 2), (2, 6))], [4])
    assert spans.student.tolist() == [0, 1, -1, -1]  # the teacher's second token reaches beyond
    assert spans.teacher.tolist() == [0, 1, -1, -1]


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
    layer = Layer(config, plain=True)
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


def test_a_channel_carries_the_rarity_of_tokens_to_the_last_layer(encoder: GTEEncoder) -> None:
    teacher = small_teacher()
    generator = torch.Generator().manual_seed(1)
    token_ids = [torch.randint(4, 60, (9,), generator=generator).tolist() for _ in range(80)]
    batch = Batch(token_ids)
    states = [teacher.embedded(batch), *teacher.states(batch)]
    constants, norms = torch.ones(7), torch.tensor([[0.0, 1.0, 0.0]]).repeat(7, 1)
    norms[:, 2] = torch.stack([states[(at + 1) // 2][:, RARE].mean() for at in range(7)])
    config = dataclasses.replace(encoder.config, vocab_size=60, num_layers=4, intermediate_size=256)
    rarity = torch.linspace(-0.5, 0.5, 60)
    projection, mean = torch.eye(384), torch.zeros(384)
    neurons = [torch.arange(256)] * 3
    student = transplant(
        teacher, range(60), [0, 1, 2], config, constants, mean, projection, mean, neurons, rarity, norms
    )
    for linear in (student.layers[n].attention["o_proj"] for n in range(3)):
        assert not linear.weight[[CONSTANT, RARE]].any()  # nobody but the embeddings writes there
    # Every token is a span of its own: both read the same pieces.
    encodings = [Tokens(*((i, i + 1) for i in range(len(ids) - 2))) for ids in token_ids]
    lessons = []
    for start in range(0, 80, 10):
        few = slice(start, start + 10)
        spans = common(encodings[few], encodings[few], [9] * 10)
        lessons.append(Lesson(Batch(token_ids[few]), Batch(token_ids[few]), spans, {}))
    missed = heal(student, teacher, [0, 1, 2], lessons)
    assert missed[-1] < 0.5
    with torch.inference_mode():
        carried = student(batch)[2][:, RARE]
    assert torch.corrcoef(torch.stack([carried, rarity[batch.ids]]))[0, 1] > 0.8  # untouched channels: about 0


def test_the_usual_rarity_of_a_token_is_that_where_it_occurs() -> None:
    texts = Texts.__new__(Texts)
    texts.pools, texts._languages = {"de": {}, "en": {}}, [1.0, 2.0]
    # "die" is everywhere in German and nowhere in English; a name is rare in both; the last token never occurs.
    rare = {"de": np.array([0.05, 0.8, 1.0], np.float32), "en": np.array([1.0, 0.8, 1.0], np.float32)}
    assert texts.usual_rarity(rare) == pytest.approx([0.05, 0.8, 1.0], abs=1e-3)
