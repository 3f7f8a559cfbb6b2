"""Tokens per second of generation: `python benchmarks/generation.py --chat FOLDER`.

The same prompts, the same seed, one thread, processor seconds, best of --best runs. Tokens that
count are those up to the end of each answer. Ways:

    library   `model.generate` on the padded rectangle, a logits processor noting log-probabilities
    ours      `sample_steps`: rows leave; prompts that are alike, and a shared beginning, are read
              once
    room      ours, with keys and values in memory taken ahead instead of torch.cat at every token
    paged     transformers' continuous batching (`generate_batch`), greedy only, the better of two
              runs, given up after 60 seconds

    lab       128 sums for lab base A, 8 tokens
    samples   16 sums, 8 answers each, as a training step asks them
    sentences stories260k, 96 beginnings, up to 60 tokens, a full stop ends an answer
    stories   stories260k, one beginning 64 times, 96 tokens
    turns     SmolLM2-135M-Instruct, 16 questions behind three example turns, 4 tokens
    chat      SmolLM2-135M-Instruct, 8 questions, up to 48 tokens

`same` says whether greedy tokens are those of the library. The record is transformer2_nbdev/data/records/
generation.json.
"""
import argparse, json, signal, time
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

import auto_lr
from pieces import RECORDS, about
from transformer2_nbdev import rollout
from transformer2_nbdev.evaluate import write_atomic
from transformer2_nbdev.rollout import (encode, eos_ids, forked_rng, pad_id, pad_left,
                                        sample_steps, sample_whole, sampling_config, undisturbed,
                                        until_eos)
from transformer2_nbdev.tasks import render

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


class Room(DynamicLayer):
    "Keys and values of one layer in memory that is taken ahead: a new token copies nothing"
    room, used = None, 0

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized: self.lazy_initialization(keys, values)
        n = self.used + keys.shape[2]
        if self.room is None or n > self.room[0].shape[2]: self.grow((keys, values), n + max(n, 64))
        for place, new in zip(self.room, (keys, values)): place[:, :, self.used:n] = new
        self.used = n
        self.keys, self.values = (place[:, :, :n] for place in self.room)
        return self.keys, self.values

    def grow(self, like, size):
        new = [x.new_empty(*x.shape[:2], size, x.shape[3]) for x in like]
        for place, old in zip(new, self.room or ()): place[:, :, :self.used] = old[:, :, :self.used]
        self.room = new

    def batch_repeat_interleave(self, repeats):
        self.change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices): self.change(lambda x: x[indices])

    def change(self, f):
        self.room = [f(x) for x in self.room]
        self.keys, self.values = (x[:, :, :self.used] for x in self.room)


class RoomCache(DynamicCache):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layers = [Room() if type(l) is DynamicLayer else l for l in self.layers]


def with_room(*args):
    rollout.DynamicCache = RoomCache
    try: return sample_steps(*args)
    finally: rollout.DynamicCache = DynamicCache


def cases(names):
    "(name, model, tokenizer, prompts, tokens, further ends)"
    for name in names:
        kinds = dict(lab="math", samples="math", sentences="dog", stories="dog")
        kind = kinds.get(name, "dispatch")
        model, tok, task = auto_lr.base(kind)
        ends = tok("x.", add_special_tokens=False)["input_ids"][-1:] if name == "sentences" else []
        rows = task.examples("test")
        begun = ["Once upon a time", "The dog", "One day Lily and Tom went to the big park and"]
        eight = [e for e in rows[:16] for _ in range(8)]
        prompts, T = dict(lab=(rows[:128], 8), samples=(eight, 8),
                          sentences=(begun * 32, 60), stories=(begun[:1] * 64, 96),
                          turns=(rows[:16], 4), chat=(rows[:8], 48))[name]
        if name == "chat": prompts = [render([dict(role="user", content=e["question"])], None, tok)
                                      for e in prompts]
        texts = [p if isinstance(p, str) else render(task, p, tok) for p in prompts]
        yield name, model, tok, texts, T, ends


def timed(f, best):
    "Processor seconds, and what f returned"
    seconds = []
    for _ in range(best):
        began = time.process_time()
        result = f()
        seconds.append(time.process_time() - began)
    return min(seconds), result


def too_slow(*_): raise TimeoutError("no end within 60 seconds")


def paged(model, rows, config):
    "Continuous batching; the answers in the order of the rows"
    blocks = ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=1024)
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(60)
    try: out = model.generate_batch(inputs=rows, generation_config=config, progress_bar=False,
                                    continuous_batching_config=blocks)
    finally: signal.alarm(0)
    answers = [o.generated_tokens for o in out.values()]
    T = max(map(len, answers))
    return torch.tensor([a + [config.pad_token_id] * (T - len(a)) for a in answers]), None


def compare(name, model, tok, texts, T, ends, best):
    "One line for each way and temperature"
    eos, fill = eos_ids(model, tok) + ends, pad_id(model, tok)
    rows, lines, tokens = encode(tok, texts, eos), [], {}
    for hot in (0., 1.):
        config = sampling_config(hot, max_new_tokens=T, eos_token_id=eos, pad_token_id=fill)
        ids, mask = pad_left(rows, fill)
        ways = dict(library=sample_whole, ours=sample_steps, room=with_room)
        for way, sample in ways.items():
            def once():
                with undisturbed(model), forked_rng(0, CPU): return sample(model, ids, mask, config)
            seconds, (out, _) = timed(once, best)
            lines.append(line(name, way, hot, seconds, out, eos, tokens.setdefault(hot, out)))
        if hot: continue
        try: seconds, (out, _) = timed(lambda: paged(model, rows, config), 2)
        except Exception as e:
            print(f"{name} paged: {type(e).__name__}: {str(e)[:120]}", flush=True)
            lines.append(dict(case=name, way="paged", failed=f"{type(e).__name__}: {str(e)[:120]}"))
        else: lines.append(line(name, "paged", hot, seconds, out, eos, tokens[hot]))
    return lines


def line(name, way, hot, seconds, out, eos, first):
    kept = until_eos(out, eos)
    n, w = int(kept.sum()), min(out.shape[1], first.shape[1])
    same = bool(((out * kept)[:, :w] == (first * until_eos(first, eos))[:, :w]).all())
    row = dict(case=name, way=way, temperature=hot, rows=len(out), tokens=n, same=same,
               seconds=round(seconds, 3), tokens_a_second=round(n / seconds, 1))
    print(row, flush=True)
    return row


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names = ["lab", "samples", "sentences", "stories", "turns", "chat"]
    p.add_argument("--cases", nargs="+", default=names, choices=names)
    p.add_argument("--chat", help="folder of SmolLM2-135M-Instruct, for turns and chat")
    p.add_argument("--best", type=int, default=2)
    p.add_argument("--out", default=str(RECORDS / "generation.json"))
    a = p.parse_args()
    torch.set_num_threads(1)
    auto_lr.CHAT.update(model=a.chat)
    out = Path(a.out)
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    for case in cases(a.cases):
        rows = [r for r in rows if r["case"] != case[0]] + compare(*case, a.best)
        record = about() | dict(command="python benchmarks/generation.py --chat FOLDER", rows=rows)
        write_atomic(out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
