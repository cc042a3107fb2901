"""One self-contained page of runs and laws: HTML with its pictures inside, and beside it a folder with each picture as
PDF and PNG and the table as CSV and Parquet. Made from files alone; nothing in it is fetched when it is read."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib import rc_context

from qtrain.errors import UserError
from qtrain.report import curves, health
from qtrain.report.picture import FONTS, Picture, flops, part_labels, plain_numbers
from qtrain.report.runs import Corpus, Run, corpora, read_runs
from qtrain.runs.table import write_table
from qtrain.units import readable

TEMPLATE = Path(__file__).with_name("page.html")
_NUMBER = re.compile(r"baseline|[-+]?[\d.,e+]*[kMBT]?( GiB| ± [\d.]+)?")
BASELINE = "bf16"  # where none is named
WIDE = 6.0  # inches, from which on letters are too small on a telephone when the whole width is shown
DPI = 200  # of the pictures in the page and the folder

# Column of the overview -> (heading, how a value is shown)
OVERVIEW: dict[str, tuple[str, str]] = {
    "name": ("run", ""), "recipe": ("recipe", ""), "seed": ("seed", "d"), "status": ("status", ""),
    "val_loss": ("loss", ".4f"), "model": ("model", ""), "non_embedding_parameters": ("parameters", "count"),
    "tokens": ("tokens", "count"), "tokens_per_parameter": ("per parameter", ".3g"), "lr": ("lr", "g"),
    "batch_tokens": ("batch", "count"), "schedule": ("schedule", ""), "flops": ("FLOPs", "flops"),
    "val_bits_per_byte": ("bits per byte", ".4f"), "tokens_per_second": ("tokens/s", "count"),
    "memory_bytes": ("memory", "bytes"), "config_hash": ("settings", ""), "commit": ("commit", "short"),
    "directory": ("directory", ""),
}  # fmt: skip


@dataclass
class Section:
    """A heading, what stands under it, and the one line that is shown when nothing does."""

    anchor: str
    title: str
    absent: str
    html: list[str] = field(default_factory=list)
    pictures: list[tuple[Picture, str]] = field(default_factory=list)  # with the command that remakes it

    def render(self, images: dict[str, str]) -> str:
        body = list(self.html)
        if self.pictures:
            shown = [figure_html(picture, command, images[picture.name]) for picture, command in self.pictures]
            body.append(f'<div class="figures">{"".join(shown)}</div>')
        body = body or [f'<p class="absent">{escape(self.absent)}</p>']
        return f'<section id="{self.anchor}"><h2>{escape(self.title)}</h2>\n' + "\n".join(body) + "</section>"


def write_report(
    places: Sequence[Path], out: Path, laws: Sequence[Path], baseline: str, command: str, figure: str | None = None
) -> list[str]:
    """Makes out, an .html file, and the folder of the same name without the suffix. Returns what is wrong with the
    runs, which the page says too. UserError where a place holds no run, no run is the baseline that was named, a file
    cannot be read, or one not written.

    figure: draw the picture of this name alone, into the folder; the page stays as it is.
    """
    read_laws = [(path, read_law(path)) for path in laws]
    with rc_context(FONTS):
        with _os_error_told("read", places[0], "mend it, or leave it out"):
            runs, problems = read_runs(places)
            _check_baseline(baseline, runs)
            found = corpora(runs, problems)
            sections = [*_run_sections(found, baseline, command), _law_section(read_laws)]
        sections = [_problems(problems), _overview(runs), *_sources(runs), *sections]
        pictures = [pair for section in sections for pair in section.pictures]
        with _os_error_told("write", out, "give another --out"):
            if figure is not None:
                picture = _named(figure, pictures)
                save(picture, command, own_folder(out.with_suffix("")))
                return problems
            folder = own_folder(out.with_suffix(""), emptied=True)
            for suffix in ("parquet", "csv"):  # the first of all: by it a later call knows the folder as its own
                write_table((run.row for run in runs), folder / f"runs.{suffix}")
            images = save_all(pictures, folder)
            page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
                title=escape(f"qtrain: {len(runs)} run{'s' * (len(runs) != 1)}"),
                intro=_intro(runs, found, command, folder.name),
                nav="".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections),
                sections="\n".join(section.render(images) for section in sections),
            )
            out.write_text(page, encoding="utf-8")
    return problems


def _check_baseline(baseline: str, runs: Sequence[Run]) -> None:
    """UserError where no run has this name or recipe. A page without one of the default is a page without gaps."""
    names = {str(run.row[column]) for run in runs for column in ("name", "recipe") if run.row[column]}
    if baseline not in {BASELINE, *names}:
        listed = ", ".join(sorted(names))
        raise UserError(f"--baseline {baseline}: no run has this name or recipe; there are: {listed}")


def _named(name: str, pictures: Sequence[tuple[Picture, str]]) -> Picture:
    names = {picture.name: picture for picture, _ in pictures}
    if name not in names:
        raise UserError(f"--figure {name}: these runs have no such figure; there are: {', '.join(names)}")
    return names[name]


@contextmanager
def _os_error_told(doing: str, place: Path, advice: str) -> Iterator[None]:
    """An OSError in its body as UserError. place: named where the error names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        told = f"cannot {doing} {error.filename or place}: {error.strerror or error}; {advice}"
        raise UserError(told) from None


def own_folder(folder: Path, emptied: bool = False) -> Path:
    """The folder of the single figures; emptied: without the figures that it holds, since those of an earlier page may
    be others than this one's. UserError when no page made it: it may be the runs themselves."""
    ours = folder / "runs.parquet"
    if folder.exists() and any(path.suffix not in (".pdf", ".png") for path in folder.iterdir()) and not ours.exists():
        raise UserError(f"the figures would go to {folder}, which holds something else; give --out another name")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.pdf"), *folder.glob("*.png")):
        if emptied and ours.exists():
            path.unlink()
    return folder


def save_all(pictures: Sequence[tuple[Picture, str]], folder: Path) -> dict[str, str]:
    """name -> data URL of each picture, which is saved with its command. A name is file and anchor: two pictures of
    one would show the same image twice."""
    images: dict[str, str] = {}
    for picture, command in pictures:
        assert picture.name not in images, f"two pictures named {picture.name}"
        images[picture.name] = save(picture, command, folder)
    return images


def save(picture: Picture, command: str, folder: Path) -> str:
    """Writes the figure as PDF and PNG, the command in both; the PNG as the data URL of an image."""
    plain_numbers(picture.figure)
    part_labels(picture.figure)
    picture.figure.set_layout_engine("none")  # it stays as it was laid out; the search costs a third of the time
    picture.figure.savefig(folder / f"{picture.name}.pdf", metadata={"Subject": command, "CreationDate": None})
    file = io.BytesIO()
    picture.figure.savefig(file, format="png", dpi=DPI, metadata={"Description": command})
    content = file.getvalue()
    (folder / f"{picture.name}.png").write_bytes(content)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def figure_html(picture: Picture, command: str, image: str) -> str:
    """A picture made wider than the page's own stands alone in its row, and scrolls in its frame on a telephone."""
    width, height = (round(inches * 96) for inches in picture.figure.get_size_inches())
    shown = f'<img src="{image}" width="{width}" height="{height}" alt="{escape(picture.alt)}">'
    opened = f'<figure id="{picture.name}">'
    if width > WIDE * 96:
        opened = f'<figure id="{picture.name}" class="wide">'
        shown = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(picture.caption)}">{shown}</div>'
    caption = f"<figcaption>{escape(picture.caption)}<code>{escape(command)}</code></figcaption>"
    return f"{opened}{shown}{caption}</figure>"


def table_html(head: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table that scrolls in a frame of its own; columns of numbers are set flush right."""
    rows = list(rows)
    opened = [' class="number"' if all(_NUMBER.fullmatch(row[n]) for row in rows) else "" for n in range(len(head))]
    first = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, opened, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, opened, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{first}</tr>'
        f"</thead><tbody>\n{body}</tbody></table></div>"
    )


def shown(value: Any, form: str) -> str:
    """A cell: nothing for None; form is a format, or count, flops, bytes, short."""
    if value is None:
        return ""
    if form == "count":
        return readable(value)
    if form == "flops":
        return flops(value)
    if form == "bytes":
        return f"{value / 2**30:.2f} GiB"
    return str(value)[:8] if form == "short" else format(value, form)


# ----------------------------------------------------------------------------------------------------- sections


def _intro(runs: list[Run], found: list[Corpus], command: str, folder: str) -> str:
    counts = Counter(run.row["status"] for run in runs)
    states = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    data = "; ".join(corpus.title for corpus in found) or "no data named"
    return (
        f"<p>{escape(states)}. Data: {escape(data)}. Losses are in nats per token, on the validation split.</p>"
        f"<p>Made by <code>{escape(command)}</code>. The folder <code>{escape(folder)}</code> beside this page has "
        "each figure as PDF and PNG, and all runs and settings in <code>runs.csv</code> and "
        "<code>runs.parquet</code>.</p>"
    )


def _problems(problems: list[str]) -> Section:
    section = Section("problems", "Problems", "None: every run that was found is finished, whole and its own.")
    if problems:
        section.html.append('<ul class="problems">' + "".join(f"<li>{escape(one)}</li>" for one in problems) + "</ul>")
    return section


def _overview(runs: list[Run]) -> Section:
    """Without the columns that no run fills, as those of older results files, and those that repeat an earlier one."""
    columns: dict[str, list[str]] = {}
    for column, (title, form) in OVERVIEW.items():
        cells = [shown(run.row[column], form) for run in runs]
        if any(cells) and cells not in columns.values():
            columns[title] = cells
    hint = f'<p class="hint">{len(columns)} columns: the table scrolls to the side.</p>'
    table = table_html([*columns], zip(*columns.values(), strict=True), "All runs")
    return Section("overview", "Runs", "", html=[hint, table])


def _sources(runs: list[Run]) -> list[Section]:
    """The last loss on each further source; no section where there is none."""
    rows = []
    for run in runs:
        for name in curves.sources([run]):
            keys = (f"val_loss/{name}", f"val_bits_per_byte/{name}", f"val_tokens/{name}")
            last = [line for line in run.lines if line.get(keys[0]) is not None][-1:]
            values = [last[0].get(key) if last else None for key in keys]
            cells = [shown(value, form) for value, form in zip(values, (".4f", ".4f", "count"), strict=True)]
            rows.append([str(run.row["name"]), shown(run.row["seed"], "d"), name, *cells])
    if not rows:
        return []
    head = ["run", "seed", "source", "loss", "bits per byte", "tokens"]
    return [Section("sources", "Validation sources", "", html=[table_html(head, rows, "Loss on each source")])]


def _run_sections(found: list[Corpus], baseline: str, command: str) -> list[Section]:
    """Every section takes the pictures of each corpus in turn, which never share one."""
    train = "python train.py -m"
    sections = {
        "loss": Section("loss", "Loss", "No run has logged a loss yet."),
        "recipes": Section("recipes", "Recipes", "No recipe has a finished run of the same size, tokens and data as "
                           f"one of {baseline}; {train} +experiment=bf16,quest,quartet seed=0,1,2 makes such runs."),
        "learning-rate": Section("learning-rate", "Learning rate", "No recipe was run at several learning rates; "
                                 f"{train} +experiment=quartet optimizer.lr=1e-3,2e-3,4e-3 does that."),
        "health": Section("health", "Quantisation by layer", "No run has telemetry (lines quant/... in metrics.jsonl), "
                          "which the telemetry callback writes."),
        "speed": Section("speed", "Speed and memory", "No finished run tells its speed."),
    }  # fmt: skip
    for number, corpus in enumerate(found, 1):
        prefix = f"data{number}-" if len(found) > 1 else ""
        made = {
            "loss": curves.loss_pictures(corpus, baseline),
            "recipes": curves.gap_pictures(corpus, baseline),
            "learning-rate": curves.rate_pictures(corpus, baseline),
            "health": health.health_pictures(corpus),
            "speed": curves.speed_pictures(corpus),
        }
        sections["recipes"].html += _gap_tables(corpus, baseline, titled=bool(prefix))
        for anchor, pictures in made.items():
            for picture in curves.with_prefix(pictures, prefix):
                picture = picture if not prefix else picture.said_of(corpus.title)
                sections[anchor].pictures.append((picture, f"{command} --figure {picture.name}"))
    return list(sections.values())


def _gap_tables(corpus: Corpus, baseline: str, titled: bool) -> list[str]:
    """One table of every comparison: sizes and budgets, the largest first."""
    rows = []
    cost = {run.point: shown(run.row["flops"], "flops") for run in corpus.compared}
    compared = curves.comparisons(corpus, baseline)
    for point, found in compared.items():
        for one in found:
            mean = sum(one.losses.values()) / len(one.losses)
            spread = f" ± {one.half_width:.4f}" if one.half_width == one.half_width else ""
            gap = "baseline" if one is found[0] else f"{one.gap:+.4f}{spread}" if one.gap == one.gap else ""
            parameters, model, tokens = point
            size = [str(model or ""), readable(parameters), readable(tokens), f"{tokens / parameters:.3g}"]
            rows.append([one.name, str(len(one.losses)), f"{mean:.4f}", gap, *size, cost[point]])
    if not rows:
        return []
    head = [
        "recipe",
        "seeds",
        "mean loss",
        f"gap to {baseline}",
        "model",
        "parameters",
        "tokens",
        "per parameter",
        "FLOPs",
    ]
    title = f" on {corpus.title}" if titled else ""
    text = "A gap is the mean over the seeds that the baseline has too, ± its 95% interval by Student's t."
    if curves.is_ladder(compared):
        text += (
            f" The figures show the gaps at the end, of all {len(compared)} sizes and budgets. Not shown: the gaps "
            "while each trained, which the page of the runs of one size and budget has."
        )
    return [f"<h3>Gaps{escape(title)}</h3><p>{escape(text)}</p>", table_html(head, rows, "Gaps to the baseline")]


# --------------------------------------------------------------------------------------------------------- laws


LAW_CAPTIONS = {
    "loss_by_tokens": "loss over training tokens, dots the runs, lines the law",
    "loss_by_parameters": "loss over non-embedding parameters, dots the runs, lines the law",
    "residuals": "measured loss less the predicted one, held-out points hollow",
    "isoflop": "loss over parameters at equal 6 N D (non-embedding; not the FLOPs of the runs above), by the law, and "
    "the least of each",
    "efficiencies": "share of parameters and of tokens that each recipe is worth to the baseline, with 95% intervals "
    "where they are known",
    "precision_map": "the recipe of least loss at equal time, over the baseline's size and tokens per parameter; the "
    "numbers are those of the legend",
}


LAW_KEYS: dict[str, type] = {
    "law": str, "baseline": str, "constants": dict, "efficiencies": dict, "fit": dict, "points": list, "command": str
}  # fmt: skip


def read_law(path: Path) -> dict[str, Any]:
    """A law.json of `qtrain fit`. UserError where it is none."""
    try:
        law = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lacking = [key for key in LAW_KEYS if not isinstance(law, dict) or key not in law]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}; it is no law.json of `qtrain fit`")
    parts = [*law["constants"].values(), *law["efficiencies"].values(), *law["points"]] if _have_kinds(law) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path} has values of other kinds than a law.json of `qtrain fit`")
    return law


def _have_kinds(law: dict[str, Any]) -> bool:
    return all(isinstance(law[key], kind) for key, kind in LAW_KEYS.items())


def _law_section(laws: list[tuple[Path, dict[str, Any]]]) -> Section:
    absent = "No law was given: qtrain fit RUNS --law quartet --out LAW makes LAW/law.json, and "
    section = Section("law", "Scaling law", absent + "--law LAW/law.json shows it here.")
    if not laws:
        return section
    from qtrain.report.law_figures import law_figures, without_panel

    for number, (path, law) in enumerate(laws, 1):
        section.html += _law_tables(path, law)
        prefix = f"law{number}-" if len(laws) > 1 else "law-"
        for name, figure in law_figures(law).items():
            caption = f"Law {law['law']}: {LAW_CAPTIONS.get(name, name.replace('_', ' '))}."
            alt = f"{caption} The tables above have the constants, {path} every point with its residual."
            picture = Picture(prefix + name.replace("_", "-"), figure, caption, alt)
            picture = picture.without(without_panel(law) if name.startswith("loss_by") else [])
            section.pictures.append((picture, law["command"]))
    return section


def _law_tables(path: Path, law: dict[str, Any]) -> list[str]:
    rows = [
        [name, *_interval(one), "yes" if one.get("identified", True) else "no"]
        for name, one in law["constants"].items()
    ]
    head = ["constant", "value", "low", "high", "identified"]
    html = [f"<h3>{escape(law['law'])}, {escape(str(path))}</h3>", table_html(head, rows, "Constants of the law")]
    rows = [
        [recipe, *_interval(both.get("eff_N")), *_interval(both.get("eff_D"))]
        for recipe, both in law["efficiencies"].items()
    ]
    if rows:
        head = ["recipe", "eff N", "low", "high", "eff D", "low", "high"]
        html.append(table_html(head, rows, "Efficiencies of the recipes"))
    fit = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in law["fit"].items())
    html.append(f"<p>Intervals are 95% percentiles of the bootstrap. Fit: {escape(fit)}.</p>")
    if law.get("warnings"):
        html.append("<ul>" + "".join(f"<li>{escape(one)}</li>" for one in law["warnings"]) + "</ul>")
    return html


def _interval(one: dict[str, Any] | None) -> list[str]:
    return [_short((one or {}).get(key)) for key in ("value", "low", "high")]


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
