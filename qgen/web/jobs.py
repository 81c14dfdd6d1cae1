"""Jobs: everything that takes time has an id, a place in a queue, a state that outlives a page reload, and a way to be cancelled.

    waiting ─► running ─► done | failed | cancelled          one folder per job: job.json, and what it made

Jobs of one lane run one after the other, first come, first served; lanes run side by side. A lane refuses what it cannot take on. A job is
known by an id that cannot be guessed, so whoever has the id may look at the job, cancel it and use its result. States are also written to
disk: after a restart of the server results are still there, and what was running then is said to be lost.
"""

__all__ = ["Cancelled", "Full", "Job", "Jobs"]

import asyncio
import collections
import json
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qgen.errors import QgenError
from qgen.web.errors import plain

log = logging.getLogger("qgen")

OPEN = ("waiting", "running")
_ID = re.compile(r"[0-9a-f]{16}")
_KEEP_IN_MEMORY, _KEEP_ON_DISK = 200, 400
_LOG_LINES = 400


class Cancelled(Exception):
    """Raised inside a job that somebody cancelled."""


class Full(QgenError):
    """A lane has as many jobs waiting as it takes."""


@dataclass(eq=False)
class Job:
    """One piece of work. done and total: progress of what `doing` names. version grows with every change that is worth showing."""

    id: str
    kind: str
    asked: dict[str, Any]
    folder: Path
    state: str = "waiting"
    made: float = field(default_factory=time.time)
    doing: str = ""
    done: float = 0
    total: float = 0
    log: collections.deque = field(default_factory=lambda: collections.deque(maxlen=_LOG_LINES))
    live: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    version: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def step(self, doing: str, done: float = 0, total: float = 0) -> None:
        """Says what is going on; raises Cancelled if somebody asked for that."""
        self.doing, self.done, self.total = doing, done, total
        self.version += 1
        if self.stop.is_set():
            raise Cancelled

    def say(self, line: str) -> None:
        self.log.append(f"{time.strftime('%H:%M:%S')}  {line}")
        self.version += 1

    def show(self, **live: Any) -> None:
        """Intermediate results, by name, for whoever watches."""
        self.live |= live
        self.version += 1

    def facts(self) -> dict[str, Any]:
        """What the disk and the API know of a job."""
        return {
            "id": self.id, "kind": self.kind, "state": self.state, "made": self.made, "doing": self.doing, "done": self.done,
            "total": self.total, "error": self.error, "asked": self.asked, "result": self.result, "log": list(self.log),
        }  # fmt: skip


class Jobs:
    """All jobs of a server, under one folder. most: how many may wait, per kind of lane ("draw", "heavy")."""

    def __init__(self, folder: str | Path, most: dict[str, int] | None = None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.most = {"draw": 64, "heavy": 8} | (most or {})
        self._jobs: dict[str, Job] = {}
        self._lanes: dict[str, _Lane] = {}
        self._lock = threading.RLock()
        self._prune()

    def submit(self, lane: str, kind: str, asked: dict[str, Any], run: Callable[[Job], None]) -> Job:
        """Puts a job at the end of a lane ("heavy", or "draw:" and a model). Full if too many wait there.

        run fills `job.result`, calls `job.step` often, and raises what goes wrong.
        """
        most = self.most[lane.partition(":")[0]]
        with self._lock:
            queue = self._lanes.setdefault(lane, _Lane(lane, self._lock, self._ended))
            if len(queue.waiting) >= most:
                raise Full(f"The queue is full: {most} jobs are waiting. Try again in a minute.")
            name = secrets.token_hex(8)
            job = Job(name, kind, asked, self.folder / name)
            job.folder.mkdir()
            self._jobs[name] = job
            self._write(job)
            queue.add(job, run)
        return job

    def get(self, name: Any) -> Job | None:
        """The job of this id, from memory or, as it ended, from disk; None if there is none."""
        if not isinstance(name, str) or not _ID.fullmatch(name):
            return None
        with self._lock:
            return self._jobs.get(name) or self._read(name)

    def cancel(self, name: Any) -> Job | None:
        """A waiting job gives up its place at once; a running one at its next step. None if there is no such job."""
        job = self.get(name)
        if job is None or job.state not in OPEN:
            return job
        with self._lock:
            job.stop.set()
            for lane in self._lanes.values():
                if lane.drop(job):
                    job.state = "cancelled"
                    self._ended(job)
        return job

    def ahead(self, job: Job) -> int:
        """How many jobs come before this one."""
        with self._lock:
            return next((lane.ahead(job) for lane in self._lanes.values() if job in lane.waiting), 0)

    async def watch(self, job: Job, every: float = 0.12) -> AsyncIterator[Job]:
        """Yields the job whenever it changed, the last time when it has ended. Takes no thread while it waits."""
        seen = None
        while True:
            closed = job.state not in OPEN
            now = (job.version, job.state, self.ahead(job) if job.state == "waiting" else 0)
            if now != seen or closed:
                seen = now
                yield job
            if closed:
                return
            await asyncio.sleep(every)

    def close(self) -> None:
        """Cancels everything; for the end of the server."""
        for job in list(self._jobs.values()):
            self.cancel(job.id)

    def _ended(self, job: Job) -> None:
        """Written down, and old jobs forgotten: results stay on disk, memory stays small."""
        job.version += 1
        self._write(job)
        with self._lock:
            closed = [name for name, other in self._jobs.items() if other.state not in OPEN]
            for name in closed[: max(0, len(closed) - _KEEP_IN_MEMORY)]:
                del self._jobs[name]
        self._prune()

    def _write(self, job: Job) -> None:
        text = json.dumps(job.facts(), ensure_ascii=False)
        temporary = job.folder / "job.tmp"
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(job.folder / "job.json")
        except OSError as error:
            log.warning("job %s is not on disk: %s", job.id, error)

    def _read(self, name: str) -> Job | None:
        try:
            facts = json.loads((self.folder / name / "job.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        job = Job(name, facts["kind"], facts["asked"], self.folder / name, facts["state"], facts["made"])
        job.doing, job.result, job.error = facts["doing"], facts["result"], facts["error"]
        job.log.extend(facts["log"])
        if job.state in OPEN:
            job.state, job.error = "failed", "The server was restarted while this job ran. Start it again."
        return job

    def _prune(self) -> None:
        """Only the newest folders stay; open jobs always do."""
        with self._lock:
            folders = [path for path in self.folder.iterdir() if _ID.fullmatch(path.name)]
            if len(folders) <= _KEEP_ON_DISK:
                return
            folders.sort(key=lambda path: path.stat().st_mtime)
            for path in folders[: len(folders) - _KEEP_ON_DISK]:
                job = self._jobs.get(path.name)
                if job is None or job.state not in OPEN:
                    self._jobs.pop(path.name, None)
                    shutil.rmtree(path, ignore_errors=True)


class _Lane:
    """Jobs that run one after the other, in a thread that lives as long as there are some."""

    def __init__(self, name: str, lock: threading.RLock, ended: Callable[[Job], None]):
        self.name, self.ended = name, ended
        self.lock = lock
        self.waiting: dict[Job, Callable[[Job], None]] = {}
        self.thread: threading.Thread | None = None

    def add(self, job: Job, run: Callable[[Job], None]) -> None:
        self.waiting[job] = run
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name=f"qgen {self.name}", daemon=True)
            self.thread.start()

    def drop(self, job: Job) -> bool:
        return self.waiting.pop(job, None) is not None

    def ahead(self, job: Job) -> int:
        """Those before it that wait, and the one that runs."""
        return list(self.waiting).index(job) + 1

    def _work(self) -> None:
        while True:
            with self.lock:
                if not self.waiting:
                    self.thread = None
                    return
                job = next(iter(self.waiting))
                run = self.waiting.pop(job)
                job.state = "running"
                job.version += 1
            try:
                run(job)
                state = "done"
            except Cancelled:
                state = "cancelled"
            except BaseException as error:  # whatever it was, the lane goes on with the next job
                job.error, state = plain(error), "failed"
            with self.lock:
                job.state = state
                self.ended(job)
