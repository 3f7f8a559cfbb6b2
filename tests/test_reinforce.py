"""Training runs that are killed, interrupted, resumed, spread over processes, broken and misused."""
import json, math, multiprocessing, os, random, signal, socket, time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import reinforce_toy as toy
from transformer2_nbdev import evaluate, reinforce, rollout
from transformer2_nbdev.reinforce import Diverged, ReinforceConfig, Run, advantages, policy_step, sft, train_expert
from transformer2_nbdev.rollout import Rollouts, kl_per_token, vocab_logprobs
from transformer2_nbdev.tasks import Task

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)


def config(**kw): return ReinforceConfig(**toy.FAST | kw)
def train(out=None, resume=False, method="svf", task=toy.DOG, **kw): return train_expert(toy.policy(method=method), toy.tokenizer(), task, config(**kw), out, resume, progress=False)
def adapter(out): return load_file(Path(out) / "adapter_model.safetensors")
def metrics(out): return [{k: v for k, v in json.loads(l).items() if k != "seconds"} for l in open(Path(out) / "metrics.jsonl")]


def same(a, b, **tol):
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], **tol or dict(rtol=0, atol=0))


def child(out, resume, kw, env=()):
    "A training run in a forked process; leaves 'error' beside the folder if it fails."
    from accelerate import PartialState
    os.environ.update(env)
    PartialState._reset_state()  # a fork inherits what other tests of this session told accelerate; a process of its own would start blank
    torch.set_num_threads(1)
    try: train(out, resume, **kw)
    except BaseException as e: Path(f"{out}.error").write_text(f"{type(e).__name__}: {e}"); os._exit(1)
    os._exit(0)


def launch(out, resume=False, env=(), **kw):
    p = fork.Process(target=child, args=(out, resume, kw, dict(env))); p.start()
    return p


def wait_for_step(out, step, process, seconds=120):
    "Wait until the run in `out` has written the line of `step`."
    file, end = Path(out) / "metrics.jsonl", time.time() + seconds
    while time.time() < end and process.is_alive():
        if file.exists() and f'"step": {step},' in file.read_text(): return
        time.sleep(.002)


@pytest.mark.parametrize("kw", [dict(fused=True), dict(method="lora", dropout=True)], ids=["svf fused", "lora with dropout"])
def test_killed_at_any_moment_and_resumed_it_is_the_same_run_bit_for_bit(tmp_path, kw):
    train(tmp_path / "whole", **kw)
    rng, out, kills = random.Random(7), tmp_path / "killed", 0
    for step in (0, 2, 3):
        p = launch(out, out.exists(), **kw)
        wait_for_step(out, step, p); time.sleep(rng.random() * .3)
        if p.is_alive(): os.kill(p.pid, signal.SIGKILL)
        p.join(); kills += p.exitcode == -signal.SIGKILL
        for f in out.glob("*.json*"): [json.loads(l) for l in f.read_text().splitlines() if f.suffix == ".jsonl"] # every line is whole
    assert kills >= 2
    h = train(out, resume=True, **kw)
    assert h.stopped == "all steps done" and metrics(out) == metrics(tmp_path / "whole")
    for folder in ("", "last"): same(adapter(out / folder), adapter(tmp_path / "whole" / folder))
    assert not list(out.glob(".*")), "no temporary files are left"


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(tmp_path):
    train(tmp_path / "whole")
    p = launch(out := tmp_path / "stopped")
    wait_for_step(out, 2, p); os.kill(p.pid, signal.SIGINT); p.join()
    said = Path(f"{out}.error").read_text()
    assert said.startswith("KeyboardInterrupt: stopped after step") and f"resume the run in {out}" in said
    assert adapter(out) and not (out / "result.json").exists(), "the adapter is usable, the record is not claimed"
    train(out, resume=True)
    same(adapter(out / "last"), adapter(tmp_path / "whole" / "last"))


@pytest.mark.parametrize("fused", [True, False])
def test_two_processes_find_the_same_z_as_one(tmp_path, fused):
    kw = dict(fused=fused, steps=4, micro_batch=None)
    train(tmp_path / "one", **kw)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ps = [launch(tmp_path / "two", env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), **kw) for r in range(2)]
    for p in ps: p.join(300)
    assert [p.exitcode for p in ps] == [0, 0], Path(f"{tmp_path / 'two'}.error").read_text()
    one, two = ({k: 1 + d for k, d in adapter(tmp_path / n / "last").items()} for n in ("one", "two"))     # z, of which d is stored
    same(two, one, rtol=1e-5, atol=1e-6)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["reward"] for m in one[1:]] == [m["reward"] for m in two[1:]]
    assert json.loads((tmp_path / "two" / "result.json").read_text())["run"]["processes"] == 2


def test_more_processes_than_chunks_is_refused(monkeypatch):
    monkeypatch.setattr(reinforce, "world", lambda: (0, 3))
    with pytest.raises(ValueError, match="3 processes share 2 chunks: lower rollout_batch to 10"):
        reinforce.check_run(reinforce.begin(toy.policy(), toy.tokenizer(), toy.DOG, config(), None), False)


def gradient(**kw):
    run = reinforce.begin(toy.policy(), toy.tokenizer(), toy.DOG, config(**kw), None)
    with torch.no_grad():
        for p in run.params.values(): p.add_(torch.linspace(-.2, .2, len(p)))
    run.ahead = torch.linspace(.5, 0, run.tokens)
    m = policy_step(run)
    return {n: p.grad.clone() for n, p in run.params.items()}, m


@pytest.mark.parametrize("kw", [dict(), dict(kl_of="base", reduction="token"), dict(samples=4, advantage="group"), dict(kl=0.), dict(kl_path=False)], ids=str)
def test_fused_and_additive_and_any_micro_batch_give_the_same_gradient(kw):
    (a, m), (b, _), (c, _) = gradient(fused=True, **kw), gradient(fused=False, **kw), gradient(fused=False, **kw | dict(micro_batch=1))
    scale = max(g.abs().max() for g in b.values())
    for n in a:
        assert (a[n] - b[n]).abs().max() < 2e-5 * scale and (c[n] - b[n]).abs().max() < 2e-5 * scale
    assert m["gap"] < 1e-4, "log-probabilities in training are those at sampling"


def test_bf16_stays_near_fp32():
    (a, _), (b, _) = gradient(fused=False, autocast="bf16", kl=0., advantage="none", temperature=0.), gradient(fused=False, kl=0., advantage="none", temperature=0.)
    a, b = (torch.cat([g.flatten() for g in x.values()]) for x in (a, b))
    assert torch.cosine_similarity(a, b, 0) > .95 and not torch.equal(a, b)


def test_the_base_is_bit_identical_and_the_model_carries_the_best_z(tmp_path):
    model, before = toy.policy(), {n: p.clone() for n, p in toy.base().named_parameters()}
    h = train_expert(model, toy.tokenizer(), toy.DOG, config(fused=True), tmp_path / "x", progress=False)
    z = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    same({n.replace(".default", ""): v for n, v in z.items()}, adapter(tmp_path / "x"))
    after = dict(model.unload().named_parameters())
    same(dict(after), before)
    assert h.best_step in [m["step"] for m in h.metrics if "val_reward" in m]
    again = PeftModel.from_pretrained(toy.base(), tmp_path / "x")
    r = evaluate.evaluate(again, toy.tokenizer(), toy.DOG, split="validation", progress=False)
    recorded = evaluate.load(tmp_path / "x")
    assert r.correct == recorded.correct and {(i["prompt"], i["completion"]) for i in r.items} == {(i["prompt"], i["completion"]) for i in recorded.items}


def test_early_stopping_keeps_the_first_best(monkeypatch):
    scores = iter([.1, .5, .3, .5, .2, .9])
    h = train_expert(toy.policy(), toy.tokenizer(), toy.DOG, config(val_every=1, patience=3, steps=6), eval_fn=lambda model, tok: next(scores), progress=False)
    assert h.best_step == 1 and h.stopped == "no better validation in 3" and len(h.metrics) == 5


def test_divergence_stops_with_one_line_and_keeps_the_last_good_z(tmp_path):
    with pytest.raises(Diverged, match=r"diverged in step \d+: .*last good z is kept in .*lower lr \(now 1e\+20\)"): train(tmp_path / "x", lr=1e20, max_grad_norm=None)
    for folder in ("", "last"): assert all(v.isfinite().all() for v in adapter(tmp_path / "x" / folder).values())
    assert json.loads((tmp_path / "x" / "result.json").read_text())["training"]["stopped"].startswith("diverged")
    with pytest.raises(Diverged, match="nats per token away"): train(lr=1., max_kl=.05)


def test_sft_learns_the_answers_and_resumes(tmp_path):
    h = sft(toy.policy(), toy.tokenizer(), toy.DOG, config(steps=8), tmp_path / "x", progress=False)
    nll = h.column("nll")[1]
    assert nll[-1] < nll[0] - .2
    again = sft(toy.policy(), toy.tokenizer(), toy.DOG, config(steps=8), tmp_path / "x", resume=True, progress=False)
    assert again.best_step == h.best_step and again.result["correct"] == h.result["correct"]
    with pytest.raises(ValueError, match="no gold answers"):
        sft(toy.policy(), toy.tokenizer(), Task("t", toy.DOG.examples, toy.DOG.prompt, toy.DOG.reward), config(), progress=False)


def test_tensorboard_events(tmp_path):
    train(tmp_path / "x", steps=1, tensorboard=True)
    assert list((tmp_path / "x" / "tensorboard").glob("events*"))


def broken(**kw): return Task(**dict(name="dog", examples=toy.DOG.examples, prompt=toy.DOG.prompt, reward=toy.DOG.reward, max_new_tokens=6) | kw)
def raises(text, e): raise KeyError("gold")

BAD = {
    "reward raises": (dict(task=broken(reward=raises)), "judging .*KeyError"),
    "reward is NaN": (dict(task=broken(reward=lambda t, e: math.nan)), "reward must be finite"),
    "reward is text": (dict(task=broken(reward=lambda t, e: "good")), "reward must be a number"),
    "empty prompt": (dict(task=broken(prompt=lambda e: "  ")), "prompt 0 is empty"),
    "no examples": (dict(task=broken(examples=lambda s: [])), "no training examples"),
    "long prompt": (dict(task=broken(prompt=lambda e: "dog " * 40)), "has 41 tokens and max_new_tokens is 6, but the context holds 32"),
    "fused on LoRA": (dict(method="lora", fused=True), "fused needs a model with SVF adapters"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name):
    kw, message = BAD[name]
    with pytest.raises(ValueError, match=message) as e: train(tmp_path / "x", **kw)
    assert "\n" not in str(e.value) and not any(tmp_path.iterdir())


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    for model, message in ((toy.base().requires_grad_(False), "no trainable parameters"), (toy.base(), "needs a PEFT model")):
        with pytest.raises(ValueError, match=message): train_expert(model, toy.tokenizer(), toy.DOG, config(), tmp_path / "x", progress=False)
    assert not any(tmp_path.iterdir())


def test_a_folder_is_never_taken_over(tmp_path):
    train(tmp_path / "x", steps=1)
    with pytest.raises(ValueError, match="is not empty: resume"): train(tmp_path / "x", steps=1)
    with pytest.raises(ValueError, match="with lr=0.5: it was started with 0.03"): train(tmp_path / "x", True, steps=1, lr=.5)
    with pytest.raises(ValueError, match="trainable parameters are not the ones"): train(tmp_path / "x", True, steps=1, method="lora")
    with pytest.raises(FileNotFoundError, match="nothing to resume"): train(tmp_path / "y", True)
    (tmp_path / "x" / "state.pt").write_bytes(b"no state")
    with pytest.raises(ValueError, match="is not a state that this package wrote"): train(tmp_path / "x", True, steps=1)


@pytest.mark.parametrize("kw", [dict(advantage="best"), dict(lr=0), dict(lr=math.nan), dict(lr="fast"), dict(step_kl=0), dict(steps=0), dict(batch_size=30, samples=4), dict(advantage="group"), dict(top_p=1.5),
                                dict(val_samples=2, temperature=0), dict(val_temperature=-1), dict(patience=0), dict(kl=-1)], ids=str)
def test_a_config_that_means_nothing_is_refused(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): ReinforceConfig(**kw)


def everything(temperature=1.):
    "A tiny random policy off its base, all 13 answers of at most two words out of four, and who they are."
    torch.manual_seed(3)
    model = toy.LlamaForCausalLM(toy.LlamaConfig(vocab_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=.5)).double().eval()
    model = toy.get_peft_model(model, toy.SvfConfig(target_modules="all-linear"))
    z = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad(): [p.add_(.3 * torch.randn_like(p)) for p in z]
    answers = [[2]] + [[a, b] for a in (0, 1, 3) for b in range(4)]
    kept = torch.tensor([[1] * len(a) + [0] * (2 - len(a)) for a in answers])
    ids = torch.tensor([[1, 3] + a + [0] * (2 - len(a)) for a in answers])
    mask = torch.cat([torch.ones(13, 2).long(), kept], 1)
    return model, z, Rollouts([""] * 13, [""] * 13, ids, mask, kept, torch.zeros(13, 2), 2, torch.ones(13), temperature)


def per_answer(losses, z): return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(l, z, retain_graph=True)]) for l in losses])


@pytest.mark.parametrize("temperature", [1., .6])
def test_over_all_pairs_of_answers_leave_one_out_is_exact_and_group_points_the_same_way(temperature):
    model, z, every = everything(temperature)
    logp = vocab_logprobs(model, every.ids, every.mask, 2, temperature)
    pi = (logp.gather(-1, every.ids[:, 2:, None])[..., 0] * every.completion_mask).sum(1).exp()
    assert abs(pi.sum().item() - 1) < 1e-12
    reward = torch.tensor([1., -1., -1., 1., -1.] * 2 + [-1., 1., -1.])
    exact = per_answer([(pi * reward).sum()], z)[0]
    loglik = per_answer(list(-reinforce.policy_loss(model, every, torch.ones(13), lam=0.)[0]), z)   # grad log pi of each answer
    p, expected = pi.detach(), {}
    for how in ("leave-one-out", "group"):
        A = torch.tensor([[advantages(reward[[i, j]], how, samples=2).tolist() for j in range(13)] for i in range(13)])
        expected[how] = torch.einsum("i,j,ij,ip->p", p, p, A[..., 0].double(), loglik.to(p)) / 2 + torch.einsum("i,j,ij,jp->p", p, p, A[..., 1].double(), loglik.to(p)) / 2
    assert (expected["leave-one-out"] - exact).norm() < 1e-6 * exact.norm()
    assert torch.cosine_similarity(expected["group"], exact, 0) > 1 - 1e-6


@pytest.mark.parametrize("of", ["policy", "base"])
def test_a_baseline_known_beforehand_leaves_the_gradient_of_the_kl_exact(of):
    model, z, every = everything(.8)
    logp = vocab_logprobs(model, every.ids, every.mask, 2, .8)
    with reinforce.reference(model): ref = vocab_logprobs(model, every.ids, every.mask, 2, .8)
    pi = (logp.gather(-1, every.ids[:, 2:, None])[..., 0] * every.completion_mask).sum(1).exp()
    exact = per_answer([(pi * (kl_per_token(logp, ref, of) * every.completion_mask).sum(1)).sum()], z)[0]
    def ours(**kw): return per_answer([(pi.detach() * reinforce.policy_loss(model, every, torch.zeros(13), 1., of, **kw)[0]).sum()], z)[0]
    for ahead in (None, torch.tensor([.4, -2., 9.])):
        assert (ours(ahead=ahead) - exact).norm() < 1e-6 * exact.norm()
    assert (ours(path=False) - exact).norm() > .02 * exact.norm()
    same_value = [reinforce.policy_loss(model, every, torch.ones(13), 1., of, path)[0] for path in (True, False)]
    torch.testing.assert_close(*same_value)


def first_step(run, guess):
    policy_step(run)
    run.good = reinforce.snapshot(run)
    return reinforce.trusted(run, guess)


@pytest.mark.parametrize("method", ["svf", "lora"])
@pytest.mark.parametrize("guess", [1e-6, 1e-3, 1e-1, 30.])
def test_the_rate_that_is_found_does_not_depend_on_the_guess_and_moves_the_policy_as_far_as_asked(method, guess):
    for step_kl in (1e-3, 1e-2):
        run = reinforce.begin(toy.policy(method=method), toy.tokenizer(), toy.DOG, config(lr="auto", step_kl=step_kl), None)
        m = first_step(run, guess)
        assert step_kl / 2 <= m["step_kl"] <= 1.5 * step_kl and m["lr"] == run.rate
        assert reinforce.moved(run, run.good) == pytest.approx(m["step_kl"], rel=1e-4), "what was measured is what was left in the model"


def test_a_later_step_that_goes_too_far_is_shortened_and_one_that_does_not_is_left_alone():
    run = reinforce.begin(toy.policy(), toy.tokenizer(), toy.DOG, config(lr="auto"), None)
    first_step(run, 1e-3)
    for factor, shorter in ((30., True), (1 / 300, False)):
        run.step += 1; run.rate *= factor
        policy_step(run); run.good = reinforce.snapshot(run)
        m = reinforce.trusted(run)
        assert (m["lr"] < run.rate) == shorter and m["step_kl"] <= 1.5 * run.config.step_kl


@pytest.mark.parametrize("lr", ["auto", 1e-2])
@pytest.mark.parametrize("reward, moves", [(1., False), (-1., False), (None, True)])
def test_equal_rewards_at_the_base_move_nothing_whatever_the_rounding(monkeypatch, lr, reward, moves):
    "The gradient is rounding then, of a size that grows with the model: 1e-5 at 135M weights"
    real = reinforce.stepping
    @contextmanager
    def rounded(run):
        with real(run): yield
        for p in run.params.values(): p.grad += 1e-3 * torch.randn_like(p)
    monkeypatch.setattr(reinforce, "stepping", rounded)
    task = toy.DOG if moves else broken(reward=lambda t, e: reward)
    run = reinforce.begin(toy.policy(), toy.tokenizer(), task, config(lr=lr), None)
    for _ in range(2): reinforce.update(run, m := policy_step(run))
    assert (m["grad_norm"] > 0) == moves
    assert any(bool(p.any()) for p in run.params.values()) == moves


def test_a_step_without_a_gradient_leaves_the_rate_open():
    run = reinforce.begin(toy.policy(), toy.tokenizer(), broken(reward=lambda t, e: 1.), config(lr="auto"), None)
    before, m = reinforce.snapshot(run), policy_step(run)
    reinforce.update(run, m)
    assert m["step_kl"] == m["lr"] == 0 and run.rate is None
    same(reinforce.snapshot(run), before)


def test_auto_resumes_bit_for_bit(tmp_path):
    kw = dict(lr="auto", steps=4, micro_batch=None)
    whole = train(tmp_path / "whole", **kw)
    p = launch(tmp_path / "cut", **kw)
    wait_for_step(tmp_path / "cut", 2, p); os.kill(p.pid, signal.SIGKILL) if p.is_alive() else None; p.join()
    train(tmp_path / "cut", resume=True, **kw)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    same(adapter(tmp_path / "cut" / "last"), adapter(tmp_path / "whole" / "last"))
    assert all(m["step_kl"] <= 1.5 * .004 for m in whole.metrics[1:]) and len({m["lr"] for m in whole.metrics[1:]}) < 4


def test_a_step_whose_kl_is_rounded_below_zero_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(reinforce, "moved", lambda run, before: -1e-10)
    history = train(tmp_path / "run", lr="auto", steps=2)
    assert [m["step_kl"] for m in history.metrics[1:]] == [0., 0.]


@pytest.mark.parametrize("kw", [dict(), dict(kl=0.), dict(kl=0., track_kl=False), dict(kl_of="base", reduction="token"), dict(kl_path=False, temperature=.7)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_in_pieces_is_the_loss(kw, fused, monkeypatch):
    whole, m = gradient(fused=fused, **kw | dict(micro_batch=None))
    monkeypatch.setattr(rollout, "PIECE", 15 * 64)
    seen = []
    monkeypatch.setattr(reinforce, "hidden", lambda *args: seen.append(rollout.hidden(*args)) or seen[-1])
    parts, n = gradient(fused=fused, **kw | dict(micro_batch=None))
    assert seen and all(h.lean for h in seen)
    same(parts, whole, rtol=1e-4, atol=1e-6)
    for k in ("loss", "kl", "entropy", "gap"): assert math.isclose(m[k], n[k], rel_tol=1e-4, abs_tol=1e-5), k


def test_the_length_of_a_step_is_the_same_in_pieces(monkeypatch):
    found = []
    for piece in (rollout.PIECE, 15 * 64):
        monkeypatch.setattr(rollout, "PIECE", piece)
        run = reinforce.begin(toy.policy(), toy.tokenizer(), toy.DOG, config(lr="auto"), None)
        policy_step(run); run.good = reinforce.snapshot(run)
        found.append(reinforce.trusted(run))
    assert math.isclose(found[0]["step_kl"], found[1]["step_kl"], rel_tol=1e-3)
