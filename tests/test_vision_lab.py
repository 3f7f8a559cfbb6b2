"The lab's model that sees: its world, what ships of it, and that the record and the model agree."

import random
import numpy as np, pytest, torch
from transformer2_nbdev import vision
from transformer2_nbdev.evaluate import evaluate
from transformer2_nbdev.tasks import get_task, render

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded():
    return vision.load("V")


def test_what_ships_is_small_and_complete(loaded):
    model, _, tasks = loaded
    folder = vision.DATA / "V"
    assert (
        sum(p.stat().st_size for p in folder.glob("*")) < 3e6
        and (folder / "model.safetensors").stat().st_size < 1.5e6
    )
    assert type(model).__name__ == "LlavaForConditionalGeneration" and set(tasks) == set(
        vision.TASKS
    )
    assert vision.record()["recipe"] == vars(vision.BASES["V"])


@pytest.mark.parametrize("name", vision.TASKS)
def test_every_task_by_name_and_every_gold_is_right(name):
    task = get_task(f"lab.vision-{name}" if name.startswith("cls") else f"lab.{name}")
    for e in task.examples("test")[:200]:
        assert (
            task.judge(task.answer(e), e).reward == 1.0 and task.judge("purple 7", e).reward == -0.1
        )


def test_splits_share_no_word_and_no_font():
    words, fonts = {}, {}
    for s in vision.SIZES:
        facts = [
            e["facts"]
            for n in vision.TASKS
            for e in get_task(f"lab.vision-{n}" if n.startswith("cls") else f"lab.{n}").examples(s)
        ]
        words[s], fonts[s] = {q[0] for q in facts}, {q[1] for q in facts}
    for kind in (words, fonts):
        assert (
            kind["train"].isdisjoint(kind["test"])
            and kind["train"].isdisjoint(kind["validation"])
            and kind["validation"].isdisjoint(kind["test"])
        )
    read = {r[2] is not None and tuple(r[2][0, 0]) for r in next(vision.corpus(0, False))}
    assert len(read) > 30  # pictures of a batch differ


def test_the_corpus_shows_no_picture_of_a_test_word(monkeypatch):
    seen = []
    real = vision.picture
    monkeypatch.setattr(vision, "picture", lambda *q: seen.append(q) or real(*q))
    corpus = vision.corpus(3, True)
    for _ in range(5):
        next(corpus)
    assert len(seen) > 200 and all(
        vision.split_of(q[0]) == "train" and q[1] in vision.FONTS["train"] for q in seen
    )


def test_a_picture_follows_from_its_facts():
    q = vision.draw("read", random.Random(0), "test")
    a, b = vision.picture(*q), vision.picture(*q)
    assert a.dtype == np.uint8 and a.shape == (60, 60, 3) and (a == b).all()
    assert (a != vision.picture("b" + q[0][1:] if q[0][0] != "b" else "c" + q[0][1:], *q[1:])).any()


def test_slips_are_always_wrong():
    for name in vision.ASK:
        for i in range(200):
            q = vision.draw(name, random.Random(i), "train")
            right, wrong = vision.work(name, q), vision.work(name, q, (vision.SLIP[name],))
            assert right != wrong and right.split()[-1:] != wrong.split()[-1:] or name == "read"
            assert right != wrong


def test_the_processor_speaks_the_models_language(loaded):
    model, processor, tasks = loaded
    for task in tasks.values():
        e = task.examples("validation")[0]
        text = render(task, e, processor)
        ids = processor(text=[str(text)], images=[vision.image_of(e)], return_tensors="pt")[
            "input_ids"
        ][0]
        assert (
            ids == model.config.image_token_index
        ).sum() == vision.PATCHES and processor.tokenizer.unk_token_id not in ids.tolist()
        assert (
            processor.tokenizer.unk_token_id not in processor.tokenizer(task.answer(e))["input_ids"]
        )


def test_the_model_answers_as_its_record_says(loaded):
    model, processor, tasks = loaded
    r = vision.record()["accuracy"]["count"]
    got = evaluate(model, processor, tasks["count"], limit=167, batch_size=167, progress=False)
    assert abs(got.acc - r["correct"] / r["n"]) < 0.12


def test_without_the_picture_nothing_can_be_read(loaded):
    model, processor, tasks = loaded
    from dataclasses import replace
    from PIL import Image

    def blank(e):
        return [
            dict(
                role="user",
                content=[
                    dict(type="image", image=Image.new("RGB", (60, 60), "gray")),
                    dict(type="text", text=e["text"]),
                ],
            )
        ]

    got = evaluate(
        model,
        processor,
        replace(tasks["read"], prompt=blank),
        limit=60,
        batch_size=60,
        progress=False,
    )
    assert got.correct <= 1


def test_names_that_are_not_there():
    with pytest.raises(ValueError, match="no lab model 'W' that sees; there is V"):
        vision.load("W")
    with pytest.raises(ValueError, match="no split 'dev'"):
        get_task("lab.read").examples("dev")
    with pytest.raises(ValueError, match="no task 'smell'"):
        vision.task("smell")
