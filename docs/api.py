"""The reference: signatures, parameter tables and source links read from the library's own text, for docs/reference.md and docs/internals.md.

A line `%%module.name%%` in docs/reference.md becomes what the source says about that name: its sentence, a table of its parameters (of its
fields, for a class that has them) with types, defaults and the comment beside each, and what it returns. What it raises and an example stand
below in the page itself, and tests/test_reference.py runs them.
"""
import ast, io, re, tokenize
from functools import cache
from typing import NamedTuple

from reader import ROOT, rooms, settings

RE_NAME_LINE = re.compile(r"^%%([\w.]+)%%$", re.M)
PLAIN = dict(model="a causal language model of transformers, bare or wrapped by PEFT", tokenizer="its tokenizer", task="what to ask, as from `get_task`",
             config="how to train", progress="show a bar", confidence="of the interval", resamples="draws of the bootstrap", high="its upper end",
             split='`"train"`, `"validation"` or `"test"`', dtype="of the weights", name="of a base, one of `lab.BASES`", temperature="0 is greedy",
             top_p="1 keeps the whole vocabulary", top_k="0 keeps the whole vocabulary", system="system message", iterable="what to go through",
             disable="show nothing", adapter="name of the expert on the model", adapter_name="name of the expert on the model", seed="everything random follows from it",
             out="folder to write", rank="keep so many of the largest changes; none: all of them", batch_size="prompts that go through the model at once",
             max_new_tokens="longest answer", completion="what the model wrote", gold="the right answer")


class Param(NamedTuple):
    name: str
    type: str
    default: str
    about: str


class Entry(NamedTuple):
    name: str         # module.name
    doc: str          # first sentence
    kind: str         # of its table's first column: "parameter" or "field"
    params: tuple     # of Param
    returns: str      # "type: comment", "" where nothing comes back
    line: int         # in the module


@cache
def module(name: str) -> tuple:
    "A module's top-level nodes by name, and its comments by line."
    path = ROOT / settings()["lib_name"] / ("__init__.py" if name == settings()["lib_name"] else f"{name}.py")
    text = path.read_text(encoding="utf-8")
    comments, alone = {}, set()
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type == tokenize.COMMENT:
            comments[t.start[0]] = t.string.lstrip("#").strip()
            if not t.line[:t.start[1]].strip(): alone.add(t.start[0])
    nodes = {n.name: n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return nodes, comments, alone


def said(comments: dict, alone: set, line: int, end: int) -> str:
    "The comment at the end of a line, and the lines of comment under it."
    parts = [comments.get(line, "")] if line not in alone else []
    while line + 1 < end and line + 1 in alone: line += 1; parts.append(comments[line])
    return " ".join(filter(None, parts))


def of_function(node: ast.FunctionDef, comments: dict, alone: set) -> tuple:
    "Parameters of a function, and what it returns."
    a, found = node.args, []
    plain = a.posonlyargs + a.args
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    every = [*zip(plain, defaults), *zip(a.kwonlyargs, a.kw_defaults)]
    if a.vararg: every.append((a.vararg, None))
    if a.kwarg: every.append((a.kwarg, None))
    body, last = node.body[0].lineno, 0
    for arg, default in every:
        line = max(arg.end_lineno, default.end_lineno if default is not None else 0); last = max(last, line)
        if arg.arg in ("self", "cls"): continue
        star = "*" if arg is a.vararg else "**" if arg is a.kwarg else ""
        kind = (ast.unparse(arg.annotation).strip("'\"") if arg.annotation else "")
        about = said(comments, alone, line, body) if line != node.lineno or node.lineno + 1 < body or not node.returns else ""
        found.append(Param(star + arg.arg, kind, "" if default is None else ast.unparse(default), about))
    ends = next((comments[l] for l in range(body - 1, last, -1) if l in comments and l not in alone), "")
    if not ends and last == node.lineno: ends = comments.get(node.lineno, "")
    kind = ast.unparse(node.returns).strip("'\"") if node.returns else ""
    return found, ": ".join(filter(None, (f"`{kind}`" if kind not in ("", "None") else "", ends)))


def of_fields(node: ast.ClassDef, nodes: dict, comments: dict, alone: set) -> list:
    "Fields of a dataclass or a named tuple, those of its bases in the same module first."
    found = [p for b in node.bases if isinstance(b, ast.Name) and b.id in nodes for p in of_fields(nodes[b.id], nodes, comments, alone)]
    for f in node.body:
        if not isinstance(f, ast.AnnAssign) or f.target.id.startswith("_"): continue
        default, about = f.value, said(comments, alone, f.end_lineno, node.end_lineno)
        if not about and f.end_lineno > f.lineno:                                    # black breaks a long line around its comment
            about = next((comments[l] for l in range(f.lineno, f.end_lineno + 1) if l in comments), "")
        if isinstance(default, ast.Call) and getattr(default.func, "id", "") == "setting":
            default, about = default.args[0], ast.literal_eval(default.args[1])
        elif isinstance(default, ast.Call) and getattr(default.func, "id", "") == "field":
            default = next((k.value for k in default.keywords if k.arg in ("default", "default_factory")), None)
        found.append(Param(f.target.id, ast.unparse(f.annotation).strip("'\""), "" if default is None else ast.unparse(default), about))
    return found


@cache
def entry(name: str) -> Entry:
    "What the source says about `module.name`."
    where, _, what = name.rpartition(".")
    nodes, comments, alone = module(where)
    node = nodes[what]
    doc = (ast.get_docstring(node) or "").split("\n")[0]
    if isinstance(node, ast.FunctionDef):
        params, returns = of_function(node, comments, alone)
        return Entry(name, doc, "parameter", tuple(params), returns, node.lineno)
    init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    params = of_function(init, comments, alone)[0] if init else of_fields(node, nodes, comments, alone)
    return Entry(name, doc, "parameter" if init else "field", tuple(params), "", node.lineno)


def about(p: Param) -> str:
    "The sentence beside a parameter, or what such a parameter always is."
    return p.about or PLAIN.get(p.name, "")


def cell(text: str) -> str:
    return text.replace("|", r"\|")


@cache
def places() -> dict:
    "module.name -> the page that defines it, and the target on it."
    return {f"{r.module}.{e.name}": (r.doc, e.label) for r in rooms() for e in r.exports}


def shown(name: str) -> str:
    "An entry of the reference in MyST."
    e, s = entry(name), settings()
    where, _, what = name.rpartition(".")
    path = f"{s['lib_name']}/{'__init__' if where == s['lib_name'] else where}.py"
    room, anchor = places().get(name, ("", ""))
    book = f"[in the book]({f'#{anchor}' if anchor else f'../{room}.ipynb'}) · " if room else ""
    source = f"{book}[source]({s['git_url']}/blob/{s['branch']}/{path}#L{e.line})"
    target = f"ref-{'class-' if what[0].isupper() else ''}{where}-{what}".lower().replace("_", "-")       # Paired and paired are two
    out = [f"({target})=\n### `{name}`", f"{e.doc}{'' if e.doc.endswith('.') else '.'}\n\n{{.export-bar}}\n{source}"]
    if e.params:
        code = lambda t: f"`{cell(t)}`" if t else ""
        rows = "\n".join(f"| `{p.name}` | {code(p.type)} | {code(p.default)} | {cell(about(p))} |" for p in e.params)
        out.append(f"| {e.kind} | type | default | |\n|---|---|---|---|\n{rows}")
    if e.returns: out.append(f"*Returns* {e.returns}.")
    return "\n\n".join(out)


def fill(text: str) -> str:
    "docs/reference.md with its entries filled in."
    return RE_NAME_LINE.sub(lambda m: shown(m[1]), text)


def names() -> list:
    "The names that docs/reference.md documents, in its order."
    return RE_NAME_LINE.findall((ROOT / "docs" / "reference.md").read_text(encoding="utf-8"))
