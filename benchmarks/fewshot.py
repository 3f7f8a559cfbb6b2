"""What it costs to mark one generation of the few-shot search, as ratios measured in one run.

    python benchmarks/fewshot.py [--sizes 128x4 512x4 --population 32 --shots 10 --tokens 8 --rounds 5 --threads 1 --seed 0]

Marking means: answer every shot greedily and read the log-likelihood of its correct answer, for every candidate mixture. Three ways:

    batched    candidates x shots are the rows of one batch, each with its own mixture (fewshot.mark)
    composed   candidate by candidate: put z of the mixture into a spare adapter, build W' (adapter.fused), mark its shots, put W back
    merged     candidate by candidate: PEFT's verbs (add_weighted_adapter, merge_adapter, unmerge_adapter, delete_adapter)

All three run once per round, in turn, and a ratio is the median over rounds of (time / time of `batched` in the same round). The marks must
agree before a time counts. `lab` is lab base A with its experts of math, code and logic on unseen arithmetic; the other models are random Llamas with random experts, prompts are random tokens, the
correct answers are those of a planted mixture; the candidates are the first generation of a search. Writes transformer2_nbdev/data/records/fewshot.json.
"""
import argparse, json, statistics, sys, time
from pathlib import Path

import peft, torch, transformers
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pieces import RECORDS
from transformer2_nbdev import lab
from transformer2_nbdev.adapt import load_experts
from transformer2_nbdev.adapter import SvfConfig, mix_layer, svf_layers
from transformer2_nbdev.fused import fused
from transformer2_nbdev.mixture import mixture
from transformer2_nbdev.fewshot import Shots, draw, draw_shots, mark, mark_rows
from transformer2_nbdev.rollout import generate
from transformer2_nbdev.tasks import Task

EXPERTS = ["red", "green", "blue"]


def tokenizer(vocab: int):
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0")


def model(hidden: int, layers: int, vocab: int, g: torch.Generator):
    "A random Llama with three random experts and one spare adapter"
    m = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                                     num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()
    with torch.no_grad():
        for p in m.parameters(): p.mul_(1 if p.dim() < 2 else 2)
    m = get_peft_model(m, SvfConfig(), adapter_name="red")
    for name in ("green", "blue", "spare"): m.add_adapter(name, SvfConfig())
    for l in svf_layers(m).values():
        for name in EXPERTS: l.svf_d[name].data += .3 * torch.randn(l.svf_d[name].shape, generator=g)
    return m


def shots_for(m, vocab: int, n: int, tokens: int, g: torch.Generator) -> Shots:
    "Random prompts of 12 tokens, answered by a planted mixture, so that a search would have something to find"
    say = lambda k: " ".join(f"w{i}" for i in torch.randint(vocab, (k,), generator=g).tolist())
    task = Task("random", lambda split: [], lambda e: e["prompt"], lambda c, e: 1. if c.split() == e["answer"].split() else -1., lambda e: e["answer"],
                max_new_tokens=tokens)
    tok, prompts = tokenizer(vocab), [say(12) for _ in range(n)]
    with mixture(m, [.9, .1, .6], EXPERTS): said = generate(m, tok, prompts, tokens, temperature=0).texts
    return Shots(m, tok, task, [dict(prompt=p, answer=t) for p, t in zip(prompts, said)])


def of_the_lab(n: int) -> tuple:
    "Lab base A with its three experts and a spare adapter, and shots of its unseen arithmetic"
    m, tok, tasks = lab.load("A")
    m = load_experts(m, dict(zip(EXPERTS, (lab.experts("A")[e] for e in lab.TRAINED))))
    m.add_adapter("spare", SvfConfig())
    return m, Shots(m, tok, tasks["math-hard"], draw_shots(tasks["math-hard"], n), batch_size=1024)


def together(parts: list) -> tuple: return tuple(torch.stack(x) for x in zip(*parts))


@torch.no_grad()
def composed(m, shots, weights):
    "W' once per candidate, then the model's own speed"
    m.set_adapter("spare")
    parts = []
    for a in weights:
        for l in svf_layers(m).values(): l.svf_d["spare"].data = mix_layer(l, EXPERTS, a, "delta")
        with fused(m): parts.append(mark_rows(shots, list(range(len(shots)))))
    m.set_adapter("red")
    return together(parts)


@torch.no_grad()
def merged(m, shots, weights):
    "The same with PEFT's verbs"
    parts = []
    for a in weights:
        m.base_model.add_weighted_adapter(EXPERTS, a.tolist(), "candidate")
        m.set_adapter("candidate"); m.merge_adapter()
        parts.append(mark_rows(shots, list(range(len(shots)))))
        m.unmerge_adapter(); m.set_adapter("red"); m.delete_adapter("candidate")
    return together(parts)


def compare(ways: dict, rounds: int) -> dict:
    "Marks agree; then seconds of one round each, as ratios to `batched`"
    seen, first = {k: [] for k in ways}, None
    for i in range(rounds + 1):
        t = {}
        for k, f in ways.items():
            start = time.perf_counter(); correct, logp = f(); t[k] = time.perf_counter() - start
            first = (correct, logp) if first is None else first
            assert torch.equal(correct, first[0]) and torch.allclose(logp, first[1], atol=1e-3), f"{k} marks differently"
        if i:
            for k in t: seen[k].append(t[k] / t["batched"])
    return {k: dict(median=round(statistics.median(v), 2), low=round(min(v), 2), high=round(max(v), 2)) for k, v in seen.items()}


def main(a) -> dict:
    torch.set_num_threads(a.threads)
    out, began = {}, time.perf_counter()
    for size in a.sizes:
        torch.manual_seed(a.seed)
        g = torch.Generator().manual_seed(a.seed)
        if size == "lab": m, shots = of_the_lab(a.shots)
        else:
            hidden, layers = map(int, size.split("x"))
            m = model(hidden, layers, a.vocab, g)
            shots = shots_for(m, a.vocab, a.shots, a.tokens, g)
        weights = draw(torch.full((3,), .5), torch.full((3,), .25), a.population, (0., 1.), g)
        share = mark(shots, weights, EXPERTS).correct.float().mean().item()
        out[size] = dict(share_of_rows_correct=round(share, 3)) | compare(dict(batched=lambda: mark(shots, weights, EXPERTS), composed=lambda: composed(m, shots, weights),
                                 merged=lambda: merged(m, shots, weights)), a.rounds)
        print(f"hidden x layers {size}: one generation of {a.population} candidates x {a.shots} shots, batched = 1:",
              {k: f"{v['median']} [{v['low']}, {v['high']}]" for k, v in out[size].items() if isinstance(v, dict)}, flush=True)
    return dict(command=" ".join(["python", *sys.argv]), seed=a.seed, threads=a.threads, device="cpu", dtype="float32", population=a.population,
                shots=a.shots, tokens=a.tokens, rounds=a.rounds, seconds=round(time.perf_counter() - began),
                versions=dict(torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__), ratios=out)


def limits(r: dict) -> list[tuple[str, float, float]]:
    "What the package promises at the lab's size, as (claim, measured, at least)"
    first = next(iter(r["ratios"].values()))
    return [(f"{k} candidate by candidate / batched", first[k]["median"], 5.) for k in ("composed", "merged")]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", nargs="+", default=["lab", "128x4", "512x4"], help="lab, or hidden width x layers of a random model"); p.add_argument("--vocab", type=int, default=85)
    p.add_argument("--population", type=int, default=32); p.add_argument("--shots", type=int, default=10); p.add_argument("--tokens", type=int, default=8)
    p.add_argument("--rounds", type=int, default=5); p.add_argument("--threads", type=int, default=1); p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=RECORDS / "fewshot.json")
    a = p.parse_args()
    r = main(a)
    for claim, got, least in limits(r): print(f"{'ok  ' if got >= least else 'UNDER'} {claim}: {got:.1f} (at least {least:.0f})")
    a.out.write_text(json.dumps(r, indent=1) + "\n")
