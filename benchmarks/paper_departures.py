#!/usr/bin/env python
"""Three of the official code's departures at work in the lab: `python benchmarks/paper_departures.py [--steps 40] [--seeds 0 1 2]`.

On lab base A, for each seed: an MLP expert with sigmoid and preserved nuclear norm is trained on math by REINFORCE, once with sampled and once
with greedy rollouts, all else equal. Each is then answered with as trained, and through the official mixer with the one-expert mixture (raw p in
the place of sigmoid(p)). Accuracy is greedy, on the task's whole test split, paired with the base. Learning rate and clipping are not the
paper's, which move nothing in so few steps: 2e-2 on p is about 1e-2 on z.
"""
import argparse, json, platform, time
from pathlib import Path

import peft, torch, transformers
from peft import get_peft_model

from transformer2_nbdev import lab
from transformer2_nbdev.adapter import SvfConfig, svf_layers
from transformer2_nbdev.evaluate import evaluate, paired
from transformer2_nbdev.reinforce import ReinforceConfig, train_expert
from transformer2_nbdev.svf import compose, effective

SVF = dict(target_modules="mlp", parametrization="sigmoid", preserve_nuclear_norm=True)
TRAIN = dict(batch_size=192, lr=2e-2, kl=0.1, val_every=0)


def raw_mixer(model):
    "A bare model with the weights that the official mixer composes for the mixture alpha = 1 of one expert."
    bare = lab.load("A")[0]
    for name, layer in svf_layers(model).items():
        z = effective(layer.svf_z["default"].detach(), "linear", layer.svf_S, True)
        weight = bare.get_submodule(name).weight
        weight.data = compose(weight.data, z, layer.svf_Q)
    return bare


def one_seed(seed, steps):
    "The base, and four ways to answer, on one seed."
    base, tok, tasks = lab.load("A")
    score = lambda m: evaluate(m, tok, tasks["math"], progress=False)
    out = {"base": score(base)}
    for how, temperature in dict(sampled=1., greedy=0.).items():
        torch.manual_seed(seed)
        model = get_peft_model(lab.load("A")[0], SvfConfig(**SVF, init_std=1e-2))
        last = iter(range(10 ** 6))     # keep the last step: the comparison is of training, not of selection
        train_expert(model, tok, tasks["math"], ReinforceConfig(**TRAIN, steps=steps, temperature=temperature, seed=seed),
                     eval_fn=lambda model, tok: next(last), progress=False)
        out[how], out[f"{how}, raw mixer"] = score(model.eval()), score(raw_mixer(model))
    return out


def main():
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--steps", type=int, default=40)
    parse.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parse.add_argument("--out", default="benchmarks/results/paper-departures.json")
    a = parse.parse_args()
    torch.set_num_threads(1)
    start, rows = time.time(), []
    for seed in a.seeds:
        results = one_seed(seed, a.steps)
        for how, r in results.items():
            p = paired(results["base"], r)
            rows.append(dict(seed=seed, how=how, correct=r.correct, n=r.n, diff=p.diff, low=p.low, high=p.high, p=p.p))
            print(f"seed {seed}  {how:20}{r.correct:5}/{r.n}  {100 * p.diff:+6.1f} [{100 * p.low:+.1f}, {100 * p.high:+.1f}]", flush=True)
    record = dict(command=f"python benchmarks/paper_departures.py --steps {a.steps} --seeds {' '.join(map(str, a.seeds))}", base="A", task="math", svf=SVF,
                  train=TRAIN | dict(steps=a.steps), rows=rows, seconds=round(time.time() - start), processor=platform.processor() or platform.machine(),
                  versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__))
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
