"""The lab's model that sees, and what adapts it: `python benchmarks/vision.py --work FOLDER`.

Model V (a LLaVA of 570,336 weights) learns *read* from rewards (+1, and -0.1 for a wrong answer) in
one loop (reinforce.train_expert, lr="auto": no rate was chosen by hand), with one budget, by each

    language     SVF on the linear layers of the language model (the paper's choice)
    vision       SVF on those of the vision tower
    both         SVF on both, and on the bridge between them
    two layers   SVF on the last two of the language model's three layers (the paper: half of them)
    LoRA r1      LoRA of rank 1 on the language model's attention: about as many numbers
    LoRA r16     LoRA of rank 16 on all linear layers of the language model

The kept step is the best of the validations (split "validation"). Then 1,002 test questions of each
task are answered greedily: read, the two unseen ones (animal, letters), and the two skills that
were not trained (colour, count). Methods and settings were written down before the first test
question was answered. Parts:

    methods     all methods, on each of --seeds
    experts     seed 0, SVF on the language model, for colour, count and cls as well; they and that
                of read ship with V
    labels      what the base and the cls expert call the questions of each task
    adapt       prompt and classifier dispatch, and few-shot search on ten solved examples (three
                draws), over the experts of read, colour and count, on the unseen tasks

Finished pieces are files in --work, and an interrupted benchmark goes on from there. The record,
data/records/vision.json of the package, says right or wrong question by question (hex,
evaluate.unpack), so that any two rows can be paired.
"""
import argparse, json, time
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from pieces import RECORDS, Work, about
from transformer2_nbdev import vision
from transformer2_nbdev.adapt import fixed, load_experts
from transformer2_nbdev.adapter import SvfConfig, linear_names
from transformer2_nbdev.classifier import Classifier
from transformer2_nbdev.evaluate import evaluate, pack, write_atomic
from transformer2_nbdev.fewshot import FewShot, draw_shots
from transformer2_nbdev.prompt import Dispatch, confusion
from transformer2_nbdev.reinforce import ReinforceConfig, train_expert

BUDGET = dict(steps=16, batch_size=96, rollout_batch=96, val_every=4, val_limit=150)
TESTED = "read", "animal", "letters", "colour", "count"
EXPERTS = "read", "colour", "count"
SEARCH = dict(generations=6, patience=3, population=16)
WORDING = dict(ask=lambda p: f"{p} which skill ?", say=lambda label: f"\\boxed{{ {label} }}",
               other=None, max_new_tokens=4, batch_size=167)


def language(model, ends=("_proj",)):
    "Names of the language model's linear layers"
    return [n for n in linear_names(model) if "language_model" in n and n.endswith(ends)]


def lora(r, ends):
    return lambda m: LoraConfig(r=r, lora_alpha=2 * r, target_modules=language(m, ends))


METHODS = {"language": lambda m: SvfConfig(),
           "vision": lambda m: SvfConfig(target_modules="vision"),
           "both": lambda m: SvfConfig(target_modules="all-linear"),
           "two layers": lambda m: SvfConfig(layers_to_transform=[1, 2]),
           "LoRA r1": lora(1, ("q_proj", "k_proj", "v_proj", "o_proj")),
           "LoRA r16": lora(16, ("_proj",))}


@cache
def world(): return vision.load("V")[1:]               # processor, tasks


def answered(model, name, strategy=None):
    "Right answers to a task's whole test split"
    proc, tasks = world()
    r = evaluate(model, proc, tasks[name], strategy, batch_size=167, progress=False)
    return dict(correct=r.correct, n=r.n, right=pack(r.items))


def trained(skill, method, seed, out=None):
    "One run: (model, facts about it)"
    proc, tasks = world()
    torch.manual_seed(seed)
    base = vision.load("V")[0]
    model = get_peft_model(base, METHODS[method](base))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    h = train_expert(model, proc, tasks[skill], ReinforceConfig(seed=seed, **BUDGET), out=out,
                     progress=False)
    vals = [(m["step"], round(m["val_accuracy"], 4)) for m in h.metrics if "val_accuracy" in m]
    kl = [m["kl"] for m in h.metrics if "kl" in m]
    return model, dict(skill=skill, method=method, seed=seed, numbers=numbers, validation=vals,
                       step=h.best_step, kl=round(kl[-1], 5) if kl else None,
                       moved=moved(model) if method not in ("LoRA r1", "LoRA r16") else None)


def moved(model):
    "Root mean square of z - 1 in each matrix"
    name = lambda n: n.removeprefix("base_model.model.").split(".svf_")[0]
    return {name(n): round(p.detach().square().mean().sqrt().item(), 5)
            for n, p in model.named_parameters() if p.requires_grad}


def method_run(name, seed, folder):
    "One method's run on read; the language model's first one is the expert that ships"
    model, facts = trained("read", name, seed)
    if (name, seed) == ("language", 0): model.save_pretrained(folder / "read")
    return facts | dict(tested={t: answered(model, t) for t in TESTED})


def expert_run(skill, folder):
    model, facts = trained(skill, "language", 0)
    model.save_pretrained(folder / skill)
    tested = ("cls", "cls-unseen") if skill == "cls" else (skill,)
    return facts | dict(tested={t: answered(model, t) for t in tested})


def with_experts(folder, names):
    return load_experts(vision.load("V")[0], {e: str(folder / e) for e in names})


def dispatchers(model):
    proc, labels = world()[0], {e: e for e in EXPERTS}
    return {"prompt": Dispatch(model, proc, labels, **WORDING),
            "classifier": Classifier(model, proc, labels, **WORDING)}


def labels(model, name):
    "How often the base and the classifier give each label to a task's test questions"
    tasks = world()[1]
    prompts = [tasks[name].prompt(e) for e in tasks[name].examples("test")]
    out = {}
    for k, d in dispatchers(model).items():
        c = confusion([name] * len(prompts), d.classify(prompts), list(EXPERTS))
        out[k] = dict(zip(c.cols, map(int, c.counts[0])))
    return dict(n=len(prompts), counts=out)


def searched(model, name, seed):
    "Mixture weights found on ten solved examples, and what they answer"
    proc, tasks = world()
    few = FewShot(model, proc, tasks[name], draw_shots(tasks[name], 10, seed), list(EXPERTS),
                  seed=seed, **SEARCH)
    return dict(seed=seed, weights=[round(x, 4) for x in few.weights.tolist()],
                **answered(model, name, few))


def adapt(work, folder, draws):
    "Every way to choose among the experts, on the unseen tasks"
    out, model = {}, None
    for name in vision.UNSEEN:
        def get():
            nonlocal model
            model = model or with_experts(folder, (*EXPERTS, "cls"))
            return model
        rows = {e: work.do(f"adapt_{name}_{e}", lambda: answered(get(), name, fixed({e: 1.})))
                for e in EXPERTS}
        for k in ("prompt", "classifier"):
            choose = lambda: answered(get(), name, dispatchers(get())[k])
            rows[k] = work.do(f"adapt_{name}_{k}", choose)
        few = [work.do(f"adapt_{name}_few_{s}", lambda: searched(get(), name, s)) for s in draws]
        out[name] = dict(rows=rows, few=few)
    return out


def main(a):
    began, work, made = time.perf_counter(), Work(a.work), Path(a.work) / "experts"
    out = dict(command="python benchmarks/vision.py", budget=BUDGET, search=SEARCH, seeds=a.seeds,
               tested=TESTED)
    base = {}
    for t in vision.TASKS:
        base[t] = work.do(f"base_{t}", lambda: answered(vision.load("V")[0], t))
    out["base"] = base
    out["methods"] = [work.do(f"read_{m}_{s}", lambda: method_run(m, s, made))
                      for s in a.seeds for m in a.methods]
    if "experts" in a.parts:
        out["experts"] = {s: work.do(f"expert_{s}", lambda: expert_run(s, made))
                          for s in ("colour", "count", "cls")}
    if "labels" in a.parts:
        model = with_experts(made, (*EXPERTS, "cls"))
        out["labels"] = {t: work.do(f"labels_{t}", lambda: labels(model, t)) for t in TESTED}
    if "adapt" in a.parts: out["adapt"] = adapt(work, made, a.draws)
    out |= dict(seconds=round(time.perf_counter() - began)) | about()
    write_atomic(a.out, json.dumps(out) + "\n")


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--work", default="runs/vision", help="folder for finished pieces")
    parse.add_argument("--parts", nargs="+", default=["experts", "labels", "adapt"])
    parse.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parse.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parse.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="of ten shots")
    parse.add_argument("--out", type=Path, default=RECORDS / "vision.json")
    a = parse.parse_args()
    torch.set_num_threads(1)
    main(a)
