"""Wheel and sdist hold what a reader needs: every notebook runs alone, from the installed wheel.

Each one is copied into an empty folder and run there under nbdev's rules, with the hub out of reach
and no published data. This is the test of the notebooks: there is no second pass over them.
"""
import os, subprocess, sys, tarfile, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from execute import ROOT, alone, notebooks

WORKERS = int(os.environ.get("TRANSFORMER2_WORKERS", 2))            # notebooks at a time
LIMIT = 1800                                                        # seconds for one of them


def call(*command, cwd, **env):
    "Run a command outside the clone; its output"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    "A folder with a wheel and an sdist of this commit's files"
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="session")
def python(built, tmp_path_factory) -> str:
    "An environment with the wheel and this one's other packages, and nothing of the clone"
    folder = tmp_path_factory.mktemp("env")
    call(sys.executable, "-m", "venv", folder, cwd=folder)
    found = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    wheel, = built.glob("*.whl")
    call(found, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=folder)
    said = call(found, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)
    others = [p for p in sys.path if p.endswith("site-packages")]   # their .pth files do not count
    (Path(said.strip()) / "others.pth").write_text("\n".join(others) + "\n")
    return str(found)


def files(package: Path) -> set:
    "Paths inside a wheel or an sdist, without the sdist's own folder"
    if package.suffix == ".whl": return set(zipfile.ZipFile(package).namelist())
    return {n.partition("/")[2] for n in tarfile.open(package).getnames()}


def test_wheel_and_sdist_hold_library_and_data(built):
    ours = subprocess.run(["git", "ls-files", "transformer2_nbdev"], cwd=ROOT, text=True,
                          capture_output=True, check=True).stdout.split()
    assert "transformer2_nbdev/data/records/svd.json" in ours and len(ours) > 50
    for package in built.iterdir():
        assert not set(ours) - files(package), package.name
    wheel, = built.glob("*.whl")
    more = {n for n in files(wheel) - set(ours) if ".dist-info/" not in n}
    assert not more, f"{wheel.name} holds files that are not the library's: {more}"
    assert wheel.stat().st_size < 20_000_000


def test_the_wheel_starts_in_an_empty_folder(python, tmp_path):
    script = Path(python).with_name("transformer2")
    assert call(script, "--version", cwd=tmp_path).strip()
    assert "--seed" in call(script, "demo", "--help", cwd=tmp_path)
    code = "import transformer2_nbdev as t; print(t.record('svd')['command'], t.shipped('lab/A'))"
    said = call(python, "-c", code, cwd=tmp_path)
    assert said.startswith("python benchmarks/svd.py") and str(ROOT) not in said


def test_what_ships_is_found_by_name():
    from transformer2_nbdev import record, shipped
    for path in shipped("records").glob("*.json"):
        assert isinstance(record(path.stem), dict), path.name
    for name in ("nothing", "records/nothing.json", "../__init__.py"):
        with pytest.raises(ValueError, match="no data .* ships with this package: there is"):
            shipped(name)
    with pytest.raises(ValueError, match="records/svd.json"): record("nothing")


@pytest.fixture(scope="session")
def runs(python) -> dict:
    "{notebook: its run, still going on}, WORKERS at a time"
    pool = ThreadPoolExecutor(WORKERS)
    yield {p: pool.submit(alone, p, python, timeout=LIMIT) for p in notebooks()}
    pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_a_notebook_runs_alone(path, runs):
    done = runs[path].result()
    assert done.returncode == 0, done.stdout[-6000:]


def test_a_notebook_that_fails_is_noticed(python, tmp_path):
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2, 'no'")])
    nbformat.write(nb, tmp_path / "bad.ipynb")
    done = alone(tmp_path / "bad.ipynb", python)
    assert done.returncode == 1 and "AssertionError: no" in done.stdout
    done = alone(tmp_path / "bad.ipynb")                            # this Python imports the clone
    assert done.returncode == 1 and "imports the clone" in done.stdout
