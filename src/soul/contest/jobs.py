"""The jobs of a contest, in the order of their worth: references, pilots, trials, reports."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from soul import config
from soul.contest.book import Book, Line
from soul.contest.matrix import Matrix
from soul.contest.measure import Sets, Values, load_sets
from soul.contest.same import check_line, check_same
from soul.contest.trial import Run, Tick, do, measured, measured_under, never
from soul.metrics.contest import Cell, choose, point, read_lines, references_of, runs_of, sides
from soul.metrics.frontier import FLOOR
from soul.models import resolve
from soul.optim.base import CurvatureOptimizerSpec
from soul.origins import of_model
from soul.rundir import note_environment
from soul.stored import remove_parts, write_text

_STALE = 3600.0  # seconds after which no worker is still writing a file of a contest
_PATIENCE = 2.0  # seconds between looks at what other workers do


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to be done once.

    Attributes:
        kind: ``reference``, ``pilot``, ``tune``, ``report`` or ``attack``.
        task: The task.
        request: The deletion request.
        cell: The cell; None for a reference.
        point: Which of the cell's trials; -1 where it is none.
        which: ``before`` or ``gold``, of a reference.
    """

    kind: str
    task: str
    request: str
    cell: Cell | None = None
    point: int = -1
    which: str = ""

    @property
    def key(self) -> str:
        """The job's name in the record."""
        parts = [self.kind, self.task, self.request]
        if self.cell:
            parts += [self.cell.objective, self.cell.optimizer]
        return "/".join(
            [*parts, *([self.which] if self.which else []), *([str(self.point)] if self.point >= 0 else [])]
        )


class Contest:
    """A matrix and its record.

    Args:
        matrix: What is to be done.
        folder: Where the record goes; a copy of the matrix is kept beside it.

    Raises:
        ValueError: The folder holds another contest, or cannot be written.
    """

    def __init__(self, matrix: Matrix, folder: Path) -> None:
        self.matrix, self.book = matrix, Book(folder)
        self._sets: dict[tuple[str, str], Sets] = {}
        self._weights: dict[str, Line] = {}
        text, file = config.dump(matrix.tree()), folder / "matrix.yaml"
        if file.is_file() and file.read_text(encoding="utf-8") != text and self.book.lines():
            check_same(file, matrix, "choose another --out, or delete that folder")
        with self.book.alone():
            remove_parts(folder, older=_STALE)
            write_text(file, text)
            note_environment(folder)

    def jobs(self) -> Iterator[Job]:
        """Yield all jobs that can be done now, done or not.

        A trial needs its cell's pilot and its request's references; reports wait until every cell of their task and
        objective is tuned, which is when the matrix says who goes on. Trials go by point first and cell second, so that
        at any time all cells have had about as many.
        """
        m, lines = self.matrix, self.book.lines()
        known = {line["key"] for line in lines}
        chosen = {cell: self._chosen(lines, cell) for cell in m.cells}
        untuned = {(cell.task, cell.objective) for cell, numbers in chosen.items() if numbers is None}
        tuned = {cell: numbers or [] for cell, numbers in chosen.items() if (cell.task, cell.objective) not in untuned}
        for phase in ("tune", "report"):
            for name, task in m.tasks.items():
                if phase == "report" and not any(cell.task == name for cell in tuned):
                    continue
                for request, which in itertools.product(getattr(task, phase), ("before", "gold")):
                    yield Job("reference", name, request, which=which)
        for cell in m.cells:
            if not m.entry(cell.optimizer).method:
                yield self._pilot_of(cell)
        for number, cell in itertools.product(range(m.budget.points), m.cells):
            if number >= m.trials(cell.optimizer):
                continue
            for request in m.tasks[cell.task].tune:
                needed = [Job("reference", cell.task, request, which=which) for which in ("before", "gold")]
                needed += [] if m.entry(cell.optimizer).method else [self._pilot_of(cell)]
                if {job.key for job in needed} <= known:
                    yield Job("tune", cell.task, request, cell, number)
        for name, task in m.tasks.items():
            for request, (cell, numbers) in itertools.product(task.report, tuned.items()):
                for number in numbers if cell.task == name else ():
                    yield Job("report", name, request, cell, number)
        if tuned and m.attacks:
            yield from self._attacks(lines, tuned, known)

    def _attacks(self, lines: list[Line], tuned: Mapping[Cell, list[int]], known: set[str]) -> Iterator[Job]:
        """Yield the attacks on references, and on each side's best of the squares whose reports are done."""
        m = self.matrix
        for name, task in m.tasks.items():
            if not any(cell.task == name for cell in tuned):
                continue
            for request, which in itertools.product(task.report, ("before", "gold")):
                yield Job("attack", name, request, which=which)
            for objective in m.objective_names:
                cells = {c: n for c, n in tuned.items() if (c.task, c.objective) == (name, objective) and n}
                reports = [Job("report", name, r, c, i).key for r in task.report for c, n in cells.items() for i in n]
                reports += [Job("reference", name, r, which=w).key for r in task.report for w in ("before", "gold")]
                if cells and known.issuperset(reports):
                    first = {c: choose(lines, c, task.tune, *m.sizes(c.optimizer)) or [] for c in cells}
                    best = sides(lines, first, {e.name: e.order for e in m.optimizers}, task.report)
                    for request, (cell, number) in itertools.product(task.report, best.values()):
                        yield Job("attack", name, request, cell, number)

    def _pilot_of(self, cell: Cell) -> Job:
        return Job("pilot", cell.task, self.matrix.tasks[cell.task].tune[0], cell)

    def _chosen(self, lines: list[Line], cell: Cell) -> list[int] | None:
        """Return the trials that go on to report requests: those that either utility would choose."""
        tune = self.matrix.tasks[cell.task].tune
        sizes = self.matrix.sizes(cell.optimizer)
        found: set[int] = set()
        for relative in (False, True):
            numbers = choose(lines, cell, tune, *sizes, relative=relative)
            if numbers is None:
                return None
            found |= set(numbers)
        return sorted(found)

    def work(self, tick: Tick, *, phases: tuple[str, ...] = (), seconds: float = float("inf")) -> int:
        """Do what is not done and not claimed by another worker, until there is nothing left or time is up.

        Args:
            tick: Called with (what, done, of).
            phases: Kinds of jobs to do; all where empty.
            seconds: No job begins later than this.

        Returns:
            Jobs done.

        Raises:
            ValueError: A model or data of a request to come cannot be found; or as the jobs do.
        """
        self._check_sources(phases)
        self._check_record()
        began, done = time.perf_counter(), 0
        elsewhere: set[str] = set()
        while time.perf_counter() - began < seconds:
            known = {line["key"] for line in self.book.lines()}
            waiting = [j for j in self.jobs() if j.key not in known and (not phases or j.kind in phases)]
            job = next((j for j in waiting if j.key not in elsewhere), None)
            if job is None and not waiting:
                break
            if job is None:  # another worker is at what is left, and may leave it, or something that follows from it
                elsewhere.clear()
                time.sleep(_PATIENCE)
                continue
            with self.book.claim(job.key) as ours:
                if not ours:
                    elsewhere.add(job.key)
                elif job.key not in {line["key"] for line in self.book.lines()}:
                    self.book.append({"key": job.key, **self._do(job, tick)})
                    done += 1
        return done

    def take_over(self, folder: Path) -> tuple[int, int]:
        """Copy what another contest tuned, so that its choices are judged here, by other requests or fewer sides.

        Taken are the pilots, the trials and the references of tuning requests that this matrix has too, each checked to
        be what would be run here; reports are not, since they are what this contest is for. Trials that the other one
        does not have are run here.

        Args:
            folder: The other contest's.

        Returns:
            How many lines were copied, and how many of these are of before lines said what they were run with, which
            nothing can check; those that are here already are not copied again.

        Raises:
            ValueError: There is no such contest, or its trials are not what this matrix's would be.
        """
        file = folder / "trials.jsonl"
        if not file.is_file() or not (folder / "matrix.yaml").is_file():
            raise ValueError(f"{folder} is no contest's folder, which has a trials.jsonl and a matrix.yaml")
        check_same(folder / "matrix.yaml", self.matrix, "its trials cannot be taken over")
        theirs = {line["key"]: line for line in read_lines(file) if line["kind"] in ("pilot", "tune", "reference")}
        tuning = {(name, request) for name, task in self.matrix.tasks.items() for request in task.tune}
        taken = unsaid = 0
        while True:  # trials are jobs once their pilots and references are here
            known = {line["key"] for line in self.book.lines()}
            new = [j for j in self.jobs() if j.key in theirs and j.key not in known and (j.task, j.request) in tuning]
            if not new:
                return taken, unsaid
            for job in new:
                check_line(file, theirs[job.key], self._identity(job), "it cannot be taken over")
                self.book.append(theirs[job.key])
            taken += len(new)
            unsaid += sum("of" not in theirs[job.key] for job in new)

    def _check_sources(self, phases: tuple[str, ...]) -> None:
        """Find out before the first job what the last one would miss, hours later."""
        known = {line["key"] for line in self.book.lines()}
        late = not phases or {"report", "attack"} & set(phases)
        for name, task in self.matrix.tasks.items():
            for request in [*task.tune, *(task.report if late else [])]:
                attacked = self.matrix.attacks and request in task.report
                gold = attacked or Job("reference", name, request, which="gold").key not in known
                for source in ("model", "gold") if gold else ("model",):
                    path = task.source(source, request)
                    try:
                        resolve(path)
                    except ValueError as error:
                        raise ValueError(f"tasks.{name}.{source} of {request}: {error}") from error
                self._sets_of(Job("reference", name, request))

    def _check_record(self) -> None:
        """Make sure that what is on record is what would be run now, as far as both say what they are.

        Raises:
            ValueError: A run had other settings, other data, or another model at the same path.
        """
        lines = {line["key"]: line for line in self.book.lines() if "of" in line}
        for job in self.jobs():
            if job.key in lines:
                remedy = "choose another --out, or give the entry another label"
                check_line(self.book.file, lines[job.key], self._identity(job), remedy)

    def _identity(self, job: Job) -> Line:
        """Return what a job is of: a measurement, the weights; a run, its settings and its data besides."""
        which = "gold" if job.which == "gold" else "model"
        path = self.matrix.tasks[job.task].source(which, job.request)
        if path not in self._weights:
            files = {name: mark["sha256"] for name, mark in of_model(path).items()}
            digest = hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=8).hexdigest()
            self._weights[path] = {"weights": digest} if files else {}  # of a hub's model, or one that is gone, none
        return {**(self.run_of(job).identity() if job.cell else {}), **self._weights[path]}

    def left(self) -> int:
        """Return how many of the jobs known by now are not done."""
        known = {line["key"] for line in self.book.lines()}
        return sum(job.key not in known for job in self.jobs())

    def _do(self, job: Job, tick: Tick) -> Line:
        m, task = self.matrix, self.matrix.tasks[job.task]
        head: Line = {"kind": job.kind, "task": job.task, "request": job.request, "of": self._identity(job)}
        title = job.key.replace("/", " ")
        if job.cell is None:
            sets = self._sets_of(job)
            path = task.source("model" if job.which == "before" else "gold", job.request)
            tick(title, 0, 1)
            if job.kind == "attack":
                attacked = measured_under(m.attackers, path, sets, m.training, m.evaluation)
                found: dict[str, Any] = {"attacked": attacked}
            else:
                found = measured(path, sets, m.training, m.evaluation)
            tick(title, 1, 1)
            return {**head, "which": job.which, **found}
        run = self.run_of(job)
        stop = self._stopper(job) if job.kind == "tune" else never
        line = do(run, lambda _what, d, n: tick(title, d, n), stop)
        where = {"objective": job.cell.objective, "optimizer": job.cell.optimizer}
        settings = self._settings(job)
        if job.kind == "pilot":
            assert run.optimizer is not None
            if not line["update_rms"]:
                raise ValueError(f"{title}: the default rate moves nothing, or loses the model; give the entry an lr")
            centre = run.optimizer.lr * m.budget.update_rms / line["update_rms"]
            return {**head, **where, "lr": run.optimizer.lr, "centre": centre, **line}
        return {**head, **where, "point": job.point, "settings": settings, **line}

    def _sets_of(self, job: Job) -> Sets:
        key = job.task, job.request
        if key not in self._sets:
            self._sets[key] = load_sets(self.matrix.tasks[job.task], job.request)
        return self._sets[key]

    def _settings(self, job: Job) -> dict[str, float]:
        assert job.cell is not None
        if job.kind == "pilot":
            return {"retain_weight": 1.0}
        m, entry = self.matrix, self.matrix.entry(job.cell.optimizer)
        if entry.method:
            return m.settings(entry.name, job.point, math.nan)
        centre = self._pilot(job)["centre"]
        if entry.match == "run":
            centre *= m.training.max_steps / entry.steps
        return m.settings(entry.name, job.point, centre)

    def _pilot(self, job: Job) -> Line:
        assert job.cell is not None
        key = self._pilot_of(job.cell).key
        return next(line for line in self.book.lines() if line["key"] == key)

    def run_of(self, job: Job) -> Run:
        """Return what a job of a cell does."""
        assert job.cell is not None
        m, settings, sets = self.matrix, self._settings(job), self._sets_of(job)
        entry = m.entry(job.cell.optimizer)
        optimizer = None if entry.method else entry.spec(settings)
        combine = "projected" if entry.projected else m.training.combine
        training = dataclasses.replace(m.training, save_steps=0, seed=m.seed + entry.reseed, combine=combine)
        checkpoints: list[int] = []
        if job.kind == "pilot":  # at the full rate from the first step
            found = optimizer.settings() if optimizer else {}
            steps = m.budget.pilot_steps * int(found.get("every", 1))  # whole moves
            training = dataclasses.replace(training, max_steps=steps, warmup=0.0, schedule="constant")
            if isinstance(optimizer, CurvatureOptimizerSpec):  # what curvature costs where there is none yet
                apart = dataclasses.replace(optimizer.curvature, cache=False)
                optimizer = dataclasses.replace(optimizer, curvature=apart)
        else:
            if not entry.method:
                steps = entry.steps or m.steps(self._pilot(job), optimizer)
                training = dataclasses.replace(training, max_steps=steps)
            checkpoints = m.checkpoints(training.max_steps)
            if job.kind == "attack":
                checkpoints = checkpoints[-1:]
        return Run(
            m.tasks[job.task],
            job.request,
            sets,
            entry,
            m.objective(job.cell.objective, settings),
            optimizer,
            training,
            m.evaluation,
            checkpoints,
            m.budget.interpolate if job.kind == "report" else (),
            full=job.kind in ("report", "attack"),
            attacks=m.attackers if job.kind == "attack" else {},
            method=entry.do(settings) if entry.method else None,
        )

    def _stopper(self, job: Job) -> Any:
        """Return the rule by which a trial ends at its first checkpoint: out of the judged area, or behind another."""
        assert job.cell is not None
        lines = self.book.lines()
        references = references_of(lines, job.task, job.request, full=False)
        rivals = [
            point(line["measures"][0]["values"], references, full=False)
            for line in runs_of(lines, job.cell, "tune", job.request)
            if line["measures"]
        ]
        least_f, least_u = self.matrix.budget.ahead

        def stop(values: Values) -> str:
            f, u = point(values, references, full=False)
            if u < FLOOR:
                return "diverged"
            if any(rf >= f + least_f and ru >= u + least_u for rf, ru in rivals):
                return "dominated"
            return ""

        return stop
