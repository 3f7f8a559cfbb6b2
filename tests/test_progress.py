"""One helper for all progress bars: a total and the time left where people look, whole lines where no terminal is."""
import fcntl, os, pty, struct, subprocess, sys, termios
from pathlib import Path


import transformer2_nbdev
from transformer2_nbdev import progress_bar

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
ENV.pop("TQDM_DISABLE", None)
WORK = """
import sys, time, transformer2_nbdev as t
t._line_a_minute().every = {every}
with t.progress_bar(total=40, desc="Decomposing", unit="matrix", delay=0, mininterval=0, leave={leave}) as bar:
    for i in range(40):
        time.sleep(.02); bar.update(); bar.set_postfix_str("acc 1.0")
"""


def log_file(tmp_path, every, leave=False) -> str:
    "What a program without a terminal writes"
    with open(tmp_path / "log", "w") as f: subprocess.run([sys.executable, "-c", WORK.format(every=every, leave=leave)], stderr=f, env=ENV, check=True, timeout=60)
    return (tmp_path / "log").read_text()


def test_a_log_file_gets_whole_lines_at_most_one_a_minute(tmp_path):
    assert transformer2_nbdev._line_a_minute().every == 60
    assert log_file(tmp_path, every=60) == ""  # done within a minute: nothing to say
    lines = log_file(tmp_path, every=.25).split("\n")
    assert lines.pop() == "" and 2 <= len(lines) <= 8, lines
    for line in lines:
        assert line.startswith("Decomposing: ") and " of 40 matrix, " in line and line.endswith("left, acc 1.0") and "\r" not in line and "\x1b" not in line
    last = log_file(tmp_path, every=.25, leave=True).split("\n")[-2:]
    assert last[0].startswith("Decomposing: 40 of 40 matrix") and last[1] == ""


def test_a_terminal_sees_the_total_and_the_time_left():
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    p = subprocess.Popen([sys.executable, "-c", WORK.format(every=60, leave=True)], stderr=end, env=ENV)
    os.close(end)
    seen = b""
    while True:
        try: piece = os.read(main, 4096)
        except OSError: break
        if not piece: break
        seen += piece
    assert p.wait(30) == 0
    text = seen.decode()
    assert "Decomposing" in text and "/40 [" in text and "<00:00" in text and "\r" in text


def test_off_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    for i in progress_bar(range(3), delay=0, disable=True): pass
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(progress_bar(iter("ab"), total=2, delay=0)) == ["a", "b"] and capsys.readouterr().err == ""


def test_no_room_makes_a_bar_of_its_own():
    "Every bar of the library is the helper's (reinforce writes one line through tqdm, above a bar)"
    for f in (ROOT / "transformer2_nbdev").glob("[a-z]*.py"):
        text = f.read_text(encoding="utf-8")
        assert not [l for l in text.splitlines() if "tqdm(" in l or "trange(" in l], f.name


def test_decomposing_has_a_total(monkeypatch):
    import transformer2_nbdev.adapter as adapter
    from peft import get_peft_model
    from svf_toy import llama
    bars = []
    def note(*args, **kw): bars.append(progress_bar(*args, **kw)); return bars[-1]
    monkeypatch.setattr(adapter, "progress_bar", note)
    m = get_peft_model(llama(), adapter.SvfConfig(exclude_modules=["o_proj"]))
    m.add_adapter("b", adapter.SvfConfig(target_modules="mlp", layers_to_transform=[1]))
    assert [(b.total, b.n) for b in bars] == [(12, 12), (3, 3)]
