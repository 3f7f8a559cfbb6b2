"""When does an expert survive a change of model, and when does the order of its numbers matter?

    python benchmarks/transfer.py [--parts carry train stability shuffles mix home --out transfer.json --work runs/transfer]

The experts that ship with lab base A (math, code, logic; seed 0) are carried to three other bases. Everything is answered greedily on the 1,002
test items of a task and compared with the target's own base item by item. Six parts, each usable without the later ones:

    carry      A -> A-sibling, B: ordered, matched and three shuffles; A -> B-wide: resampled; on every task. On the expert's own skill and its
               unseen twin also mean, three random draws of equal norm, and B-wide's shuffles (of the resampled numbers). The experts at home, on A.
    stability  A-sibling, with the experts carried over in order, goes on learning from more flawed text. Then the expert is applied three ways: in
               the old basis ("kept"), as the same numbers in the basis of the new weights ("ordered"), projected onto that basis ("matched").
    train      A-sibling and B train experts of their own with the settings of `transformer2 demo`.
    shuffles   more shuffles (20 in all) onto A-sibling and B, on the expert's own skill.
    mix        few-shot search (10 shots) over the target's own experts, A's (ordered), both, and its own beside shuffled ones.
    home       stability of A's experts on A itself.
    null       200 shuffles of every expert onto A-sibling and B (the first 20 are those of `shuffles`), on the first 501 or 251 questions of its own
               skill, each with its centred cosine: the sample from which the permutation test draws.
    real       kinship of a real checkpoint (stories260k) with what became of it: rounded to 4 bits, disturbed by noise, trained on other text.
               With `--folders A B` that of any two checkpoints on disk; with `--folders A` that of one checkpoint's layers with each other.

`null` and `real` change only their own tables of the record, and leave the rest as it is.

`alike` compares the expert's operator Q diag(z - 1) Q^T before and after, all matrices together: cosine, cosine without each matrix's mean,
ratio of norms; `kin` is the mean |u_i . u'_i| of a matrix beside chance. Each finished evaluation is a line in --work, so an interrupted run goes on where it stopped.
"""
import argparse, copy, json, math, os, sys, time
from contextlib import nullcontext
from pathlib import Path

import peft, torch, transformers
from peft import PeftModel

from pieces import RECORDS, Work
from transformer2_nbdev import lab
from transformer2_nbdev.adapt import load_experts
from transformer2_nbdev.adapter import svf_layers, zs
from transformer2_nbdev.fused import fused
from transformer2_nbdev.cli import DEMO, wrap
from transformer2_nbdev.evaluate import bootstrap, evaluate, mcnemar
from transformer2_nbdev.fewshot import FewShot, draw_shots
from transformer2_nbdev.reinforce import ReinforceConfig, train_expert
from transformer2_nbdev.svd import decompose
from transformer2_nbdev.svf import compose
from transformer2_nbdev.tasks import get_task
from transformer2_nbdev.transfer import alike, carry as move, kinship, overlap, transfer

SKILLS, TASKS, TOKENS = lab.TRAINED, (*lab.TRAINED, *lab.UNSEEN, "code+math"), lab.tokenizer()
near = lambda skill: (skill, f"{skill}-hard")
NEW_TEXT, STEPS, SNAPSHOTS, LR = {"A-sibling": 202, "A": 201}, 200, (0, 50, 100, 200), 3e-3
SEARCH = dict(generations=6, population=20)
OWN = {"A-sibling": SKILLS, "B": ("math", "code")}   # B never learned logic
PARTS = ["carry", "train", "stability", "shuffles", "mix", "home"]
DRAWS, QUESTIONS = 200, {"A-sibling": 501, "B": 251} # of `null`


class Book:
    "Lines of finished work in one file: {key: value}"
    def __init__(self, path: Path):
        self.path, self.lines = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists(): self.lines = {tuple(k): v for k, v in map(json.loads, path.read_text().splitlines())}

    def __call__(self, key: tuple, make):
        "What is written under `key`, made first if it is not there"
        if key not in self.lines:
            began = time.perf_counter()
            self.lines[key] = make() | dict(seconds=round(time.perf_counter() - began, 1))
            with self.path.open("a") as f: f.write(json.dumps([key, self.lines[key]]) + "\n")
        return self.lines[key]


@torch.no_grad()
def ask(book: Book, key: tuple, model, task: str, strategy=None, dense: bool = True) -> str:
    "Which of the test items are right, as a string of 0 and 1; `dense` composes W' once instead of adding its correction to every output"
    def make():
        with fused(model) if dense and strategy is None and isinstance(model, PeftModel) else nullcontext():
            r = evaluate(model, TOKENS, lab.tasks()[task], strategy, batch_size=256, progress=False)
        return dict(right="".join(str(int(i["correct"])) for i in r.items))
    return book((*key, task), make)["right"]


def expert(skill: str) -> PeftModel:
    "Base A with one of its experts"
    return PeftModel.from_pretrained(lab.load("A")[0], lab.experts("A")[skill], adapter_name=skill).eval()


FULL = "matched, full norm"   # the same, rescaled to the norm that the expert had

def rescaled(model: PeftModel, name: str, source: PeftModel) -> PeftModel:
    z = zs(source, name)
    with torch.no_grad():
        for n, l in svf_layers(model).items(): l.svf_d[name].mul_((z[n] - 1).norm() / l.svf_d[name].norm())
    return model


def ways(target: str) -> list[tuple]: # (how, seed, tasks of a skill)
    every, wide = (lambda _: TASKS), target == "B-wide"
    straight = [("resampled", 0)] if wide else [("ordered", 0), ("matched", 0)]
    controls = [*([(FULL, 0)] if target == "A-sibling" else []), ("mean", 0), ("random", 0), ("random", 1), ("random", 2)]
    return [*[(h, s, every) for h, s in straight], *[("shuffled", s, near if wide else every) for s in range(3)], *[(h, s, near) for h, s in controls]]


def carried(source: PeftModel, skill: str, target: str, how: str, seed: int) -> PeftModel:
    "The target with the expert on it; for other widths the controls rearrange what resampling gave"
    first = lambda h: transfer(skill, source, lab.load(target)[0], h, seed, adapter_name=skill).eval()
    if how == FULL: return rescaled(first("matched"), skill, source)
    if target != "B-wide" or how == "resampled": return first(how)
    return transfer(skill, first("resampled"), lab.load(target)[0], how, seed, adapter_name=skill).eval()


def carry(book: Book, ways=ways, targets=("A-sibling", "B", "B-wide")) -> None:
    for t in TASKS: ask(book, ("carry", "A", "base", "base", 0), lab.load("A")[0], t)
    for skill in SKILLS:
        home = expert(skill)
        for t in TASKS: ask(book, ("carry", "A", skill, "home", 0), home, t)
    for target in targets:
        base = lab.load(target)[0]
        for t in TASKS: ask(book, ("carry", target, "base", "base", 0), base, t)
        for skill in SKILLS:
            source = expert(skill)
            for how, seed, tasks in ways(target):
                if all(("carry", target, skill, how, seed, t) in book.lines for t in tasks(skill)) and (target == "B-wide" or ("alike", target, skill, how, seed) in book.lines): continue
                model = carried(source, skill, target, how, seed)
                if target != "B-wide": book(("alike", target, skill, how, seed), lambda: dict(value=alike(source, model, skill, skill)))
                for t in tasks(skill): ask(book, ("carry", target, skill, how, seed), model, t)
        if target != "B-wide": book(("kin", target), lambda: dict(value={n: [round(x, 4) for x in v]
                                                                         for n, v in kinship(expert("math"), carried(expert("math"), "math", target, "ordered", 0)).items()}))
        print(f"carry: {target} done", flush=True)


def shuffles(book: Book, n: int) -> None:
    carry(book, lambda target: [("shuffled", s, lambda skill: (skill,)) for s in range(3, n)], ("A-sibling", "B"))


def continued(work: Path, base: str) -> dict: # {steps: bare model}
    "The base after more flawed text, at each snapshot"
    paths = {s: work / f"{base}-{s}.pt" for s in SNAPSHOTS[1:]}
    if not all(p.exists() for p in paths.values()):
        model = lab.load(base)[0].train()
        for i, _ in enumerate(lab.pretrain(model, TOKENS, NEW_TEXT[base], STEPS, True, lr=LR), 1):
            if i in paths: torch.save(model.state_dict(), paths[i])
    out = {0: lab.load(base)[0]}
    for s, p in paths.items():
        out[s] = lab.load(base)[0]; out[s].load_state_dict(torch.load(p, weights_only=True))
    return out


def kept(start: PeftModel, weights: dict) -> PeftModel:
    "The adapter with the basis that it has, on new base weights"
    with torch.no_grad():
        for n, p in start.get_base_model().named_parameters():
            if "svf_" not in n: p.copy_(weights[n.replace(".base_layer", "")])
    return start


def stability(book: Book, work: Path, bases: tuple) -> None:
    for base in bases:
        for steps, model in continued(work, base).items():
            weights = {n: p.clone() for n, p in model.state_dict().items()}
            fresh = lambda: [m.load_state_dict(weights) and m for m in [lab.load(base)[0]]][0]
            for t in (*lab.TRAINED, *lab.UNSEEN): ask(book, ("stability", base, "base", "base", steps), model, t)
            for skill in SKILLS:
                start = lambda: expert(skill) if base == "A" else carried(expert(skill), skill, base, "ordered", 0)
                for how in ("kept", "ordered", "matched"):
                    if all(("stability", base, skill, how, steps, t) in book.lines for t in near(skill)): continue
                    if how == "kept": now = kept(start(), weights)
                    else: now = transfer(skill, old := start(), fresh(), how, adapter_name=skill).eval()
                    for t in near(skill): ask(book, ("stability", base, skill, how, steps), now, t, dense=how != "kept")
                    if how == "kept": continue
                    book(("alike", f"{base}+{steps}", skill, how, 0), lambda: dict(value=alike(old, now, skill, skill)))
                    book(("kin", f"{base}+{steps}"), lambda: dict(value={n: [round(x, 4) for x in v] for n, v in kinship(old, now).items()}))
            print(f"stability: {base} + {steps} done", flush=True)


def train(book: Book, work: Path) -> None:
    for base, skills in OWN.items():
        for skill in skills:
            folder = work / "experts" / base / skill
            def make():
                model, tok, tasks = lab.load(base)
                train_expert(wrap(model, "svf", "all-linear", None, 0), tok, tasks[skill], ReinforceConfig(**DEMO | dict(seed=0)), folder,
                             resume=(folder / "state.pt").is_file())
                return {}
            book(("train", base, skill), make)
            own = load_experts(lab.load(base)[0], {skill: folder}).eval()
            for t in TASKS: ask(book, ("carry", base, skill, "own", 0), own, t)
        print(f"train: {base} done", flush=True)


def mix(book: Book, work: Path, seeds: int) -> None:
    for seed in range(seeds):
        for target, own in OWN.items():
            model = load_experts(lab.load(target)[0], {s: work / "experts" / target / s for s in own})
            names = {how: [f"{how}_{s}" for s in SKILLS] for how in ("ordered", "shuffled")}
            for how in names:
                for s in SKILLS: transfer(s, expert(s), model, how, seed, adapter_name=f"{how}_{s}")
            model.eval()
            sets = {"own": [*own], "theirs": names["ordered"], "both": [*own, *names["ordered"]], "own + shuffled": [*own, *names["shuffled"]]}
            for task in (*lab.UNSEEN, "code+math"):
                shots = draw_shots(lab.tasks()[task], 10, seed)
                for name, experts in sets.items():
                    key = (target, name, seed, task)
                    if ("mix", *key) in book.lines and ("alpha", *key) in book.lines: continue
                    few = FewShot(model, TOKENS, lab.tasks()[task], shots, experts, seed=seed, **SEARCH)
                    book(("alpha", *key), lambda: dict(value=[round(w, 3) for w in few.weights.tolist()], on_shots=round(few.found.score[0].item(), 3)))
                    ask(book, ("mix", *key[:3]), model, task, few)
            print(f"mix: {target}, shots of seed {seed} done", flush=True)


def against(a: str, b: str) -> list: # n, right in b, gained, lost, p, low, high of b - a
    "Two strings of 0 and 1, item by item"
    gained, lost = sum(x < y for x, y in zip(a, b)), sum(x > y for x, y in zip(a, b))
    return [len(b), b.count("1"), gained, lost, float(f"{mcnemar(gained, lost):.3g}"), *(round(x, 4) for x in bootstrap(gained, lost, len(b)))]


def numbers(skill: str) -> tuple: # ({matrix: d}, {matrix: Q}) of an expert of A, in the order in which `transfer` reads them
    "What there is to carry"
    d = {n: z.cpu() - 1 for n, z in zs(expert(skill), skill).items()}
    modules = dict(lab.load("A")[0].named_modules())
    return d, {n: decompose(modules[n].weight.detach()).Q for n in d}


@torch.no_grad()
def null_piece(skill: str, target: str, draws: range) -> dict:
    "Right answers and centred cosine of the ordered expert and of some shuffles, on plain weights"
    model, plain, task = lab.load(target)[0], lab.load(target)[0], lab.tasks()[skill]
    d, Q = numbers(skill)
    modules, weights = dict(model.named_modules()), {n: m.weight for n, m in plain.named_modules() if n in d}
    R = {n: decompose(modules[n].weight.detach()).Q for n in d}
    O2 = {n: overlap(Q[n], R[n]) for n in d}
    centred = {n: v - v.mean() for n, v in d.items()}
    size = sum(v.square().sum() for v in centred.values())
    n = QUESTIONS[target]
    ask = lambda m: evaluate(m, TOKENS, task, limit=n, batch_size=n, progress=False).correct
    def one(how: str, seed: int = 0) -> tuple:
        g = torch.Generator().manual_seed(seed)
        e = {n: move(v, len(v), how, g) for n, v in d.items()}
        for n, v in e.items(): weights[n].copy_(compose(modules[n].weight, 1 + v, R[n]))
        cosine = sum(centred[n] @ O2[n] @ (v - v.mean()) for n, v in e.items()) / size
        return ask(plain), round(cosine.item(), 4)
    base = ask(model)
    (ordered, cosine), drawn = one("ordered"), [one("shuffled", s) for s in draws]
    return dict(n=n, base=base, ordered=ordered, cosine=cosine,
                shuffled=[c for c, _ in drawn], cosines=[x for _, x in drawn])


def null_case(done: Work, skill: str, target: str) -> dict:
    "All shuffles of one transfer, from pieces of 40"
    pieces = [done.do(f"{target}_{skill}_{QUESTIONS[target]}_{i}",
                      lambda: null_piece(skill, target, range(i, min(i + 40, DRAWS)))) for i in range(0, DRAWS, 40)]
    same = {k: pieces[0][k] for k in ("n", "base", "ordered", "cosine")}
    if any(p[k] != v for p in pieces for k, v in same.items()):
        raise ValueError(f"{target}, {skill}: pieces were made by different code or weights: remove {done.folder}")
    return same | {k: [x for p in pieces for x in p[k]] for k in ("shuffled", "cosines")}


def null(work: Path, only: list[str] | None = None) -> dict:
    "{target: {expert: its 200 shuffles}}; `only` names one target and one expert"
    done, (target, skill) = Work(work / "null"), only or (None, None)
    return {t: {s: null_case(done, s, t) for s in SKILLS if skill in (None, s)}
            for t in ("A-sibling", "B") if target in (None, t)}


def four_bits(W: torch.Tensor, group: int = 32) -> torch.Tensor:
    "Rounded to 16 levels between the smallest and the largest of each group of 32, as Q4_1 does"
    x = W.reshape(-1, group)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = (high - low).clamp(min=1e-12) / 15
    return (((x - low) / step).round() * step + low).reshape(W.shape)


def relatives(folder: str) -> dict: # {what became of it: model}
    "A real checkpoint, and what became of it"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    new = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = lambda m: [p for n, p in m.named_parameters() if n.endswith("_proj.weight")]
    out, g = {"rounded to 4 bits": new()}, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in matrices(out["rounded to 4 bits"]): p.copy_(four_bits(p))
        for noise in (.03, .1, .3, 1.):
            out[f"noise {noise:g}"] = new()
            for p in matrices(out[f"noise {noise:g}"]): p.add_(noise * p.std() * torch.randn(p.shape, generator=g))
    tok, text = AutoTokenizer.from_pretrained(folder), get_task("gsm8k", data_dir=Path(folder).parent).examples("train")
    ids = torch.tensor([i for e in text[:1500] for i in tok(e["question"])["input_ids"]])
    model = new().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, 301):
        rows = ids[torch.randint(len(ids) - 128, (16, 1), generator=g) + torch.arange(128)]
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (30, 100, 300): out[f"{step} steps on other text"] = copy.deepcopy(model).eval()
    torch.manual_seed(1)
    out["another initialisation"] = type(model)(model.config)
    return {"itself": new()} | out


def bases_of(model, part: str = "") -> dict: # {matrix: Q}
    "Singular bases of the linear layers inside the blocks"
    inside = {n: m.weight.detach().float() for n, m in model.named_modules()
              if isinstance(m, torch.nn.Linear) and ".layers." in f".{n}" and part in f".{n}."}
    return {n: decompose(w).Q for n, w in inside.items()}


def thirds(pairs: list) -> dict: # pairs of bases of equal shape
    "Mean |u . u'| of the strongest, middle and weakest third of directions, and what chance gives"
    cosines = [torch.tensor_split((a * b).sum(0).abs(), 3) for a, b in pairs]
    mean = lambda xs: round(sum(xs) / len(xs), 4)
    return dict(thirds=[mean(torch.cat([c[i] for c in cosines]).tolist()) for i in range(3)],
                chance=mean([(2 / (math.pi * len(a))) ** .5 for a, _ in pairs]), matrices=len(pairs))


def real(folder: Path) -> dict:
    "{relative: kinship with it, size of the change}"
    norm = lambda ws: sum(w.norm() ** 2 for w in ws.values()) ** .5
    first, Q, out = None, None, {}
    for name, model in relatives(str(folder)).items():
        W = {n: m.weight.detach() for n, m in model.named_modules() if n.endswith("_proj")}
        R = {n: decompose(w).Q for n, w in W.items()}
        first, Q = first or W, Q or R
        change = norm({n: W[n] - first[n] for n in W}) / norm(first)
        out[name] = thirds([(Q[n], R[n]) for n in Q]) | dict(change=round(change.item(), 4))
    return out


def read(folder) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def kin_of(a, b) -> dict: # two folders of checkpoints
    "Kinship of two checkpoints, over the matrices that both have in one shape"
    A, B = (bases_of(read(f)) for f in (a, b))
    both = [n for n in A if n in B and A[n].shape == B[n].shape]
    if not both: raise ValueError(f"{a} and {b} have no matrix in common: kinship needs one architecture")
    return thirds([(A[n], B[n]) for n in both]) | dict(left_out=len(A) - len(both))


def kin_of_layers(folder) -> dict: # {how far apart: kinship}
    "Kinship of the same matrix in two blocks of one checkpoint"
    Q, out = bases_of(read(folder)), {}
    block = lambda n: int(n.split("layers.")[1].split(".")[0])
    last = max(map(block, Q))
    for gap in sorted({1, 2, max(last // 2, 1)}):
        there = lambda n: n.replace(f"layers.{block(n)}.", f"layers.{block(n) + gap}.")
        out[f"{gap} apart"] = thirds([(Q[n], Q[there(n)]) for n in Q if there(n) in Q])
    return out


COLUMNS = ["n", "correct", "gained", "lost", "p", "low", "high"]

def report(book: Book) -> dict:
    "The record: counts, exact McNemar p and bootstrap interval of the difference, row by row"
    b, right = book.lines, lambda *key: book.lines[key]["right"]
    under = lambda part: [k for k in b if k[0] == part]
    base = lambda target, task: right("carry", target, "base", "base", 0, task)
    bases = {f"{k[1]}": {t: base(k[1], t).count("1") for t in TASKS} for k in under("carry") if k[2] == "base"}
    carry = [[*k[1:], *against(base(k[1], k[5]), v["right"])] for k, v in b.items() if k[0] == "carry" and k[2] != "base"]
    order = [[*k[1:], *against(v["right"], right(*k[:3], "resampled" if k[1] == "B-wide" else "ordered", 0, k[5]))]
             for k, v in b.items() if k[0] == "carry" and k[3] in ("shuffled", "mean", "random", "matched", FULL, "own") and (k[4] < 3 or k[3] != "shuffled")
             and k[5] in near(k[2]) and (*k[:3], "resampled" if k[1] == "B-wide" else "ordered", 0, k[5]) in b]
    stab = [[*k[1:], *against(right("stability", k[1], "base", "base", k[4], k[5]), v["right"])] for k, v in b.items() if k[0] == "stability" and k[2] != "base"]
    lasts = {f"{k[1]}+{k[4]}": {} for k in under("stability") if k[2] == "base"}
    for k in under("stability"):
        if k[2] == "base": lasts[f"{k[1]}+{k[4]}"][k[5]] = b[k]["right"].count("1")
    mixes = [[*k[1:], *against(base(k[1], k[4]), v["right"]), b[("alpha", *k[1:])]["value"], b[("alpha", *k[1:])]["on_shots"]] for k, v in b.items() if k[0] == "mix"]
    pairs = [[k[1], f"both - {other}", *k[3:], *against(right("mix", k[1], other, *k[3:]), v["right"])] for k, v in b.items() if k[0] == "mix" and k[2] == "both"
             for other in ("own", "theirs", "own + shuffled") if ("mix", k[1], other, *k[3:]) in b]
    return dict(bases=bases, carry=carry, ordered_minus=order, stability=stab, stability_bases=lasts, mix=mixes, mix_pairs=pairs,
                alike=[[*k[1:], *(round(x, 4) for x in v["value"])] for k, v in b.items() if k[0] == "alike"],
                kin={k[1]: v["value"] if "+" not in k[1] else [round(sum(x[i] for x in v["value"].values()) / len(v["value"]), 4) for i in (0, 1)]
                     for k, v in b.items() if k[0] == "kin"})


FACTS = ("versions", "continued", "search", "expert", "columns", "parts")

def write(path: Path, facts: dict, tables: dict) -> None:
    "JSON with one table row per line"
    lines = lambda rows: "[\n  " + ",\n  ".join(json.dumps(r) for r in rows) + "\n ]" if rows else "[]"
    body = [f' {json.dumps(k)}: {json.dumps(v)}' for k, v in facts.items()]
    body += [f' {json.dumps(k)}: {lines(v) if isinstance(v, list) else json.dumps(v)}' for k, v in tables.items()]
    path.write_text("{\n" + ",\n".join(body) + "\n}\n")


def real_part(a, known: dict) -> dict:
    "The table `real`, with what was asked for added"
    done = Work(a.work / "real")
    if not a.folders: return known | done.do("stories260k", lambda: dict(stories260k=real(a.data / "stories260k")))
    name = " and ".join(Path(f).name for f in a.folders)
    one, two = len(a.folders) == 1, lambda: dict(kinship=kin_of(*a.folders))
    found = done.do(name.replace(" ", "_"), (lambda: kin_of_layers(*a.folders)) if one else two)
    print(name, json.dumps(found))
    return known | {name: found}


def alone(a) -> None:
    "The parts that change their own table only"
    if a.only: return null(a.work, a.only)               # its pieces; the record is written when all are there
    record = json.loads(a.out.read_text())
    if "null" in a.parts: record["null"] = null(a.work)
    if "real" in a.parts: record["real"] = real_part(a, record.get("real", {}))
    tables = {k: record.pop(k) for k in [*record] if isinstance(record[k], (list, dict)) and k not in FACTS}
    write(a.out, record, tables)


def main(a) -> dict:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if set(a.parts) <= {"null", "real"}: return alone(a)
    book = Book(a.work / "book.jsonl")
    todo = dict(carry=lambda: carry(book), stability=lambda: stability(book, a.work, ("A-sibling",)), home=lambda: stability(book, a.work, ("A",)), train=lambda: train(book, a.work), mix=lambda: mix(book, a.work, a.shot_seeds),
                shuffles=lambda: shuffles(book, a.shuffles))
    for part in a.parts:
        todo[part]()
        facts = dict(command="python benchmarks/transfer.py", seed=0, shuffles=a.shuffles, shot_seeds=a.shot_seeds, shots=10, threads=1, device="cpu", dtype="float32",
                     parts=a.parts, seconds=round(sum(v["seconds"] for v in book.lines.values())),
                     versions=dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__),
                     continued=dict(text=NEW_TEXT, steps=STEPS, lr=LR), search=SEARCH, expert=DEMO,
                     columns=dict(carry=["target", "expert", "how", "seed", "task", *COLUMNS], stability=["base", "expert", "how", "steps", "task", *COLUMNS],
                                  mix=["target", "experts", "shot seed", "task", *COLUMNS, "alpha", "on shots"], alike=["pair", "expert", "how", "seed", "cosine", "centred", "norm"]))
        write(a.out, facts, report(book))
        print(f"{part}: {a.out} written, {a.out.stat().st_size / 1000:.0f} kB", flush=True)
    return json.loads(a.out.read_text())


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--parts", nargs="+", default=PARTS, choices=[*PARTS, "null", "real"])
    p.add_argument("--shot-seeds", type=int, default=3); p.add_argument("--shuffles", type=int, default=20)
    p.add_argument("--work", type=Path, default=Path("runs/transfer"), help="finished evaluations, snapshots and trained experts")
    p.add_argument("--only", nargs=2, metavar=("TARGET", "EXPERT"), help="`null` of one transfer, without writing the record")
    p.add_argument("--folders", nargs="+", help="`real`: one checkpoint, whose layers are compared; or two, which are compared with each other")
    p.add_argument("--data", type=Path, default=Path(os.environ.get("TRANSFORMER2_DATA", "../shared/data")), help="published data, for `real`")
    p.add_argument("--out", type=Path, default=RECORDS / "transfer.json")
    main(p.parse_args())
