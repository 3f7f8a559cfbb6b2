"""The book as Sphinx sees it: which rooms there are, what they export, and every notebook turned into cells that myst-nb renders.

Notebooks are read as they are; nothing is executed. nbdev's directives become what they mean on a page: `#| hide` cells fold into
a line that says Set-up, exported cells carry a bar with their names and a link to the library's source, import cells and `#| exporti` fold
away, callouts become admonitions.
"""
import ast, json, re
from configparser import ConfigParser
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parent.parent

RE_DIRECTIVE = re.compile(r"^[ \t]*#\|[ \t]*([\w-]+)[ \t]*:?[ \t]*(.*?)[ \t]*$", re.M)
RE_CALLOUT = re.compile(r"""^(:{3,})[ ]*\{\.callout-(\w+)(?:[ ]+title=["'](.*?)["'])?[^}\n]*\}[ ]*\n(?:\s*\#+ (.+)\n)?""", re.M)
RE_ROOM_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./|nbs/|\./|tutorials/)*)((?:\d+_\w+|index|start)\.ipynb)(#[\w-]+)?\)")
RE_BADGE = re.compile(r"^\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)\n*", re.M)
RE_PAPER = re.compile(r"^(?=>[^\n]{0,40}\bpaper\b)", re.I | re.M)
RE_NAME = re.compile(r"(?<![\[`\w])`(?:transformer2_nbdev\.)?([A-Za-z_][\w.]*)(\(\))?`(?![\]`])")


@cache
def settings() -> dict:
    "settings.ini, the one place for names, version and links."
    parser = ConfigParser(); parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


class Part(NamedTuple):
    first: int       # number of its first room
    name: str        # as in the sidebar
    caption: str     # what its rooms add to the story, in one line


# Read one after the other, these lines are the paper.
PARTS = [Part(0, "I · The idea", "one number for every singular value of a weight, and nothing else is learned"),
         Part(5, "II · Learning", "the numbers are learned from rewards; what is learned is an expert"),
         Part(10, "III · Adapting", "read a prompt once to choose among experts, once more to answer it"),
         Part(14, "IV · Findings", "what transfers to another model, and what LoRA does better"),
         Part(17, "V · The real world", "model-written programs, the paper's data sets, its code, and a terminal")]


class Export(NamedTuple):
    name: str        # public name
    call: str        # name and parameters, as in a call
    doc: str         # first line of the docstring
    label: str       # target on the room's page, "" if another name took it


class Room(NamedTuple):
    path: Path       # the notebook
    number: int      # reading order, from the file name
    module: str      # what it exports to, "" for a room without a module
    title: str       # its H1
    subtitle: str    # the quoted sentence under it
    exports: tuple   # of Export, in order

    @property
    def doc(self): return self.path.relative_to(ROOT).with_suffix("").as_posix()
    @property
    def name(self): return self.module or self.path.stem[3:] or self.path.stem
    @property
    def caption(self): return self.subtitle if 0 < len(self.subtitle) <= 60 else self.title
    @property
    def part(self): return [p for p in PARTS if p.first <= self.number][-1]
    @property
    def colab(self):
        s = settings()
        return f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/{self.doc}.ipynb"


def directives(source: str) -> dict:
    "The `#| name: value` lines at the head of a code cell."
    head = []
    for line in source.splitlines():
        if line.strip() and not line.lstrip().startswith("#|"): break
        head.append(line)
    return dict(RE_DIRECTIVE.findall("\n".join(head)))


def definitions(source: str) -> list:
    "Top-level statements of a cell; none where it is not plain Python (magics)."
    try: return ast.parse(source).body
    except SyntaxError: return []


def public(node) -> list:
    "The public names that a top-level statement defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names = [node.name]
    elif isinstance(node, ast.Assign): names = [t.id for t in node.targets if isinstance(t, ast.Name)]
    else: names = []
    return [n for n in names if not n.startswith("_")]


def call(node, name: str) -> str:
    "`name(a, b=…)` of a function, `name` of anything else."
    if not isinstance(node, ast.FunctionDef): return name
    a = node.args
    args = [x.arg for x in a.posonlyargs + a.args] + ([f"*{a.vararg.arg}"] if a.vararg else ["*"] if a.kwonlyargs else [])
    return f"{name}({', '.join(args + [x.arg for x in a.kwonlyargs] + ([f'**{a.kwarg.arg}'] if a.kwarg else []))})"


def exports(cells: list, module: str) -> tuple:
    "Every public name that the exported cells define."
    found, taken = {}, set()
    for c in cells:
        if c["cell_type"] != "code" or not directives("".join(c["source"])).keys() & {"export", "exports"}: continue
        for node in definitions("".join(c["source"])):
            for name in public(node):
                if name in found: continue
                label = f"api-{module}-{name}".lower().replace("_", "-")
                doc = (ast.get_docstring(node) or "").split("\n")[0] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""
                found[name] = Export(name, call(node, name), doc, "" if label in taken else label); taken.add(label)
    return tuple(found.values())


def read_room(path: Path) -> Room:
    "What the covers of a room say, read from its notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = ["".join(c["source"]) for c in cells]
    prose = "\n\n".join(s for s, c in zip(source, cells) if c["cell_type"] == "markdown")
    module = next((m[1] for s in source if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))), "")
    title, quote = re.search(r"^# (.+)$", prose, re.M), re.search(r"^> (.+(?:\n> .+)*)", prose, re.M)
    number = path.name.split("_")[0]
    return Room(path, int(number) if number.isdigit() else -1, module, title[1].strip() if title else path.stem,
                re.sub(r"\n> ", " ", quote[1]).strip().rstrip(".") if quote else "", exports(cells, module))


def rooms() -> list:
    "The rooms that exist, in reading order."
    return [read_room(p) for p in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))]


def start() -> Room:
    "The notebook to begin with, before the first room."
    return read_room(ROOT / "nbs" / "start.ipynb")


def tutorials() -> list:
    "The tutorials, in reading order: rooms without a module and without a part."
    return [read_room(p) for p in sorted((ROOT / "nbs" / "tutorials").glob("[0-9]_*.ipynb"))]


# --- prose

def link_names(text: str, room: Room, known: dict) -> str:
    "Turn `module.name`, and `name` where nothing else can be meant, into links to where the book defines them."
    own = {e.name: e.label for e in room.exports} if room else {}
    def one(m):
        name, called = m[1], bool(m[2])
        meant = called or "_" in name or name != name.lower()      # `dense` and `generate` are also words, and other libraries' names
        label = known.get(name) or (own.get(name) if meant else None)
        return f"[{m[0]}](#{label})" if label else m[0]
    out, fenced = [], False
    for line in text.split("\n"):
        if re.match(r"\s*(```|~~~|\$\$)", line) and not re.match(r"\s*\$\$.*\$\$\s*$", line): fenced = not fenced
        out.append(line if fenced or line.startswith(("#", "    ", "|", "<", ":::")) else RE_NAME.sub(one, line))
    return "\n".join(out)


def known_names(all_rooms: list) -> dict:
    "Names that mean one thing in the whole book -> label: `module.name` always, a bare name if it is unique and does not look like a common word."
    known, count = {}, {}
    for r in all_rooms:
        for e in r.exports:
            if e.label: known[f"{r.module}.{e.name}"] = e.label; count.setdefault(e.name, []).append(e.label)
    return known | {n: l[0] for n, l in count.items() if len(l) == 1 and (("_" in n.strip("_")) or n != n.lower())}


def callout(m) -> str:
    "The head of a Quarto callout in MyST; its title is an attribute or a heading inside."
    fence, kind, title = m[1], m[2], m[3] or m[4]
    return f"{fence}{{admonition}} {title.strip()}\n:class: {kind}\n\n" if title else f"{fence}{{{kind}}}\n"


def markdown(text: str, room: Room, known: dict) -> str:
    "A markdown cell in MyST: callouts, the paper's voice, links to rooms that exist and to names."
    here, folder = "" if room else "nbs/", room.path.parent if room else ROOT
    def room_link(m):
        if (folder / (m[2] + m[3])).exists(): return m[0]       # as it is written
        if m[3] == "index.ipynb": return f"[{m[1]}]({'../' if room else ''}index.ipynb{m[4] or ''})"
        return f"[{m[1]}]({here}{m[3]}{m[4] or ''})" if (ROOT / "nbs" / m[3]).exists() else m[1]
    text = RE_ROOM_LINK.sub(room_link, RE_CALLOUT.sub(callout, text)).replace('src="docs/_static/', 'src="_static/')
    return link_names(RE_PAPER.sub("{.paper-says}\n", text) if not text.startswith("# ") else text, room, known)


def cover(text: str, room: Room) -> str:
    "The first cell: the subtitle as a subtitle, and under it what a reader may want to open."
    head, _, rest = text.partition("\n> ")
    if not rest: return text
    quote, _, rest = rest.partition("\n\n")
    rest = RE_BADGE.sub("", rest)                                # on a page the bar below has that link
    s = settings()
    if not room: return f"{head}\n{{.subtitle}}\n> {quote}\n\n{{.room-bar}}\n[Open in Colab]({start().colab}) [GitHub]({s['git_url']})\n\n{rest}"
    links = [f"[Open in Colab]({room.colab})", f"[Notebook]({s['git_url']}/blob/{s['branch']}/{room.doc}.ipynb)"]
    if room.module: links.append(f"[`{s['lib_name']}.{room.module}`]({s['git_url']}/blob/{s['branch']}/{s['lib_name']}/{room.module}.py)")
    return f"{head}\n{{.subtitle}}\n> {quote}\n\n{{.room-bar}}\n{' '.join(links)}\n\n{rest}"


# --- code

@cache
def source_lines(module: str) -> dict:
    "Top-level name -> its line in the exported module."
    path = ROOT / settings()["lib_name"] / f"{module}.py"
    if not path.exists(): return {}
    return {n: node.lineno for node in ast.parse(path.read_text(encoding="utf-8")).body for n in public(node)}


def export_bar(source: str, room: Room) -> str:
    "Targets for the names that an exported cell defines, and a link to them in the library."
    names = [n for node in definitions(source) for n in public(node)]
    mine = [e for e in room.exports if e.name in names]
    if not mine: return ""
    s = settings()
    url = f"{s['git_url']}/blob/{s['branch']}/{s['lib_name']}/{room.module}.py"
    line = source_lines(room.module).get(mine[0].name)
    shown = ", ".join(f"`{e.name}`" for e in mine[:4]) + (" …" if len(mine) > 4 else "")
    return "".join(f"({e.label})=\n" for e in mine if e.label) + f"{{.export-bar}}\n{room.module} · {shown} [source]({url}{f'#L{line}' if line else ''})"


def code(cell: dict, room: Room) -> list:
    "A code cell as the cells that show it."
    source = "".join(cell["source"])
    d, body = directives(source), RE_DIRECTIVE.sub("", source).strip("\n")
    if "default_exp" in d or d.get("include") == "false" or not body: return []
    exported, nodes = bool(d.keys() & {"export", "exports"}), definitions(body)
    if "hide" in d and not nodes: return []                       # the install cell of Colab is not Python
    tags, myst, bar = [f for f in ("gpu", "network", "slow") if f in d], {}, export_bar(body, room) if exported and room else ""
    if exported: tags.append("exported")
    outputs = cell.get("outputs", [])
    if d.get("echo") == "false" and outputs and all("text/markdown" in o.get("data", {}) for o in outputs):      # prose that code wrote
        return [nbformat.v4.new_markdown_cell("".join(o["data"]["text/markdown"])) for o in outputs]
    if d.get("echo") == "false" or "hide_input" in d: tags.append("remove-input")
    if d.get("output") == "false" or "hide_output" in d: tags.append("remove-output")
    imports = nodes and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes)
    if imports or d.keys() & {"exporti", "hide"} or d.get("code-fold") == "true":
        tags.append("hide-input")
        plain = "Set-up" if "hide" in d else "Imports" if imports else "Helpers" if "exporti" in d else "Code"
        title = d.get("code-summary", plain).strip("\"'")
        myst["code_prompt_show"] = myst["code_prompt_hide"] = title
    if "fig-cap" in d: myst["figure"] = {"caption": d["fig-cap"].strip("\"'")}
    widths = [w for o in outputs if (w := o.get("metadata", {}).get("image/png", {}).get("width"))]
    if widths: myst["image"] = {"width": f"{widths[0]}px"}       # a picture has two pixels a point
    out = nbformat.v4.new_code_cell(body, metadata={"tags": tags} | ({"mystnb": myst} if myst else {}))
    out.outputs = [nbformat.from_dict(o) for o in outputs]
    return ([nbformat.v4.new_markdown_cell(bar)] if bar else []) + [out]


def read(text: str, path: str = "") -> nbformat.NotebookNode:
    "myst-nb's reader: the text of a notebook -> the notebook that Sphinx renders."
    everything = rooms()
    room = next((r for r in [start(), *everything, *tutorials()] if r.doc == path), None)
    known = known_names(everything)
    cells, first = [], True
    for c in json.loads(text)["cells"]:
        if c["cell_type"] == "code": cells += code(c, room); continue
        if c["cell_type"] != "markdown": continue
        source = "".join(c["source"])
        if first: source = cover(source, room)
        cells.append(nbformat.v4.new_markdown_cell(markdown(source, room, known)))
        if first and not room: cells.append(nbformat.v4.new_markdown_cell(toctree([start(), *everything, *tutorials()])))
        first = False
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"},
                                                         "language_info": {"name": "python", "pygments_lexer": "ipython3"}})
    return nbformat.reads(json.dumps(nb), as_version=4)      # joins the line lists of outputs


def contents(all_rooms: list) -> str:
    "Learn, use, look up: the front door's list of pages, the rooms by parts."
    out, s = ["### Learn"], settings()
    for part, group in groupby(all_rooms, lambda r: r.part):
        rows = [f"| [{r.number:02d} {r.title}](nbs/{r.path.name}) | {f'`{r.module}`' if r.module else '–'} | {r.subtitle} |" for r in group]
        out.append("\n".join([f"**{part.name}.** *{part.caption[0].upper()}{part.caption[1:]}.*", "", "| room | module | |", "|---|---|---|", *rows]))
    rows = [f"| [{t.title}](nbs/tutorials/{t.path.name}) | {t.subtitle} |" for t in tutorials()]
    out += ["### Use", "\n".join(["| on a model of your own | |", "|---|---|", *rows]), "### Reference",
            f"[The names to build on]({s['doc_host']}{s['doc_baseurl']}/docs/reference.html), about forty, with parameters and examples; "
            f"[internals]({s['doc_host']}{s['doc_baseurl']}/docs/internals.html), all the others."]
    return "\n\n".join(out)


def toctree(all_rooms: list) -> str:
    "The reading order, for Sphinx; the visible navigation is docs/_templates/rooms.html."
    docs = [r.doc for r in all_rooms] + ["docs/reference", "docs/internals", "CONTRIBUTING"]
    return "```{toctree}\n:hidden:\n\n" + "\n".join(docs) + "\n```"


def internals(all_rooms: list) -> str:
    "Every public name that the reference leaves to the rooms, room by room: the body of docs/internals.md."
    from api import names
    documented, out = set(names()), []
    for r in all_rooms:
        rest = [e for e in r.exports if f"{r.module}.{e.name}" not in documented]
        if not rest: continue
        rows = []
        for e in rest:
            name = f"[`{e.call}`](#{e.label})" if e.label else f"`{e.call}`"
            rows.append(f"| {name} | {e.doc.replace('|', chr(92) + '|')} |")
        out += [f"## `{r.module}`", f"[{r.title}](../{r.doc}.ipynb)", "| name | what it does |\n|---|---|\n" + "\n".join(rows)]
    return "\n\n".join(out)
